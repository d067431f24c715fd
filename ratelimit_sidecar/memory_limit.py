"""How much memory this process may take, and what has room in it.

The kernel kills a process that exceeds the limit of its cgroup, as of a container, and whoever can invent keys or hold
calls can fill what these may take. So the number of buckets follows from the memory, unless it is configured, and so do
other bounds where there is little memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from ratelimit_sidecar.config.sidecar import SidecarConfig
from ratelimit_sidecar.crdt.bucket import ENTRY_BYTES, ORIGIN_BYTES
from ratelimit_sidecar.crdt.journal import DEFAULT_MAX_RECEIVED_BYTES
from ratelimit_sidecar.crdt.limit import Window, WindowLimit
from ratelimit_sidecar.crdt.store import DEFAULT_MAX_BUCKETS
from ratelimit_sidecar.limiter.rules import Rule

MIN_BUCKETS: Final = 10_000

PROCESS_BYTES: Final = 96 * 1_024 * 1_024
"""What the process takes with few rules and no clients."""

BUCKETS_SHARE: Final = 2
"""Buckets may take half of what is left (`memory_to_fill`)."""

OTHER_SHARE: Final = 8
"""What else clients or peers can fill may take an eighth of that each."""

CALLS_SHARE: Final = 4
"""Unfinished calls may take a quarter of all: of a burst what has no room is refused, and Envoy lets it pass."""

NODES: Final = 8
"""Of a mesh, at least: names of peers may have many addresses."""

# The most that one takes, in bytes (docs/sizing.md).
_TOKEN_BUCKET: Final = 1_600
_SHARED_BUCKET: Final = 1_500
_SHARED_BUCKET_OF_NODE: Final = ORIGIN_BYTES + 4 * ENTRY_BYTES
_SLIDING_WINDOW: Final = 7_500
_STRICT_BUCKET: Final = 1_400
_STRICT_BUCKET_OF_MEMBER: Final = 200
_GATEWAY_BUCKET: Final = 8_000


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """The memory of the machine, or if that is less, of the cgroups in which this process is (cgroups(7), both
    versions).

    Args:
        root: where `proc` and `sys` are.
    """
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits(root)])


def memory_to_fill(limit_bytes: int) -> int:
    """What is left beside the process, in bytes. Most of what clients and peers can fill are shares of that."""
    return max(limit_bytes - PROCESS_BYTES, limit_bytes // 4)


def _cgroup_limits(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # A group has the limits of all those that it is in. A container may see its own as the topmost.
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            # It may not be there, or say "max".
            with suppress(OSError, ValueError):
                yield int((top / folder / file).read_text())


def bytes_a_bucket(config: SidecarConfig, rules: Iterable[Rule]) -> int:
    """The most that one of `max_buckets` takes, if all nodes take from it; of a sliding window twice as much where one
    other node does.

    Args:
        rules: that are known at the start.
    """
    if config.fabric is not None:
        return _GATEWAY_BUCKET
    slides = config.algorithm == "sliding_window" or any(
        isinstance(rule.limit, WindowLimit) and rule.limit.window is Window.SLIDING for rule in rules
    )
    shared = _SLIDING_WINDOW if slides else _TOKEN_BUCKET
    if config.listen.sync is not None:
        nodes = max(NODES, 1 + len(config.sync.peers))
        shared = max(shared, _SHARED_BUCKET + _SHARED_BUCKET_OF_NODE * nodes)
    if config.membership is None:
        return shared
    return shared + _STRICT_BUCKET + _STRICT_BUCKET_OF_MEMBER * len(config.membership.weights)


def max_buckets(config: SidecarConfig, rules: Iterable[Rule], to_fill_bytes: int) -> int:
    """As configured; else as many as have room."""
    if config.max_buckets is not None:
        return config.max_buckets
    fitting = to_fill_bytes // BUCKETS_SHARE // bytes_a_bucket(config, rules)
    return max(MIN_BUCKETS, min(fitting, DEFAULT_MAX_BUCKETS))


def sliding_places(config: SidecarConfig, rules: Iterable[Rule]) -> int:
    """As how many buckets a sliding window counts that none of these rules has: of a later rule, or of a limit that a
    request brings. What is configured counts as it is."""
    return 1 if config.max_buckets is not None else -(-_SLIDING_WINDOW // bytes_a_bucket(config, rules))


def max_received_bytes(config: SidecarConfig, most_buckets: int, to_fill_bytes: int) -> int:
    """What other nodes took may take the buckets' share of the memory, but for the buckets themselves. Without other
    nodes there is only what this one took in its former lives."""
    if config.listen.sync is None and config.fabric is None:
        return DEFAULT_MAX_RECEIVED_BYTES
    left = to_fill_bytes // BUCKETS_SHARE - most_buckets * _SHARED_BUCKET
    return min(max(left, to_fill_bytes // OTHER_SHARE), DEFAULT_MAX_RECEIVED_BYTES)


def less_in_little_memory(most_bytes: int, of_bytes: int, share: int = OTHER_SHARE) -> int:
    """How much what clients or peers can fill may take, `most_bytes` if there is much memory."""
    return min(most_bytes, of_bytes // share)


def fewer_in_little_memory(most: int, each_bytes: int, to_fill_bytes: int) -> int:
    """How many there may be of what clients or peers can make, `most` if there is much memory."""
    return min(most, to_fill_bytes // OTHER_SHARE // each_bytes)
