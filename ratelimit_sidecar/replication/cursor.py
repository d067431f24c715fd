"""How far one peer has come in the node's log of changes.

A peer that keeps up is sent each segment as it is encoded for all. One that is behind those catches up: it is told what
changed since its cursor, each bucket once and with its newest counts.
"""

from __future__ import annotations

from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.changes import ChangeLog, Segment
from ratelimit_sidecar.replication.parts import NOTHING, Parts, own_part


class Cursor:
    """Args:
    takes_numbers: False for a peer whose protocol has no numbers for keys: it is not sent encoded segments.
    """

    def __init__(self, store: Store, log: ChangeLog, *, takes_numbers: bool) -> None:
        self._store = store
        self._log = log
        self._takes_numbers = takes_numbers
        self._known = 0
        """A bit for each number whose key the stream has carried."""
        self._next = log.end
        """The segment that is sent next."""
        self._passed_us = log.created_us
        """Not later than the first change behind the cursor."""
        self._catching_up: Parts | None = None
        self.lost_since_us: int | None = None
        """Set when what changed since then is forgotten: the peer needs a snapshot."""

    @property
    def has_changes(self) -> bool:
        """True while there is a segment to be sent."""
        return self._next < self._log.end

    @property
    def pending(self) -> int:
        """About how many changed buckets are yet to be sent."""
        return self._log.changes_since(self._next)

    @property
    def created_us(self) -> int | None:
        """Of the oldest change that is yet to be sent; None when there is none."""
        if not self.pending:
            return None
        segment = self._log.get(self._next)
        if segment is not None:
            return segment.created_us
        return self._passed_us if self.has_changes else self._log.created_us

    def take_shared(self) -> tuple[Segment, bytes] | None:
        """The next segment and its payload for this stream, which then is behind the cursor; None when the peer has to
        catch up."""
        segment = self._log.get(self._next)
        if segment is None or segment.payload is None or self._catching_up is not None or not self._takes_numbers:
            return None
        payload = segment.knowledge.missing(self._known) + segment.payload
        self._known |= segment.knowledge.all
        self._next += 1
        self._passed_us = segment.created_us
        return segment, payload

    def parts(self) -> Parts:
        """What the peer has to catch up with."""
        if self._catching_up is None:
            # It misses what these segments say of numbers.
            self._known = 0
            self._catching_up = self._catch_up()
        return self._catching_up

    def _catch_up(self) -> Parts:
        log = self._log
        end = log.next_shared(self._next + 1) if self._takes_numbers else log.end
        since_us = self.created_us or self._passed_us
        try:
            for key in log.keys(self._next, end):
                if key is None:
                    yield NOTHING
                else:
                    yield from own_part(self._store, key, since_us)
        except LookupError:
            end = log.end
            self.lost_since_us = since_us
        last = log.get(end - 1)
        self._passed_us = since_us if last is None else last.created_us
        self._next = end
        self._catching_up = None
