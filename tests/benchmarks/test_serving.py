"""What the benchmarks of whole servers share: it counts what was answered, and takes ratios within a round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest

from benchmarks.serving.generator import Generator, each, uniform
from benchmarks.serving.h2load import Load
from benchmarks.serving.requests import RULES
from benchmarks.serving.rounds import Figures, Result, alternate
from benchmarks.serving.servers import Servers, running_servers


def giving(*values: float) -> Callable[[], Figures]:
    source = cycle(values)
    return lambda: {"requests/s": next(source)}


def only(results: list[Result], variant: str) -> Result:
    [result] = [result for result in results if result.variant == variant]
    return result


def test_the_ratio_is_taken_within_each_round_so_that_a_slow_moment_for_both_does_not_count() -> None:
    results = alternate("load", {"base": giving(100, 10, 100), "half": giving(50, 5, 50)}, rounds=3)
    assert only(results, "half").ratio.median == 0.5
    assert (only(results, "half").ratio.low, only(results, "half").ratio.high) == (0.5, 0.5)
    assert only(results, "base").value.median == 100


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with running_servers() as servers:
        yield servers


def test_the_generator_asks_for_each_key_once_and_counts_every_answer(servers: Servers) -> None:
    sidecar = servers.sidecar("each", rules=RULES)
    with Generator(sidecar.address, Load(2, 8)) as generator:
        answered = generator.run(each(100), None)
        assert len(answered.latencies_ns) == 100
        assert len(generator.run(uniform(100), 0.5, rate=100).latencies_ns) == pytest.approx(50, abs=2)
    # The first answer, for which the server was waited, had a key of its own.
    assert sidecar.metric("crdt_buckets") == [101]


def test_the_empty_handler_answers_the_same_load(servers: Servers) -> None:
    with Generator(servers.empty_handler("h2").address, Load(1, 4)) as generator:
        assert len(generator.run(each(20), None).latencies_ns) == 20
