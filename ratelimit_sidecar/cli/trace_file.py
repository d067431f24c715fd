"""Requests from a file for `explain --trace`: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, BinaryIO, NamedTuple

from google.protobuf.json_format import ParseDict, ParseError

from ratelimit_sidecar.envoy_api.envoy.service.auth.v3.external_auth_pb2 import CheckRequest
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest

MAX_LINE_BYTES = 1_048_576

FORMAT = """\
A trace has one JSON object a line:

\b
  {"time": 1767225600.25, "domain": "shop", "descriptors": [[["user", "eve"]]]}
  {"time": "2026-01-01T00:00:01Z", "domain": "shop", "hits": 2,
   "descriptors": [[["plan", "gold"], ["user", "eve"]],
                   {"entries": [{"key": "path", "value": "/"}]}]}
  {"time": 1767225602, "check": {"attributes": {"request": {"http": {"path": "/"}}}}}
  {"time": 1767225605, "domain": "shop", "bucket_id": {"user": "eve"}, "requests": 40}

\b
  time         seconds since the epoch, or ISO 8601 (UTC, unless it says otherwise)
  domain       of Envoy's filter
  descriptors  each a list of [key, value], or a RateLimitDescriptor as JSON
  hits         the request's hits_addend; 1 when absent
  check        over ext_authz: a CheckRequest as JSON, which says itself what else is here
  bucket_id    of the quota filter, as in its reports; hits and descriptors are in its place
  requests     in the report: allowed and denied ones together,
  seconds      evenly in so many before that time; 5 when absent
"""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND_US = 1_000_000
_LAST_SECOND = 253_402_300_799
"""The last second of the year 9999."""
_KNOWN = ("time", "domain", "descriptors", "hits")
_KNOWN_OF_CHECK = ("time", "check")
_KNOWN_OF_REPORT = ("time", "domain", "bucket_id", "requests", "seconds")
_REPORT_SECONDS = 5
"""The usual interval of reports of Envoy's quota filter."""
MAX_REPORTED = 1_000_000
"""The most requests, and seconds, of one report."""


class BadLine(Exception):
    """A broken line; the text says why."""


class RecordedRequests(NamedTuple):
    """A request, or several equal ones.

    Args:
        at_us: the time of the last one, in microseconds since the epoch.
        within_us: they were made evenly in this time.
    """

    at_us: int
    request: RateLimitRequest | CheckRequest
    number: int = 1
    within_us: int = 0

    def times_us(self) -> Iterator[int]:
        """The time of each of them."""
        for left in range(self.number - 1, -1, -1):
            yield max(0, self.at_us - self.within_us * left // self.number)


class TraceLine(NamedTuple):
    """One line of a trace.

    Args:
        number: from 1.
        size_bytes: the line's size, to show progress.
        recorded: the requests, or the problem of the line.
    """

    number: int
    size_bytes: int
    recorded: RecordedRequests | BadLine


def read_trace(file: BinaryIO) -> Iterator[TraceLine]:
    """All lines but empty ones, one at a time."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        size = len(line)
        try:
            if size > MAX_LINE_BYTES:
                size += _skip_line(file)
                raise BadLine(f"longer than {MAX_LINE_BYTES} bytes")
            if not line.strip():
                continue
            recorded = parse_line(line)
        except BadLine as error:
            yield TraceLine(number, size, error)
        else:
            yield TraceLine(number, size, recorded)


def parse_line(line: bytes) -> RecordedRequests:
    """The requests in a line.

    Raises:
        BadLine: it has none.
    """
    try:
        item = json.loads(line)
    except ValueError as error:
        raise BadLine(f"not JSON: {error}") from error
    except RecursionError as error:
        raise BadLine("nested too deeply") from error
    if not isinstance(item, dict):
        raise BadLine("not a JSON object")
    known = _KNOWN_OF_CHECK if "check" in item else _KNOWN_OF_REPORT if "bucket_id" in item else _KNOWN
    unknown = [name for name in item if name not in known]
    if unknown:
        raise BadLine(f"unknown key {unknown[0]!r}; known are {', '.join(known)}")
    if "time" not in item:
        raise BadLine("no time")
    at_us = _microseconds(item["time"])
    if "check" in item:
        return RecordedRequests(at_us, _check_of(item["check"]))
    if "bucket_id" in item:
        return _report_of(at_us, item)
    descriptors = item.get("descriptors")
    if not isinstance(descriptors, list):
        raise BadLine("descriptors is no list")
    try:
        request = RateLimitRequest(domain=item.get("domain"), hits_addend=item.get("hits"))
        for descriptor in descriptors:
            _add_descriptor(request, descriptor)
    except (TypeError, ValueError, ParseError) as error:
        raise BadLine(f"no rate limit request: {' '.join(str(error).split())}") from error
    return RecordedRequests(at_us, request)


def _check_of(item: object) -> CheckRequest:
    if not isinstance(item, dict):
        raise BadLine("check is no object")
    request = CheckRequest()
    try:
        ParseDict(item, request)
    except (AttributeError, TypeError, ParseError) as error:
        raise BadLine(f"no CheckRequest: {' '.join(str(error).split())}") from error
    return request


def _report_of(at_us: int, item: dict[str, Any]) -> RecordedRequests:
    bucket_id, number, seconds = item["bucket_id"], item.get("requests"), item.get("seconds", _REPORT_SECONDS)
    if not (isinstance(bucket_id, dict) and all(isinstance(text, str) for text in bucket_id.values())):
        raise BadLine("bucket_id is no object of texts")
    for name, value in (("requests", number), ("seconds", seconds)):
        if type(value) is not int or not 0 <= value <= MAX_REPORTED:
            raise BadLine(f"{name} is no whole number from 0 to {MAX_REPORTED}")
    assert isinstance(number, int)
    assert isinstance(seconds, int)
    try:
        request = RateLimitRequest(domain=item.get("domain"))
        _add_descriptor(request, [[key, value] for key, value in bucket_id.items()])
    except (TypeError, ValueError) as error:
        raise BadLine(f"no report of a quota: {' '.join(str(error).split())}") from error
    return RecordedRequests(at_us, request, number, seconds * _SECOND_US)


def _add_descriptor(request: RateLimitRequest, item: object) -> None:
    descriptor = request.descriptors.add()
    if isinstance(item, dict):
        ParseDict(item, descriptor)
        return
    if not isinstance(item, list):
        raise BadLine(f"a descriptor is neither a list of [key, value] nor an object: {json.dumps(item)}")
    # Not by way of ParseDict: it takes longer than the decision.
    for pair in item:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadLine(f"an entry of a descriptor is no [key, value] of texts: {json.dumps(pair)}")
        descriptor.entries.add(key=pair[0], value=pair[1])


def _microseconds(value: object) -> int:
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError as error:
            raise BadLine(f"time is neither a number of seconds nor ISO 8601: {value!r}") from error
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        since = moment - _EPOCH
        at_us = (since.days * 86_400 + since.seconds) * _SECOND_US + since.microseconds
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # A double still tells microseconds apart in this range.
        at_us = round(value * _SECOND_US) if 0 <= value <= _LAST_SECOND else -1
    else:
        raise BadLine(f"time is neither a number of seconds nor ISO 8601: {value!r}")
    if at_us < 0:
        raise BadLine(f"time is before 1970 or after 9999: {value}")
    return at_us


def _skip_line(file: BinaryIO) -> int:
    skipped = 0
    while part := file.readline(MAX_LINE_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped
