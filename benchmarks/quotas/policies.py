"""Others' ways to divide a limit among Envoys, in the place of `limiter.quota.Quotas`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.limiter.assignment import SECOND_US, TOKEN, Assignment, assign, share_base_of
from ratelimit_sidecar.limiter.quota_pool import Action, QuotaStream, Usage

LEASE_US: Final = 20 * SECOND_US


@dataclass(slots=True)
class Lease:
    wants: int = -1
    has: int = 0
    ends_us: int = 0
    reported_us: int = 0
    bucket_id: bytes = b""
    is_due: bool = False


class Doorman:
    """Leases by the algorithm FAIR_SHARE of Google's Doorman (github.com/youtube/doorman, doc/algorithms.md).

    Each client gets what it wants up to an equal share, and a part of what others leave of theirs. A lease is computed
    when its client refreshes it, here with each report, from what others hold until they refresh theirs: nobody is told
    sooner.
    """

    def __init__(self, limit: TokenBucketLimit) -> None:
        self._base = share_base_of(limit)
        self._leases: dict[QuotaStream, Lease] = {}

    def open(self, wake: Callable[[], None]) -> QuotaStream:
        stream = QuotaStream(wake)
        self._leases[stream] = Lease()
        return stream

    def close(self, stream: QuotaStream) -> None:
        """It holds on until the lease ends."""

    def report(self, stream: QuotaStream, domain: str, usages: Iterable[Usage], now_us: int) -> None:
        lease = self._leases[stream]
        for usage in usages:
            elapsed_us = now_us - lease.reported_us
            if lease.wants < 0 or elapsed_us >= SECOND_US:
                # A client says what it wants: here what it was asked for since the last report.
                known = usage.elapsed_s > 0
                lease.wants = (usage.allowed + usage.denied) * SECOND_US * TOKEN // elapsed_us if known else self._equal
            lease.reported_us, lease.bucket_id, lease.is_due = now_us, usage.bucket_id, True

    def take_actions(self, stream: QuotaStream, now_us: int, most: int) -> list[Action]:
        lease = self._leases[stream]
        if not lease.is_due:
            return []
        lease.is_due = False
        self._forget(now_us)
        others = sum(other.has for other in self._leases.values() if other is not lease)
        lease.has = max(0, min(self._fair(lease), self._base.rate - others))
        lease.ends_us = now_us + LEASE_US
        return [Action(lease.bucket_id, assign(self._base, lease.has))]

    def tick(self, now_us: int) -> None:
        """Nothing is done between reports."""

    @property
    def _equal(self) -> int:
        return self._base.rate // len(self._leases)

    def _forget(self, now_us: int) -> None:
        for stream, lease in list(self._leases.items()):
            if lease.ends_us and lease.ends_us <= now_us:
                del self._leases[stream]

    def _fair(self, lease: Lease) -> int:
        equal = self._equal
        if lease.wants <= equal:
            return lease.wants
        # Two rounds, as there: who wants more than an equal share divides what the others leave, and once more.
        extra = sum(equal - other.wants for other in self._leases.values() if other.wants < equal)
        greedy = [other for other in self._leases.values() if other.wants > equal]
        more = extra // len(greedy)
        if lease.wants <= equal + more:
            return lease.wants
        left = sum(equal + more - other.wants for other in greedy if other.wants < equal + more)
        unmet = [other for other in greedy if other.wants > equal + more]
        return equal + more + left // len(unmet)


class WholeEach:
    """Every Envoy gets all of the limit."""

    def __init__(self, limit: TokenBucketLimit) -> None:
        base = share_base_of(limit)
        self._whole: Assignment = assign(base, base.rate)
        self._due: dict[QuotaStream, list[bytes]] = {}

    def open(self, wake: Callable[[], None]) -> QuotaStream:
        stream = QuotaStream(wake)
        self._due[stream] = []
        return stream

    def close(self, stream: QuotaStream) -> None:
        del self._due[stream]

    def report(self, stream: QuotaStream, domain: str, usages: Iterable[Usage], now_us: int) -> None:
        self._due[stream] = [usage.bucket_id for usage in usages]

    def take_actions(self, stream: QuotaStream, now_us: int, most: int) -> list[Action]:
        due, self._due[stream] = self._due[stream], []
        return [Action(bucket_id, self._whole) for bucket_id in due]

    def tick(self, now_us: int) -> None:
        """Nothing changes."""
