"""Which refused streams are told of."""

from __future__ import annotations

from replication.builders import NOW_US, SECOND_US

from ratelimit_sidecar.replication.refusals import MAX_REFUSALS, Refusals

HERE, THERE = "ipv4:10.0.0.1:40001", "ipv4:10.0.0.2:40001"


def test_a_refusal_is_told_once_whatever_port_the_peer_comes_from() -> None:
    refusals = Refusals()
    assert refusals.note(HERE, "version", NOW_US)
    assert not refusals.note("ipv4:10.0.0.1:40002", "version", NOW_US + SECOND_US)
    assert refusals.note(THERE, "version", NOW_US)
    assert refusals.note(HERE, "malformed", NOW_US)


def test_what_may_pass_by_itself_is_told_when_it_has_not() -> None:
    refusals = Refusals()
    assert not refusals.note(HERE, "duplicate", NOW_US, certain_after_us=SECOND_US)
    assert not refusals.note(HERE, "duplicate", NOW_US + SECOND_US - 1, certain_after_us=SECOND_US)
    assert not refusals.is_told(HERE, "duplicate")
    assert refusals.note(HERE, "duplicate", NOW_US + SECOND_US, certain_after_us=SECOND_US)
    assert refusals.is_told(HERE, "duplicate")
    assert not refusals.note(HERE, "duplicate", NOW_US + 2 * SECOND_US, certain_after_us=SECOND_US)


def test_after_a_stream_was_accepted_a_refusal_is_news() -> None:
    refusals = Refusals()
    for address in (HERE, THERE):
        assert refusals.note(address, "version", NOW_US)
    refusals.forget("ipv4:10.0.0.1:40009")
    assert refusals.note(HERE, "version", NOW_US)
    assert not refusals.note(THERE, "version", NOW_US)


def test_their_number_is_bounded() -> None:
    refusals = Refusals()
    for number in range(MAX_REFUSALS):
        assert refusals.note(HERE, str(number), NOW_US)
    assert not refusals.note(HERE, "0", NOW_US)
    assert refusals.note(THERE, "one more", NOW_US)
    assert refusals.note(HERE, "0", NOW_US)
