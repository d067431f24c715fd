"""A peer without a front end takes from the buckets that requests would take from, at the rate it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serving.bare_peer import MOST_LATE_SECONDS, Consumer, bare_peer, shuffled_keys
from benchmarks.serving.generator import each
from benchmarks.serving.requests import DOMAIN, RULES
from benchmarks.serving.servers import running_servers, wait_until
from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.demo.ports import HOST
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Rules

pytestmark = pytest.mark.slow

NOW_US = 1_790_000_000_000_000
KEYS = 10


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Rules:
    file = tmp_path_factory.mktemp("rules") / "rules.yaml"
    file.write_text(RULES)
    return load_rules([file])


def consumer_of(rules: Rules) -> tuple[Consumer, Store]:
    store = Store(Origin("peer", 1), rules.replicated_limit_of_key)
    return Consumer(store, shuffled_keys(rules, KEYS), lambda: NOW_US), store


def taken(store: Store) -> list[int]:
    """From each bucket, in no order."""
    return sorted(sum(sum(of_origin.values()) for of_origin in bucket.taken.values()) for bucket in store)


def test_it_takes_from_the_buckets_of_the_generators_requests(rules: Rules) -> None:
    limiter = Limiter(rules, Origin("sidecar", 1))
    body = each(KEYS)
    for _ in range(KEYS):
        limiter.decide(body()[5:], NOW_US)
    assert DOMAIN in rules.domains
    assert sorted(shuffled_keys(rules, KEYS)) == sorted(bucket.key for bucket in limiter.store)


def test_it_takes_from_no_bucket_until_it_is_told_to(rules: Rules) -> None:
    consumer, store = consumer_of(rules)
    consumer.take(MOST_LATE_SECONDS)
    assert taken(store) == []


def test_it_takes_from_each_bucket_in_turn(rules: Rules) -> None:
    consumer, store = consumer_of(rules)
    consumer.per_second = 1_000
    consumer.take(0.008)
    assert taken(store) == [1] * 8
    consumer.take(0.008)
    assert taken(store) == [1] * 4 + [2] * 6


def test_parts_of_a_bucket_add_up(rules: Rules) -> None:
    consumer, store = consumer_of(rules)
    consumer.per_second = 50
    for _ in range(10):
        consumer.take(0.01)
    assert taken(store) == [1] * 5


def test_what_was_due_too_long_ago_is_left_out(rules: Rules) -> None:
    consumer, store = consumer_of(rules)
    consumer.per_second = 100
    consumer.take(60)
    assert taken(store) == [1] * int(100 * MOST_LATE_SECONDS)


def test_what_it_takes_arrives_at_a_sidecar_and_it_ends_with_its_input(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(RULES)
    with running_servers() as servers:
        ports, of_peer = servers.ports(), servers.ports()
        sidecar = servers.sidecar(peers=[f"{HOST}:{of_peer.sync}"], ports=ports, rules=RULES)
        peer = bare_peer(servers, "peer", file, ports=of_peer, peers=[f"{HOST}:{ports.sync}"], keys=KEYS)
        wait_until(lambda: sidecar.metric("crdt_peer_connected") == [1.0])
        peer.take(1_000)
        # The sidecar has a bucket of the call for which its start was waited, too.
        wait_until(lambda: sidecar.metric("crdt_buckets") == [KEYS + 1])
        assert peer.server.process is not None
        assert peer.server.process.stdin is not None
        peer.server.process.stdin.close()
        assert peer.server.process.wait(timeout=30) == 0
