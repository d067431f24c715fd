"""Requests that wait for tokens of a strict bucket, and the tickets wished for on their behalf; `strict.py` says what a
ticket is. Of this file safety depends on `WaitQueue.accept` alone: it calls `take_rest` after each `accept`.

A request that finds its bucket short may join the bucket's queue, if peers are believed to have as many tokens as all
in the queue need. Each tick wishes for the tokens that are not wished for yet, from the peers that have most. Requests
are served in the order in which they came. However a wait ends, the request is decided then, by the bucket's level at
that time; nothing is taken before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from ratelimit_sidecar.crdt.payment_policy import PaymentPolicy, Ticket
from ratelimit_sidecar.crdt.shares import TOKEN
from ratelimit_sidecar.crdt.strict import NEVER_US

MAX_WAITING_OF_BUCKET: Final = 256
MAX_WAITING: Final = 512
"""The most requests that wait at once, for one bucket and in all; and the most buckets that have a queue. By default an
Envoy has 1,024 calls under way and lets further requests pass unasked: so waiting calls leave half of these to others.
"""

SERVED_AT_ONCE: Final = 64
"""The most waits that end in one step, about 5 us each. What is then left of a ticket is kept, or returned."""

BELIEF_US: Final = 20_000
"""The sum of what peers are believed to have is computed anew after this time; until then it is only counted down."""


class Outcome(StrEnum):
    """How a wait has ended."""

    SERVED = "served"
    """There were enough tokens."""
    EXPIRED = "expired"
    """Its time was over."""
    CANCELLED = "cancelled"
    """The client has given up."""
    CALLED_OFF = "ended"
    """The rules have changed, the process stops, or there was no room to keep the call."""


class WaitOwner(Protocol):
    """The owner of waits, which ends them in time: `services.waits.Waits`."""

    def cancel(self, waiting: PendingDecision, /) -> None: ...

    def end_now(self, waiting: PendingDecision, /) -> None: ...


class PendingDecision:
    """A decision that comes later. Whoever sends the answer sets `on_end`, and calls `result` when that was called;
    `cancel` if the client is gone, `end_now` if it cannot wait.

    Args:
        hits: the tokens that it needs.
        decide: makes the decision from the levels at that time. Called once, with the time, unless the wait was
            cancelled.
        wait_us: how long it may wait.
    """

    def __init__(self, hits: int, decide: Callable[[int], bytes], wait_us: int) -> None:
        self.hits = hits
        self.wait_us = wait_us
        self.on_end: Callable[[], None] | None = None
        """Called when there is a `result`: by the event loop, not within the call that ended the wait."""
        self.owner: WaitOwner | None = None
        self.outcome: Outcome | None = None
        self.since_us = 0
        self.number = 0
        """Counts up, over all buckets."""
        self.queue: WaitQueue | None = None
        """The queue in which it waits; None when the wait is over."""
        self._decide = decide
        self._answer = b""
        self._failure: Exception | None = None
        self._conversions: list[Callable[[bytes], bytes]] = []

    def then(self, convert: Callable[[bytes], bytes]) -> PendingDecision:
        """Have `result` converted, after the conversions before; returns itself."""
        self._conversions.append(convert)
        return self

    def cancel(self) -> None:
        """End the wait without an answer, because the client is gone; `on_end` is not called. Nothing happens if the
        wait is over."""
        self.on_end = None
        if self.owner is not None:
            self.owner.cancel(self)

    def end_now(self) -> None:
        """Decide now, because the call cannot wait: then there is a `result`, and `on_end` is not called."""
        self.on_end = None
        if self.owner is not None:
            self.owner.end_now(self)

    def result(self) -> bytes:
        """The answer; call it only when the wait has ended. Raises what the decision or a conversion has raised."""
        if self._failure is not None:
            raise self._failure
        answer = self._answer
        for convert in self._conversions:
            answer = convert(answer)
        return answer

    def decide(self, outcome: Outcome, strict_us: int) -> None:
        """End the wait: make the decision, unless it was cancelled. The queue calls this when it has removed it."""
        self.outcome = outcome
        if outcome is not Outcome.CANCELLED:
            try:
                self._answer = self._decide(strict_us)
            except Exception as failure:
                # For whoever asks for the result: the next one must be served all the same.
                self._failure = failure


class Wish(NamedTuple):
    """A request to a peer for a ticket of up to `tokens` whole tokens."""

    peer: str
    key: bytes
    tokens: int
    at_us: int


class WaitQueue:
    """The requests that wait for one bucket, in order of arrival, and the wishes sent on their behalf.

    Args:
        ended: called with each request whose wait is over, and the time.
    """

    def __init__(self, policy: PaymentPolicy, ended: Callable[[PendingDecision, int], None]) -> None:
        self.policy = policy
        self.hits = 0
        """The tokens that all waiting requests need."""
        self._wished: dict[str, int] = {}
        """By peer, the tokens wished for that have not come yet."""
        self._all_wished = 0
        self._waiting: OrderedDict[PendingDecision, None] = OrderedDict()
        self._ended = ended
        self._believed = 0
        self._believed_us = NEVER_US

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_over(self) -> bool:
        """True when nobody waits and no ticket is to come. Until then it stays in `WaitQueues.by_key`: whoever knows of
        an open wish looks it up without asking."""
        return not self._waiting and not self._all_wished

    @property
    def first(self) -> PendingDecision | None:
        """The request that has waited longest."""
        return next(iter(self._waiting), None)

    def may_be_enough(self, hits: int, peers: Iterable[str], strict_us: int) -> bool:
        """True if this bucket and peers are believed to have enough for all waiting requests and one more of `hits`."""
        if strict_us - self._believed_us >= BELIEF_US:
            self._believed_us = strict_us
            self._believed = self._all_wished + sum(self._left(peer, strict_us) for peer in peers)
        return self.hits + hits <= self._believed + self.policy.bucket.remaining

    def join(self, waiting: PendingDecision, strict_us: int) -> None:
        waiting.since_us, waiting.queue = strict_us, self
        self._waiting[waiting] = None
        self.hits += waiting.hits

    def end(self, waiting: PendingDecision, outcome: Outcome, strict_us: int) -> None:
        """End the wait of a request; nothing happens if it is over."""
        if waiting.queue is not self:
            return
        waiting.queue = None
        del self._waiting[waiting]
        self.hits -= waiting.hits
        waiting.decide(outcome, strict_us)
        self._ended(waiting, strict_us)

    def serve(self, strict_us: int, max_waits: int) -> int:
        """End the waits for which the bucket has tokens, in order, up to `max_waits` of them; returns how many."""
        bucket = self.policy.bucket
        bucket.advance(strict_us)
        served = 0
        while served < max_waits and (first := self.first) is not None and bucket.has(first.hits):
            self.end(first, Outcome.SERVED, strict_us)
            served += 1
        return served

    def make_wishes(self, peers: Iterable[str], strict_us: int) -> dict[str, int]:
        """Wish for the tokens that are missing: note each wish, as by `note_wish`.

        Returns:
            The whole tokens wished for, by peer; the caller later calls `accept` or `give_up` for each.
        """
        bucket = self.policy.bucket
        missing = self.hits - self._all_wished - bucket.remaining
        wishes: dict[str, int] = {}
        if missing <= 0:
            return wishes
        left = {peer: self._left(peer, strict_us) for peer in peers}
        for peer in sorted(left, key=lambda peer: left[peer], reverse=True):
            tokens = min(missing, left[peer])
            if tokens <= 0:
                break
            missing -= tokens
            wishes[peer] = tokens
            self.note_wish(peer, tokens)
        return wishes

    def note_wish(self, peer: str, tokens: int) -> None:
        """Note a wish for so many tokens. The caller later calls `accept` or `give_up`."""
        self._wished[peer] = self._wished.get(peer, 0) + tokens
        self._all_wished += tokens

    def accept(self, number: int, wish: Wish, ticket: Ticket, max_home: int, strict_us: int) -> int:
        """Serve waiting requests from a ticket that has arrived.

        Args:
            number: see `StrictBucket.wish`.
            max_home: see `StrictBucket.receive_payment`.

        Returns:
            The amount to give back to the peer.
        """
        peer = wish.peer
        self.end_wish(peer, wish.tokens)
        self.policy.note_left(peer, ticket.left, max_home, strict_us)
        bucket = self.policy.bucket
        added = bucket.accept(number, peer, ticket.tokens, max_home, strict_us)
        if not added:
            return ticket.tokens * TOKEN
        try:
            self.serve(strict_us, SERVED_AT_ONCE)
        finally:
            returned = bucket.take_rest(peer, added)
        self.policy.add_left(peer, returned)
        self._believed += returned // TOKEN
        return returned

    def give_up(self, number: int, wish: Wish) -> None:
        """End a wish that was not answered in time, or whose stream is closed."""
        self.policy.bucket.give_up(number)
        self.end_wish(wish.peer, wish.tokens)

    def end_wish(self, peer: str, tokens: int) -> None:
        """End a wish for so many tokens: its ticket has arrived, or none will."""
        self._all_wished -= tokens
        self._believed -= tokens
        wished = self._wished[peer] - tokens
        if wished:
            self._wished[peer] = wished
        else:
            del self._wished[peer]

    def _left(self, peer: str, strict_us: int) -> int:
        """The whole tokens that a peer is believed to have, less those wished for already."""
        return max(0, self.policy.believed(peer, strict_us) // TOKEN - self._wished.get(peer, 0))
