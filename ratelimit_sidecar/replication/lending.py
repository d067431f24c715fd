"""A node's ledger of strict limits on the mesh: what it hears from peers, and when it says something to them.

Sans-I/O, with a clock of its own: loans are timed by one that never steps (crdt/strict.py), deltas by the wall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from ratelimit_sidecar.crdt.ledger import Ledger, Wishes
from ratelimit_sidecar.crdt.shares import PARTS, Shown, home_parts
from ratelimit_sidecar.crdt.strict import Grant
from ratelimit_sidecar.replication.loans import LoanOutbox, check_count, read_asks, read_grants, read_returns
from ratelimit_sidecar.replication.status import MembershipStatus
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

TICK_EVERY_US: Final = 50_000

TICK_WORK: Final = 512
"""A tick looks at so many pairs of a bucket and a peer, of which each takes some 4 us: 2 ms, 4 % of the time. With
two peers it gets round 2,000 busy buckets while half a loan passes, when it has to be renewed."""

_NOTHING: Final = Shown(0, {})
"""What a peer without a membership shows: an epoch before the first."""


class Lending:
    """Args:
    strict_us: microseconds of a clock that never steps, the one of the ledger's buckets.
    """

    def __init__(self, ledger: Ledger, strict_us: Callable[[], int]) -> None:
        self.ledger = ledger
        self.loans_granted = 0
        """Asks of peers answered with a loan."""
        self.loans_received = 0
        """Asks that peers have answered with a loan."""
        self.refused = 0
        """Loans of nodes that are no members, and grants of more than a lender can have."""
        self._strict_us = strict_us
        weights = ledger.shares.membership.weights
        self._homes = {node: home_parts(weights, node) for node in weights}
        self._tick_due_us = strict_us()

    @property
    def membership(self) -> Shown:
        """What this node shows."""
        membership = self.ledger.shares.membership
        return Shown(membership.epoch, membership.weights)

    def conflicts_with(self, peer: str) -> bool:
        """True when the peer has shown other members under this node's epoch."""
        return peer in self.ledger.shares.conflicts

    def status(self) -> MembershipStatus:
        shares, now_us = self.ledger.shares, self._strict_us()
        settled_us = shares.settled_us()
        return MembershipStatus(
            epoch=shares.membership.epoch,
            home_share=shares.home(now_us) / PARTS,
            settled=settled_us is not None and settled_us <= now_us,
            conflicts=tuple(shares.conflicts),
            buckets=len(self.ledger),
            loans_granted=self.loans_granted,
            loans_received=self.loans_received,
        )

    def hear(self, peer: str, shown: Shown | None) -> None:
        """A peer has said hello, and what its membership is."""
        self.ledger.shares.hear(peer, shown or _NOTHING, self._strict_us())

    def tick(self, lenders: Iterable[str]) -> Mapping[str, Wishes]:
        """To be called every few milliseconds.

        Args:
            lenders: the peers that can be reached.

        Returns:
            What to tell each peer; not to one that cannot be reached any more.
        """
        now_us = self._strict_us()
        if now_us < self._tick_due_us:
            return {}
        self._tick_due_us = now_us + TICK_EVERY_US
        homes = {node: self._homes[node] for node in lenders if node in self._homes}
        return self.ledger.tick(homes, now_us, most=TICK_WORK // (4 + len(homes)))

    def receive(self, peer: str, loans: pb.Loans, outbox: LoanOutbox) -> int:
        """Apply a frame of a peer.

        Args:
            outbox: takes the answers.

        Returns:
            The number of buckets that the peer wants to borrow of and no strict rule here knows.

        Raises:
            ProtocolError: too_large, bad_key or bad_loan. What stood before the bad one has been applied, and is as
                good as if it had come alone.
        """
        check_count(loans)
        if not self.ledger.shares.is_member(peer):
            return self._turn_away(loans, outbox)
        now_us = self._strict_us()
        unknown_keys = 0
        for key, returned in read_returns(loans):
            self.ledger.returned(peer, key, returned, now_us)
        for key, ask in read_asks(loans):
            if not outbox.has_room_for_grant(key):
                # It asks again.
                continue
            try:
                grant = self.ledger.answer(peer, key, ask, now_us)
            except ValueError as error:
                raise ProtocolError(Reason.BAD_KEY, str(error)) from error
            if grant is None:
                unknown_keys += 1
                # So that it asks the others for more.
                grant = Grant(ask.number, parts=0, tokens=0, available=0)
            self.loans_granted += grant.parts > 0
            outbox.grant(key, grant)
        for key, grant in read_grants(loans):
            self.refused += not self.ledger.granted(peer, key, grant, now_us)
            self.loans_received += grant.parts > 0
        return unknown_keys

    def _turn_away(self, loans: pb.Loans, outbox: LoanOutbox) -> int:
        """Lend nothing to a node that is no member, and borrow nothing of it."""
        for key, ask in read_asks(loans):
            if outbox.has_room_for_grant(key):
                outbox.grant(key, Grant(ask.number, parts=0, tokens=0, available=0))
        self.refused += len(loans.returns) + len(loans.asks) + len(loans.grants)
        return 0

    def lost(self, peer: str) -> None:
        """The last stream of a peer has ended."""
        self.ledger.lost(peer)

    def forget(self, peer: str) -> None:
        """The peer is not coming back: what it has shown is void."""
        self.ledger.shares.hear(peer, _NOTHING, self._strict_us())
