"""The demands of Envoys on limits that they enforce themselves (`limiter.quota`), in the pings between peers.

A ping each second carries the demands that have changed since the last one, and all of them again every few seconds. So
they need no acknowledgement: a lost one is sent again soon. The demands of a silent peer are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ratelimit_sidecar.limiter.fair_shares import Group
from ratelimit_sidecar.limiter.quota import Quotas
from ratelimit_sidecar.limiter.quota_pool import MAX_RATE
from ratelimit_sidecar.replication.deltas import check_key
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

MAX_DEMANDS: Final = 256
"""The most demands in a ping. They are sent again every few seconds, so a thousand of them are never forgotten."""

MAX_BYTES: Final = 1 << 16
"""About the most bytes of demands in a ping."""

MAX_TAKEN: Final = 1_024
"""The most demands accepted in a ping; more than are sent, so that peers with other bounds are understood."""

MAX_WANTS: Final = 256
"""The most wants of one demand."""

STEP_WANTS: Final = 256
"""The most wants that are read in one step, besides those of one demand."""

MAX_MEMBERS: Final = 4_096

_GROUP_BYTES: Final = 12

_WANTS_PER_DEMAND: Final = 8
"""So many wants take as long as one demand."""


class QuotaDemands:
    """Writes this node's demands into pings, and reads those of peers.

    Args:
        strict_us: the clock of strict limits, and of `quotas`.
    """

    def __init__(self, quotas: Quotas, strict_us: Callable[[], int]) -> None:
        self._quotas = quotas
        self._strict_us = strict_us

    def write(self, ping: pb.Ping, told: int) -> int:
        """Add the demands that were not sent to a peer yet to a ping.

        Args:
            told: the last return value for that stream; 0 at first.
        """
        size = 0
        for version, key, groups in self._quotas.demands(told, MAX_DEMANDS):
            if size >= MAX_BYTES:
                break
            size += len(key) + _GROUP_BYTES * len(groups)
            ping.demands.add(
                key=key, wants=[group.want for group in groups], members=[group.members for group in groups]
            )
            told = version
        return told

    def read_steps(self, peer: str, demands: Sequence[pb.Demand]) -> Iterator[int]:
        """Read a peer's demands, in steps.

        Yields:
            The number of keys in the step that no rule here has.

        Raises:
            ProtocolError: too_large, bad_key or malformed. Demands before the bad one have been read.
        """
        if len(demands) > MAX_TAKEN:
            raise ProtocolError(Reason.TOO_LARGE, f"{len(demands)} demands in a ping; at most {MAX_TAKEN} are taken")
        strict_us = self._strict_us()
        unknown_keys = work = 0
        for demand in demands:
            check_key(demand.key)
            try:
                is_known = self._quotas.receive(peer, demand.key, _groups(demand), strict_us)
            except ValueError as error:
                raise ProtocolError(Reason.BAD_KEY, str(error)) from error
            unknown_keys += not is_known
            work += _WANTS_PER_DEMAND + len(demand.wants)
            if work >= STEP_WANTS:
                yield unknown_keys
                unknown_keys = work = 0
        yield unknown_keys


def _groups(demand: pb.Demand) -> list[Group]:
    wants, members = demand.wants, demand.members
    if len(wants) != len(members) or len(wants) > MAX_WANTS:
        raise ProtocolError(
            Reason.MALFORMED,
            f"a demand of {len(wants)} wants and {len(members)} members; up to {MAX_WANTS} are taken",
        )
    groups = []
    for want, count in zip(wants, members, strict=True):
        if want > MAX_RATE or not 1 <= count <= MAX_MEMBERS:
            raise ProtocolError(
                Reason.MALFORMED, f"{count} Envoys that want {want} each; 1 to {MAX_MEMBERS} may, up to 2**63"
            )
        groups.append(Group(want, count))
    return groups
