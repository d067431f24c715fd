"""A hostile member on the mesh: what it says of others, how many it pretends to be, and how much it sends."""

from __future__ import annotations

from contextlib import suppress

import grpc
import grpc.aio
import pytest
from joined import join
from replication.builders import NOW_US, PER_USER, RULES, SECOND_US, flush, frame, key_of, take
from replication.meshes import address_of, sidecar
from replication.test_replicator import connected, exchange, hello, replicator, stream_of

from ratelimit_sidecar.crdt.bucket import Base, Entry, Origin
from ratelimit_sidecar.crdt.limit import MAX_AHEAD_US
from ratelimit_sidecar.crdt.slot import slot_id, slot_start_us
from ratelimit_sidecar.replication.deltas import PIECE_ENTRIES
from ratelimit_sidecar.replication.peers import MAX_DIALLED_IN, MAX_PEERS
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.stream_io import METHOD
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import MAX_FRAME_BYTES, Reason, read_reaches
from simulation.cluster import Cluster
from simulation.steps import receive

SLOT = slot_id(NOW_US, PER_USER.exponent)
"""The slot of now."""


def deltas(sequence: int, slot: int, tokens: int, origin: Origin | None = None, key: bytes = key_of("ann")) -> bytes:
    """One slot of one bucket: the sender's own, or said to be another's."""
    exponent = slot & 63
    run = pb.SlotRun(
        origin=0 if origin is None else 1, exponent=exponent, slots=[slot_start_us(slot) >> exponent], tokens=[tokens]
    )
    origins = [] if origin is None else [pb.Origin(node=origin.node, incarnation=origin.incarnation)]
    return frame(deltas=pb.Deltas(sequence=sequence, origins=origins, buckets=[pb.BucketDelta(key=key, runs=[run])]))


def test_what_is_refused_is_counted_with_the_peer_that_said_it() -> None:
    a = replicator("a")
    honest, hostile = stream_of(a), stream_of(a)
    receive(honest, hello("b"), NOW_US)
    receive(hostile, hello("evil"), NOW_US)
    take(a.store, "ann", 1, NOW_US)
    receive(honest, deltas(1, SLOT, 1), NOW_US)
    receive(hostile, deltas(1, slot_id(NOW_US + 60 * SECOND_US, PER_USER.exponent), 1), NOW_US)
    receive(hostile, deltas(2, slot_id(NOW_US, 45), 1), NOW_US)
    receive(hostile, deltas(3, SLOT, 1_000, origin=a.local.origin), NOW_US)
    assert a.peers["b"].status(NOW_US, 0).refused == {}
    refused = a.peers["evil"].status(NOW_US, 0).refused
    assert refused["ahead"] == refused["own"] == 1
    assert hostile.error is None


@pytest.mark.parametrize(("is_proven", "believed"), [(True, 3), (False, 500)])
def test_only_who_is_known_to_be_the_origin_can_lower_what_it_has_taken(is_proven: bool, believed: int) -> None:
    a = replicator("a")
    stream = Stream(a, "far end", is_dialled=False, wake=lambda: None, now_us=NOW_US, is_proven=is_proven)
    receive(stream, hello("b", 7), NOW_US)
    origin = Origin("b", 7)
    join(a.store, key_of("ann"), None, [Entry(origin, SLOT, 500)], NOW_US)
    receive(stream, deltas(1, SLOT, 3), NOW_US + 10 * SECOND_US)
    bucket = a.store.get(key_of("ann"))
    assert bucket is not None
    assert bucket.taken == {origin: {SLOT: believed}}


def test_what_comes_late_on_an_older_stream_corrects_nothing() -> None:
    a = replicator("a")
    older, newer = (
        Stream(a, "far end", is_dialled=False, wake=lambda: None, now_us=NOW_US, is_proven=True) for _ in range(2)
    )
    for stream in (older, newer):
        receive(stream, hello("b", 7), NOW_US)
    receive(older, deltas(1, SLOT, 1), NOW_US)
    receive(newer, deltas(1, SLOT, 5), NOW_US)
    later_us = NOW_US + 10 * SECOND_US
    bucket = a.store.get(key_of("ann"))
    assert bucket is not None
    receive(older, deltas(2, SLOT, 3), later_us)
    assert bucket.taken == {Origin("b", 7): {SLOT: 5}}
    receive(newer, deltas(2, SLOT, 4), later_us)
    assert bucket.taken == {Origin("b", 7): {SLOT: 4}}


def test_replicas_that_differ_by_what_a_third_has_invented_are_healed_by_comparing() -> None:
    cluster = Cluster(3, "ab", RULES)
    cluster.network.is_proven = True
    cluster.run_until_settled()
    a, b = cluster["a"], cluster["b"]
    a.bucket("ann").take(3, a.now_us)
    cluster.run(SECOND_US)
    [slot] = a.bucket("ann").taken[a.origin]
    forged = [Entry(a.origin, slot, 500)]
    join(b.store, key_of("ann"), None, forged, b.now_us)
    assert b.bucket("ann").taken[a.origin] == {slot: 500}
    cluster.run(20 * SECOND_US)
    assert b.bucket("ann").taken == a.bucket("ann").taken == {a.origin: {slot: 3}}


def test_poison_is_gone_soon_although_restarted_nodes_learn_it_of_the_others_again() -> None:
    """All honest nodes are restarted one after another. What was said counts no longer than if none had been."""
    cluster = Cluster(5, "abc", RULES)
    cluster.run_until_settled()
    a = cluster["a"]
    poison = [
        Entry(Origin("evil", number), slot_id(a.now_us + ahead_us, exponent), 2**48)
        for number, ahead_us in enumerate((0, 5 * SECOND_US, 10 * SECOND_US, 60 * SECOND_US, 2**41), start=1)
        for exponent in (PER_USER.exponent, 31, 45)
    ]
    base = Base(a.now_us - 6 * SECOND_US, 2**63 * PER_USER.period_us)
    for each in cluster:
        join(each.store, key_of("ann"), base, poison, each.now_us)
    # Ahead, the debt ceiling, and a slot.
    gone_us = cluster.now_us + MAX_AHEAD_US + PER_USER.debt_ceiling // PER_USER.tokens + (2 << PER_USER.exponent)
    for name in "abc":
        cluster.crash(name)
        cluster.start(name)
        cluster.run(10 * SECOND_US)
    assert not cluster["a"].bucket("ann").take(1, cluster["a"].now_us)
    assert gone_us - cluster.now_us < 600 * SECOND_US
    cluster.run(gone_us - cluster.now_us)
    for each in cluster:
        assert each.bucket("ann").take(1, each.now_us)


def test_a_configured_peer_has_its_place_beside_as_many_invented_ones_as_there_may_be() -> None:
    a = replicator("a")
    for index in range(MAX_PEERS):
        receive(stream_of(a), hello(f"ghost {index}"), NOW_US)
    dialled = stream_of(a, is_dialled=True)
    receive(dialled, hello("b"), NOW_US)
    assert dialled.peer is a.peers["b"]
    one_more = stream_of(a)
    receive(one_more, hello("one more"), NOW_US)
    assert one_more.error is not None
    assert one_more.error.reason is Reason.TOO_MANY_PEERS


def test_a_node_that_came_by_itself_under_anothers_id_makes_way_for_the_one_at_the_configured_address() -> None:
    a, b = replicator("a"), replicator("b", 7)
    squatter = stream_of(a)
    receive(squatter, hello("b", 666), NOW_US)
    ours, theirs = stream_of(a, is_dialled=True), stream_of(b)
    exchange(ours, theirs)
    assert a.peers["b"].streams == [ours]
    assert a.peers["b"].incarnation == 7
    assert squatter.why_ended.startswith("duplicate_node")
    again = stream_of(a)
    receive(again, hello("b", 666), NOW_US)
    assert again.error is not None
    assert again.error.reason is Reason.DUPLICATE_NODE


def test_what_a_connected_peer_takes_is_heard_whoever_has_filled_the_bucket_with_invented_origins() -> None:
    a, b = replicator("a"), replicator("b")
    ours, theirs = connected(a, b)
    ghosts = [Entry(Origin("ghost", number), SLOT, 1) for number in range(1, 3_000)]
    join(a.store, key_of("ann"), None, ghosts, NOW_US)
    take(b.store, "ann", 5, NOW_US)
    flush(b, NOW_US)
    exchange(ours, theirs)
    bucket = a.store.get(key_of("ann"))
    assert bucket is not None
    assert bucket.taken[b.local.origin] == {SLOT: 5}
    ours.lost("gone", NOW_US)
    assert b.local.origin not in a.store.journal.peers


def test_a_bucket_of_thousands_of_entries_is_joined_in_steps() -> None:
    a = replicator("a")
    hostile = stream_of(a)
    receive(hostile, hello("evil"), NOW_US)
    numbers = [(slot_start_us(SLOT) >> PER_USER.exponent) - 6, *[1] * 6]
    runs = [
        pb.SlotRun(origin=origin, exponent=PER_USER.exponent, slots=numbers, tokens=[1] * 7) for origin in range(1_001)
    ]
    origins = [pb.Origin(node=f"ghost {number}", incarnation=1) for number in range(1_000)]
    told = pb.Deltas(sequence=1, origins=origins, buckets=[pb.BucketDelta(key=key_of("ann"), runs=runs)])
    steps = sum(1 for _ in hostile.receive_steps(frame(deltas=told), NOW_US))
    assert hostile.error is None
    assert steps >= 7 * 1_001 // PIECE_ENTRIES
    bucket = a.store.get(key_of("ann"))
    assert bucket is not None
    assert sum(len(slots) for slots in bucket.taken.values()) == 7 * 1_001


def test_a_peer_that_keeps_dialling_in_has_few_streams_and_loses_those_it_says_nothing_on() -> None:
    a = replicator("a")
    streams = [stream_of(a) for _ in range(MAX_DIALLED_IN + 2)]
    for stream in streams[:MAX_DIALLED_IN]:
        receive(stream, hello("b"), NOW_US)
    receive(streams[0], frame(ping=pb.Ping(id=1)), NOW_US + 1)
    for index, stream in enumerate(streams[MAX_DIALLED_IN:], start=2):
        receive(stream, hello("b"), NOW_US + index)
    assert [bool(stream.why_ended) for stream in streams] == [False, True, True, False, False]
    dialled = stream_of(a, is_dialled=True)
    receive(dialled, hello("b"), NOW_US + 10)
    assert len(a.peers["b"].streams) == MAX_DIALLED_IN + 1


def test_as_many_peers_as_there_may_be_are_told_of_each_other() -> None:
    """Each takes a status of some size only."""
    a = replicator("a")
    for index in range(MAX_PEERS):
        receive(stream_of(a), hello(f"ghost {index:03}"), NOW_US)
    for name in ("honest", "zealous"):
        receive(stream_of(a, is_dialled=True), hello(name), NOW_US)
    reaches = read_reaches(a.status(a.peers["honest"]))
    assert {"honest", "zealous"} <= reaches


async def test_a_frame_that_is_compressed_is_not_unpacked() -> None:
    async with sidecar("a") as a:
        gzip = grpc.Compression.Gzip
        async with grpc.aio.insecure_channel(address_of(a), compression=gzip) as channel:
            call = channel.stream_stream(METHOD)()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert "gzip" in str(refused.value.details())
        async with grpc.aio.insecure_channel(address_of(a), compression=gzip) as channel:
            call = channel.stream_stream(METHOD)()
            with suppress(grpc.aio.AioRpcError):
                await call.write(hello("evil", version="0" * (MAX_FRAME_BYTES // 2)))
            await call.code()
        assert a.peer("evil") is None
