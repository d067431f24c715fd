"""Who owns how much of every strict limit, which is a node's *home*: by configured membership, safe while it changes.

Homes come from weights that every member configures alike, under an epoch number. The rule that keeps the sum of homes
at most one limit while epochs differ:

- A node of epoch E + 1 uses the smaller of its homes of E and E + 1. So together with nodes still on E the sum is at
  most that of E, and together with nodes on E + 1 at most that of E + 1.
- It uses the new home in full once every member has shown epoch E + 1.
- Until then, if a member still shows an epoch older than E, its weights count too: the change to E has not reached it.
  So the sum is at most that of the earliest epoch. A node cannot heed whom it has not heard since its start.

A node that leaves must be stopped before the new epoch is rolled out. A peer that shows other members under the same
epoch is configured wrongly; then the smaller home of the two is used. Units are those of `strict.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from ratelimit_sidecar.crdt.strict import HOLD_US

TOKEN: Final = 1 << 32
"""One token, as an amount."""

OLD_LOAN_US: Final = 2_520_000
"""Protocols 2 and 3 lent shares for at most 2.52 s. After a start the home is zero until every other member has shown
protocol 4, or until such loans must have expired; and in any case until tickets must have (`HOLD_US`).
"""


MAX_CONFLICTS: Final = 64


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
class ShownMembership:
    """The membership that a node shows to its peers."""

    epoch: int
    weights: Mapping[str, int]


def home_of(weights: Mapping[str, int], node: str, key: bytes, capacity: int) -> int:
    """A node's home of one limit, in whole tokens: a fraction of a token would admit nothing. 0 if it is no member.

    Each node's part is rounded down. The tokens that remain go to one node each: to those with the highest hash of key
    and node (rendezvous hashing, Thaler and Ravishankar 1998). So all nodes compute the same homes, the sum is the
    capacity, and different keys favour different nodes.
    """
    total = sum(weights.values())
    weight = weights.get(node, 0)
    if not weight:
        return 0
    tokens = capacity * weight // total
    if capacity * weight % total:
        rounded = [other for other, each in weights.items() if capacity * each % total]
        left = capacity - sum(capacity * each // total for each in weights.values())
        ranked = sorted(rounded, key=lambda other: (rank(key, other), other), reverse=True)
        tokens += node in ranked[:left]
    return tokens * TOKEN


def home_in(memberships: Iterable[Mapping[str, int]], node: str, key: bytes, capacity: int) -> int:
    """The smallest of a node's homes in these memberships; 0 without any."""
    return min((home_of(weights, node, key, capacity) for weights in memberships), default=0)


def rank(key: bytes, node: str) -> bytes:
    """A node's rank for this key. The tokens that are left of homes go to the highest ranks (`home_of`). Of two nodes
    with fractions of a token the lower rank gets both (`payment_policy`).
    """
    return blake2b(key, key=blake2b(node.encode(), digest_size=16).digest(), digest_size=8).digest()


_WITHOUT_THIS_NODE: Final[Mapping[str, int]] = {"": 1}
"""As weights: another node has all."""


@dataclass(slots=True)
class Shares:
    """The membership as one node sees it, and the homes that follow from it.

    Args:
        node: this node.
        started_us: when it started; its buckets were empty then.
        has_never_lent: True if no former life of this node can have lent tokens by an old protocol (`OLD_LOAN_US`), as
            in a region with a fabric.
    """

    membership: Membership
    node: str
    started_us: int
    has_never_lent: bool = False
    conflicts: dict[str, ShownMembership] = field(default_factory=dict)
    """Peers that show other members under the same epoch. Only those of members have an effect; of others the first
    `MAX_CONFLICTS` are kept."""
    is_id_taken: bool = False
    """Another process has this node's id, and the home of it."""
    are_purses_kept: bool = False
    """A former life's purses are in a file that cannot be deleted: a later life may spend them (`purse_file`)."""
    from_us: int = field(init=False)
    """When the home begins."""
    _behind: list[tuple[Mapping[str, int], set[str]]] = field(default_factory=list)
    """Weights of earlier epochs other than `previous`, each with the members that showed them last. What they show
    counts also while they cannot be reached."""
    _current: set[str] = field(default_factory=set)
    """Peers that show this epoch, or did before a later one."""
    _upgraded: set[str] = field(default_factory=set)
    """Peers that have shown a membership, which only protocol 4 can."""

    def __post_init__(self) -> None:
        self.from_us = self.started_us + (OLD_LOAN_US if self._others and not self.has_never_lent else 0)

    @property
    def _others(self) -> set[str]:
        return set(self.membership.weights) - {self.node}

    @property
    def is_epoch_everywhere(self) -> bool:
        """True when the new home counts in full: every member has shown this epoch."""
        return self.membership.previous is None or self._others <= self._current

    def receive(self, peer: str, shown: ShownMembership, strict_us: int) -> None:
        """Note the membership that a peer has shown."""
        self.conflicts.pop(peer, None)
        # Anybody may dial in, under any number of names.
        is_other = peer in self._others
        if shown.epoch and is_other:
            self._upgraded.add(peer)
            if strict_us < self.from_us and self._upgraded >= self._others:
                self.from_us = max(strict_us, self.started_us + HOLD_US)
            self._note_behind(peer, shown)
        if shown.epoch < self.membership.epoch:
            # It may have been restarted with an older configuration.
            self._current.discard(peer)
        elif shown.epoch == self.membership.epoch:
            if dict(shown.weights) != dict(self.membership.weights):
                if self.is_member(peer) or len(self.conflicts) < MAX_CONFLICTS:
                    self.conflicts[peer] = shown
            elif is_other:
                self._current.add(peer)

    def _note_behind(self, peer: str, shown: ShownMembership) -> None:
        for _, members in self._behind:
            members.discard(peer)
        if shown.epoch < self.membership.epoch and shown.weights != self.membership.previous:
            for weights, members in self._behind:
                if weights == shown.weights:
                    members.add(peer)
                    break
            else:
                self._behind.append((shown.weights, {peer}))
        self._behind = [each for each in self._behind if each[1]]

    def home_fraction(self, strict_us: int) -> float:
        """This node's homes at `strict_us`, as a fraction of each limit, but for rounding."""
        in_force = self.in_force(strict_us)
        return min((weights.get(self.node, 0) / sum(weights.values()) for weights in in_force), default=0)

    def home(self, key: bytes, capacity: int, strict_us: int) -> int:
        """This node's home of one limit at `strict_us`."""
        return home_in(self.in_force(strict_us), self.node, key, capacity)

    def max_home(self, member: str, key: bytes, capacity: int) -> int:
        """The largest that a node's home of one limit can be; 0 if it is no member."""
        memberships = (self.membership.weights, self.membership.previous or {})
        return max(home_of(weights, member, key, capacity) for weights in memberships)

    def is_member(self, node: str) -> bool:
        """True for members of this epoch or the one before."""
        return node in self.membership.weights or node in (self.membership.previous or {})

    def in_force(self, strict_us: int) -> list[Mapping[str, int]]:
        """The memberships in force at `strict_us`, as weights; this node uses the smallest of its homes in them. Empty
        before its home begins.
        """
        if strict_us < self.from_us:
            return []
        found = [self.membership.weights]
        if self.membership.previous is not None and not self.is_epoch_everywhere:
            found.append(self.membership.previous)
            found += [weights for weights, _ in self._behind]
        if self.is_id_taken or self.are_purses_kept:
            found.append(_WITHOUT_THIS_NODE)
        return found + [shown.weights for peer, shown in self.conflicts.items() if self.is_member(peer)]
