"""Batches on their way to one peer, and how far behind that leaves it.

Lag, by this node's clock alone: from the creation of the oldest change unacknowledged to its acknowledgement.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

LAG_SHOWN_US: Final = 60_000_000
"""The last lag is shown for so long, so that a scraper sees that of a link that is seldom used."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One Deltas frame.

    Args:
        payload: a Deltas without a sequence.
        bucket_keys: of the buckets in it.
        entries: slot entries in it.
        created_us: of the oldest change in it; None when it tells of no change, only of state.
        begun_us: when the first of it was written.
        sent_us: when it was taken from the outbox.
        ends_snapshot: with it the peer has all of the snapshot.
    """

    payload: bytes
    bucket_keys: tuple[bytes, ...]
    entries: int
    created_us: int | None
    begun_us: int
    sent_us: int
    ends_snapshot: bool


class InFlight:
    """Batches sent and not acknowledged, oldest first."""

    def __init__(self) -> None:
        self._batches: deque[Batch] = deque()
        self.buckets = self.bytes = 0
        """Buckets, and bytes of payload, in all batches."""
        self._acknowledged_us = 0
        self._last_lag_us = 0

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def ends_snapshot(self) -> bool:
        """True while the end of a snapshot is among them."""
        return any(batch.ends_snapshot for batch in self._batches)

    @property
    def begun_us(self) -> int | None:
        """When the oldest was begun."""
        return self._batches[0].begun_us if self._batches else None

    @property
    def created_us(self) -> int | None:
        """When the oldest change in any of them was made."""
        return min((batch.created_us for batch in self._batches if batch.created_us is not None), default=None)

    def sent(self, batch: Batch) -> None:
        self._batches.append(batch)
        self.buckets += len(batch.bucket_keys)
        self.bytes += len(batch.payload)

    def acknowledged(self, now_us: int) -> Batch:
        """Remove and return the oldest batch, which the peer has applied."""
        batch = self._batches.popleft()
        self.buckets -= len(batch.bucket_keys)
        self.bytes -= len(batch.payload)
        self._acknowledged_us = now_us
        # The peer says itself how long it has waited to acknowledge.
        self._last_lag_us = max(0, now_us - (batch.sent_us if batch.created_us is None else batch.created_us))
        return batch

    def lost(self) -> None:
        """Forget all of them: the stream is gone."""
        self._batches.clear()
        self.buckets = self.bytes = 0

    def forget_times(self) -> None:
        """Forget the last lag: the clock was set."""
        self._acknowledged_us = 0

    def lag_us(self, oldest_us: int | None, now_us: int) -> int:
        """The age of the oldest change not acknowledged; with none, the lag of the batch acknowledged last.

        That is shown for `LAG_SHOWN_US`; on a quiet link there is nothing to lag behind.
        """
        if oldest_us is not None:
            return now_us - oldest_us
        return self._last_lag_us if now_us - self._acknowledged_us < LAG_SHOWN_US else 0


def earlier(one_us: int | None, other_us: int | None) -> int | None:
    """The earlier of two instants, of which there may be none."""
    if one_us is None or other_us is None:
        return one_us if other_us is None else other_us
    return min(one_us, other_us)
