"""The grammar of a rules file, level by level: envoyproxy/ratelimit's, with our own optional keys.

`descriptors` stays raw here: each level is validated on its own, so that one broken descriptor hides no other problem.
A key of envoyproxy/ratelimit that is not supported yet stands in `not_yet`; supporting it means making it a field.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ratelimit_sidecar.config.bucket import BucketConfig, TokenCount
from ratelimit_sidecar.config.structure import Expected, Section, ShownDefault
from ratelimit_sidecar.limiter.rules import Unit

MAX_REQUESTS_PER_UNIT = 2**32 - 1
"""It is a uint32 in Envoy's answer."""

UNITS = tuple(unit.name.lower() for unit in Unit)


def _to_unit(value: object) -> object:
    return Unit.__members__.get(value.upper(), value) if isinstance(value, str) else value


def _check_scalar(value: object) -> object:
    if not isinstance(value, str | int | Decimal):
        raise ValueError("not a scalar")
    return value


Text = Annotated[str, Field(min_length=1), Expected("text that is not empty", of="text")]
Flag = Annotated[bool, Expected("true or false", of="plain")]
Scalar = Annotated[object, BeforeValidator(_check_scalar), Expected("text")]
RawDescriptors = Annotated[tuple[Annotated[object, Expected("a descriptor")], ...], Field(strict=False)]
UnitName = Annotated[Unit, BeforeValidator(_to_unit), Expected(f"one of {', '.join(UNITS)}", choices=UNITS)]
RequestsPerUnit = Annotated[
    int,
    Field(ge=0, le=MAX_REQUESTS_PER_UNIT),
    Expected(f"a whole number from 0 to {MAX_REQUESTS_PER_UNIT}", of="plain"),
]
Algorithm = Annotated[
    Literal["token_bucket"],
    Expected("token_bucket", choices=("token_bucket",), not_yet=("fixed_window", "sliding_window")),
]
_NEEDED = ShownDefault("required, unless unlimited")


class RateLimit(Section):
    """How much of what a descriptor matches is let through."""

    not_yet: ClassVar[frozenset[str]] = frozenset(("name", "replaces", "unit_multiplier"))

    unit: Annotated[UnitName | None, _NEEDED] = Field(
        None, description="What the requests are counted per, in any case. A month has 30 days, a year 365."
    )
    requests_per_unit: Annotated[RequestsPerUnit | None, _NEEDED] = Field(
        None, description="Requests let through per unit in the long run; 0 denies all."
    )
    unlimited: Flag = Field(
        False,
        description="`true` in place of the two keys above: everything passes, also where a wider rule would limit.",
    )


class Descriptor(Section):
    """One rule, or one step on the way to deeper ones."""

    not_yet: ClassVar[frozenset[str]] = frozenset(
        ("shadow_mode", "quota_mode", "detailed_metric", "value_to_metric", "share_threshold", "metadata")
    )

    key: Text = Field(description="Key of the entry it matches.")
    value: Annotated[Scalar | None, ShownDefault("every value")] = Field(
        None,
        description="Value of the entry it matches, taken as written (10 is the text 10). Without it every value"
        " matches, and each has a bucket of its own.",
    )
    rate_limit: RateLimit | None = Field(
        None, description="The limit, in envoyproxy/ratelimit's terms. Without it, or a bucket, what matches passes."
    )
    algorithm: Annotated[Algorithm | None, ShownDefault("token_bucket")] = Field(
        None, description="How the limit is enforced: `token_bucket`, so unused requests add up to at most `burst`."
    )
    burst: Annotated[TokenCount | None, ShownDefault("requests_per_unit")] = Field(
        None, description="Requests let through at once after a quiet time."
    )
    bucket: BucketConfig | None = Field(None, description="The limit as a token bucket, in place of rate_limit.")
    descriptors: RawDescriptors = Field(
        (), description="The same again, for descriptors with one entry more than this level has."
    )


class RulesFile(Section):
    """All rules of one domain."""

    domain: Text = Field(description="The domain that Envoy's rate limit filter sends; one file has all its rules.")
    descriptors: RawDescriptors = Field((), description="The rules for descriptors, by their first entry.")
