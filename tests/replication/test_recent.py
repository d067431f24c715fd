"""What a node took from lately: nothing recent is missing, and what is old goes."""

from __future__ import annotations

from ratelimit_sidecar.replication.recent import KEPT_US, RECENT_US, SHARDS, RecentBuckets


def test_what_is_recent_is_known_however_often_it_is_noted_and_the_rest_is_forgotten() -> None:
    recent, now_us = RecentBuckets(), 0
    for _ in range(4 * SHARDS):
        now_us += RECENT_US // SHARDS
        for name in (b"hot", b"%d" % now_us):
            recent.note(name, now_us)
        recent.forget(now_us)
    known = list(recent.keys())
    assert known.count(b"hot") == 1
    assert len(known) == len(recent) == len(set(known))
    assert {b"%d" % (now_us - age * (RECENT_US // SHARDS)) for age in range(SHARDS)} <= set(known)
    # Each shard was looked at within a round.
    assert len(recent) <= (KEPT_US // RECENT_US + 1) * SHARDS + 1
    for _ in range(SHARDS):
        recent.forget(now_us + KEPT_US + 1)
    assert len(recent) == 0


def test_what_is_old_goes_although_others_that_are_older_are_in_use() -> None:
    recent = RecentBuckets()
    hot = [b"hot %d" % number for number in range(1_000)]
    for key in (*hot, *(b"cold %d" % number for number in range(1_000))):
        recent.note(key, 0)
    for key in hot:
        recent.note(key, KEPT_US)
    for _ in range(SHARDS):
        recent.forget(KEPT_US + 1)
    assert set(recent.keys()) == set(hot)


def test_they_may_change_while_they_are_gone_through() -> None:
    recent = RecentBuckets()
    for number in range(1_000):
        recent.note(b"%d" % number, 0)
    seen = set()
    for number, key in enumerate(recent.keys()):
        seen.add(key)
        recent.note(b"new %d" % number, 0)
    assert {b"%d" % number for number in range(1_000)} <= seen


def test_what_was_recent_is_not_forgotten_while_they_are_gone_through_slowly() -> None:
    recent = RecentBuckets()
    for number in range(1_000):
        recent.note(b"%d" % number, 0)
    keys = recent.keys()
    seen = {next(keys)}
    for _ in range(SHARDS):
        recent.forget(2 * RECENT_US)
    assert {b"%d" % number for number in range(1_000)} == seen | set(keys)
