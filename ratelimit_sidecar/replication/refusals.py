"""Decides which refused streams are logged, since a refused peer comes back every few seconds, for ever."""

from __future__ import annotations

from dataclasses import dataclass

from ratelimit_sidecar.replication.targets import host_of

MAX_REFUSALS = 1_024
"""The most refusals remembered. When there are more, all are forgotten, and logged again."""


@dataclass(slots=True)
class _Refusal:
    since_us: int
    is_told: bool = False


class Refusals:
    """Remembers refusals by host, since each connection of a peer that dials in has a port of its own."""

    def __init__(self) -> None:
        self._refusals: dict[tuple[str, str], _Refusal] = {}

    def note(self, address: str, why: str, now_us: int, *, certain_after_us: int = 0) -> bool:
        """Note that a stream to or from `address` was refused.

        Args:
            certain_after_us: a refusal that goes away by itself within this time is not logged.

        Returns:
            True once: the caller must log it then.
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
        """Whether `note` has returned True for this refusal."""
        refusal = self._refusals.get((host_of(address), why))
        return refusal is not None and refusal.is_told

    def forget(self, address: str) -> None:
        """Note that a stream to or from the address was accepted. The next refusal is logged again."""
        host = host_of(address)
        for key in [key for key in self._refusals if key[0] == host]:
            del self._refusals[key]
