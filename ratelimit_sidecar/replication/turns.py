"""Replication's share of the event loop, so that requests never wait for long behind it, nor it behind them.

A flush wakes the writers of all streams, and peers that flush at once wake all readers: they would all work in the same
turn of the loop, tens of milliseconds with many buckets and peers. So when it has worked for its share it leaves two
turns to requests: in one they are read, in the next they are answered. Turns are long while there are many requests;
then its share grows with them, and they are left one turn at a time: so it has a third of the loop, and a quarter when
turns stay longer than 1.5 ms. It goes by the shortest of the latest turns: a long share after a long turn among short
ones would make the next turn long as well, for all the requests that come meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

SHARE_NS = 200_000
"""At least. The piece of work that fills it is the last, so it takes up to as long as the longest piece more."""

FAIR_SHARE_NS = 500_000
"""Up to so much it is half of others' turns, and above a third of them."""

MAX_SHARE_NS = 5_000_000
"""At most."""

GROWTH = 16
"""What others are reckoned to take for a turn grows by one part in so many at a time, and shrinks at once."""

LONG_TURN_NS = 500_000
"""Where others need so long for a turn, they are left one at a time."""

Piece = Callable[[], bool | None]
"""Does a piece of some work; True when there is more to do."""


class _Work(NamedTuple):
    piece: Piece
    is_urgent: bool
    done: asyncio.Future[None]


class Turns:
    """A piece of each work is done in turn.

    Args:
        monotonic_ns: what they are timed with.
    """

    def __init__(self, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._monotonic_ns = monotonic_ns
        self._share_ns = SHARE_NS
        self._worked_ns = 0
        """Of the share."""
        self._turn_ns = 0
        """What others take for a turn, or less when that has been so only lately."""
        self._turns_left = 2
        """To others, when the share is filled."""
        self._left_ns = 0
        """When it was filled."""
        self._waiting: deque[_Work] = deque()

    async def do(self, piece: Piece, *, is_urgent: bool = False) -> None:
        """Do a piece now, or after others have had their turns, and again until it returns no True.

        Args:
            is_urgent: every second piece is one of this work, however much else there is to do.

        Raises:
            Exception: what `piece` raises.
        """
        while self._worked_ns < self._share_ns:
            if not self._timed(piece):
                return
        work = _Work(piece, is_urgent, asyncio.get_running_loop().create_future())
        self._put(work)
        await work.done

    def _put(self, work: _Work) -> None:
        if work.is_urgent:
            self._waiting.insert(1, work)
        else:
            self._waiting.append(work)

    def _timed(self, piece: Piece) -> bool | None:
        began_ns = self._monotonic_ns()
        try:
            return piece()
        finally:
            ended_ns = self._monotonic_ns()
            self._worked_ns += ended_ns - began_ns
            if self._worked_ns >= self._share_ns:
                self._left_ns = ended_ns
                loop = asyncio.get_running_loop()
                if self._turns_left == 1:
                    loop.call_soon(self._go_on)
                else:
                    loop.call_soon(loop.call_soon, self._go_on)

    def _go_on(self) -> None:
        self._worked_ns = 0
        turn_ns = (self._monotonic_ns() - self._left_ns) // self._turns_left
        self._turn_ns = min(turn_ns, max(SHARE_NS, self._turn_ns + self._turn_ns // GROWTH))
        self._turns_left = 1 if self._turn_ns >= LONG_TURN_NS else 2
        others_ns = self._turn_ns * self._turns_left
        self._share_ns = max(SHARE_NS, min(others_ns // 2, FAIR_SHARE_NS), min(others_ns // 3, MAX_SHARE_NS))
        while self._waiting and self._worked_ns < self._share_ns:
            work = self._waiting.popleft()
            if work.done.cancelled():
                continue
            try:
                is_unfinished = self._timed(work.piece)
            except Exception as error:
                work.done.set_exception(error)
                continue
            if is_unfinished:
                self._put(work)
            else:
                work.done.set_result(None)
        # It has caught up: what comes next, maybe much later, need not have a long share at once.
        if self._worked_ns < self._share_ns:
            self._share_ns = max(min(self._share_ns, FAIR_SHARE_NS), self._worked_ns + 1)
