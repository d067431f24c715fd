"""How seldom the cycle collector looks at everything there is."""

from __future__ import annotations

import gc

from ratelimit_sidecar.app import GC_THRESHOLDS
from ratelimit_sidecar.cycle_collector import MOST_YOUNG

KEYS_A_SECOND = 20_000
OBJECTS_OF_KEY = 18
"""Of a strict limit with eight members."""


def test_a_month_of_invented_keys_does_not_have_the_oldest_objects_collected() -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(*GC_THRESHOLDS)
        oldest = gc.get_threshold()[2]
    finally:
        gc.set_threshold(*before)
    assert oldest > 30 * 86_400 * KEYS_A_SECOND * OBJECTS_OF_KEY // MOST_YOUNG
