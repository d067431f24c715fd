"""Settings that apply to every answer, whichever rule it comes from; most are envoyproxy/ratelimit's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ResponseHeaders:
    """Names of the headers that tell callers their limit, what is left of it, and in how many seconds it is reset."""

    limit: str = "RateLimit-Limit"
    remaining: str = "RateLimit-Remaining"
    reset: str = "RateLimit-Reset"


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """The settings for all rules of a sidecar.

    Args:
        shadow_mode: True if the overall code is always OK.
        quota_mode: True if every rule is in quota mode.
        near_limit_ratio: hits above this part of a limit count as near it; 0 to 1.
        response_headers: None for none.
        all_limits: True if every answer has all limits of the request, in RateLimit-Policy and RateLimit.
        dynamic_metadata: True if answers have metadata about the request and of the rules that admitted.
    """

    shadow_mode: bool = False
    quota_mode: bool = False
    near_limit_ratio: float = 0.8
    response_headers: ResponseHeaders | None = None
    all_limits: bool = False
    dynamic_metadata: bool = False
