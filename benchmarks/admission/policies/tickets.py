"""`strict, wait: 250ms`: purses, and requests that wait for tickets when the purse of their region is short."""

from __future__ import annotations

from collections import deque
from functools import partial

from benchmarks.admission.policies.policy import Answer, Setup
from benchmarks.admission.policies.strict import Strict
from ratelimit_sidecar.crdt.ledger import FEW_TOKENS
from ratelimit_sidecar.crdt.paying import Pay, Ticket
from ratelimit_sidecar.crdt.strict import HOLD_US, TICKET_US
from ratelimit_sidecar.crdt.waiting import MAX_WAITING_OF_BUCKET, Line, Outcome, Waiting, Wish

WAIT_US = 250_000


class Tickets(Strict):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._lines = [Line(purse, self._ended) for purse in self._purses]
        self._numbers = 0
        self._wishes: list[deque[tuple[int, Wish]]] = [deque() for _ in self._lines]

    def request(self, region: int, answer: Answer) -> None:
        now_us, line, bucket = self.setup.timeline.now_us, self._lines[region], self._purses[region].bucket
        if (
            bucket.would_admit(1, now_us)
            or len(line) >= MAX_WAITING_OF_BUCKET
            or not line.has_hope(1, self._open[region], now_us)
        ):
            answer(bucket.take(1, now_us), now_us)
        else:
            waiting = Waiting(1, lambda now_us: b"1" if bucket.take(1, now_us) else b"", WAIT_US)
            waiting.on_end = lambda: answer(bool(waiting.result()), self.setup.timeline.now_us)
            line.join(waiting, now_us)
            self.setup.timeline.after(WAIT_US, partial(self._expire, line, waiting))

    def _ended(self, waiting: Waiting, _now_us: int) -> None:
        if waiting.on_end is not None:
            waiting.on_end()

    def _expire(self, line: Line, waiting: Waiting) -> None:
        line.leave(waiting, Outcome.EXPIRED, self.setup.timeline.now_us)

    def _flush(self, region: int) -> None:
        line, now_us, ends = self._lines[region], self.setup.timeline.now_us, self._open[region]
        line.serve(now_us, MAX_WAITING_OF_BUCKET)
        while self._wishes[region] and now_us - self._wishes[region][0][1].at_us > TICKET_US:
            _, wish = self._wishes[region].popleft()
            line.come(wish.peer, wish.tokens)
        for name, tokens in line.wishes(list(ends), now_us).items():
            self._numbers += 1
            line.paying.bucket.wish(self._numbers)
            wish, payer = Wish(name, b"the limit", tokens, now_us), self._names.index(name)
            self._wishes[region].append((self._numbers, wish))
            self.setup.network.send(region, payer, partial(self._wished, payer, region, self._numbers, wish))
        if line.is_over or line.paying.bucket.home >= FEW_TOKENS:
            super()._flush(region)

    def _wished(self, region: int, peer: int, number: int, wish: Wish) -> None:
        now_us, timeline = self.setup.timeline.now_us, self.setup.timeline
        if self._names[peer] in self._open[region]:
            ticket = Ticket(0, 0)
            if not len(self._lines[region]):
                ticket = self._purses[region].ticket(number, wish.tokens, now_us)
            timeline.after(HOLD_US, partial(self._release, region, peer, number, 0))
            self.setup.network.send(region, peer, partial(self._come, peer, number, wish, ticket))

    def _come(self, region: int, number: int, wish: Wish, ticket: Ticket) -> None:
        payer = self._names.index(wish.peer)
        if (number, wish) in self._wishes[region]:
            self._wishes[region].remove((number, wish))
            back = self._lines[region].accept(number, wish, ticket, self._most[payer], self.setup.timeline.now_us)
            self.setup.network.send(region, payer, partial(self._release, payer, region, number, back))

    def _release(self, region: int, peer: int, number: int, back: int) -> None:
        now_us, bucket = self.setup.timeline.now_us, self._purses[region].bucket
        bucket.release(number, self._names[peer], back, now_us)

    def _paid(self, region: int, payer: int, end: int, pay: Pay) -> None:
        super()._paid(region, payer, end, pay)
        self._lines[region].serve(self.setup.timeline.now_us, MAX_WAITING_OF_BUCKET)
