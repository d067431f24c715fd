"""Who owns how much of every strict limit: shares by configured membership, safe while it changes.

A share is an integer in parts of 2**32 of a limit. Home shares come from weights that every member configures alike,
under an epoch number. The rule that keeps the sum of what is used at most one while epochs differ:

- A node of epoch E + 1 uses the smaller of its home shares before and after. So beside nodes still on E the sum is at
  most that of E, and beside nodes on E + 1 at most that of E + 1.
- It uses the new share in full once every member has shown epoch E + 1, and one longest loan has passed since: each of
  them was restarted to get there, and what it had lent before has ended then.

A node that leaves is in the membership before and not in the one after: it must be stopped before the new epoch is
rolled out. A peer that shows other members under the same epoch is a mistake; then the smaller share of the two is
used. Times are microseconds of a clock that never steps (see `strict.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

PARTS: Final = 1 << 32
"""The whole of a limit."""

LOAN_US: Final = 2_400_000
"""How long a borrower may use a loan, from its asking for it, on its own clock."""

LOAN_GUARD_US: Final = 120_000
"""How much longer the lender does without, from its granting it: 5 %, while two clocks slewed by up to 0.5 % each
differ by 1 %."""


@dataclass(frozen=True, slots=True)
class Membership:
    """Who shares strict limits, and with which weights.

    Args:
        epoch: 1 or more; rises by one with each change.
        weights: by node id; each 0 or more, at least one above 0.
        previous: the weights of the epoch before; None when there was none.
    """

    epoch: int
    weights: Mapping[str, int]
    previous: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """What a peer says of its membership."""

    epoch: int
    weights: Mapping[str, int]


def home_parts(weights: Mapping[str, int], node: str) -> int:
    """A node's home share; 0 for one that is no member. Rounded down, so that the sum is at most `PARTS`."""
    total = sum(weights.values())
    return PARTS * weights.get(node, 0) // total if total else 0


@dataclass(slots=True)
class Shares:
    """The membership as one node sees it.

    Args:
        node: this one.
        started_us: when it did. Until one longest loan later its home share is zero: it has forgotten what it had
            lent, and what it had admitted.
    """

    membership: Membership
    node: str
    started_us: int
    conflicts: dict[str, Shown] = field(default_factory=dict)
    """Peers that show other members under the same epoch."""
    _current_since_us: dict[str, int] = field(default_factory=dict)
    """When each peer first showed this epoch with these members."""

    @property
    def from_us(self) -> int:
        """When the home share begins."""
        return self.started_us + LOAN_US + LOAN_GUARD_US

    def since_us(self, now_us: int) -> int:
        """Since when the home share is what it is at `now_us`, or from when it will be."""
        settled_us = self.settled_us()
        return settled_us if settled_us is not None and settled_us <= now_us else self.from_us

    def hear(self, peer: str, shown: Shown, now_us: int) -> None:
        """A peer has said what its membership is."""
        self.conflicts.pop(peer, None)
        if shown.epoch != self.membership.epoch:
            if shown.epoch < self.membership.epoch:
                # It may have been restarted with an older configuration.
                self._current_since_us.pop(peer, None)
            return
        if dict(shown.weights) == dict(self.membership.weights):
            self._current_since_us.setdefault(peer, now_us)
        else:
            self.conflicts[peer] = shown

    def settled_us(self) -> int | None:
        """When the new share counts in full; None while a member has not shown this epoch."""
        if self.membership.previous is None:
            return self.from_us
        others = [member for member in self.membership.weights if member != self.node]
        if not all(member in self._current_since_us for member in others):
            return None
        last_us = max((self._current_since_us[member] for member in others), default=self.started_us)
        return max(self.from_us, last_us + LOAN_US + LOAN_GUARD_US)

    def home(self, now_us: int) -> int:
        """This node's home share at `now_us`, in parts."""
        if now_us < self.from_us:
            return 0
        membership = self.membership
        share = home_parts(membership.weights, self.node)
        settled_us = self.settled_us()
        if membership.previous is not None and (settled_us is None or now_us < settled_us):
            share = min(share, home_parts(membership.previous, self.node))
        for shown in self.conflicts.values():
            share = min(share, home_parts(shown.weights, self.node))
        return share
