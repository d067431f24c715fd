"""The limit that a bucket enforces, a rate and a capacity or a window, in exact integers.

A limit is `tokens` per `period_us` microseconds. The deficit of a bucket is held scaled by `period_us`, so that it
drains `tokens` per microsecond and one token costs `period_us`: no rounding anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import gcd
from typing import Final

MIN_EXPONENT: Final = 14
"""Narrowest slot: 2**14 us = 16.4 ms, about the replication flush interval; narrower slots would say no more."""

SMALL_STATE_EXPONENT: Final = 17
"""The least that keeps a bucket's state small: a horizon of 10 s is 77 slots of 2**17 us = 131 ms."""

MAX_EXPONENT: Final = 50
"""Widest slot: 2**50 us = 35 years."""

SLOTS_PER_REFILL: Final = 32
"""A bucket that refills in 4 s or more does so in 32 to 64 slots: the error of a slot's middle is 1/64 capacity."""

MAX_REFILLS_PER_SLOT: Final = 2
"""A slot's takes count at one instant. Slots that span more than two refills would show debt that never was, and more
would be denied than ought to be.
"""

URGENT_SHARE: Final = 8
"""A bucket with at most 1/8 of its capacity left is nearly used up. The take that makes it so is sent to peers at once,
later ones with the next flush.
"""

MIN_STEPS_CAPACITY: Final = 32
"""From this capacity on, peers that are behind hear of a bucket before others also whenever a further 1/16 to 1/8 of it
was taken. In a smaller bucket a single request would be such a step, and so would the first request for each invented
key.
"""

SLOTS_PER_PERIOD: Final = 32
"""A sliding window has 32 to 64 slots, so a token comes back up to 1/32 of the period late."""

HORIZON_SLOTS: Final = 64
MIN_HORIZON_US: Final = 10_000_000
"""The shortest horizon. Deltas that arrive within this time count in full."""

MAX_AHEAD_US: Final = MIN_HORIZON_US
"""How far a peer's clock may be ahead. Later slots are refused, because they would count until their time has come."""

MAX_WIDER_EXPONENT: Final = 36
"""The widest slot that is accepted from a peer when the limit's own slots are narrower: 2**36 us = 19 hours, the slots
of a limit of a month. Wider slots than the limit's own are from before it changed. They are kept for as long as they
are wide. A fixed window's slots are almost as long as the window.
"""

MAX_WIDER_SLIDING_EXPONENT: Final = 31
"""The same for sliding windows: 2**31 us = 36 minutes, the slots of a limit of a day. They are kept for 64 times their
width.
"""

MAX_TOKENS: Final = 2**40
MAX_CAPACITY: Final = 2**40
MAX_PERIOD_US: Final = 2**50
MIN_WINDOW_US: Final = 1 << MIN_EXPONENT
DEFAULT_MAX_DEBT: Final = 4
MAX_MAX_DEBT: Final = 1_024


@dataclass(frozen=True, slots=True)
class TokenBucketLimit:
    """`tokens` per `period_us` microseconds, at most `capacity` at once.

    Args:
        tokens: refilled in each period; 1 to 2**40. Stored in lowest terms with `period_us`, so that two spellings
            of one rate are one limit.
        period_us: microseconds; 1 to 2**50.
        capacity: tokens a full bucket holds; 0 (always deny) to 2**40.
        max_debt: debt is cut to this many capacities (at least 1), or to the refill of the horizon plus one slot if
            that is more.

    Raises:
        ValueError: a number is outside its range.
    """

    tokens: int
    period_us: int
    capacity: int
    max_debt: int = DEFAULT_MAX_DEBT

    scaled_capacity: int = field(init=False, compare=False)
    """The capacity, scaled: a take is admitted when the deficit after it is at most this."""
    urgent_from: int = field(init=False, compare=False)
    """At this deficit or more the bucket is nearly used up; scaled."""
    step_bits: int = field(init=False, compare=False)
    """At each further multiple of 2**step_bits, 1/16 to 1/8 of the capacity, peers are told early of the deficit."""
    debt_ceiling: int = field(init=False, compare=False)
    """The largest deficit that a bucket keeps, scaled."""
    exponent: int = field(init=False, compare=False)
    """Slots are 2**exponent microseconds wide."""
    slot_refill: int = field(init=False, compare=False)
    """What refills while a slot lasts, scaled."""
    horizon_us: int = field(init=False, compare=False)
    """Consumption older than this is sealed into the base; later deltas of it are ignored."""

    def __post_init__(self) -> None:
        _check_ranges(
            self,
            ("tokens", 1, MAX_TOKENS),
            ("period_us", 1, MAX_PERIOD_US),
            ("capacity", 0, MAX_CAPACITY),
            ("max_debt", 1, MAX_MAX_DEBT),
        )
        divisor = gcd(self.tokens, self.period_us)
        set_field = object.__setattr__
        set_field(self, "tokens", self.tokens // divisor)
        set_field(self, "period_us", self.period_us // divisor)
        set_field(self, "scaled_capacity", self.capacity * self.period_us)
        set_field(self, "urgent_from", self.scaled_capacity - self.scaled_capacity // URGENT_SHARE)
        set_field(self, "exponent", _token_bucket_exponent(self.scaled_capacity // self.tokens))
        set_field(self, "slot_refill", self.tokens << self.exponent)
        set_field(self, "horizon_us", max(HORIZON_SLOTS << self.exponent, MIN_HORIZON_US))
        # Debt of up to the horizon's refill is never forgiven: replicas under load may admit so much in a partition
        # that ends within the horizon. One slot's refill is added, because takes are placed at the middle of their
        # slot, so that a bucket without debt can seem to have some.
        debt_ceiling = max(self.scaled_capacity * self.max_debt, self.horizon_us * self.tokens)
        set_field(self, "debt_ceiling", debt_ceiling + self.slot_refill)
        set_field(self, "step_bits", _step_bits(self.capacity, self.scaled_capacity))

    def boundary_us(self, now_us: int, shift: int = 0) -> int:
        """The seal boundary at `now_us`: everything placed before it belongs to the base, on every replica alike.

        0 when the horizon reaches back before the epoch, because times below 0 are not sent to peers.

        Args:
            shift: halve the horizon so many times, but to no less than `MIN_HORIZON_US`.
        """
        horizon_us = max(self.horizon_us >> shift, MIN_HORIZON_US)
        return max(0, now_us - horizon_us) >> self.exponent << self.exponent


class Window(Enum):
    """How a `WindowLimit` counts."""

    FIXED = "fixed_window"
    """From multiples of the period since the epoch, as envoyproxy/ratelimit does."""
    SLIDING = "sliding_window"
    """Over the period that ends now."""


@dataclass(frozen=True, slots=True)
class WindowLimit:
    """At most `requests` in a window of `period_us` microseconds.

    Args:
        requests: 0 (always deny) to 2**40.
        period_us: microseconds; 2**14 (the narrowest slot) to 2**50.

    Raises:
        ValueError: a number is outside its range.
    """

    requests: int
    period_us: int
    window: Window

    exponent: int = field(init=False, compare=False)
    """Slots are 2**exponent microseconds wide: at most 1/32 of a sliding window, and more than half of a fixed one; but
    at least 16 ms.
    """

    def __post_init__(self) -> None:
        _check_ranges(self, ("requests", 0, MAX_CAPACITY), ("period_us", MIN_WINDOW_US, MAX_PERIOD_US))
        slot_us = self.period_us if self.window is Window.FIXED else self.period_us // SLOTS_PER_PERIOD
        object.__setattr__(self, "exponent", max(_floor_log2(slot_us), MIN_EXPONENT))
        object.__setattr__(self, "urgent_from", self.requests - self.requests // URGENT_SHARE)
        object.__setattr__(self, "step_bits", _step_bits(self.requests, self.requests))

    urgent_from: int = field(init=False, compare=False)
    """At this count or more the window is nearly used up."""
    step_bits: int = field(init=False, compare=False)
    """As `TokenBucketLimit.step_bits`, of the count."""

    @property
    def capacity(self) -> int:
        """The most tokens there can be at once."""
        return self.requests

    @property
    def scaled_capacity(self) -> int:
        """As `TokenBucketLimit.scaled_capacity`, of the count."""
        return self.requests


AnyLimit = TokenBucketLimit | WindowLimit


def _token_bucket_exponent(refill_us: int) -> int:
    """The slot width, as an exponent, of a bucket that refills from empty in `refill_us`."""
    for_precision = _floor_log2(refill_us // SLOTS_PER_REFILL)
    for_size = min(_floor_log2(refill_us * MAX_REFILLS_PER_SLOT), SMALL_STATE_EXPONENT)
    return min(max(for_precision, for_size, MIN_EXPONENT), MAX_EXPONENT)


def _step_bits(capacity: int, scaled_capacity: int) -> int:
    """See `TokenBucketLimit.step_bits`: the largest power of 2 in 1/8 of the capacity. For a small capacity, one that
    no bucket reaches."""
    if capacity < MIN_STEPS_CAPACITY:
        return scaled_capacity.bit_length()
    return _floor_log2(scaled_capacity // URGENT_SHARE)


def _floor_log2(number: int) -> int:
    return max(number, 1).bit_length() - 1


def _check_ranges(limit: object, *ranges: tuple[str, int, int]) -> None:
    for name, low, high in ranges:
        value = getattr(limit, name)
        if not low <= value <= high:
            raise ValueError(f"{name} must be {low} to {high}, not {value}")
