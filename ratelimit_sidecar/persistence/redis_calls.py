"""Calls to Redis: how long one may take, the words for how it failed, and when to try again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import cache
from hashlib import sha1
from typing import Final, Protocol, TypeVar

from redis import exceptions
from redis.asyncio import Redis, RedisCluster

CALL_SECONDS: Final = 2.0
"""The longest time for a call, whatever the client library does meanwhile."""

SERVER_FAULTS: Final = (
    *("OOM", "READONLY", "MISCONF", "NOPERM", "LOADING", "CLUSTERDOWN", "MASTERDOWN", "NOREPLICAS"),
    *("The user executing the script", "TRYAGAIN", "non local key", "CLOCKAHEAD"),
)
"""Words of errors after which no other bucket can be written either. A Cluster that moves a slot has `TRYAGAIN` and
what follows it; the last one is of `redis_record.JOIN`.
"""

_NOT_PERMITTED: Final = ("NOPERM", "no permissions", "The user executing the script")

T = TypeVar("T")


class Connect(Protocol):
    """Makes a client, which tries nothing again by itself, and calls `on_connect` at each new connection."""

    def __call__(self, *, on_connect: Callable[[], object]) -> Redis | RedisCluster: ...


class Unusable(Exception):
    """The server cannot be used, though nothing failed on the way to it; the text says why."""


class BackOff:
    """How long to wait before the next attempt: from `first` seconds on twice as long each time, up to `longest`.

    Args:
        least_part: of that time, at least 0 and at most 1; the rest is cut short at random, so that many sidecars do
            not come back at once.
    """

    def __init__(self, first: float, longest: float, *, least_part: float = 0.5) -> None:
        self._first = self._seconds = first
        self._longest = longest
        self._least_part = least_part

    def next(self) -> float:
        """The seconds to wait now."""
        seconds = self._seconds
        self._seconds = min(2 * seconds, self._longest)
        return seconds * random.uniform(self._least_part, 1)

    def reset(self) -> None:
        """An attempt has succeeded."""
        self._seconds = self._first


async def bounded(answer: Awaitable[T]) -> T:
    """The answer, within `CALL_SECONDS`.

    Before Python 3.12 `asyncio.wait_for`, by which redis-py sends, swallows a cancellation that comes when all is sent:
    the library then waits for the answer, for `redis_client.COMMAND_SECONDS` at most, and goes on. One that comes while
    it connects becomes a failure to connect.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        async with asyncio.timeout(CALL_SECONDS):
            result = await answer
    except Exception:
        if task.cancelling() > before:
            raise asyncio.CancelledError from None
        raise
    if task.cancelling() > before:
        raise asyncio.CancelledError
    return result


def is_of_server(error: str) -> bool:
    """True when the error that one bucket met is one of the server's, and none of that bucket's."""
    return any(fault in error for fault in SERVER_FAULTS)


def is_permitted(error: Exception) -> bool:
    """False when the server refuses this user what is needed."""
    return not any(words in str(error) for words in _NOT_PERMITTED)


@cache
def digest_of(script: str) -> str:
    """The script's name on a server."""
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


def reason_of(error: Exception) -> str:
    """Why a call failed, in words that stay the same while the cause does: a cause is logged once."""
    text = str(error)
    if isinstance(error, Unusable):
        return text
    for words, reason in (
        (("WRONGPASS", "NOAUTH", "invalid username-password"), "it refuses user or password"),
        (_NOT_PERMITTED, "it does not permit what is needed"),
        (("OOM", "maxmemory"), "it is out of memory"),
        (("READONLY", "read only replica"), "it is a read-only replica"),
        (("LOADING", "loading the dataset"), "it is loading its data"),
        (("MISCONF",), "it cannot write to its disk"),
        (("CLUSTERDOWN",), "the cluster is down"),
        (("CLOCKAHEAD",), "its clock is more than a minute behind the one here"),
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
