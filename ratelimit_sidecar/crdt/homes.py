"""The homes of one node over time, for purses that follow late: each change counts as of its instant.

To change the homes of a million purses takes longer than a turn of the event loop may. So a purse follows when it is
next looked at, and first lives through the time before with the home that it had then. If it refilled by its former
home up to now, it could hold tokens that another node has by now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ratelimit_sidecar.crdt.shares import Shares, home_in

MAX_CHANGES: Final = 8
"""The most changes that are kept apart. Before them the smallest homes of all earlier ones count. That is safe: a purse
that nobody used for so long may be less full than it could be."""

_Weights = list[Mapping[str, int]]


class Homes:
    """Which memberships were in force, and since when. Call `look` often; purses ask for what they missed (`since`)."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._changes: list[tuple[int, _Weights]] = []
        """The instant of each, and the weights in force from then on, as `Shares.in_force`."""
        self.version = 0
        """The number of the last change; 0 before the home begins."""

    @property
    def since_us(self) -> int | None:
        """The instant of the last change; None before the home begins."""
        return self._changes[-1][0] if self._changes else None

    @property
    def is_one_and_whole(self) -> bool:
        """True while the home has not changed since it began, and no other membership makes it smaller."""
        return self.version == 1 and self._changes[0][1] == [self._shares.membership.weights]

    def look(self, strict_us: int) -> None:
        """Note whether other memberships are in force now."""
        changes, in_force = self._changes, self._shares.in_force(strict_us)
        if in_force == (changes[-1][1] if changes else []):
            return
        changes.append((strict_us if changes else self._shares.from_us, in_force))
        self.version += 1
        if len(changes) > MAX_CHANGES:
            first_us, weights = changes.pop(0)
            changes[0] = first_us, weights + changes[0][1]

    def since(self, version: int, key: bytes, capacity: int) -> list[tuple[int, int]]:
        """This node's homes of one limit that came after that version: since when, and the home."""
        missed = self._changes[max(0, len(self._changes) - (self.version - version)) :]
        return [(at_us, home_in(weights, self._shares.node, key, capacity)) for at_us, weights in missed]
