"""`strict, wait: 250ms`: purses, and requests that wait for tickets when the purse of their region is short."""

from __future__ import annotations

from functools import partial

from benchmarks.admission.policies.policy import Answer, Setup
from benchmarks.admission.policies.strict import Strict
from ratelimit_sidecar.crdt.paying import Pay, Ticket
from ratelimit_sidecar.crdt.strict import HOLD_US
from ratelimit_sidecar.crdt.waiting import MAX_WAITING_OF_BUCKET, Line, Outcome, Waiting

WAIT_US = 250_000


class Tickets(Strict):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._lines = [Line(purse, self._ended) for purse in self._purses]
        self._numbers = 0

    def request(self, region: int, answer: Answer) -> None:
        now_us, line, bucket = self.setup.timeline.now_us, self._lines[region], self._purses[region].bucket
        if bucket.would_admit(1, now_us) or len(line) >= MAX_WAITING_OF_BUCKET:
            answer(bucket.take(1, now_us), now_us)
        elif not line.has_hope(1, self._open[region], now_us):
            answer(bucket.take(1, now_us), now_us)
        else:
            waiting = Waiting(1, lambda now_us: b"1" if bucket.take(1, now_us) else b"", WAIT_US)
            waiting.on_end = lambda: answer(bool(waiting.result()), self.setup.timeline.now_us)
            line.join(waiting, now_us)
            self.setup.timeline.after(WAIT_US, partial(self._expire, line, waiting))

    def _ended(self, waiting: Waiting) -> None:
        if waiting.on_end is not None:
            waiting.on_end()

    def _expire(self, line: Line, waiting: Waiting) -> None:
        line.leave(waiting, Outcome.EXPIRED, self.setup.timeline.now_us)

    def _flush(self, region: int) -> None:
        line, now_us, ends = self._lines[region], self.setup.timeline.now_us, self._open[region]
        if len(line):
            line.serve(now_us, MAX_WAITING_OF_BUCKET)
            for peer, tokens in line.wishes(ends, now_us).items():
                self._numbers += 1
                self._purses[region].bucket.wish(self._numbers)
                payer, number, end = self._names.index(peer), self._numbers, ends[peer]
                self.setup.network.send(region, payer, partial(self._wished, payer, region, end, number, tokens))
        if line.is_over or self._purses[region].bucket.home >= 8 << 32:
            super()._flush(region)

    def _wished(self, region: int, peer: int, end: int, number: int, tokens: int) -> None:
        if self._open[region].get(self._names[peer]) == end:
            now_us, purse = self.setup.timeline.now_us, self._purses[region]
            ticket = Ticket(0, 0) if len(self._lines[region]) else purse.ticket(number, tokens, now_us)
            self.setup.timeline.after(HOLD_US, partial(self._release, region, peer, number, 0))
            self.setup.network.send(region, peer, partial(self._come, peer, region, end, number, tokens, ticket))

    def _come(self, region: int, payer: int, end: int, number: int, wished: int, ticket: Ticket) -> None:
        name, now_us, bucket = self._names[payer], self.setup.timeline.now_us, self._purses[region].bucket
        if self._open[region].get(name) != end:
            return
        line = self._lines[region]
        line.come(name, wished)
        self._purses[region].heard(name, ticket.left, self._most[payer], now_us)
        if ticket.tokens:
            added = bucket.accept(number, name, ticket.tokens, self._most[payer], now_us)
            line.serve(now_us, MAX_WAITING_OF_BUCKET)
            back = bucket.put_down(name, added)
            line.given_back(name, back)
            self.setup.network.send(region, payer, partial(self._release, payer, region, number, back))

    def _release(self, region: int, peer: int, number: int, back: int) -> None:
        now_us, bucket = self.setup.timeline.now_us, self._purses[region].bucket
        bucket.release(number, self._names[peer], back, now_us)

    def _paid(self, region: int, payer: int, end: int, pay: Pay) -> None:
        super()._paid(region, payer, end, pay)
        self._lines[region].serve(self.setup.timeline.now_us, MAX_WAITING_OF_BUCKET)
