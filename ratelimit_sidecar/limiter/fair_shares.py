"""Max-min fair shares: a total is divided among those who want some of it.

Nobody gets more than it wants while another one, who gets no more, wants more (progressive filling; Bertsekas and
Gallager, Data Networks, 6.5.2). What nobody wants is spread evenly, so that whoever comes to want more has some of it
already. Integers in any unit; the sum is never above the total, and less by fewer units than there are shares.

Those who want the same are one *group*: a want, and how many there are of it. So many can be divided among, and told
of, in few numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

WANT_BITS: Final = 6
"""Wants are rounded up to so many significant bits: by a sixty-fourth on average. So few are different, and a want that
varies a little stays the same."""


class Group(NamedTuple):
    """So many who each want as much."""

    want: int
    members: int


class Level(NamedTuple):
    """What everybody gets.

    Args:
        most: of what is wanted; None where everybody gets all of it.
        spare: besides.
    """

    most: int | None
    spare: int

    def share(self, want: int) -> int:
        return (want if self.most is None else min(want, self.most)) + self.spare


def fair_level(total: int, groups: Iterable[Group]) -> Level:
    """The level at which the shares of all are the total.

    Args:
        total: 0 or more, as are the wants.
    """
    ordered = sorted(groups)
    left = total
    count = everybody = sum([group.members for group in ordered])
    for group in ordered:
        if group.want * count >= left:
            return Level(left // count, 0)
        left -= group.want * group.members
        count -= group.members
    return Level(None, left // everybody if everybody else 0)


def grouped(wants: Iterable[int]) -> list[Group]:
    """In order of the wants."""
    counts: dict[int, int] = {}
    for want in wants:
        counts[want] = counts.get(want, 0) + 1
    return [Group(want, counts[want]) for want in sorted(counts)]


def rounded_want(want: int) -> int:
    """Up, to `WANT_BITS` significant bits."""
    shift = max(0, want.bit_length() - WANT_BITS)
    return -(-want >> shift) << shift
