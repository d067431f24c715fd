"""`python -m benchmarks.crowded`: what replication gets of an event loop that requests keep busy.

One node of a mesh, in this process, and peers that talk to it over calls in memory. Each turn of the loop is made to
take a while, as requests do; the shortest turns are the base. Meanwhile the node takes from a thousand buckets a
second, and each peer tells of some that it took from. Measured are the time from a take until all peers were sent it,
from a peer's deltas to their acknowledgement, from a ping to its pong, and how much of the loop's time was not spent in
the turns that were made long: what replication had of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import cycle
from math import inf

import click

from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from ratelimit_sidecar import __version__
from ratelimit_sidecar.clock import Clock
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.key import KEY_ONLY, TOKEN_BUCKET, KeyEntry, encode_bucket_key
from ratelimit_sidecar.replication.deltas import DeltasWriter
from ratelimit_sidecar.replication.key_ids import KeyIdsReceived, KeyMemory
from ratelimit_sidecar.replication.mesh import Mesh
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import PROTOCOL

TURNS_MS = (0.1, 1.0, 3.0, 10.0)
NODE = "node"
PEERS = tuple(f"peer-{number}" for number in range(5))
KEYS = 10_000
TAKEN_PER_SECOND = 1_000
TOLD_PER_SECOND = 200
"""By each peer."""

TELL_SECONDS = 0.02
PING_SECONDS = 0.1
RULES_DIGEST = 1
LIMIT = TokenBucketLimit(1_000, 1_000_000, 1_000)


def percentile_ms(nanoseconds: list[int], percent: int) -> float:
    """Infinite when nothing has arrived."""
    ordered = sorted(nanoseconds)
    return ordered[len(ordered) * percent // 100] / 1e6 if ordered else inf


class Taking:
    """Takes from the node's buckets in turn, and notes when."""

    def __init__(self, store: Store, keys: list[bytes], now_us: Callable[[], int]) -> None:
        self._store = store
        self._keys = cycle(keys)
        self._now_us = now_us
        self._due_ns = time.monotonic_ns()
        self.at_ns: dict[bytes, int] = {}
        self.awaited: dict[bytes, int] = {}
        """By how many peers, of those taken from."""
        self.delays_ns: list[int] = []

    def take(self) -> None:
        """What is due by now."""
        now_ns, now_us = time.monotonic_ns(), self._now_us()
        while self._due_ns <= now_ns:
            self._due_ns += 1_000_000_000 // TAKEN_PER_SECOND
            key = next(self._keys)
            self._store.bucket(key, LIMIT, now_us).take(1, now_us)
            self.at_ns.setdefault(key, now_ns)
            self.awaited[key] = len(PEERS)

    def arrived(self, key: bytes) -> None:
        """At one more peer."""
        left = self.awaited.get(key, 0)
        if left > 1:
            self.awaited[key] = left - 1
        elif left == 1:
            del self.awaited[key]
            self.delays_ns.append(time.monotonic_ns() - self.at_ns.pop(key))


class MemoryPeer:
    """The far end of a call: acknowledges what it is told, tells of takes of its own, and pings."""

    def __init__(self, name: str, keys: list[bytes], taking: Taking, now_us: Callable[[], int]) -> None:
        self.origin = Origin(name, 1)
        self._store = Store(self.origin, lambda _key: LIMIT)
        self._keys = cycle(keys)
        self._taking = taking
        self._now_us = now_us
        self._key_ids = KeyIdsReceived(KeyMemory(), "")
        self._said: asyncio.Queue[bytes] = asyncio.Queue()
        self._sent_ns: deque[int] = deque()
        self._pinged_ns: deque[int] = deque()
        self.has_heard_all = asyncio.Event()
        self.acknowledged_ns: list[int] = []
        self.answered_ns: list[int] = []
        self._sequence = 0
        hello = pb.Hello(protocol=PROTOCOL, node=name, region=name, incarnation=1, version=__version__)
        self._say(pb.Frame(hello=hello))
        # It hears from all others itself, so the node has nothing to pass on.
        status = pb.Status(reaches=[NODE, *PEERS], rules=RULES_DIGEST, joined=True, sync_request=pb.EVERYTHING)
        self._say(pb.Frame(status=status))
        self._say_deltas(pb.Deltas(ends_full_state=True))

    async def read(self) -> bytes:
        return await self._said.get()

    async def write(self, message: bytes, /) -> None:
        frame = pb.Frame.FromString(message)
        match frame.WhichOneof("kind"):
            case "deltas":
                if frame.deltas.acknowledged:
                    self._acknowledged(frame.deltas.acknowledged, frame.deltas.ack_delay_ms)
                self._receive(frame.deltas)
            case "ack":
                self._acknowledged(frame.ack.sequence, 0)
            case "ping":
                now_us = self._now_us()
                self._say(pb.Frame(pong=pb.Pong(id=frame.ping.id, received_us=now_us, sent_us=now_us)))
            case "pong":
                self.answered_ns.append(time.monotonic_ns() - self._pinged_ns.popleft())

    def _acknowledged(self, sequence: int, delay_ms: int) -> None:
        applied_ns = time.monotonic_ns() - 1_000_000 * delay_ms
        for _ in range(sequence - (self._sequence - len(self._sent_ns))):
            self.acknowledged_ns.append(applied_ns - self._sent_ns.popleft())

    def _receive(self, deltas: pb.Deltas) -> None:
        for delta in deltas.buckets:
            if delta.key and delta.number:
                self._key_ids.receive(delta.number, delta.key)
            self._taking.arrived(delta.key or self._key_ids.key(delta.number))
        if deltas.ends_full_state:
            self.has_heard_all.set()
        self._say(pb.Frame(ack=pb.Ack(sequence=deltas.sequence)))

    async def tell(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(TELL_SECONDS)
            now_us = self._now_us()
            for _ in range(int(TOLD_PER_SECOND * TELL_SECONDS)):
                self._store.bucket(next(self._keys), LIMIT, now_us).take(1, now_us)
            writer = DeltasWriter(self.origin)
            for bucket, slots in self._store.drain_changes():
                writer.add(bucket, None, list(bucket.own_entries(slots)))
            self._say_deltas(writer.deltas)

    async def ping(self) -> None:
        """Until cancelled."""
        number = 0
        while True:
            await asyncio.sleep(PING_SECONDS)
            # A ping that comes before another is answered takes its answer.
            if not self._pinged_ns:
                number += 1
                self._pinged_ns.append(time.monotonic_ns())
                self._say(pb.Frame(ping=pb.Ping(id=number)))

    def forget(self) -> None:
        """What was measured so far."""
        self.acknowledged_ns.clear()
        self.answered_ns.clear()

    def _say(self, frame: pb.Frame) -> None:
        self._said.put_nowait(frame.SerializeToString())

    def _say_deltas(self, deltas: pb.Deltas) -> None:
        self._sequence += 1
        deltas.sequence = self._sequence
        self._sent_ns.append(time.monotonic_ns())
        self._say(pb.Frame(deltas=deltas))


class Crowd:
    """Makes each turn of the loop take a while."""

    def __init__(self, turn_ms: float, work: Callable[[], None]) -> None:
        self._turn_ns = int(turn_ms * 1e6)
        self._work = work
        self._is_over = False
        self._loop = asyncio.get_running_loop()
        self.taken_ns = 0

    def begin(self) -> None:
        if self._is_over:
            return
        began_ns = time.monotonic_ns()
        self._work()
        while (took_ns := time.monotonic_ns() - began_ns) < self._turn_ns:
            pass
        self.taken_ns += took_ns
        self._loop.call_soon(self.begin)

    def end(self) -> None:
        self._is_over = True


async def crowded(turn_ms: float, seconds: float) -> Figures:
    """One round."""
    clock = Clock()
    keys = [
        encode_bucket_key(TOKEN_BUCKET, "api", [KeyEntry(KEY_ONLY, "user", f"user-{number}")]) for number in range(KEYS)
    ]
    origin = Origin(NODE, 1)
    store = Store(origin, lambda _key: LIMIT)
    mesh = Mesh(origin=origin, region=NODE, version=__version__, store=store, now_us=clock.now_us)
    mesh.use_rules(RULES_DIGEST)
    for key in keys:
        store.bucket(key, LIMIT, clock.now_us())
    taking = Taking(store, keys, clock.now_us)
    peers = [MemoryPeer(name, keys[first :: len(PEERS)], taking, clock.now_us) for first, name in enumerate(PEERS)]
    crowd = Crowd(turn_ms, taking.take)
    running: list[asyncio.Task[object]] = [asyncio.create_task(mesh.run())]
    running += [
        asyncio.create_task(mesh._open_streams.run(peer, peer.origin.node, None, None, mesh._dialler)) for peer in peers
    ]
    try:
        async with asyncio.timeout(60):
            for peer in peers:
                await peer.has_heard_all.wait()
        running += [asyncio.create_task(each) for peer in peers for each in (peer.tell(), peer.ping())]
        crowd.begin()
        await asyncio.sleep(seconds / 2)
        taking.delays_ns.clear()
        for peer in peers:
            peer.forget()
        began_ns, taken_ns = time.monotonic_ns(), crowd.taken_ns
        await asyncio.sleep(seconds)
        elapsed_ns, taken_ns = time.monotonic_ns() - began_ns, crowd.taken_ns - taken_ns
    finally:
        crowd.end()
        for task in running:
            task.cancel()
        for task in running:
            with suppress(asyncio.CancelledError):
                await task
    acknowledged_ns = [each for peer in peers for each in peer.acknowledged_ns]
    answered_ns = [each for peer in peers for each in peer.answered_ns]
    return {
        "told p50 ms": percentile_ms(taking.delays_ns, 50),
        "told p99 ms": percentile_ms(taking.delays_ns, 99),
        "heard p99 ms": percentile_ms(acknowledged_ns, 99),
        "pong p99 ms": percentile_ms(answered_ns, 99),
        "rest of loop %": 100 * (1 - taken_ns / elapsed_ns),
    }


@click.command()
@round_options(rounds=3, seconds=4.0)
def main(rounds: int, seconds: float, as_json: bool) -> None:
    """Measure how late replication is when each turn of the event loop takes a while."""

    def of_turns(turn_ms: float) -> Figures:
        return asyncio.run(crowded(turn_ms, seconds))

    variants = {f"turns of {turn_ms:g} ms": partial(of_turns, turn_ms) for turn_ms in TURNS_MS}
    print_results(alternate(f"{len(PEERS)} peers", variants, rounds), as_json=as_json)


if __name__ == "__main__":
    main()
