"""Answers that come later (`crdt.waiting.PendingDecision`), for callers that can await: grpc.aio and HTTP requests."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from ratelimit_sidecar.crdt.waiting import PendingDecision


async def answer_of(waiting: PendingDecision) -> bytes:
    """Await the answer of a wait. Cancelling this cancels the wait."""
    ended = asyncio.Event()
    waiting.on_end = ended.set
    try:
        await ended.wait()
    finally:
        waiting.cancel()
    return waiting.result()


class HttpWaits:
    """Lets requests over HTTP wait, as long as enough of the places of `console.requests` are left for others.

    Args:
        max_waiting: requests that wait at once.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting = 0

    async def answer_of(self, waiting: PendingDecision, receive: Receive) -> bytes | None:
        """The answer: at once if too many wait; None if the client is gone before.

        Args:
            receive: of the request.
        """
        if self._waiting >= self._max_waiting:
            waiting.end_now()
            return waiting.result()
        self._waiting += 1
        gone = asyncio.ensure_future(_until_gone(receive))
        answer = asyncio.ensure_future(answer_of(waiting))
        try:
            await asyncio.wait((gone, answer), return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else None
        finally:
            self._waiting -= 1
            gone.cancel()
            answer.cancel()
            await asyncio.gather(gone, answer, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
