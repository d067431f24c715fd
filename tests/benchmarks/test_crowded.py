"""What is measured of a node whose event loop is kept busy."""

from __future__ import annotations

from math import inf

import pytest

from benchmarks.crowded import crowded, percentile_ms


@pytest.mark.slow
async def test_what_was_taken_arrives_at_all_peers_and_they_are_answered() -> None:
    figures = await crowded(0.1, 3.0)
    assert all(0 < figure < inf for figure in figures.values()), figures


@pytest.mark.parametrize(("nanoseconds", "milliseconds"), [([], inf), ([1_000_000, 3_000_000, 2_000_000], 2.0)])
def test_what_never_arrives_takes_for_ever(nanoseconds: list[int], milliseconds: float) -> None:
    assert percentile_ms(nanoseconds, 50) == milliseconds
