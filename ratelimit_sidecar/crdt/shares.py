"""Who owns how much of every strict limit: shares by configured membership, safe while it changes.

A share is an integer in parts of 2**32 of a limit. Home shares come from weights that every member configures alike,
under an epoch number. The rule that keeps the sum of what is used at most one while epochs differ:

- A node of epoch E + 1 uses the smaller of its home shares of E and E + 1. So together with nodes still on E the sum is
  at most that of E, and together with nodes on E + 1 at most that of E + 1.
- It uses the new share in full once every member has shown epoch E + 1.

A node that leaves must be stopped before the new epoch is rolled out. A peer that shows other members under the same
epoch is configured wrongly; then the smaller share of the two is used. Times are microseconds of a clock that never
steps (see `strict.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

PARTS: Final = 1 << 32
"""The whole of a limit."""

OLD_LOAN_US: Final = 2_520_000
"""Protocols 2 and 3 lent shares for at most 2.52 s. After a start the home is zero until every other member has shown
protocol 4, or until such loans must have expired.
"""


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
    """The membership that a peer has shown."""

    epoch: int
    weights: Mapping[str, int]


def home_parts(weights: Mapping[str, int], node: str) -> int:
    """A node's home share; 0 if it is no member. Rounded down, so that the sum is at most `PARTS`."""
    total = sum(weights.values())
    return PARTS * weights.get(node, 0) // total if total else 0


MAX_WHOLE_CAPACITY: Final = 1 << 20
"""Up to this capacity homes are whole tokens. With larger limits a fraction of a token at each node does not matter."""


def parts_of(tokens: int, capacity: int) -> int:
    """The parts for a number of whole tokens of `capacity`, which is at most MAX_WHOLE_CAPACITY."""
    return tokens * PARTS // capacity if capacity else 0


def whole_tokens(parts: int, capacity: int) -> int:
    """The inverse of `parts_of`; other parts are rounded down."""
    return parts * capacity + capacity - 1 >> 32 if capacity else 0


def whole_tokens_up(parts: int, capacity: int) -> int:
    """The inverse of `parts_of`; other parts are rounded up."""
    return -(-parts * capacity >> 32)


def home_parts_of_key(weights: Mapping[str, int], node: str, key: bytes, capacity: int) -> int:
    """A node's home share of one limit, in parts that are whole tokens: a fraction of a token would admit nothing.

    Each node's share is rounded down. The tokens that remain go to one node each: to those with the highest hash of key
    and node (rendezvous hashing, Thaler and Ravishankar 1998). So all nodes compute the same shares, the sum is the
    capacity, and different keys favour different nodes.
    """
    total = sum(weights.values())
    weight = weights.get(node, 0)
    if not total or not weight or capacity > MAX_WHOLE_CAPACITY:
        return home_parts(weights, node)
    tokens = capacity * weight // total
    if capacity * weight % total:
        rounded = [other for other, each in weights.items() if capacity * each % total]
        left = capacity - sum(capacity * each // total for each in weights.values())
        ranked = sorted(rounded, key=lambda other: (rank(key, other), other), reverse=True)
        tokens += node in ranked[:left]
    return parts_of(tokens, capacity)


def rank(key: bytes, node: str) -> bytes:
    """A node's rank for this key. Nodes with a higher rank come first when only some can get a token."""
    return blake2b(key, key=blake2b(node.encode(), digest_size=16).digest(), digest_size=8).digest()


@dataclass(slots=True)
class Shares:
    """The membership as one node sees it.

    Args:
        node: this node.
        started_us: when it started; its buckets were empty then.
    """

    membership: Membership
    node: str
    started_us: int
    conflicts: dict[str, Shown] = field(default_factory=dict)
    """Peers that show other members under the same epoch. Only those of members have an effect."""
    from_us: int = field(init=False)
    """When the home share begins."""
    _current_since_us: dict[str, int] = field(default_factory=dict)
    """When each peer first showed this epoch with these members."""
    _upgraded: set[str] = field(default_factory=set)
    """Peers that have shown a membership, which only protocol 4 can."""

    def __post_init__(self) -> None:
        alone = not self._others
        self.from_us = self.started_us + (0 if alone else OLD_LOAN_US)

    @property
    def _others(self) -> set[str]:
        return set(self.membership.weights) - {self.node}

    def since_us(self, now_us: int) -> int:
        """The time since which the home share has its value of `now_us`, or from which it will have it."""
        settled_us = self.settled_us()
        return settled_us if settled_us is not None and settled_us <= now_us else self.from_us

    def hear(self, peer: str, shown: Shown, now_us: int) -> None:
        """Note the membership that a peer has shown."""
        self.conflicts.pop(peer, None)
        if shown.epoch:
            self._upgraded.add(peer)
            if now_us < self.from_us and self._upgraded >= self._others:
                self.from_us = now_us
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
        others = self._others
        if not others <= self._current_since_us.keys():
            return None
        return max([self.from_us, *(self._current_since_us[member] for member in others)])

    def home(self, now_us: int) -> int:
        """This node's home share at `now_us`, in parts. For one limit see `home_of_key`."""
        return min((home_parts(weights, self.node) for weights in self.in_force(now_us)), default=0)

    def home_of_key(self, key: bytes, capacity: int, now_us: int) -> int:
        """This node's home share of one limit at `now_us`, in parts."""
        return min(
            (home_parts_of_key(weights, self.node, key, capacity) for weights in self.in_force(now_us)), default=0
        )

    def most_of_key(self, member: str, key: bytes, capacity: int) -> int:
        """The largest that a node's home share of one limit can be, in parts; 0 if it is no member."""
        memberships = (self.membership.weights, self.membership.previous or {})
        return max(home_parts_of_key(weights, member, key, capacity) for weights in memberships)

    def is_member(self, node: str) -> bool:
        """True for members of this epoch or the one before."""
        return node in self.membership.weights or node in (self.membership.previous or {})

    def in_force(self, now_us: int) -> list[Mapping[str, int]]:
        """The memberships in force at `now_us`, as weights; this node uses the smallest of its shares in them. Empty
        before its home begins.
        """
        if now_us < self.from_us:
            return []
        membership = self.membership
        found = [membership.weights]
        settled_us = self.settled_us()
        if membership.previous is not None and (settled_us is None or now_us < settled_us):
            found.append(membership.previous)
        return found + [shown.weights for peer, shown in self.conflicts.items() if self.is_member(peer)]
