"""A connection to the Redis of a fabric: it calls scripts within a bounded time, and counts how often it was made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from redis import exceptions
from redis.asyncio import Redis, RedisCluster

from ratelimit_sidecar.persistence.redis_calls import Connect, bounded, digest_of
from ratelimit_sidecar.persistence.redis_record import BadRecord

FAILURES: Final = (exceptions.RedisError, OSError, TimeoutError, BadRecord)
"""What a call, and reading its answer, may raise."""

ScriptCall = tuple[Sequence[bytes], Sequence[bytes | str]]
"""The keys and arguments of a script; all keys are of one shard."""


class RedisLink:
    """The connection. Call `close` after a call without an answer.

    Args:
        connect: called at the first call, and again after `close`.
    """

    def __init__(self, connect: Connect) -> None:
        self.connections = 0
        """Connections made so far. After another one the server may have lost data, or be an older copy of itself."""
        self._connect = connect
        self._client: Redis | RedisCluster | None = None

    async def call(self, script: str, calls: Sequence[ScriptCall]) -> list[Any]:
        """Run the script for each of the calls, in one pipeline.

        Returns:
            The answers. Where there are several calls, that of one that failed is an exception.

        Raises:
            exceptions.RedisError, OSError, TimeoutError, BadRecord: nothing was answered in time, or nonsense.
        """
        if not calls:
            return []
        if self._client is None:
            self._client = self._connect(on_connect=self._count)
        client = self._client
        try:
            try:
                return await bounded(_evaluate(client, script, calls))
            except exceptions.NoScriptError:
                # SCRIPT FLUSH, or a server or node that is new.
                await bounded(client.script_load(script))
                return await bounded(_evaluate(client, script, calls))
        except FAILURES:
            raise
        except Exception as error:
            # The library raises whatever it stumbles over when the server talks nonsense.
            raise BadRecord(repr(error)[:200]) from error

    async def close(self) -> None:
        """Close the connections; the next call opens others."""
        client, self._client = self._client, None
        if client is not None:
            with suppress(*FAILURES):
                await bounded(client.aclose())

    def _count(self) -> None:
        self.connections += 1


async def _evaluate(client: Redis | RedisCluster, script: str, calls: Sequence[ScriptCall]) -> list[Any]:
    digest = digest_of(script)
    if len(calls) == 1:
        [(keys, arguments)] = calls
        return [await client.evalsha(digest, len(keys), *keys, *arguments)]
    pipeline = client.pipeline(transaction=False) if isinstance(client, Redis) else client.pipeline()
    for keys, arguments in calls:
        pipeline.execute_command("EVALSHA", digest, len(keys), *keys, *arguments)
    answers: list[Any] = await pipeline.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, exceptions.NoScriptError):
            raise answer
    return answers
