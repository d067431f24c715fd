"""envoy.service.rate_limit_quota.v3.RateLimitQuotaService: Envoys report how many requests they admitted, and get
assignments.

`limiter.quota` decides the assignments; this file has the messages, the streams and the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Final

import structlog

from ratelimit_sidecar.envoy_api.envoy.service.rate_limit_quota.v3 import rlqs_pb2
from ratelimit_sidecar.limiter.quota import TTL_S, Quotas
from ratelimit_sidecar.limiter.quota_pool import Action, QuotaStream
from ratelimit_sidecar.limiter.usage_reports import InvalidReports, ReportsReader
from ratelimit_sidecar.limiter.v1.quota_pb2 import (
    ALLOW_ALL,
    DENY_ALL,
    Abandon,
    BucketAction,
    QuotaResponse,
)
from ratelimit_sidecar.server.budget import Places
from ratelimit_sidecar.server.rpc import MAX_KINDS_LOGGED, Code, Handlers, Metadata, RpcError, StreamingMethod
from ratelimit_sidecar.server.turn_event import TurnEvent
from ratelimit_sidecar.server.turns import StepQueue, Turns

SERVICE_NAME: str = rlqs_pb2.DESCRIPTOR.services_by_name["RateLimitQuotaService"].full_name

_PATH: Final = f"/{SERVICE_NAME}/StreamRateLimitQuotas"

ACTIONS_AT_ONCE: Final = 64
"""The most actions in one message."""

MAX_STREAMS: Final = 1_024
"""The most streams, of which a connection may have an eighth of those free, and an address half."""

STREAM_BYTES: Final = 160_000
"""What a stream takes that has sent all but the end of a report on one bucket (`usage_reports.MAX_USAGE_BYTES`)."""

_log = structlog.stdlib.get_logger(__name__)

WARNING_US: Final = 60_000_000
"""A warning is logged once in this time at most."""

TICK_SECONDS: Final = 0.1
IDLE_TICK_SECONDS: Final = 1.0


class QuotaService:
    """The service, with one method, `StreamRateLimitQuotas`. Run `run` as a task.

    Args:
        strict_us: the clock of strict limits, and of `quotas`.
        waits_for_rules: True to refuse streams until `rules_loaded`.
        turns: of the event loop; its own if None. All that streams do is done in turns.
        max_streams: at once.
    """

    def __init__(
        self,
        quotas: Quotas,
        strict_us: Callable[[], int],
        *,
        waits_for_rules: bool = False,
        turns: Turns | None = None,
        max_streams: int = MAX_STREAMS,
    ) -> None:
        self.quotas = quotas
        self.places = Places(max_streams)
        self._strict_us = strict_us
        self._waits_for_rules = waits_for_rules
        self._turns = turns or Turns()
        self._queue = StepQueue()
        self._logged: set[str] = set()
        """Why streams were refused."""

    def handlers(self) -> Handlers:
        """For a front end."""
        return {_PATH: StreamingMethod(self.stream, takes_parts=True, places=self.places)}

    def rules_loaded(self) -> None:
        """Stop refusing streams: rules are loaded."""
        self._waits_for_rules = False

    async def run(self) -> None:
        """Divide and charge until cancelled."""
        warned_us = refused = 0
        while True:
            await asyncio.sleep(TICK_SECONDS if self.quotas.pools else IDLE_TICK_SECONDS)
            self.quotas.tick(self._strict_us())
            before, refused = refused, self.quotas.counts.errors["no_room"]
            if refused > before and self._strict_us() - warned_us >= WARNING_US:
                warned_us = self._strict_us()
                _log.warning("quota_buckets_full", no_room=refused, buckets=self.quotas.bucket_count)
            while self.quotas.drop_closed(self._strict_us()):  # noqa: ASYNC110 (it does the work itself)
                await asyncio.sleep(0)

    async def stream(self, requests: AsyncIterator[bytes], _metadata: Metadata) -> AsyncGenerator[bytes, None]:
        """Take serialized RateLimitQuotaUsageReports in parts, and answer with serialized RateLimitQuotaResponses
        whenever there are actions to send.

        Raises:
            RpcError: UNAVAILABLE while there are no rules, INVALID_ARGUMENT for something else than reports, or
            without a domain.
        """
        if self._waits_for_rules:
            raise RpcError(Code.UNAVAILABLE, "no rules have been loaded yet")
        woken = TurnEvent(self._turns, self._queue)
        stream = self.quotas.open(woken.set)
        reading = asyncio.create_task(self._read(stream, requests))
        reading.add_done_callback(lambda _reading: woken.set())
        try:
            while True:
                actions = self.quotas.take_actions(stream, self._strict_us(), ACTIONS_AT_ONCE)
                if actions:
                    yield _response(actions)
                elif stream.due:
                    await woken.turn()
                elif reading.done():
                    refusal = reading.result()
                    if refusal is not None:
                        raise refusal
                    return
                else:
                    await woken.wait()
        finally:
            self.quotas.close(stream)
            reading.cancel()
            await asyncio.wait([reading])

    async def _read(self, stream: QuotaStream, requests: AsyncIterator[bytes]) -> RpcError | None:
        """Returns why the stream is to be ended; None when the client has ended it."""
        reader = ReportsReader()
        next_step = TurnEvent(self._turns, self._queue)
        try:
            async for part in requests:
                reader.feed(part)
                while reader.has_more:
                    await next_step.turn()
                    usages = reader.usages()
                    self.quotas.report(stream, reader.domain, usages, self._strict_us())
            reader.end()
        except InvalidReports as invalid:
            refusal = RpcError(Code.INVALID_ARGUMENT, str(invalid))
        except RpcError as broken:
            refusal = broken.with_traceback(None)
        else:
            return None
        self._note_refusal(refusal.message)
        return refusal

    def _note_refusal(self, why: str) -> None:
        """Count it, and log it if it is the first of its kind: the Envoy comes back with the same every few seconds."""
        self.quotas.counts.errors["invalid"] += 1
        if why not in self._logged and len(self._logged) < MAX_KINDS_LOGGED:
            self._logged.add(why)
            _log.warning("quota_reports_refused", why=why)


def _response(actions: Sequence[Action]) -> bytes:
    raw: bytes = QuotaResponse(bucket_action=[_message(action) for action in actions]).SerializeToString()
    return raw


def _message(action: Action) -> BucketAction:
    told = action.assignment
    message = BucketAction(bucket_id=action.bucket_id)
    if told is None:
        message.abandon_action.CopyFrom(Abandon())
        return message
    assignment = message.quota_assignment_action
    # Unset it would be over at once, and nothing but whole seconds counts.
    assignment.assignment_time_to_live.seconds = TTL_S
    strategy = assignment.rate_limit_strategy
    if told.max_tokens:
        bucket = strategy.token_bucket
        bucket.max_tokens = told.max_tokens
        bucket.tokens_per_fill.value = told.tokens_per_fill
        bucket.fill_interval.seconds = told.fill_interval_s
    else:
        strategy.blanket_rule = ALLOW_ALL if told.allows_all else DENY_ALL
    return message
