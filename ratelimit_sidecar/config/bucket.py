"""`bucket: {capacity, refillRate}`: a token bucket in its own terms, in both kinds of file."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from ratelimit_sidecar.config.structure import Expected, Section
from ratelimit_sidecar.crdt.limit import DEFAULT_MAX_DEBT, MAX_CAPACITY, MAX_PERIOD_US, MAX_TOKENS, TokenBucketLimit

_SECOND_US = 1_000_000


def _per_microsecond(refill_rate: Decimal) -> Fraction:
    return Fraction(refill_rate) / _SECOND_US


def _to_decimal(value: object) -> object:
    return Decimal(value) if type(value) is int else value


def _check_rate(value: Decimal) -> Decimal:
    rate = _per_microsecond(value)
    if not 0 < rate.numerator <= MAX_TOKENS or rate.denominator > MAX_PERIOD_US:
        raise ValueError("not a rate of a TokenBucketLimit")
    return value


TokenCount = Annotated[
    int, Field(ge=1, le=MAX_CAPACITY), Expected(f"a whole number from 1 to {MAX_CAPACITY}", quoting="plain")
]

RefillRate = Annotated[
    Decimal,
    BeforeValidator(_to_decimal),
    AfterValidator(_check_rate),
    # Any number of that shape is in range; of the longer ones, those with an exact ratio within TokenBucketLimit's.
    Expected("a number above 0 with at most 12 digits, 9 of them after the point", quoting="plain"),
]


class BucketConfig(Section):
    """A token bucket."""

    capacity: TokenCount = Field(description="Tokens a full bucket holds: the largest burst.")
    refill_rate: RefillRate = Field(
        alias="refillRate", description="Tokens added per second, exact in decimals: 0.1 is one token in ten seconds."
    )

    def limit(self, max_debt: int = DEFAULT_MAX_DEBT) -> TokenBucketLimit:
        rate = _per_microsecond(self.refill_rate)
        return TokenBucketLimit(
            tokens=rate.numerator, period_us=rate.denominator, capacity=self.capacity, max_debt=max_debt
        )
