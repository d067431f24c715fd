"""What a sidecar makes of answers that are none of the script's: nothing is drawn, and it goes on."""

from __future__ import annotations

from typing import Any

import pytest

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.granted import GrantedBucket, Needs
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.places import BucketPlaces
from ratelimit_sidecar.fabric.account_calls import AccountCalls, members_text
from ratelimit_sidecar.fabric.status import DrawStatus
from ratelimit_sidecar.persistence.redis_record import BadRecord

NOW_US = 10**12
MEMBERS = members_text([{"east": 1}]).encode()
DRAW = Needs(10, 10, 5)


class Caller:
    def __init__(self) -> None:
        self.draws = AccountCalls("east", DrawStatus(), BucketPlaces(100, lambda key: key))
        self.bucket = GrantedBucket(b"k", TokenBucketLimit(100, 1_000_000, 100), Origin("a", 1), NOW_US)

    def call(self, answer: list[Any]) -> None:
        """The answer has the number of the call where there is None."""
        asked = self.draws.ask(self.bucket, DRAW)
        assert asked is not None
        number = str(self.draws.arguments([asked], NOW_US)[2]).encode()
        self.draws.receive([asked], [number if each is None else each for each in answer], NOW_US)


def knowing() -> Caller:
    """It knows lineage and members."""
    caller = Caller()
    caller.call([b"L", b"V", None, MEMBERS])
    caller.call([b"L", 1, None, b"0 7 0 60"])
    assert caller.bucket.held == 7
    return caller


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [b"L", 1, None],
        [b"L", 1, b"1", b"7 1 0 60"],
        [b"L", 1, None, 1],
        [b"L", 1, None, b"7 1 0"],
        [b"L", 1, None, b"7 1 0 x"],
        [b"L", 1, None, b"8 1 0 60"],
        [b"L", 1, None, b"7 11 0 60"],
        [b"L", 1, None, b"7 -1 0 60"],
        [b"L", 1, None, b"7 1 6 60"],
        [b"L", b"W", b"1", MEMBERS],
        [b"L", b"W", None, b"no JSON"],
        [b"L", b"W", None, b"[" * 100_000],
        [b"L", b"W", None, b'[{"east": -1}]'],
        [b"L", b"W", None, b'[{"east": "1"}]'],
        [b"L", b"W", None, b"{}"],
    ],
)
def test_an_odd_answer_gives_nothing(answer: list[Any]) -> None:
    caller = knowing()
    with pytest.raises(BadRecord):
        caller.call(answer)
    assert caller.bucket.held == 7
    caller.call([b"L", 1, None, b"7 3 0 60"])
    assert caller.bucket.held == 10


def test_no_account_has_more_than_the_home_or_less_than_nothing() -> None:
    caller = knowing()
    caller.call([b"L", 1, None, b"7 0 0 101"])
    assert caller.bucket.left == 100
    caller.call([b"L", 1, None, b"7 0 0 -1"])
    assert caller.bucket.left == 0


def test_the_answer_of_another_call_does_not_say_that_this_one_was_not_done() -> None:
    caller = knowing()
    with pytest.raises(BadRecord):
        caller.call([b"L", b"W", b"1", MEMBERS])
    # What it held may have ended in the account, and is not to end there again.
    assert caller.bucket.generation == -1
