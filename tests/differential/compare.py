"""Two answers to one request, field by field, and which of their differences are deliberate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeAlias

from google.protobuf.json_format import MessageToDict

from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse

RESET_HEADER: Final = "RateLimit-Reset"


class Missing(Enum):
    """Stands for a field that an answer has not; a field of metadata can be null."""

    MISSING = "nothing"


MISSING: Final = Missing.MISSING


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the clock's seconds before it was sent and after both services had answered."""

    message: RateLimitRequest
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A field of the answers in which they differ.

    Args:
        field: its path, as in `statuses.0.limit_remaining`.
    """

    field: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.field}: there {_shown(self.there)}, here {_shown(self.here)}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that ended with an error."""

    code: str
    text: str


Answer: TypeAlias = RateLimitResponse | Failure


def disagreements(asked: Asked, there: Answer, here: Answer) -> Iterator[Disagreement]:
    """Every field that differs; the time until a reset may by as much as the clock went on in between."""
    theirs, ours = dict(_fields(there)), dict(_fields(here))
    for field in sorted(theirs.keys() | ours.keys()):
        one, other = theirs.get(field, MISSING), ours.get(field, MISSING)
        if one == other:
            continue
        is_reset = field.endswith(".duration_until_reset") or field == f"headers.{RESET_HEADER}"
        if is_reset and MISSING not in (one, other) and abs(one - other) <= asked.after - asked.before:
            continue
        yield Disagreement(field, one, other)


def _fields(answer: Answer) -> Iterator[tuple[str, Any]]:
    if isinstance(answer, Failure):
        yield "error.code", answer.code
        yield "error.text", answer.text
        return
    plain = RateLimitResponse()
    plain.CopyFrom(answer)
    plain.ClearField("response_headers_to_add")
    plain.ClearField("dynamic_metadata")
    for name, value in _leaves("", MessageToDict(plain, preserving_proto_field_name=True)):
        # "59s"
        yield name, int(value.removesuffix("s")) if name.endswith(".duration_until_reset") else value
    yield "statuses", len(answer.statuses)
    yield "headers", [header.key for header in answer.response_headers_to_add]
    for header in answer.response_headers_to_add:
        yield f"headers.{header.key}", int(header.value)
    if answer.HasField("dynamic_metadata"):
        for name, value in _leaves("metadata", MessageToDict(answer.dynamic_metadata)):
            # Go puts one space or two between the fields, so that nobody relies on it.
            yield name, value.replace("  ", " ") if name.endswith(".limit") else value


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    items: Sequence[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    if not items:
        # Also an empty mapping or list.
        yield path, value
    for key, inner in items:
        yield from _leaves(f"{path}.{key}" if path else str(key), inner)


def _shown(value: Any) -> str:
    return MISSING.value if value is MISSING else json.dumps(value, ensure_ascii=False)
