"""The log of demands hands out what was published after a version, in order, each key once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.limiter.demand_log import DemandLog

keys = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
# Enough of them for several groups.
deeds = st.lists(st.tuples(st.sampled_from(["publish", "publish", "publish", "forget"]), keys), max_size=2_000)


@given(deeds, st.integers(0, 2_000), st.integers(1, 6))
def test_what_is_newer_is_what_was_published_last_after_that_version(
    done: list[tuple[str, bytes]], version: int, most: int
) -> None:
    log = DemandLog()
    published: dict[bytes, int] = {}
    last = 0
    for deed, key in done:
        if deed == "publish":
            last += 1
            published[key] = last
            log.publish(key)
        else:
            published.pop(key, None)
            log.forget(key)
    expected = sorted((at, key) for key, at in published.items() if at > version)
    assert log.newer(version, most) == expected[:most]


def test_a_reader_that_goes_on_where_it_was_gets_every_key() -> None:
    log = DemandLog()
    for number in range(5_000):
        log.publish(b"%d" % number)
    got: list[bytes] = []
    version = 0
    while newer := log.newer(version, 300):
        version = newer[-1][0]
        got += [key for _, key in newer]
    assert got == [b"%d" % number for number in range(5_000)]
