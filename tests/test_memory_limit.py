"""How many buckets there may be where the memory is limited."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ratelimit_sidecar.config.sidecar_schema import FabricConfig, ListenConfig, SidecarConfig, SyncConfig
from ratelimit_sidecar.crdt.bucket import Entry, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.rules import Rule
from ratelimit_sidecar.memory_limit import (
    CALLS_SHARE,
    bytes_a_bucket,
    fewer_in_little_memory,
    less_in_little_memory,
    max_buckets,
    max_received_bytes,
    memory_limit_bytes,
    memory_to_fill,
    sliding_places,
)

MIB = 1_024 * 1_024
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
V1 = "sys/fs/cgroup/memory"
V2 = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        pytest.param("0::/", {f"{V2}/memory.max": "536870912\n"}, 512 * MIB, id="a container's own"),
        pytest.param("0::/a/b", {f"{V2}/a/b/memory.max": "max\n"}, MACHINE, id="none"),
        pytest.param(
            "0::/a/b", {f"{V2}/a/b/memory.max": "max\n", f"{V2}/a/memory.max": "1048576\n"}, MIB, id="of one around it"
        ),
        pytest.param("5:cpu:/x\n4:memory:/a\n0::/", {f"{V1}/a/memory.limit_in_bytes": "1048576\n"}, MIB, id="v1"),
        pytest.param(
            "4:hugetlb,memory:/docker/1",
            {f"{V1}/memory.limit_in_bytes": "1048576\n"},
            MIB,
            id="a container's own, v1",
        ),
        pytest.param("4:memory:/", {f"{V1}/memory.limit_in_bytes": "9223372036854771712\n"}, MACHINE, id="none, v1"),
        pytest.param("", {}, MACHINE, id="no cgroups"),
    ],
)
def test_the_least_limit_is_found(groups: str, files: dict[str, str], limit: int, tmp_path: Path) -> None:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit_bytes(tmp_path) == limit


def test_a_system_without_cgroups_has_the_memory_of_the_machine(tmp_path: Path) -> None:
    assert memory_limit_bytes(tmp_path) == MACHINE


EVENTUAL = SidecarConfig()
STRICT = SidecarConfig(sync=SyncConfig(members={"a": 1, "b": 1, "c": 1}))
MESH = SidecarConfig(listen=ListenConfig(sync="127.0.0.1:50051"))
FABRIC = SidecarConfig(fabric=FabricConfig(url="redis://redis.example"))


@pytest.mark.parametrize(("limit", "left"), [(64, 16), (128, 32), (256, 160), (512, 416), (4_096, 4_000)])
def test_the_process_takes_its_part_first(limit: int, left: int) -> None:
    assert memory_to_fill(limit * MIB) == left * MIB


@pytest.mark.parametrize("config", [EVENTUAL, STRICT, FABRIC], ids=["eventual", "strict", "fabric"])
@pytest.mark.parametrize("to_fill", [128 * MIB, 512 * MIB, 1_024 * MIB])
def test_buckets_have_room_in_half_of_what_is_left(config: SidecarConfig, to_fill: int) -> None:
    most, each = max_buckets(config, (), to_fill), bytes_a_bucket(config, ())
    assert most == 10_000 or to_fill // 2 - each < most * each <= to_fill // 2


@pytest.mark.parametrize(("peers", "each"), [(0, 5_900), (1, 5_900), (7, 5_900), (11, 8_100)])
def test_in_a_mesh_a_bucket_takes_more(peers: int, each: int) -> None:
    """A name of peers may have many addresses, and peers may dial in only, so there are eight nodes at least."""
    sync = SyncConfig(peers=[f"peer-{number}.example:50051" for number in range(peers)])
    config = SidecarConfig(listen=ListenConfig(sync="127.0.0.1:50051"), sync=sync)
    assert bytes_a_bucket(config, ()) == each


@pytest.mark.parametrize(
    ("most_buckets", "to_fill", "received"),
    [
        (60_000, 416 * MIB, 208 * MIB - 90_000_000),
        pytest.param(1_000_000, 416 * MIB, 52 * MIB, id="more buckets are configured than have room"),
        (1_000_000, 64 * 1_024 * MIB, 4_096 * MIB),
    ],
)
def test_what_other_nodes_took_has_what_the_buckets_themselves_leave_of_their_half(
    most_buckets: int, to_fill: int, received: int
) -> None:
    assert max_received_bytes(MESH, most_buckets, to_fill) == received
    assert max_received_bytes(EVENTUAL, most_buckets, to_fill) == 4_096 * MIB


@pytest.mark.parametrize(
    ("config", "places"),
    [
        (EVENTUAL, 5),
        (MESH, 2),
        (FABRIC, 1),
        (SidecarConfig(algorithm="sliding_window"), 1),
        (SidecarConfig(max_buckets=9), 1),
    ],
)
def test_a_sliding_window_that_no_rule_has_counts_as_what_it_takes(config: SidecarConfig, places: int) -> None:
    """Of limits in requests, and of rules that come later."""
    assert sliding_places(config, ()) == places


LIMITS = (
    TokenBucketLimit(100, 3_600_000_000, 100),
    TokenBucketLimit(1_000, 86_400_000_000, 1_000),
    WindowLimit(100, 60_000_000, Window.FIXED),
)


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_clients_of_all_regions_cannot_have_what_others_took_refused(limit: AnyLimit) -> None:
    """With as many keys as there may be, in each slot: an honest key is shared as ever."""
    keys, most, to_fill = 300, 10_000, 2 * 10_000 * bytes_a_bucket(MESH, ())
    store = Store(
        Origin("here", 1),
        lambda _key: limit,
        max_buckets=keys,
        max_received_bytes=max_received_bytes(MESH, most, to_fill) * keys // most,
    )
    peers = [Origin(f"peer-{number}", 1) for number in range(7)]
    store.journal.peers.update(peers)
    now_us = 1_790_000_000_000_000
    for _ in range(40):
        now_us += 1 << limit.exponent
        start_us = now_us - now_us % limit.period_us if isinstance(limit, WindowLimit) else now_us
        slot = slot_id(start_us, limit.exponent)
        for number in range(keys):
            store.join(b"%d" % number, limit, None, [Entry(peer, slot, 1) for peer in peers], now_us)
        left = keys
        while left > 0:
            left -= store.sweep(now_us, 100)
    assert store.journal.is_crowded or isinstance(limit, WindowLimit)
    assert not store.journal.refused


def test_there_are_a_million_where_there_is_room() -> None:
    assert max_buckets(EVENTUAL, (), 64 * 1_024 * MIB) == 1_000_000


@pytest.mark.parametrize("window", Window)
def test_with_a_sliding_window_there_are_fewer(window: Window) -> None:
    rule = Rule("api.user", WindowLimit(10, 60_000_000, window))
    most = max_buckets(EVENTUAL, [rule], 1_024 * MIB)
    assert (most < max_buckets(EVENTUAL, (), 1_024 * MIB)) is (window is Window.SLIDING)
    assert max_buckets(SidecarConfig(algorithm="sliding_window"), (), 1_024 * MIB) < 100_000


def test_what_is_configured_counts() -> None:
    assert max_buckets(SidecarConfig(max_buckets=2_000_000), (), 128 * MIB) == 2_000_000


@pytest.mark.parametrize(
    ("limit", "bound"), [(128 * MIB, 16 * MIB), (1_024 * MIB, 128 * MIB), (4_096 * MIB, 256 * MIB)]
)
def test_what_clients_can_fill_may_take_an_eighth_of_little_memory(limit: int, bound: int) -> None:
    assert less_in_little_memory(256 * MIB, limit) == bound
    assert fewer_in_little_memory(256, MIB, limit) == bound // MIB
    assert less_in_little_memory(256 * MIB, limit, CALLS_SHARE) == min(256 * MIB, 2 * bound)
