"""The order in which demands for quotas were published, so that each peer is sent those newer than the last it got.

Each bucket key is in the log once, under the version at which its demand was last published. Versions are grouped, so a
reader finds its place without walking over all that came before or after.
"""

from __future__ import annotations

from typing import Final

_GROUP: Final = 256


class DemandLog:
    """Keys by version. Versions count up from 1."""

    __slots__ = ("_groups", "_version", "_versions")

    def __init__(self) -> None:
        self._version = 0
        self._versions: dict[bytes, int] = {}
        self._groups: dict[int, dict[bytes, int]] = {}
        """Versions of keys by `version // _GROUP`. All are in order of versions, and none is empty."""

    def publish(self, key: bytes) -> None:
        """Give the key the next version."""
        self.forget(key)
        self._version += 1
        self._versions[key] = self._version
        self._groups.setdefault(self._version // _GROUP, {})[key] = self._version

    def forget(self, key: bytes) -> None:
        """Drop the key, if it is there."""
        version = self._versions.pop(key, 0)
        if version:
            number = version // _GROUP
            group = self._groups[number]
            del group[key]
            if not group:
                del self._groups[number]

    def newer(self, version: int, most: int) -> list[tuple[int, bytes]]:
        """The first `most` keys with a higher version than this one, each with its version."""
        found: list[tuple[int, bytes]] = []
        for number, group in self._groups.items():
            if number < version // _GROUP:
                continue
            for key, published in group.items():
                if published > version:
                    found.append((published, key))
                    if len(found) == most:
                        return found
        return found
