"""The comparison measures decisions only: a server that has no limit for what it is asked, or denies it, is refused.

What is compared is asked for the same in the same ways; processor time is measured where the process is known.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks.compare import RULES, ensure_it_admits, ensure_it_limits, main
from benchmarks.serving.options import RunningServer
from benchmarks.serving.requests import ONE_DESCRIPTOR, request
from benchmarks.serving.servers import Server, Servers, running_servers

pytestmark = pytest.mark.slow

needs_h2load = pytest.mark.skipif(shutil.which("h2load") is None, reason="no h2load here")


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with running_servers() as servers:
        yield servers


def test_a_server_with_a_wide_limit_for_every_value_of_the_key_is_taken(servers: Servers) -> None:
    sidecar = servers.sidecar("limits", rules=RULES.format(domain="benchmark", key="tenant"))
    ensure_it_limits(sidecar.address, "benchmark", "tenant")
    ensure_it_admits(sidecar.address, ONE_DESCRIPTOR)


def test_a_server_that_admits_because_it_has_no_rule_is_refused(servers: Servers) -> None:
    empty = servers.empty_handler("h2")
    ensure_it_admits(empty.address, ONE_DESCRIPTOR)
    with pytest.raises(click.ClickException, match="needs a rule for every value of that key"):
        ensure_it_limits(empty.address, "benchmark", "tenant")


def test_a_server_whose_limit_is_used_up_is_refused(servers: Servers) -> None:
    narrow = RULES.format(domain="benchmark", key="tenant").replace("100000000", "1").replace("minute", "day")
    sidecar = servers.sidecar("narrow", rules=narrow)
    # Of another value than the call for which a started server is waited.
    other = request([("tenant", "other")])
    ensure_it_admits(sidecar.address, other)
    with pytest.raises(click.ClickException, match="needs a wider limit"):
        ensure_it_admits(sidecar.address, other)


def test_the_error_of_a_server_that_answers_with_one_is_told(servers: Servers) -> None:
    sidecar = servers.sidecar("error", rules=RULES.format(domain="benchmark", key="tenant"))
    with pytest.raises(click.ClickException, match="does not answer: INVALID_ARGUMENT: "):
        ensure_it_admits(sidecar.address, b"\xff")


def test_another_server_is_given_by_its_address_and_may_have_a_name_and_a_process() -> None:
    pid = os.getpid()
    for given, expected in {
        "127.0.0.1:8081": Server("127.0.0.1:8081", "127.0.0.1:8081"),
        f"limitador=[::1]:8081@{pid}": Server("limitador", "[::1]:8081", pid=pid),
        f"a=unix:/run/a@b.sock@{pid}": Server("a", "unix:/run/a@b.sock", pid=pid),
        "unix:/run/a.sock": Server("unix:/run/a.sock", "unix:/run/a.sock"),
    }.items():
        assert RunningServer().convert(given, None, None) == expected
    for wrong, why in {"8081": "is not", "a=127.0.0.1:8081@99999999": "no process 99999999"}.items():
        with pytest.raises(click.BadParameter, match=why):
            RunningServer().convert(wrong, None, None)


@needs_h2load
def test_this_sidecar_another_build_and_another_server_are_asked_in_both_ways(servers: Servers) -> None:
    other = servers.sidecar("other", rules=RULES.format(domain="benchmark", key="tenant"))
    checkout = Path(__file__).parents[2]
    options = ["--rounds", "1", "--seconds", "0.5", "--rate", "500", "--json", "--echo"]
    options += [f"other={other.address}@{other.pid}", f"unknown={other.address}"]
    if (checkout / ".venv").exists():
        options += ["--build", f"before={checkout}"]
    run = CliRunner().invoke(main, options)
    assert run.exit_code == 0, run.output
    figures = defaultdict(set)
    for result in json.loads(run.stdout):
        figures[result["group"].partition(",")[0], result["variant"]].add(result["figure"])
        assert result["median"] > 0
        assert result["ratio"] > 0
    when_due = {"requests/s", "p50 us", "p99 us"}
    names = {"this sidecar", "other", "grpc.aio echo"} | ({"before"} if "--build" in options else set())
    assert figures == {
        **{("in lock-step", name): when_due | {"mean us", "CPU us"} for name in names},
        **{("when due", name): when_due | {"CPU us"} for name in names},
        ("in lock-step", "unknown"): when_due | {"mean us"},
        ("when due", "unknown"): when_due,
    }


@needs_h2load
def test_a_server_whose_limit_is_used_up_by_the_load_has_no_figures(servers: Servers) -> None:
    narrow = RULES.format(domain="benchmark", key="tenant").replace("100000000", "400").replace("minute", "day")
    other = servers.sidecar("narrow-later", rules=narrow)
    run = CliRunner().invoke(main, ["--rounds", "1", "--seconds", "0.1", other.address])
    assert run.exit_code == 1
    assert "needs a wider limit" in run.output


def test_a_folder_without_a_build_is_refused(tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["--build", f"before={tmp_path}"])
    assert run.exit_code == 2
    assert "holds no package ratelimit_sidecar: run 'make compile'" in run.output


def test_two_servers_of_one_name_are_refused() -> None:
    run = CliRunner().invoke(main, ["a=127.0.0.1:1", "a=127.0.0.1:2"])
    assert run.exit_code == 2
    assert "names have to differ: this sidecar, a, a" in run.output
