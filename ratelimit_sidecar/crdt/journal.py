"""Which buckets have own entries that no peer has been told of yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ratelimit_sidecar.crdt.bucket import Bucket, Origin


class Journal:
    __slots__ = ("buckets", "on_urgent", "origin")

    def __init__(self) -> None:
        self.buckets: list[Bucket] = []
        """Each at most once."""
        self.on_urgent: Callable[[], object] = _wait_for_the_next_flush
        """Called when a bucket gets nearly used up: others, who do not know, go on admitting. O(1), and does no I/O."""
        self.origin: Origin | None = None
        """What this replica writes by since its clock was set back (`Store.go_back`); None when it never was."""


def _wait_for_the_next_flush() -> None:
    pass
