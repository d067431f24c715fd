"""What all buckets of one store share: which of them have own entries that no peer has been told of yet, and who the
peers are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ratelimit_sidecar.crdt.bucket import Bucket, Origin


class Journal:
    __slots__ = ("buckets", "on_urgent", "peers")

    def __init__(self) -> None:
        self.buckets: list[Bucket] = []
        """Each at most once."""
        self.peers: set[Origin] = set()
        """Those that are connected: what they take is heard, however many origins others have told of."""
        self.on_urgent: Callable[[], object] = _wait_for_the_next_flush
        """Called when a bucket gets nearly used up: others, who do not know, go on admitting. O(1), and does no I/O."""


def _wait_for_the_next_flush() -> None:
    pass
