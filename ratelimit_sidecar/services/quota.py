"""envoy.service.rate_limit_quota.v3.RateLimitQuotaService: Envoys report how many requests they admitted, and get
assignments.

`limiter.quota` decides the assignments; this file has the messages, the streams and the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Final

from envoy.service.rate_limit_quota.v3 import rlqs_pb2
from google.protobuf.message import DecodeError

from ratelimit_sidecar.limiter.key import text_of
from ratelimit_sidecar.limiter.quota import TTL_S, Quotas, QuotasFull
from ratelimit_sidecar.limiter.quota_pool import Action, QuotaStream, Usage
from ratelimit_sidecar.limiter.v1.quota_pb2 import (
    ALLOW_ALL,
    DENY_ALL,
    Abandon,
    BucketAction,
    BucketId,
    BucketUsage,
    QuotaResponse,
    UsageReports,
)
from ratelimit_sidecar.server.limits import MAX_MESSAGE_BYTES
from ratelimit_sidecar.server.rpc import Code, Handlers, Metadata, RpcError, Streaming

SERVICE_NAME: str = rlqs_pb2.DESCRIPTOR.services_by_name["RateLimitQuotaService"].full_name

_PATH: Final = f"/{SERVICE_NAME}/StreamRateLimitQuotas"

MAX_ID_BYTES: Final = 1_024
"""The longest id of a bucket. Longer ones are ignored: callers may choose their content, and ids are kept in memory."""

REPORTS_AT_ONCE: Final = 32
"""The number of buckets of a report that are handled in one go, half a millisecond, before other tasks run."""

ACTIONS_AT_ONCE: Final = 64
"""The most actions in one message."""

TICK_SECONDS: Final = 0.1
IDLE_TICK_SECONDS: Final = 1.0


class QuotaService:
    """The service, with one method, `StreamRateLimitQuotas`. Run `run` as a task.

    Args:
        now_us: returns the time of the clock of `quotas`.
        waits_for_rules: True to refuse streams until `rules_loaded`.
    """

    def __init__(self, quotas: Quotas, now_us: Callable[[], int], *, waits_for_rules: bool = False) -> None:
        self.quotas = quotas
        self._now_us = now_us
        self._waits_for_rules = waits_for_rules

    def handlers(self) -> Handlers:
        """For a front end."""
        return {_PATH: Streaming(self.stream, MAX_MESSAGE_BYTES)}

    def rules_loaded(self) -> None:
        """Stop refusing streams: rules are loaded."""
        self._waits_for_rules = False

    async def run(self) -> None:
        """Divide and charge until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS if self.quotas.pools else IDLE_TICK_SECONDS)
            self.quotas.tick(self._now_us())

    async def stream(self, requests: AsyncIterator[bytes], _metadata: Metadata) -> AsyncGenerator[bytes, None]:
        """Take serialized RateLimitQuotaUsageReports, and answer with serialized RateLimitQuotaResponses whenever there
        is something to be told.

        Raises:
            RpcError: UNAVAILABLE while there are no rules, RESOURCE_EXHAUSTED when there are too many streams,
            INVALID_ARGUMENT for something else than reports, or without a domain.
        """
        if self._waits_for_rules:
            raise RpcError(Code.UNAVAILABLE, "no rules have been loaded yet")
        woken = asyncio.Event()
        try:
            stream = self.quotas.open(woken.set)
        except QuotasFull:
            raise RpcError(Code.RESOURCE_EXHAUSTED, "too many streams of quotas") from None
        reading = asyncio.create_task(self._read(stream, requests))
        reading.add_done_callback(lambda _reading: woken.set())
        try:
            while True:
                actions = self.quotas.take(stream, self._now_us(), ACTIONS_AT_ONCE)
                if actions:
                    yield _response(actions)
                elif reading.done():
                    refusal = reading.result()
                    if refusal:
                        raise RpcError(Code.INVALID_ARGUMENT, refusal)
                    return
                else:
                    woken.clear()
                    await woken.wait()
        finally:
            self.quotas.close(stream, self._now_us())
            reading.cancel()
            await asyncio.wait([reading])

    async def _read(self, stream: QuotaStream, requests: AsyncIterator[bytes]) -> str:
        """Returns why the stream is to be ended; empty when the client has ended it."""
        domain = ""
        async for raw in requests:
            try:
                reports = UsageReports.FromString(raw)
            except DecodeError:
                return "not an envoy.service.rate_limit_quota.v3.RateLimitQuotaUsageReports"
            # It need only be said once.
            domain = text_of(reports.domain) or domain
            if not domain:
                return "the domain of quotas must not be empty"
            usages = reports.bucket_quota_usages
            for at in range(0, len(usages), REPORTS_AT_ONCE):
                if at:
                    await asyncio.sleep(0)
                part = list(self._usages(usages[at : at + REPORTS_AT_ONCE]))
                self.quotas.report(stream, domain, part, self._now_us())
        return ""

    def _usages(self, messages: Sequence[BucketUsage]) -> Iterator[Usage]:
        for message in messages:
            raw = message.bucket_id
            pairs: list[tuple[str, str]] = []
            if len(raw) <= MAX_ID_BYTES:
                try:
                    entries = BucketId.FromString(raw).bucket
                except DecodeError:
                    pass
                else:
                    # Of two entries with one key the last counts, as in every map of protobuf.
                    pairs = sorted({text_of(entry.key): text_of(entry.value) for entry in entries}.items())
            # One that is too long or cannot be read is like one without pairs.
            yield Usage(
                raw,
                tuple(pairs),
                message.num_requests_allowed,
                message.num_requests_denied,
                message.time_elapsed.seconds,
            )


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
