"""A call to Redis: how long it may take, and in which words it failed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import cache
from hashlib import sha1
from typing import Final, TypeVar

from redis import exceptions

CALL_SECONDS: Final = 2.0
"""What a call may take in all, whatever the client library makes of it."""

T = TypeVar("T")


class Unusable(Exception):
    """The server cannot be used, though nothing failed on the way to it; the text says why."""


async def bounded(answer: Awaitable[T]) -> T:
    """The answer, within `CALL_SECONDS`.

    Before Python 3.12 `asyncio.wait_for`, by which redis-py sends, swallows a cancellation that comes when all is sent:
    the library then waits for the answer, for `redis_client.COMMAND_SECONDS` at most, and goes on.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    async with asyncio.timeout(CALL_SECONDS):
        result = await answer
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
    return result


@cache
def digest_of(script: str) -> str:
    """The script's name on a server."""
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


def reason_of(error: Exception) -> str:
    """In words that are the same for the same state."""
    text = str(error)
    if isinstance(error, Unusable):
        return text
    for words, reason in (
        (("WRONGPASS", "NOAUTH", "invalid username-password"), "it refuses user or password"),
        (("NOPERM", "no permissions"), "it does not permit what is needed"),
        (("OOM", "maxmemory"), "it is out of memory"),
        (("READONLY", "read only replica"), "it is a read-only replica"),
        (("LOADING", "loading the dataset"), "it is loading its data"),
        (("MISCONF",), "it cannot write to its disk"),
        (("CLUSTERDOWN",), "the cluster is down"),
    ):
        if any(word in text for word in words):
            return reason
    # While it connects, the library calls a time-out a failure of the connection.
    if isinstance(error, exceptions.TimeoutError | TimeoutError) or "Timeout" in text:
        return "it does not answer in time"
    if isinstance(error, exceptions.AuthenticationError):
        return "it refuses user or password"
    if isinstance(error, exceptions.ConnectionError | OSError | exceptions.RedisClusterException):
        return "it cannot be reached"
    return f"it answers with {type(error).__name__}"
