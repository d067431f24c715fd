"""A central store: one bucket in the first region; every decision of another region waits for the way there and back.

A call has a deadline. One that misses it is decided by the caller: *fail open* admits it, *fail closed* denies it. The
store drops calls whose deadline has passed, as gRPC servers do.
"""

from __future__ import annotations

from functools import partial

from benchmarks.admission.policies.policy import Answer, Policy, Setup
from simulation.textbook import TextbookBucket

TIMEOUT_US = 500_000
"""Above the longest round trip simulated. (Envoy's default for its rate limit filter, 20 ms, rules a far store out.)"""

STORE = 0


class CentralStore(Policy):
    """The policy of a central store; see above.

    Args:
        fails_open: what becomes of a call without an answer.
    """

    def __init__(self, setup: Setup, *, fails_open: bool) -> None:
        super().__init__(setup)
        self._fails_open = fails_open
        self.never_exceeds = not fails_open
        self._bucket = TextbookBucket(setup.limit)

    def request(self, region: int, answer: Answer) -> None:
        loop = self.setup.loop
        if region == STORE:
            answer(self._bucket.take(loop.now_us), loop.now_us)
            return
        call = _Call(region, loop.now_us + TIMEOUT_US, answer)
        self.setup.send(region, STORE, partial(self._decide, call))
        loop.at(call.deadline_us, partial(self._expire, call))

    def _decide(self, call: _Call) -> None:
        now_us = self.setup.loop.now_us
        if now_us < call.deadline_us:
            admitted = self._bucket.take(now_us)
            self.setup.send(STORE, call.region, partial(call.finish, admitted, now_us))

    def _expire(self, call: _Call) -> None:
        call.finish(self._fails_open, call.deadline_us)


class _Call:
    __slots__ = ("_answer", "deadline_us", "region")

    def __init__(self, region: int, deadline_us: int, answer: Answer) -> None:
        self.region = region
        self.deadline_us = deadline_us
        self._answer: Answer | None = answer

    def finish(self, admitted: bool, decided_us: int) -> None:
        """The first of answer and deadline counts."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(admitted, decided_us)
