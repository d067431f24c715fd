"""Spilled refill pays for what was taken before it, once, the earliest first."""

from __future__ import annotations

import gc

import pytest

from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.slot import placed_us, slot_id
from ratelimit_sidecar.crdt.spilled import CELLS, SpilledRefill

LIMIT = TokenBucketLimit(tokens=3, period_us=1_000_000, capacity=9)
SLOT_US = 1 << LIMIT.exponent
MIDDLE_US = placed_us(slot_id(1_790_000_000_000_000, LIMIT.exponent), LIMIT.exponent)
SLOT_REFILL = LIMIT.tokens * SLOT_US


def full_for(slots: int, *, until_us: int = MIDDLE_US) -> SpilledRefill:
    spilled = SpilledRefill(LIMIT, until_us - slots * SLOT_US)
    spilled.note(slots * SLOT_REFILL, until_us)
    return spilled


def test_what_was_spilled_before_pays_nothing() -> None:
    assert full_for(3).pay(5, MIDDLE_US) == 5
    assert full_for(3).pay(5, MIDDLE_US + 100 * SLOT_US) == 5


@pytest.mark.parametrize("until_us", [MIDDLE_US, MIDDLE_US + 1, MIDDLE_US + SLOT_US - 1])
def test_all_that_was_spilled_since_pays(until_us: int) -> None:
    middle_us = MIDDLE_US - 2 * SLOT_US
    since = (until_us - middle_us) * LIMIT.tokens
    assert full_for(4, until_us=until_us).pay(since + 7, middle_us) == 7


def test_what_has_paid_is_spent_and_the_earliest_pays_first() -> None:
    spilled = full_for(3)
    assert spilled.pay(SLOT_REFILL + 1, MIDDLE_US - 3 * SLOT_US) == 0
    assert spilled.pay(SLOT_REFILL, MIDDLE_US - SLOT_US) == 0
    assert spilled.pay(SLOT_REFILL, MIDDLE_US - 2 * SLOT_US) == 1


def test_pieces_within_one_slot_add_up() -> None:
    spilled = SpilledRefill(LIMIT, MIDDLE_US)
    for until_us in (100, 200, 300):
        spilled.note(50, MIDDLE_US + until_us)
    assert spilled.pay(151, MIDDLE_US) == 1


@pytest.mark.parametrize("idle_slots", [1, CELLS - 1, CELLS, CELLS + 1, 10**6])
def test_only_so_many_slots_are_known(idle_slots: int) -> None:
    spilled = full_for(1)
    spilled.note(idle_slots * SLOT_REFILL, MIDDLE_US + idle_slots * SLOT_US)
    oldest_us = MIDDLE_US + (idle_slots - CELLS) * SLOT_US
    assert spilled.pay(1, oldest_us - SLOT_US) is None
    known = min(idle_slots + 1, CELLS)
    assert spilled.pay(known * SLOT_REFILL + 1, oldest_us) == 1


def test_the_cycle_collector_does_not_see_it() -> None:
    """There may be one for each of a million buckets."""
    spilled = full_for(CELLS)
    assert not gc.is_tracked(spilled)
    assert not any(gc.is_tracked(held) for held in gc.get_referents(spilled) if isinstance(held, list))
