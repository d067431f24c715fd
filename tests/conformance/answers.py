"""What came back, in one form whoever asked, and its comparison with what a case expects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conformance.corpus import Request, Status
from google.protobuf.json_format import MessageToDict
from google.protobuf.wrappers_pb2 import UInt64Value

from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse


@dataclass(frozen=True, slots=True)
class SeenStatus:
    code: str
    limit: tuple[int, str] | None
    name: str
    remaining: int
    reset: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    code: str
    statuses: tuple[SeenStatus, ...]
    headers: tuple[tuple[str, str], ...]
    body: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refusal:
    text: str


def message_of(request: Request, domain: str) -> RateLimitRequest:
    """The request of a case as Envoy would send it."""
    message = RateLimitRequest(domain=domain if request.domain is None else request.domain, hits_addend=request.hits)
    for asked in request.ask:
        descriptor = message.descriptors.add(
            hits_addend=None if asked.hits is None else UInt64Value(value=asked.hits),
        )
        for key, value in asked.entries:
            descriptor.entries.add(key=key, value=value)
        if asked.limit is not None:
            descriptor.limit.requests_per_unit = asked.limit[0]
            # type.v3.RateLimitUnit; it has the same numbers.
            descriptor.limit.unit = RateLimitResponse.RateLimit.Unit.Value(asked.limit[1].upper())
    return message


def answer_of(response: RateLimitResponse) -> Answer:
    assert not response.request_headers_to_add
    return Answer(
        code=RateLimitResponse.Code.Name(response.overall_code),
        statuses=tuple(map(_seen_status, response.statuses)),
        headers=tuple((header.key, header.value) for header in response.response_headers_to_add),
        body=response.raw_body.decode(),
        metadata=MessageToDict(response.dynamic_metadata),
    )


def _seen_status(status: RateLimitResponse.DescriptorStatus) -> SeenStatus:
    limit = status.current_limit
    unit = RateLimitResponse.RateLimit.Unit.Name(limit.unit).lower()
    reset = status.duration_until_reset
    return SeenStatus(
        code=RateLimitResponse.Code.Name(status.code),
        limit=(limit.requests_per_unit, unit) if status.HasField("current_limit") else None,
        name=limit.name,
        remaining=status.limit_remaining,
        reset=reset.seconds if status.HasField("duration_until_reset") else None,
    )


def check(request: Request, seen: Answer | Refusal) -> None:
    """Raise AssertionError when what was seen is not what the case expects."""
    if isinstance(seen, Refusal):
        assert request.error is not None, f"refused: {seen.text}"
        assert request.error in seen.text
        return
    assert seen.code == request.answer, seen
    assert [_only_mentioned(expected, status) for expected, status in _pairs(request, seen.statuses)] == [
        _mentioned(expected) for expected, _ in _pairs(request, seen.statuses)
    ]
    names = [name for name, _ in seen.headers]
    assert len(set(names)) == len(names), seen.headers
    if request.headers is not None:
        assert dict(seen.headers) == request.headers
    assert request.header.items() <= dict(seen.headers).items()
    if request.body is not None:
        assert seen.body == request.body
    if request.metadata is not None:
        assert seen.metadata == request.metadata
    if request.merged is not None:
        assert seen.metadata.get("metadata") == request.merged


def _pairs(request: Request, statuses: Sequence[SeenStatus]) -> list[tuple[Status, SeenStatus]]:
    return list(zip(request.expected_statuses, statuses, strict=True))


def _mentioned(expected: Status) -> dict[str, object]:
    mentioned = expected.model_dump(exclude_none=True)
    return mentioned | ({"limit": None} if expected.limit == "none" else {})


def _only_mentioned(expected: Status, status: SeenStatus) -> dict[str, object]:
    return {name: getattr(status, name) for name in expected.model_dump(exclude_none=True)}
