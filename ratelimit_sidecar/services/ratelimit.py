"""envoy.service.ratelimit.v3.RateLimitService: the limiter's decision as a unary call, measured and perhaps traced.

A call that isn't sampled costs two clock readings and one observation besides, 0.3 us
(`benchmarks/telemetry.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Final, Protocol

from ratelimit_sidecar.crdt.waiting import PendingDecision
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.plan import Plan
from ratelimit_sidecar.limiter.request import InvalidRequest
from ratelimit_sidecar.server.rpc import Code, FailureLog, Handlers, Metadata, RpcError
from ratelimit_sidecar.services.waits import Waits
from ratelimit_sidecar.telemetry.latency import LatencyHistogram

SERVICE_NAME = "envoy.service.ratelimit.v3.RateLimitService"

_PATH: Final = f"/{SERVICE_NAME}/ShouldRateLimit"

MAX_TIMEOUT_PART: Final = 0.75
"""The most of its timeout that a request waits for tokens."""

LEAST_LEFT_SECONDS: Final = 0.02
"""What is left of its timeout at least: hundreds may be answered at once, and Envoy lets requests pass whose answer is
late."""

_SECONDS: Final = {b"H": 3_600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
"""Units of a `grpc-timeout` (PROTOCOL-HTTP2.md)."""

_perf_counter_ns: Final = time.perf_counter_ns


class RequestTracer(Protocol):
    """Records the calls whose caller wants them traced."""

    def sampled(self, metadata: Metadata) -> object | None:
        """The caller's span context when it is sampled, else None. It is not asked where no header may say so."""

    def record(self, parent: object, started_ns: int, ended_ns: int, plan: Plan, response: bytes) -> str | None:
        """A finished call.

        Args:
            parent: what `sampled` returned.
            started_ns: nanoseconds since the epoch, as is ended_ns.

        Returns:
            The id of its trace, when that is kept.
        """


class RateLimitService:
    """The service, with one method, `ShouldRateLimit`.

    Args:
        now_us: see `Limiter.decide`.
        waits_for_rules: True to refuse calls until `rules_loaded`.
        waits: lets requests wait, where their rule says so; None decides all at once.
    """

    def __init__(
        self,
        limiter: Limiter,
        now_us: Callable[[], int],
        latency: LatencyHistogram,
        tracer: RequestTracer,
        *,
        waits_for_rules: bool = False,
        waits: Waits | None = None,
    ) -> None:
        self.errors = {"invalid": 0, "internal": 0, "no_rules": 0}
        """Calls without an answer since the start, by reason: invalid requests, calls before there were rules, internal
        errors.
        """
        self._waits_for_rules = waits_for_rules
        self._limiter = limiter
        self._waits = waits
        self._now_us = now_us
        # Typed as the class, so that compiled code calls it directly.
        self._latency = latency
        self._tracer = tracer
        self._failures = FailureLog()

    def handlers(self) -> Handlers:
        """For a front end."""
        return {_PATH: self.should_rate_limit}

    def rules_loaded(self) -> None:
        """Stop refusing calls: rules are loaded."""
        self._waits_for_rules = False

    def should_rate_limit(
        self, request: bytes, metadata: Metadata, all_headers: bool = False
    ) -> bytes | PendingDecision:
        """Answer a serialized RateLimitRequest with a serialized RateLimitResponse, perhaps later.

        Other services that ask the same question call it, too.

        Args:
            metadata: of the call that led to it, in which a trace may be named.
            all_headers: see `Limiter.decide`.

        Raises:
            RpcError: INVALID_ARGUMENT for what `Limiter.decide` calls invalid, UNAVAILABLE while there are no rules.
        """
        if self._waits_for_rules:
            self.errors["no_rules"] += 1
            raise RpcError(Code.UNAVAILABLE, "no rules have been loaded yet")
        started_ns = _perf_counter_ns()
        try:
            if self._waits is None:
                response: bytes | PendingDecision = self._limiter.decide(request, self._now_us(), all_headers)
            else:
                response = self._limiter.decide_or_wait(request, self._now_us(), all_headers)
        except InvalidRequest as error:
            self.errors["invalid"] += 1
            raise RpcError(Code.INVALID_ARGUMENT, str(error)) from error
        except Exception:
            self.errors["internal"] += 1
            raise
        elapsed_ns = _perf_counter_ns() - started_ns
        self._latency.observe(elapsed_ns)
        if isinstance(response, PendingDecision):
            return self._hold(response, metadata)
        try:
            parent = self._tracer.sampled(metadata) if metadata.may_be_sampled else None
            if parent is not None:
                ended_ns = time.time_ns()
                plan = self._limiter.last_plan
                assert plan is not None
                trace_id = self._tracer.record(parent, ended_ns - elapsed_ns, ended_ns, plan, response)
                if trace_id is not None:
                    self._latency.exemplify(trace_id, elapsed_ns, ended_ns)
        except Exception as failure:
            # An error in place of the answer would let pass what was denied.
            self._failures.log_first(_PATH, failure, metadata)
        return response

    def _hold(self, waiting: PendingDecision, metadata: Metadata) -> PendingDecision:
        assert self._waits is not None
        most_s = inf
        try:
            most_s = max_wait_s(metadata)
        finally:
            # The request waits already, so its wait must end whatever happens.
            self._waits.hold(waiting, most_s)
        plan, began_ns = self._limiter.last_plan, time.time_ns()
        assert plan is not None
        if metadata.may_be_sampled:
            waiting.then(partial(self._trace_wait, metadata, plan, began_ns))
        return waiting

    def _trace_wait(self, metadata: Metadata, plan: Plan, began_ns: int, response: bytes) -> bytes:
        try:
            parent = self._tracer.sampled(metadata)
            if parent is not None:
                self._tracer.record(parent, began_ns, time.time_ns(), plan, response)
        except Exception as failure:
            self._failures.log_first(_PATH, failure, metadata)
        return response


def max_wait_s(metadata: Metadata) -> float:
    """The seconds that a request with these headers may wait, so that its answer is in time; infinite without a
    timeout.
    """
    for name, value in metadata:
        if name == b"grpc-timeout" and len(value) <= 9 and value[:-1].isdigit() and value[-1:] in _SECONDS:
            timeout_s = int(value[:-1]) * _SECONDS[value[-1:]]
            return max(0.0, min(timeout_s * MAX_TIMEOUT_PART, timeout_s - LEAST_LEFT_SECONDS))
    return inf
