"""A RateLimitResponse's codes and levels, serialized by hand: a third of the time that building a message takes.

The part that all statuses of a rule and code have in common (code, current_limit) is serialized once, as their *head*.
A decision adds how much remains and when the bucket is full again. Field numbers are those of
envoy/service/ratelimit/v3/rls.proto. The bytes are exactly those of protobuf itself; a property test checks it.
"""

from __future__ import annotations

from typing import Final

from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse

_TABLE_BITS: Final = 14
_TABLE_MASK: Final = (1 << _TABLE_BITS) - 1

_LAST: Final = tuple(
    bytes((number,) if number <= 0x7F else (number & 0x7F | 0x80, number >> 7)) for number in range(1 << _TABLE_BITS)
)
"""Varints of numbers below 2**14."""

_MORE: Final = tuple(bytes((number & 0x7F | 0x80, number >> 7 | 0x80)) for number in range(1 << _TABLE_BITS))
"""The first two varint bytes of a larger number, by its lowest 14 bits."""

_DURATION: Final = tuple(bytes((0x22, length)) for length in range(8))
"""Tag and length of `duration_until_reset`, by length."""

OVERALL_OK: Final[bytes] = RateLimitResponse(overall_code=RateLimitResponse.OK).SerializeToString()
OVERALL_OVER_LIMIT: Final[bytes] = RateLimitResponse(overall_code=RateLimitResponse.OVER_LIMIT).SerializeToString()
"""The overall code; an answer begins with it."""

_MAX_UINT32: Final = 2**32 - 1
_SECOND_US: Final = 1_000_000
_MAX_DURATION_SECONDS: Final = 315_576_000_000
"""The largest google.protobuf.Duration: 10,000 years."""


def varint(number: int) -> bytes:
    """A number as protobuf's varint.

    Args:
        number: 0 or more.
    """
    if number <= _TABLE_MASK:
        return _LAST[number]
    return _MORE[number & _TABLE_MASK] + varint(number >> _TABLE_BITS)


def status_head(code: RateLimitResponse.Code, current_limit: RateLimitResponse.RateLimit | None) -> bytes:
    """The head of the statuses of one rule and code."""
    raw: bytes = RateLimitResponse.DescriptorStatus(code=code, current_limit=current_limit).SerializeToString()
    return raw


def bare_status(code: RateLimitResponse.Code, remaining: int) -> bytes:
    """A status without a bucket, as a field of an answer."""
    status = RateLimitResponse.DescriptorStatus(code=code, limit_remaining=remaining)
    raw: bytes = RateLimitResponse(statuses=[status]).SerializeToString()
    return raw


def encode_status(head: bytes, remaining: int, reset_us: int) -> bytes:
    """A status with the levels of a bucket, as a field of an answer.

    Args:
        head: from `status_head`.
        remaining: tokens; 0 or more. The field holds no more than 2**32 - 1.
        reset_us: microseconds until the bucket is full; 0 or more. It is sent in whole seconds, rounded up, as in
            envoyproxy/ratelimit: Envoy cuts off fractions, so callers would come back too early.
    """
    seconds = -(-reset_us // _SECOND_US)
    duration = b""
    # The usual sizes of numbers are handled inline: calls would cost a tenth of the whole.
    if seconds >> 2 * _TABLE_BITS:
        duration = b"\x08" + varint(min(seconds, _MAX_DURATION_SECONDS))
    elif seconds > _TABLE_MASK:
        duration = b"\x08" + _MORE[seconds & _TABLE_MASK] + _LAST[seconds >> _TABLE_BITS]
    elif seconds:
        duration = b"\x08" + _LAST[seconds]
    if remaining >> 2 * _TABLE_BITS:
        body = head + b"\x18" + varint(min(remaining, _MAX_UINT32)) + _DURATION[len(duration)] + duration
    elif remaining > _TABLE_MASK:
        left = _MORE[remaining & _TABLE_MASK] + _LAST[remaining >> _TABLE_BITS]
        body = head + b"\x18" + left + _DURATION[len(duration)] + duration
    elif remaining:
        body = head + b"\x18" + _LAST[remaining] + _DURATION[len(duration)] + duration
    else:
        body = head + _DURATION[len(duration)] + duration
    # The head contains a name from the rules, which may be long.
    return b"\x12" + varint(len(body)) + body
