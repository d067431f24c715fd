"""All requests of one replica that wait for tokens of strict limits: how many may, and how their waits ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from ratelimit_sidecar.crdt.payment_policy import PaymentPolicy
from ratelimit_sidecar.crdt.waiting import (
    MAX_WAITING,
    MAX_WAITING_OF_BUCKET,
    SERVED_AT_ONCE,
    Outcome,
    PendingDecision,
    WaitQueue,
)


class WaitQueues:
    """The queues of all buckets for which requests wait. Call `tick` often; requests whose wait is over are in `ended`,
    from which the caller takes them.
    """

    def __init__(self) -> None:
        self.ended: deque[PendingDecision] = deque()
        self.on_ended: Callable[[], None] | None = None
        """Called when `ended` is no longer empty. It must be O(1)."""
        self.waiting = 0
        """Requests that wait now."""
        self.counts: dict[str, int] = dict.fromkeys(Outcome, 0)
        """Waits since the start, by outcome."""
        self.seconds: dict[str, float] = dict.fromkeys(Outcome, 0.0)
        """The sum of the durations of these waits, by outcome."""
        self.crowded = 0
        """Requests since the start that were decided at once, because too many others waited."""
        self.by_key: dict[bytes, WaitQueue] = {}
        """The queue of each bucket for which a request waits or a ticket is to come. For look-ups."""
        self._order: deque[WaitQueue] = deque()
        """The same queues, in the order in which `tick` looks at them."""
        self._peers: Sequence[str] = ()
        self._longest_key = 0
        self._numbers = 0
        self._ends_below = 0
        self._is_open = True

    def join(self, policy: PaymentPolicy, waiting: PendingDecision, strict_us: int) -> bool:
        """Let a request wait for a bucket.

        Returns:
            False if it must be decided now: peers are not believed to have what it needs, or too many wait.
        """
        key = policy.bucket.key
        queue = self.by_key.get(key)
        if not self._peers or not self._is_open or len(key) > self._longest_key:
            return False
        # A queue whose requests have ended stays until `tick` looks at it, and callers can invent keys faster.
        is_full = len(self.by_key) >= MAX_WAITING if queue is None else len(queue) >= MAX_WAITING_OF_BUCKET
        if is_full or self.waiting >= MAX_WAITING:
            self.crowded += 1
            return False
        found = WaitQueue(policy, self._end) if queue is None else queue
        if not found.may_be_enough(waiting.hits, self._peers, strict_us):
            return False
        if queue is None:
            self.by_key[key] = found
            self._order.append(found)
        self._numbers += 1
        waiting.number = self._numbers
        found.join(waiting, strict_us)
        self.waiting += 1
        return True

    def end(self, waiting: PendingDecision, outcome: Outcome, strict_us: int) -> None:
        """End a wait, because its time is over or its client has given up."""
        if waiting.queue is not None:
            waiting.queue.end(waiting, outcome, strict_us)

    def end_all(self) -> None:
        """Have `tick` end all current waits, because the rules have changed."""
        self._ends_below = self._numbers + 1

    def close(self) -> None:
        """Have `tick` end all waits, and let no request wait from now on, because the process stops."""
        self._is_open = False
        self.end_all()

    def tick(
        self, peers: Sequence[str], strict_us: int, max_queues: int, longest_key: int
    ) -> dict[str, dict[bytes, int]]:
        """Look at the next `max_queues` queues, and end up to `SERVED_AT_ONCE` waits.

        Args:
            peers: the connected members whose protocol has tickets.
            longest_key: the longest key that a wish can have.

        Returns:
            The whole tokens to wish for, by peer and key. The caller calls `StrictBucket.wish` for each.
        """
        self._peers, self._longest_key = peers, longest_key
        wishes: dict[str, dict[bytes, int]] = {}
        left = SERVED_AT_ONCE
        for _ in range(min(max_queues, len(self._order))):
            queue = self._order.popleft()
            left -= queue.serve(strict_us, left)
            while left and (first := queue.first) is not None and first.number < self._ends_below:
                queue.end(first, Outcome.CALLED_OFF, strict_us)
                left -= 1
            for peer, tokens in queue.make_wishes(peers, strict_us).items():
                wishes.setdefault(peer, {})[queue.policy.bucket.key] = tokens
            if queue.is_over:
                del self.by_key[queue.policy.bucket.key]
            else:
                self._order.append(queue)
        return wishes

    def _end(self, waiting: PendingDecision, strict_us: int) -> None:
        self.waiting -= 1
        assert waiting.outcome is not None
        self.counts[waiting.outcome] += 1
        self.seconds[waiting.outcome] += (strict_us - waiting.since_us) / 1e6
        self.ended.append(waiting)
        if len(self.ended) == 1 and self.on_ended is not None:
            self.on_ended()
