"""The table of the tuning guide says what its bucket does."""

from __future__ import annotations

import pytest

from benchmarks.capacity import rejected


def test_more_capacity_and_less_load_mean_fewer_rejections() -> None:
    by_capacity = [rejected(capacity, 0.9, 20_000) for capacity in (1, 5, 20)]
    assert by_capacity == sorted(by_capacity, reverse=True)
    assert rejected(5, 0.5, 20_000) < rejected(5, 0.9, 20_000)


def test_a_bucket_of_one_token_denies_as_many_as_a_server_without_a_queue() -> None:
    """Erlang's loss formula for one server, which holds for any distribution of service times: rho / (1 + rho)."""
    for utilisation in (0.5, 0.9):
        assert rejected(1, utilisation, 50_000) == pytest.approx(utilisation / (1 + utilisation), abs=0.01)
