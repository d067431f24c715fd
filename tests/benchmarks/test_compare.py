"""The comparison measures decisions only: a server that has no limit for what it is asked, or denies it, is refused."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from benchmarks.compare import RULES, ensure_it_admits, ensure_it_limits
from benchmarks.serving.requests import ONE_DESCRIPTOR, request
from benchmarks.serving.servers import Servers, running_servers


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
