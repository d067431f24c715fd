"""A strict bucket of a sidecar in a region that has one account for all its sidecars: it spends what it was granted.

Theory of operation. The account (`fabric/accounts.py`) holds the region's part of a limit, its *home*. A sidecar
*draws* whole tokens from it, a few at a time and ahead of need, and decides from what it holds. The account keeps room
for all that sidecars may still hold: `level + out <= home`. A grant ends after `GRANT_US`, by this sidecar's clock from
before the call was sent; the account counts it in `out` for longer than that. So what a sidecar holds when it dies, or
when it is stopped and goes on minutes later, is nobody's any more; refill restores it. tests/fabric/accounts_model.py
has the proof.

The bucket's `max_level` is the grant, and nothing refills here. Each call says how much of the former grant ends and
what is kept, so a grant is renewed, and what was spent is room again. When a call fails, nobody knows whether it was
done: then the grant stays as it is until its end, and the next call counts what is left once more, which is the safe
side.

Units are those of `strict.py`; grants are in whole tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit
from ratelimit_sidecar.crdt.payment_policy import Ticket
from ratelimit_sidecar.crdt.store import StoreFull
from ratelimit_sidecar.crdt.strict import NEVER_US, StrictBucket

GRANT_US: Final = 2_500_000
"""A sidecar spends what it was granted for so long. Ticks may be this far apart at most."""

COUNTED_US: Final = 3_000_000
"""The account counts it for so long at least, by a clock of its own. The difference covers both clocks' errors."""

LEAST_RETRY_US: Final = 100_000
"""The least retry time in answers: two ticks, by which more may have been drawn."""


class Needs(NamedTuple):
    """What a bucket needs of its account, in whole tokens.

    Args:
        wanted: to be drawn, beside what is held.
        max_held: tokens held beyond this many go back.
        room: to be granted for what other regions may pay.
        spared: the part of the account's room that is left for its refill; at most a quarter of the room.
    """

    wanted: int
    max_held: int
    room: int = 0
    spared: int = 0


class DrawReply(NamedTuple):
    """What an account answers, in whole tokens.

    Args:
        kept: how much of the former grant goes on: `DrawRequest.kept`, or 0 when the grant had ended.
        tokens: drawn by this call.
        room: granted by this call.
        left: what the account has left.
    """

    kept: int
    tokens: int
    room: int
    left: int


@dataclass(frozen=True, slots=True)
class DrawRequest:
    """The request of one bucket in a call to the account, in whole tokens.

    Args:
        generation: in which the former grant was counted; -1 when that is not known.
        ends: the former grant, all of which ends; 0 when `generation` is not known.
        kept: how much of it goes on, what is spent meanwhile included.
        back: how much of it goes back into the account; `back + kept <= ends` when the generation is known.
        wanted, room, spared: see `Needs`.
    """

    generation: int
    ends: int
    kept: int
    back: int
    wanted: int
    room: int
    spared: int


class GrantedBucket(StrictBucket):
    """A strict bucket that spends what its region's account has granted. For each call to the account: `draw` says what
    to send; then call `grant_received` with the answer, `not_done` if nothing was done, or neither when no answer came.
    """

    __slots__ = ("expires_us", "generation", "granted", "left", "lineage", "paced_us", "short_of", "used_us")

    def __init__(
        self,
        key: bytes,
        limit: TokenBucketLimit,
        origin: Origin,
        strict_us: int,
        *,
        active: deque[StrictBucket] | None = None,
    ) -> None:
        self.granted = 0
        """What may be held here at most, in tokens."""
        self.expires_us = strict_us
        super().__init__(key, limit, origin, strict_us, home=0, from_us=strict_us, active=active)
        self.generation = -1
        self.lineage = b""
        """The lineage of the account that granted it. An account with another lineage knows nothing of the grant."""
        self.left = 0
        """What the account had left, when it answered last."""
        self.used_us = strict_us
        self.paced_us = NEVER_US
        """When there was less to be drawn than was wanted."""
        self.short_of = 0
        """The most hits that were denied lately."""

    @property
    def held(self) -> int:
        """Whole tokens that are here; below 0 what is owed."""
        return self.level // (self._limit.period_us << 32)

    def advance(self, strict_us: int) -> None:
        super().advance(strict_us)
        if self.granted and self.at_us >= self.expires_us:
            self._set_grant(0)
            self.level = min(self.level, 0)

    def note_demand(self, hits: int) -> None:
        """Count the hits as demand, and have the account called."""
        self._note_demand(hits)

    def _note_demand(self, hits: int) -> None:
        super()._note_demand(self._admissible(hits))
        self.used_us = self.at_us

    def _admissible(self, hits: int) -> int:
        """The hits, or 0 if a request for so many is never admitted: drawing for it would take tokens from others."""
        return hits if hits <= self._limit.capacity else 0

    def take(self, hits: int, strict_us: int, *, always: bool = False) -> bool:
        admitted = super().take(hits, strict_us, always=always)
        if not admitted:
            self.short_of = max(self.short_of, self._admissible(hits))
        return admitted

    def would_admit(self, hits: int, strict_us: int) -> bool:
        is_admitted = super().would_admit(hits, strict_us)
        if not is_admitted:
            self.short_of = max(self.short_of, self._admissible(hits))
        return is_admitted

    @property
    def remaining(self) -> int:
        """Whole tokens that are here, and that the account had left when it answered last."""
        return max(0, self.held) + self.left

    @property
    def full_in_us(self) -> int:
        """By the rate of the whole limit, as `retry_after_us`: others may need it as well."""
        limit = self._limit
        return max(0, limit.capacity - self.remaining) * limit.period_us // limit.tokens

    def retry_after_us(self, hits: int) -> int:
        missing = (hits * self._limit.period_us << 32) - self.level
        return max(LEAST_RETRY_US, -(-missing // (self._limit.tokens << 32))) if missing > 0 else 0

    def draw(self, needs: Needs) -> DrawRequest:
        """What to call for; the caller has advanced the bucket. What goes back is not here any more."""
        token = self._limit.period_us << 32
        is_known = self.generation >= 0
        ends = self.granted if is_known else 0
        back = max(0, self.held - needs.max_held) if is_known else 0
        self.level -= back * token
        kept = min(self.granted, -(-(max(0, self.level) + self.room_reserved) // token))
        request = DrawRequest(self.generation, ends, kept, back, needs.wanted, needs.room, needs.spared)
        # No answer may come.
        self.generation = -1
        self._set_grant(kept)
        return request

    def grant_received(self, request: DrawRequest, grant: DrawReply, generation: int, sent_us: int) -> None:
        """Take what the account has granted in answer to a request.

        Args:
            generation: in which the grant is counted now.
            sent_us: the time before the call was sent.
        """
        if not grant.kept:
            self.level = min(self.level, 0)
        self.level += grant.tokens * self._limit.period_us << 32
        self._set_grant(grant.kept + grant.tokens + grant.room)
        self.generation = generation
        self.expires_us = sent_us + GRANT_US
        self.left = grant.left

    def not_done(self, request: DrawRequest) -> None:
        """The answer says that nothing was done."""
        self.level += request.back * self._limit.period_us << 32
        if request.generation >= 0:
            self.generation = request.generation
            self._set_grant(request.ends)

    def _set_grant(self, tokens: int) -> None:
        """Set how many tokens may be held here."""
        self.granted = tokens
        self.max_level = tokens * self._limit.period_us << 32

    def set_limit(self, limit: AnyLimit, strict_us: int) -> None:
        super().set_limit(limit, strict_us)
        self.home_version = -1
        self._set_grant(self.granted)


class GrantLedger(Ledger):
    """All strict buckets of a sidecar in a region with accounts. Its shares are the region's; see `Ledger`."""

    def bucket(self, key: bytes, limit: TokenBucketLimit, strict_us: int) -> StrictBucket:
        policy = self._policies.get(key)
        if policy is None:
            return self._make(key, limit, strict_us)
        bucket = policy.bucket
        if bucket.limit is not limit and bucket.limit != limit:
            bucket.set_limit(limit, strict_us)
        return bucket

    def _may_drop(self, bucket: StrictBucket, strict_us: int) -> bool:
        return bucket.is_idle(strict_us)

    def _make(self, key: bytes, limit: TokenBucketLimit, strict_us: int) -> StrictBucket:
        if not self.places.take(key):
            raise StoreFull
        bucket = self._new_bucket(key, limit, strict_us)
        self._add(key, bucket)
        return bucket

    def _new_bucket(self, key: bytes, limit: TokenBucketLimit, strict_us: int) -> GrantedBucket:
        return GrantedBucket(key, limit, self._origin, strict_us, active=self._active)

    def set_aside(self, _number: int, _peer: str, _key: bytes, _tokens: int, _strict_us: int) -> Ticket:
        """Nothing: the account may count a grant no longer than a ticket of it is good."""
        return Ticket(0, 0)

    def next_active(self, strict_us: int) -> GrantedBucket | None:
        """The bucket whose turn it is; it has another turn after all others. None if no request used it lately and it
        holds nothing: then it has no other. Only to be called while there are `active` ones.
        """
        bucket = self._active.popleft()
        assert isinstance(bucket, GrantedBucket)
        bucket.advance(strict_us)
        if bucket.granted or bucket.demand() or bucket.level < 0:
            self._active.append(bucket)
            return bucket
        bucket.is_active = False
        return None

    @property
    def active(self) -> int:
        """Buckets that have a turn."""
        return len(self._active)
