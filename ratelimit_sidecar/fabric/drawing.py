"""The ticks of a sidecar that draws tokens of strict limits from its region's accounts.

A tick is one pipelined call, for some of the buckets in use. No request waits for it: a bucket decides by what it
holds. While the server does not answer, that is spent, and then denied.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import structlog

from ratelimit_sidecar.crdt.draw_policy import draw_needs
from ratelimit_sidecar.crdt.granted import GrantedBucket, GrantLedger, Needs
from ratelimit_sidecar.fabric.account_calls import AccountCalls, Asked
from ratelimit_sidecar.fabric.accounts import DRAW
from ratelimit_sidecar.fabric.redis_link import FAILURES, RedisLink, ScriptCall
from ratelimit_sidecar.fabric.scripts import FabricKeys
from ratelimit_sidecar.fabric.status import DrawStatus
from ratelimit_sidecar.persistence.redis_calls import BackOff, Connect, reason_of
from ratelimit_sidecar.persistence.time_slice import TimeSlice

TICK_SECONDS: Final = 0.05

TICK_BUCKETS: Final = 256
"""The most buckets of a call, of all shards together: some 20 us each here, and 10 us of the server."""

TICK_BYTES: Final = 1 << 18
"""A call takes no further bucket once its keys have so many bytes."""

LOOKED_BUCKETS: Final = 16 * TICK_BUCKETS
"""The most buckets looked at for a call. Where callers invent keys, most are no longer used when their turn comes."""

FIRST_WAIT_SECONDS: Final = 0.1
MAX_WAIT_SECONDS: Final = 1.0
"""The first and the longest wait between two attempts; see `BackOff`. Shorter than grants are."""

LAST_CALLS_SECONDS: Final = 3.0
"""The time for giving back, at a stop."""

NeedsOf = Callable[[GrantedBucket, int], Needs | None]

_log = structlog.stdlib.get_logger(__name__)


class Drawing:
    """Draws tokens for the strict buckets of one sidecar. Call `run`, and `give_back` at the stop.

    Args:
        ledger: of this sidecar.
        region: this sidecar's, as a member of strict limits.
        strict_us: the clock of the ledger's buckets.
        needs: says what a bucket needs to draw and give back.
    """

    def __init__(
        self,
        connect: Connect,
        keys: FabricKeys,
        ledger: GrantLedger,
        strict_us: Callable[[], int],
        *,
        region: str,
        needs: NeedsOf = draw_needs,
    ) -> None:
        self.status = DrawStatus()
        self._link = RedisLink(connect)
        self._keys = keys
        self._ledger = ledger
        self._strict_us = strict_us
        self._needs = needs
        self._shards = [AccountCalls(region, self.status, ledger.places, len(keys.shards)) for _ in keys.shards]
        self._back_off = BackOff(FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS)

    async def run(self) -> None:
        """Draw, for ever."""
        clock = asyncio.get_running_loop().time
        try:
            while True:
                began, began_working = clock(), time.thread_time()
                is_answered = await self.tick()
                worked = time.thread_time() - began_working
                # With very many buckets a quarter of the loop's time at most.
                # At random, so that nobody is always the first to get what was refilled.
                seconds = max(TICK_SECONDS * random.uniform(0.5, 1.5) - (clock() - began), 3 * worked)
                await asyncio.sleep(seconds if is_answered else self._back_off.next())
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connections; the next call opens others."""
        await self._link.close()

    async def give_back(self) -> None:
        """Give back what is held; for the stop. `run` is over by then, and no request comes any more."""
        with suppress(TimeoutError, *FAILURES):
            async with asyncio.timeout(LAST_CALLS_SECONDS):
                for _ in range(-(-self._ledger.active // TICK_BUCKETS)):
                    await self._call(lambda _bucket, _now_us: Needs(0, 0))
        await self.close()

    async def tick(self) -> bool:
        """One call, if there is anything to call for. What goes wrong is logged when it is something else than the last
        time.

        Returns:
            False when not all was answered.
        """
        try:
            return await self._call(self._needs)
        except FAILURES as error:
            self._failed(error)
            await self.close()
            return False
        except asyncio.CancelledError:
            # An answer may be half read.
            await self.close()
            raise

    def _answered(self) -> None:
        self._back_off.reset()
        if self.status.degraded_reason:
            self.status.degraded_reason = ""
            _log.info("drawing_again")

    def _failed(self, error: Exception) -> None:
        self.status.failed += 1
        reason = reason_of(error)
        if reason != self.status.degraded_reason:
            self.status.degraded_reason = reason
            _log.error("not_drawing", reason=reason, error=str(error) or repr(error))

    async def _call(self, needs_of: NeedsOf) -> bool:
        """Returns False when a shard of a Cluster could not be asked."""
        asked = await self._asked(needs_of)
        if not asked:
            return True
        sent_us = self._strict_us()
        calls: list[ScriptCall] = [
            (self._keys.shards[number].of_accounts, self._shards[number].arguments(each, sent_us))
            for number, each in asked.items()
        ]
        answers = await self._link.call(DRAW, calls)
        failure: Exception | None = None
        time_slice = TimeSlice()
        for (number, each), answer in zip(asked.items(), answers, strict=True):
            if isinstance(answer, Exception):
                failure = answer
            else:
                self._shards[number].receive(each, answer, sent_us)
            await time_slice.rest_when_due()
        if failure is None:
            self._answered()
        else:
            self._failed(failure)
        return failure is None

    async def _asked(self, needs_of: NeedsOf) -> dict[int, list[Asked]]:
        asked: dict[int, list[Asked]] = {}
        time_slice = TimeSlice()
        size = 0
        left = TICK_BUCKETS
        for _ in range(min(self._ledger.active, LOOKED_BUCKETS)):
            await time_slice.rest_when_due()
            strict_us = self._strict_us()
            bucket = self._ledger.next_active(strict_us)
            if bucket is None:
                continue
            left -= 1
            needed = needs_of(bucket, strict_us)
            if needed is not None:
                number = self._keys.shard_of(bucket.key)
                said = self._shards[number].ask(bucket, needed)
                if said is not None:
                    asked.setdefault(number, []).append(said)
                    size += len(bucket.key)
            if not left or size >= TICK_BYTES:
                break
        return asked
