"""Snapshots: all there is that was written since some instant, for a peer at a stream's start and after a gap."""

from __future__ import annotations

from collections.abc import Iterator

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.changes import RECENT_CHANGES_US, ChangeLog, Forgotten
from ratelimit_sidecar.replication.lag import earlier
from ratelimit_sidecar.replication.parts import NOTHING, Parts, own_part, whole


class Snapshots:
    """The snapshots sent on one stream, one after the other. While one `is_owed`, send its `parts`.

    Args:
        peer: knows its own entries best.
        awaits_request: the peer is to say first which one it wants.
    """

    def __init__(self, store: Store, log: ChangeLog, peer: Origin, *, awaits_request: bool) -> None:
        self._store = store
        self._log = log
        self._peer = peer
        self.awaits_request = awaits_request
        self._is_told_recent = False
        """True when it has asked for own changes of the last seconds."""
        self._parts: Parts | None = None
        self._now_us = 0
        self._left = 0
        """About how many buckets are yet to be looked at."""
        self._since_us: int | None = None
        """How far back the earliest snapshot goes that is not acknowledged."""
        self._next_since_us: int | None = None
        """How far back the next snapshot goes, which follows the one under way; None for no other."""
        self._has_ended = False

    @property
    def is_owed(self) -> bool:
        """True while a snapshot has parts to be sent."""
        return self._parts is not None

    @property
    def pending(self) -> int:
        """About how many buckets are yet to be looked at."""
        return self._left if self.is_owed else 0

    @property
    def peer_misses_since_us(self) -> int | None:
        """Since when the peer misses something, if the stream is lost now; None when all snapshots were applied."""
        return earlier(self._since_us, self._next_since_us)

    def serve_request(self, now_us: int, *, recent: bool) -> None:
        """Begin the snapshot that the peer has asked for.

        Args:
            recent: own changes of the last RECENT_CHANGES_US; everything otherwise.
        """
        if self.awaits_request:
            self.awaits_request = False
            self._is_told_recent = recent
            if recent:
                self._begin_recent(now_us - RECENT_CHANGES_US, now_us)
            else:
                self._next_since_us = None
                self.begin(0)
        elif not recent and self._is_told_recent:
            # The peer that sent it everything is gone.
            self._is_told_recent = False
            self.begin(0)

    def begin(self, since_us: int) -> None:
        """Send all that was written since then: after the snapshot under way, or that which the peer is to ask for."""
        if self.awaits_request or self._parts is not None:
            # One under way has passed some buckets already, and may not go back so far.
            self._next_since_us = earlier(self._next_since_us, since_us)
            return
        self._since_us = earlier(self._since_us, since_us)
        self._left = len(self._store)
        self._parts = self._all(since_us)

    def parts(self, now_us: int) -> Parts:
        """The parts of the snapshot under way that are yet to be sent; it must be owed."""
        assert self._parts is not None
        self._now_us = now_us
        return self._parts

    def take_end(self) -> bool:
        """True once after the last part of a snapshot."""
        has_ended, self._has_ended = self._has_ended, False
        return has_ended

    def acknowledged(self) -> None:
        """Note that the peer has applied all of a snapshot."""
        if self._parts is None and not self._has_ended:
            self._since_us = None

    def close(self) -> None:
        """Call it when the stream is gone, so that the two can be freed (see `Cursor.close`)."""
        self._parts = None

    def _begin_recent(self, since_us: int, now_us: int) -> None:
        self._since_us = since_us
        first, end = self._log.recent_from(now_us), self._log.end
        self._left = min(self._log.changes_since(first), len(self._store))
        self._parts = self._recent(since_us, self._log.keys(first, end))

    def _all(self, since_us: int) -> Parts:
        # A snapshot of a million buckets takes half a minute, in which a peer that has just started admits what it
        # should deny; and if this node stops, nobody else may know.
        for first in self._store.nearly_used_up(lambda: self._now_us):
            if first is None:
                yield NOTHING
            else:
                yield from whole(self._store, first.key, since_us, self._now_us, self._peer)
        for bucket in self._store.walk():
            self._left = max(1, self._left - 1)
            yield from whole(self._store, bucket.key, since_us, self._now_us, self._peer)
        self._end()

    def _recent(self, since_us: int, keys: Iterator[bytes | None]) -> Parts:
        try:
            for key in keys:
                self._left = max(1, self._left - 1)
                if key is None:
                    yield NOTHING
                else:
                    yield from own_part(self._store, key, since_us)
        except Forgotten:
            # More has changed meanwhile than the log holds.
            for bucket in self._store.walk():
                yield from own_part(self._store, bucket.key, since_us)
        self._end()

    def _end(self) -> None:
        self._parts = None
        self._has_ended = True
        if self._next_since_us is not None:
            since_us, self._next_since_us = self._next_since_us, None
            self.begin(since_us)
