"""Replication's share of the event loop, so that requests never wait for long behind it, nor it behind them.

A flush wakes the writers of all streams, and peers that flush at once wake all readers: they would all work in the same
turn of the loop, tens of milliseconds with many buckets and peers. So when it has worked for its share it leaves two
turns to requests: in one they are read, in the next they are answered. Turns are long when there are many requests;
then its share grows with them, to half a millisecond, and they are left one turn at a time: so it has a third of the
loop until turns take a millisecond, and less when they take longer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

SHARE_NS = 200_000
"""At least. The piece of work that fills it is the last, so it takes up to as long as the longest piece more."""

MAX_SHARE_NS = 500_000
"""At most."""

LONG_TURN_NS = 500_000
"""Where others need so long for a turn, they are left one at a time."""

PART = 2
"""Of others' time is its share: a third of the loop."""

Result = TypeVar("Result")


class Turns:
    """Pieces of work are done in the order in which they came.

    Args:
        monotonic_ns: what they are timed with.
    """

    def __init__(self, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._monotonic_ns = monotonic_ns
        self._share_ns = SHARE_NS
        self._worked_ns = 0
        """Of the share."""
        self._turns_left = 2
        """To others, when it is filled."""
        self._left_ns = 0
        """When it was filled."""
        self._waiting: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()

    async def do(self, work: Callable[[], Result]) -> Result:
        """Do it now, or after others have had their turns.

        Raises:
            Exception: what `work` raises.
        """
        if self._worked_ns < self._share_ns:
            return self._timed(work)
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, done))
        return await done

    async def do_all(self, piece: Callable[[], bool]) -> None:
        """Do a piece again and again, with others' turns in between, until it returns False.

        Raises:
            Exception: what `piece` raises.
        """
        while await self.do(piece):
            pass

    def _timed(self, work: Callable[[], Result]) -> Result:
        began_ns = self._monotonic_ns()
        try:
            return work()
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
        others_ns = self._monotonic_ns() - self._left_ns
        self._share_ns = max(SHARE_NS, min(others_ns // PART, MAX_SHARE_NS))
        self._turns_left = 1 if others_ns >= LONG_TURN_NS * self._turns_left else 2
        while self._waiting and self._worked_ns < self._share_ns:
            work, done = self._waiting.popleft()
            if done.cancelled():
                continue
            try:
                done.set_result(self._timed(work))
            except Exception as error:
                done.set_exception(error)
