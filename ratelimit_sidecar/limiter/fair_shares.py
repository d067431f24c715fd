"""Max-min fair shares: a total is divided among members who each want some of it.

No member gets more than it wants while another one, who gets no more, wants more (progressive filling; Bertsekas and
Gallager, Data Networks, 6.5.2). The rest that nobody wants is spread evenly, so that a member whose want rises has some
spare already. Integers in any unit. The sum is never above the total, and below it by less than one unit a member.

Members who want the same are one *group*: the want, and the number of members. So demands can be divided and sent in
few numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

WANT_BITS: Final = 6
"""Wants are rounded up to this many significant bits, by 1/64 on average. So there are few different wants, and a want
that varies a little stays the same.
"""


class Group(NamedTuple):
    """A number of members who each want the same."""

    want: int
    members: int


class ShareLevel(NamedTuple):
    """The level up to which wants are fulfilled.

    Args:
        most: the most of its want that a member gets; None if all get all of it.
        spare: what each gets on top.
    """

    most: int | None
    spare: int

    def share(self, want: int) -> int:
        return (want if self.most is None else min(want, self.most)) + self.spare


def fair_level(total: int, groups: Iterable[Group]) -> ShareLevel:
    """The level at which the sum of all shares is the total.

    Args:
        total: 0 or more, as are the wants.
    """
    ordered = sorted(groups)
    left = total
    count = everybody = sum([group.members for group in ordered])
    for group in ordered:
        if group.want * count >= left:
            return ShareLevel(left // count, 0)
        left -= group.want * group.members
        count -= group.members
    return ShareLevel(None, left // everybody if everybody else 0)


def grouped(wants: Iterable[int]) -> list[Group]:
    """The groups of these wants, in order of the want."""
    counts: dict[int, int] = {}
    for want in wants:
        counts[want] = counts.get(want, 0) + 1
    return [Group(want, counts[want]) for want in sorted(counts)]


def rounded_want(want: int) -> int:
    """The want, rounded up to `WANT_BITS` significant bits."""
    shift = max(0, want.bit_length() - WANT_BITS)
    return -(-want >> shift) << shift
