"""Which refused streams are worth a line in the log: a peer that is refused comes back every few seconds, for ever."""

from __future__ import annotations

from dataclasses import dataclass

from ratelimit_sidecar.replication.targets import host_of

MAX_REFUSALS = 1_024
"""Remembered at once; when there are more, all are forgotten, and told again."""


@dataclass(slots=True)
class _Refusal:
    since_us: int
    is_told: bool = False


class Refusals:
    """By host, not port: each connection of a peer that dials in has a port of its own."""

    def __init__(self) -> None:
        self._refusals: dict[tuple[str, str], _Refusal] = {}

    def note(self, address: str, why: str, now_us: int, *, certain_after_us: int = 0) -> bool:
        """Note that a stream to or from `address` was refused.

        Args:
            certain_after_us: what passes by itself within this time isn't worth a line.

        Returns:
            True once: when it is to be told.
        """
        key = (host_of(address), why)
        if key not in self._refusals and len(self._refusals) >= MAX_REFUSALS:
            self._refusals.clear()
        refusal = self._refusals.setdefault(key, _Refusal(now_us))
        if refusal.is_told or now_us - refusal.since_us < certain_after_us:
            return False
        refusal.is_told = True
        return True

    def is_told(self, address: str, why: str) -> bool:
        """Whether `note` has been True for it."""
        refusal = self._refusals.get((host_of(address), why))
        return refusal is not None and refusal.is_told

    def forget(self, address: str) -> None:
        """A stream to or from it was accepted: whatever is refused next is news."""
        host = host_of(address)
        for key in [key for key in self._refusals if key[0] == host]:
            del self._refusals[key]
