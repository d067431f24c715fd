"""The purses of a region at its gateway: what other members ask for is drawn from the region's accounts, and what they
pay is put there.

Safety is that of `strict.py` and `granted.py`: the gateway pays what it was granted, and asks for what it was granted
room for. Here is when and how much. A bucket of which sidecars could draw less than they wanted lately is *short*: the
gateway gets all the room there is, but for the refill of the next moments, asks others for as much, and puts what they
pay into the account. Of one that is not short it draws what others ask for, and leaves a reserve.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.granted import GrantedBucket, GrantLedger, Needs
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.payment_policy import PAY_AHEAD_US, REPORT_US, RESERVE_SHIFT, SHORTAGE_US, Ask, Payment
from ratelimit_sidecar.crdt.shares import TOKEN
from ratelimit_sidecar.crdt.store import StoreFull
from ratelimit_sidecar.crdt.strict import NEVER_US, StrictBucket


class GatewayBucket(GrantedBucket):
    """The gateway's bucket of a strict limit. It counts as short while a sidecar of the region denied something lately,
    which it learns through `GatewayLedger.note_short`.
    """

    __slots__ = ("asked", "asked_us")

    def __init__(
        self,
        key: bytes,
        limit: TokenBucketLimit,
        origin: Origin,
        strict_us: int,
        *,
        active: deque[StrictBucket] | None = None,
    ) -> None:
        self.asked, self.asked_us = 0, NEVER_US
        """Tokens that another member asked for last, and when."""
        super().__init__(key, limit, origin, strict_us, active=active)

    def is_idle(self, strict_us: int) -> bool:
        # What a member has paid is kept in mind until it can have refilled all of it.
        refilled_us = self._limit.scaled_capacity // self._limit.tokens
        return super().is_idle(strict_us) and all(
            strict_us - at_us >= refilled_us for _, at_us in self._lacking.values()
        )


def gateway_needs(bucket: GrantedBucket, strict_us: int) -> Needs | None:
    """See `crdt.draw_policy.draw_needs`."""
    assert isinstance(bucket, GatewayBucket)
    limit = bucket.limit
    if strict_us - bucket.denied_us < SHORTAGE_US:
        return Needs(0, 0, limit.capacity, -(-limit.tokens * PAY_AHEAD_US // limit.period_us))
    if strict_us - bucket.asked_us < REPORT_US:
        spare = bucket.left - (bucket.home // TOKEN >> RESERVE_SHIFT)
        return Needs(max(0, min(bucket.asked, spare) - bucket.held), bucket.asked)
    return Needs(0, 0) if bucket.granted else None


class GatewayLedger(GrantLedger):
    """The buckets of a gateway, for the time that it is one. It is the ledger of its mesh (`replication.payments`), and
    draws like that of a sidecar, by `gateway_needs`.
    """

    def _new_bucket(self, key: bytes, limit: TokenBucketLimit, strict_us: int) -> GrantedBucket:
        return GatewayBucket(key, limit, self._origin, strict_us, active=self._active)

    def note_short(self, key: bytes, strict_us: int, every_us: int) -> None:
        """Sidecars could draw less than they wanted; to be called every so often while that is so."""
        limit = self.limit_of_key(key)
        if not isinstance(limit, TokenBucketLimit):
            return
        try:
            bucket = self.bucket(key, limit, strict_us)
        except StoreFull:
            return
        assert isinstance(bucket, GatewayBucket)
        bucket.advance(strict_us)
        # Others divide by demand what they pay to several: that is taken to be the whole limit.
        bucket.note_demand(max(1, limit.tokens * every_us // limit.period_us))
        bucket.denied_us = strict_us

    def tick(
        self, streams: Mapping[str, int], strict_us: int, max_buckets: int, longest_key: int
    ) -> dict[str, dict[bytes, Ask]]:
        self._homes.look(strict_us)
        weights = self.shares.membership.weights
        members = {peer: stream for peer, stream in streams.items() if weights.get(peer)}
        asks: dict[str, dict[bytes, Ask]] = {}
        for _ in range(min(max_buckets, len(self._active))):
            # It is left in its place for the calls to the account, which drop it when it is over.
            bucket = self._active[0]
            self._active.rotate(-1)
            if strict_us - bucket.denied_us < SHORTAGE_US and len(bucket.key) <= longest_key:
                for peer, ask in self._policies[bucket.key].make_asks(members, strict_us).items():
                    asks.setdefault(peer, {})[bucket.key] = ask
        return asks

    def pay(self, peer: str, key: bytes, ask: Ask, strict_us: int) -> Payment | None:
        limit = self.limit_of_key(key)
        if not isinstance(limit, TokenBucketLimit):
            return None
        try:
            bucket = self.bucket(key, limit, strict_us)
        except StoreFull:
            return None
        assert isinstance(bucket, GatewayBucket)
        bucket.advance(strict_us)
        if not ask.is_short or strict_us - bucket.denied_us < SHORTAGE_US:
            return Payment(0, 0)
        bucket.asked, bucket.asked_us = -(-ask.amount // TOKEN), strict_us
        bucket.note_demand(1)
        # What was drawn is for others, all of it.
        paid = bucket.pay(peer, min(ask.amount, max(0, bucket.held) * TOKEN))
        return Payment(paid, max(0, bucket.left * TOKEN - (bucket.home >> RESERVE_SHIFT)))
