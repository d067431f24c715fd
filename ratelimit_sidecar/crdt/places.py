"""The places for buckets: how many there may be at once, and how many of them of one rule.

Anybody can invent keys, and so fill the places of the rule that they fall under. A rule may therefore hold no more of
them than `RULE_SHARE` times as many as are still free (dynamic thresholds: Choudhury and Hahne, IEEE/ACM Trans.
Networking 6(2), 1998). Alone it gets 8/9 of all; two that are flooded get 8/17 each; and there is always some left for
rules that hold few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

RULE_SHARE: Final = 8
"""So it is with the memory of what others took (`Journal.has_room`)."""

KEY_BYTES: Final = 256
"""A bucket whose key is as long takes another place, and so on. Callers choose texts in keys, up to 4 KiB of them."""

AMPLE_SHARE: Final = 0.85
"""No rule is refused a bucket with less than 7/8 of the places taken; a little less, lest an alarm come and go."""


class RuleRoom:
    """What the buckets of one rule take together. A replicated bucket has that of its rule."""

    __slots__ = ("places", "received_bytes")

    def __init__(self) -> None:
        self.places = 0
        self.received_bytes = 0
        """For entries of other origins, about."""


class BucketPlaces:
    """Counts the places that the buckets of one store take.

    Args:
        max_buckets: the most buckets at once, at least 1; fewer when keys are long. It may be changed at any time.
        rule_key: returns the part of a bucket key that all buckets of its rule share. A key that equals its rule key
            always gets a bucket, so there must be few of them.
    """

    def __init__(self, max_buckets: int, rule_key: Callable[[bytes], bytes]) -> None:
        assert max_buckets >= 1
        self.max_buckets = max_buckets
        self.rule_key = rule_key
        self._taken = 0
        self._of_rule: dict[bytes, RuleRoom] = {}

    @property
    def is_ample(self) -> bool:
        """True when every rule could have more buckets, and some time will pass before one cannot."""
        return self._taken < self.max_buckets * AMPLE_SHARE

    def take(self, key: bytes, each: int = 1, *, is_restored: bool = False) -> bool:
        """Note a new bucket. False when there is no room for it: then nothing is noted.

        Args:
            each: as how many a bucket of its kind counts.
            is_restored: it was written down. Such buckets come in any order, in which a rule's share would refuse some
                that were there.
        """
        rule = self.rule_key(key)
        room = self._of_rule.get(rule)
        held = 0 if room is None else room.places
        free = self.max_buckets - self._taken
        if (free <= 0 if is_restored else held >= RULE_SHARE * free) and key != rule:
            return False
        if room is None:
            room = self._of_rule[rule] = RuleRoom()
        places = each * _places_of(key)
        room.places += places
        self._taken += places
        return True

    def room_of(self, key: bytes) -> RuleRoom:
        """That of the rule of a bucket which has its places."""
        return self._of_rule[self.rule_key(key)]

    def give_back(self, key: bytes, each: int = 1) -> None:
        """Note that a bucket was dropped, for which the same was taken."""
        rule = self.rule_key(key)
        places = each * _places_of(key)
        room = self._of_rule[rule]
        room.places -= places
        if not room.places:
            del self._of_rule[rule]
        self._taken -= places


def _places_of(key: bytes) -> int:
    return 1 + len(key) // KEY_BYTES
