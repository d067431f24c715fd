"""`python -m benchmarks.streams`: latency of a sidecar that tells very many peers what it takes.

One sidecar is asked at a steady rate for keys of a shared rule, and has as many live streams as asked for. Their other
ends are all in one process: each is a node of its own, which acknowledges what it is told, answers pings, and says
nothing else. It gets a processor only while nobody else wants one (sched(7), SCHED_IDLE): the peers would be on other
machines. The base is the same without streams.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import click
import grpc.aio

from benchmarks.mesh_size import answer_of_peer
from benchmarks.serving.generator import Generator, each, uniform
from benchmarks.serving.h2load import Load
from benchmarks.serving.observed_sidecar import Observed, observed_sidecar, print_longest_stalls
from benchmarks.serving.requests import RULES
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import running_servers, wait_until
from ratelimit_sidecar.demo.ports import HOST
from ratelimit_sidecar.replication.stream_io import METHOD, OPTIONS
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import PROTOCOL

KEYS = 10_000
SETTLE_SECONDS = 1.0


async def be_peer(address: str, name: str) -> None:
    """Be a node that says nothing by itself."""
    options = (*OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = channel.stream_stream(METHOD)()
        await call.write(pb.Frame(hello=pb.Hello(protocol=PROTOCOL, node=name, incarnation=1)).SerializeToString())
        await call.write(pb.Frame(status=pb.Status(reaches=["sidecar"], joined=True)).SerializeToString())
        while (raw := await call.read()) is not grpc.aio.EOF:
            frame = pb.Frame.FromString(raw)
            # Its clock agrees with that of the sidecar.
            answer = answer_of_peer(frame, frame.ping.sent_us)
            if answer is not None:
                await call.write(answer.SerializeToString())


async def be_peers(address: str, peers: int) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number in range(peers):
            tasks.create_task(be_peer(address, f"peer-{number}"))


def measure(sidecar: Observed, generator: Generator, per_second: float, seconds: float) -> Figures:
    """One round."""
    body = uniform(KEYS)
    generator.run(body, SETTLE_SECONDS, per_second)
    sent = sum(sidecar.server.metric("crdt_batches_sent_total"))
    figures = sidecar.measure(generator, body, per_second, seconds)
    return {**figures, "batches/s": (sum(sidecar.server.metric("crdt_batches_sent_total")) - sent) / seconds}


@click.command()
@round_options(rounds=7, seconds=3.0)
@click.option("--streams", default=200, show_default=True, type=click.IntRange(1))
@click.option("--asked", default=2_000.0, show_default=True, help="Requests a second, each for one bucket.")
@click.option("--be-peers-of", hidden=True)
def main(*, rounds: int, seconds: float, as_json: bool, streams: int, asked: float, be_peers_of: str | None) -> None:
    """Measure the latency of a sidecar with many live streams beside one without."""
    if be_peers_of is not None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        asyncio.run(be_peers(be_peers_of, streams))
        return
    with running_servers() as servers, ExitStack() as stack:
        ports = servers.ports()
        alone = observed_sidecar(servers, "alone", rules=RULES)
        crowd = observed_sidecar(servers, "crowd", ports=ports, rules=RULES)
        command = [sys.executable, "-m", "benchmarks.streams", "--streams", str(streams)]
        servers.run("peers", [*command, "--be-peers-of", f"{HOST}:{ports.sync}"], address="")
        wait_until(lambda: sum(crowd.server.metric("crdt_peer_connected")) == streams)
        variants: dict[str, Callable[[], Figures]] = {}
        for name, sidecar in (("no streams", alone), (f"{streams} streams", crowd)):
            generator = stack.enter_context(Generator(sidecar.server.address, Load(2, 1_000)))
            generator.run(each(KEYS), None)
            variants[name] = partial(measure, sidecar, generator, asked, seconds)
        results = alternate(f"{asked:,.0f} requests/s", variants, rounds)
    print_results(results, as_json=as_json)
    if not as_json:
        print_longest_stalls(results)


if __name__ == "__main__":
    main()
