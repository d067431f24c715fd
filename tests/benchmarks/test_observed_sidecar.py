"""A sidecar whose stalls a benchmark reads, and what two benchmarks that read them make of that."""

from __future__ import annotations

import struct
from operator import sub
from pathlib import Path

import click
import pytest

from benchmarks import disturbed, reload
from benchmarks.serving.generator import Generator, each, uniform
from benchmarks.serving.h2load import Load
from benchmarks.serving.observed_sidecar import StallObserver, observed_sidecar, print_longest_stalls
from benchmarks.serving.requests import DOMAIN, RULES
from benchmarks.serving.rounds import Figures, alternate
from benchmarks.serving.servers import running_servers
from ratelimit_sidecar.config.rules_file import load_rules

pytestmark = pytest.mark.slow

MS = 1_000_000


def test_the_longest_stall_is_kept_until_the_reader_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "stalls"
    file.write_bytes(bytes(16))
    observer = StallObserver(file)
    for late_ms in (2, 50, 7):
        observer.note(late_ms * MS)
    longest_ns, longest_own_ns = struct.unpack("=QQ", file.read_bytes())
    assert longest_ns == 50 * MS
    assert 0 < longest_own_ns <= longest_ns
    # The sidecar's own metric is as it was.
    assert observer.longest_seconds == 0.05
    with file.open("r+b") as opened:
        opened.write(bytes(16))
    observer.note(3 * MS)
    assert struct.unpack("=QQ", file.read_bytes())[0] == 3 * MS


def test_what_the_kernel_let_the_thread_wait_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stalls"
    file.write_bytes(bytes(16))
    waited_ns = iter([100 * MS, 104 * MS, 104 * MS])
    monkeypatch.setattr(StallObserver, "_read_waited_ns", lambda _self: next(waited_ns))
    observer = StallObserver(file)
    observer.note(6 * MS)
    assert struct.unpack("=QQ", file.read_bytes()) == (6 * MS, 2 * MS)
    observer.note(5 * MS)
    assert struct.unpack("=QQ", file.read_bytes()) == (6 * MS, 5 * MS)


def test_a_round_is_measured_from_outside_and_inside() -> None:
    with running_servers() as servers:
        sidecar = observed_sidecar(servers, rules=RULES)
        with Generator(sidecar.server.address, Load(1, 100)) as generator:
            figures = sidecar.measure(generator, uniform(100), 500, 1.0)
    assert 0 < figures["p50 us"] <= figures["p99 us"] <= figures["p99.9 us"]
    assert 0 < figures["loop CPU %"] < 100
    # The loop's timer is always a little late.
    assert 0 < figures["own stall ms"] <= figures["stall ms"]


def test_the_standard_collector_collects_the_middle_generation_less_often_than_the_sidecars() -> None:
    requests = 20_000

    def part_of_the_middle_one(name: str, *, is_standard: bool) -> float:
        sidecar = observed_sidecar(servers, name, standard_collector=is_standard, rules=RULES)
        before = sidecar.server.metric("python_gc_collections_total")
        with Generator(sidecar.server.address, Load(1, 100)) as generator:
            generator.run(each(requests), None)
        youngest, middle, _ = map(sub, sidecar.server.metric("python_gc_collections_total"), before)
        return middle / youngest

    with running_servers() as servers:
        assert part_of_the_middle_one("standard", is_standard=True) < 0.2
        assert part_of_the_middle_one("own", is_standard=False) > 0.3


def stalls(stall_ms: float, own_ms: float) -> Figures:
    return {"p50 us": 1.0, "stall ms": stall_ms, "own stall ms": own_ms}


def test_the_longest_stalls_are_those_of_all_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    of_rounds = iter([stalls(2, 1), stalls(9, 3), stalls(4, 4)])
    print_longest_stalls(alternate("load", {"quiet": lambda: next(of_rounds)}, rounds=3))
    assert capsys.readouterr().out.splitlines()[-1].split() == ["9.0", "ms", "4.0", "ms", "load,", "quiet"]


def test_it_is_said_when_the_peers_told_too_little() -> None:
    def heard(per_second: float) -> Figures:
        return {"p50 us": 1.0, disturbed.HEARD: per_second}

    variants = {disturbed.QUIET: lambda: heard(0), "in": lambda: heard(9_000), "in and out": lambda: heard(9_900)}
    assert disturbed.too_little_told(alternate("all peers up", variants, rounds=3)) == ["all peers up, in"]


def test_of_each_generation_there_are_as_many_rules_and_another_limit(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    limits = set()
    for generation in range(3):
        file.write_text(reload.rules_text(50, generation))
        rules = load_rules([file])
        assert sum(1 for _ in rules) == 50
        match = rules.match(DOMAIN, [("tenant", "tenant-0000001")])
        assert match is not None
        limits.add(match.rule.limit)
    assert len(limits) == 3


def test_a_reload_is_measured_within_its_round() -> None:
    results = reload.measure(3, rounds=1, seconds=3.0)
    in_force = [result for result in results if result.figure == "in force ms"]
    assert [(result.variant, result.ratio) for result in in_force] == [("a reload", None)]
    assert 0 < in_force[0].value.median < 3_000


def test_a_round_too_short_for_a_reload_is_an_error() -> None:
    """A file is read once nothing has happened to it for longer than this round."""
    with pytest.raises(click.ClickException, match="3 rules were not in force within a round"):
        reload.measure(3, rounds=1, seconds=0.1)
