"""What the benchmarks of whole servers share: it counts what was answered, and takes ratios within a round."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest

from benchmarks.serving.generator import Generator, each, uniform
from benchmarks.serving.h2load import Load
from benchmarks.serving.requests import DOMAIN, RULES
from benchmarks.serving.rounds import Figures, Result, Spread, alternate, print_results
from benchmarks.serving.servers import Servers, running_servers, wait_until
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest

pytestmark = pytest.mark.slow


def giving(*values: float) -> Callable[[], Figures]:
    source = cycle(values)
    return lambda: {"requests/s": next(source)}


def only(results: list[Result], variant: str) -> Result:
    [result] = [result for result in results if result.variant == variant]
    return result


def test_the_ratio_is_taken_within_each_round_so_that_a_slow_moment_for_both_does_not_count() -> None:
    results = alternate("load", {"base": giving(100, 10, 100), "half": giving(50, 5, 50)}, rounds=3)
    half = only(results, "half")
    assert half.ratio == Spread(0.5, 0.5, 0.5, 0.5)
    assert half.value == Spread(median=50, low=27.5, high=50, largest=50)
    assert only(results, "base").value.median == 100
    of_base = alternate("load", {"base": giving(100, 10), "half": giving(50, 5)}, rounds=2, of_base=True)
    assert only(of_base, "half").ratio == Spread(2, 2, 2, 2)


def test_a_figure_that_was_zero_in_the_base_or_is_not_there_has_no_ratio() -> None:
    variants = {"quiet": lambda: {"heard/s": 0.0}, "busy": lambda: {"heard/s": 10.0, "in force ms": 3.0}}
    results = alternate("load", variants, rounds=2)
    assert [(result.figure, result.ratio) for result in results if result.variant == "busy"] == [
        ("heard/s", None),
        ("in force ms", None),
    ]
    as_json = only(results, "quiet").as_json()
    assert (as_json["median"], as_json["ratio"], as_json["ratio_quartiles"]) == (0, None, None)


def test_a_table_leaves_the_ratio_out_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    variants = {"quiet": lambda: {"heard/s": 0.0, "p50 us": 2.0}, "busy": lambda: {"heard/s": 10.0, "p50 us": 3.0}}
    print_results(alternate("load", variants, rounds=1), as_json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[-2:] == [["busy", "heard/s", "10.0"], ["busy", "p50", "us", "3.0", "1.50", "(1.50-1.50)"]]


def test_a_request_of_several_descriptors_asks_for_drawn_values_of_one_rule() -> None:
    body = uniform(1_000, "agent", descriptors=3)
    entries = []
    for _ in range(100):
        framed = body()
        message = framed[5:]
        assert struct.unpack(">BI", framed[:5]) == (0, len(message))
        read = RateLimitRequest.FromString(message)
        assert read.domain == DOMAIN
        entries += [[(entry.key, entry.value) for entry in descriptor.entries] for descriptor in read.descriptors]
    assert len(entries) == 300
    [keys, values] = zip(*(entry for [entry] in entries), strict=True)
    assert set(keys) == {"agent"}
    assert set(values) <= {f"tenant-{number:07}" for number in range(1_000)}
    assert len(set(values)) > 200


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


def test_at_a_rate_latency_counts_from_when_a_request_was_due(servers: Servers) -> None:
    """One stream: each request waits for the answer to the one before, and all but the first are due at once."""
    sidecar = servers.sidecar("late", rules=RULES)
    with Generator(sidecar.address, Load(1, 1)) as generator:
        answered = generator.run(uniform(1), 0.2, rate=1e6)
    first, *_, last = answered.latencies_ns
    assert first < last
    # The last one was sent when the time was over, and due long before.
    assert last > 0.5 * 0.2e9


def test_the_empty_handler_answers_the_same_load(servers: Servers) -> None:
    with Generator(servers.empty_handler("h2").address, Load(1, 4)) as generator:
        answered = generator.run(each(20), None)
    assert (len(answered.latencies_ns), answered.admitted) == (20, 20)


def test_a_denial_is_an_answer_that_does_not_admit(servers: Servers) -> None:
    sidecar = servers.sidecar("denies", rules=RULES)
    with Generator(sidecar.address, Load(1, 4)) as generator:
        answered = generator.run(each(20, "denied"), None)
        assert (len(answered.latencies_ns), answered.admitted) == (20, 20)
        again = generator.run(each(20, "denied"), None)
        assert (len(again.latencies_ns), again.admitted) == (20, 0)


def test_requests_at_a_rate_are_dealt_out_to_all_connections(servers: Servers) -> None:
    with Generator(servers.empty_handler("h2").address, Load(4, 10)) as generator:
        answered = generator.run(uniform(1), 0.2, rate=200)
        sent = [connection.next_stream // 2 for connection in generator.connections]
    assert sum(sent) == len(answered.latencies_ns)
    assert min(sent) >= len(answered.latencies_ns) // 8


def test_the_processor_time_of_a_server_is_that_of_its_threads_and_children(servers: Servers) -> None:
    spin = "import time\nwhile time.process_time() < 0.1: pass\n"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {spin + 'input()'!r}]).wait()"
    server = servers.run("parent", [sys.executable, "-c", child], address="", stdin=subprocess.PIPE)
    wait_until(lambda: server.cpu_seconds > 0.1)
    own = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    assert int(own[11]) + int(own[12]) < 10, "that many ticks are 0.1 s"
