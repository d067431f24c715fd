"""What replication may cost on the links: bytes of a run on a virtual clock, the same on every machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.replication import FLUSH_US, HITS, SECOND_US, measure

pytestmark = pytest.mark.slow


def test_the_same_hits_cost_the_same_bytes() -> None:
    one, other = (replace(measure(100, 3_000, 1), cpu_share=0) for _ in range(2))
    assert one == other


def test_hits_on_one_bucket_between_two_flushes_are_told_as_one() -> None:
    few, many = measure(1, 3_000, 1), measure(1, 30_000, 1)
    assert many.hits == 10 * few.hits
    # Two directions, and two slots where one has just ended.
    assert many.entries_a_second <= 2 * 2 * SECOND_US / FLUSH_US
    assert many.bytes_a_hit < few.bytes_a_hit / 5


def test_fifty_thousand_hits_a_second_on_a_thousand_buckets_cost_a_link_less_than_a_megabyte_a_second() -> None:
    cost = measure(1_000, HITS, 1)
    assert cost.hits > 0.99 * HITS
    assert cost.link_bytes_a_second < 1_000_000
