"""Who lends what to whom: the policy over a replica's strict buckets. Safety does not depend on anything in here.

A replica whose level will not last for what it is asked asks its peers for the share it lacks, from each in proportion
to what that peer has to spare; it renews a loan when half of it is over, and gives back what its demand no longer
needs. A lender keeps what its own demand needs, and divides the rest among those who ask by max-min fairness: nobody
gets more than asked for, and what is short is short alike. Times are those of `strict.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ratelimit_sidecar.crdt.shares import LOAN_US, PARTS
from ratelimit_sidecar.crdt.strict import Ask, Grant, Return, StrictBucket

ASK_AGAIN_US: Final = 500_000
"""Without an answer for so long the same lender is asked again."""

ASK_MORE_US: Final = 250_000
"""A lender that answered with less than was asked for is asked again after so long."""

STALE_US: Final = 2 * ASK_AGAIN_US
"""What was asked for or told so long ago may hold no longer: whoever still lacks something has asked again since."""

RENEW_US: Final = LOAN_US // 2
"""A loan that ends so soon is renewed."""

SLACK_SHIFT: Final = 6
"""Less than a sixty-fourth of the limit is not worth an ask, nor a return."""

UNLIKELY_SHIFT: Final = 4
"""A lender with nothing to spare a moment ago is still asked as if for a sixteenth of its home."""


@dataclass(slots=True)
class _Lender:
    """What a borrower knows of a lender, for one bucket."""

    number: int = 0
    """Of the last ask."""
    asked_us: int = 0
    is_open: bool = False
    """True while the last ask is not answered."""
    available: int | None = None
    """What it could lend, as it said last; None when it has not said."""
    told_us: int = 0


@dataclass(slots=True)
class Loans:
    """The loans of one bucket, as its replica sees them.

    Args:
        first_number: of its asks, less one. Random, so that no answer to a former life is taken for one to this.
    """

    bucket: StrictBucket
    first_number: int
    _lenders: dict[str, _Lender] = field(default_factory=dict)
    _wanted: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By borrower, the parts it asked for last, and when."""

    @property
    def last_number(self) -> int:
        """Of its asks to any lender."""
        return max((lender.number for lender in self._lenders.values()), default=self.first_number)

    def ask(self, homes: Mapping[str, int], now_us: int) -> tuple[dict[str, Ask], dict[str, Return]]:
        """What to tell each lender now.

        Args:
            homes: by node, the home share of every peer that can be reached.

        Returns:
            Asks and returns, by lender; both must reach it in the order of their numbers, or not at all.
        """
        bucket = self.bucket
        bucket.advance(now_us)
        own = bucket.share - sum(map(bucket.borrowed_from, bucket.lenders))
        lacking = max(0, bucket.needed - own)
        returns = self._returns(lacking, now_us)
        asks: dict[str, Ask] = {}
        borrowed = sum(map(bucket.borrowed_from, bucket.lenders))
        if lacking and (bucket.is_short or borrowed):
            for lender, parts in self._wishes(lacking, homes, now_us).items():
                if lender not in returns and self._is_worth_asking(lender, parts, now_us):
                    asks[lender] = self._next_ask(lender, parts, now_us)
        return asks, returns

    def answer(self, borrower: str, ask: Ask, now_us: int) -> Grant:
        """Lend to a peer what its fair part of the spare share allows."""
        bucket = self.bucket
        bucket.advance(now_us)
        self._wanted[borrower] = (ask.parts, now_us)
        wishes = self._wishes_at(now_us)
        spare = max(0, bucket.home_now - bucket.kept)
        others = bucket.lent - bucket.lent_to(borrower)
        fair = _max_min(spare, wishes).get(borrower, 0)
        # What others hold now they hold until their loans end, whatever would be fair.
        free = max(0, bucket.home_now - others)
        available = min(free, _max_min(spare, {**wishes, borrower: PARTS})[borrower])
        parts = bucket.whole(min(fair, free), max(0, spare - others))
        return bucket.lend(borrower, ask, parts, available, now_us)

    def granted(self, lender: str, grant: Grant, now_us: int, *, most: int = PARTS) -> None:
        """A lender has answered.

        Args:
            most: parts that it can have.
        """
        known = self._lenders.get(lender)
        if known is None or grant.number != known.number or not known.is_open:
            return
        known.is_open = False
        known.available = min(grant.available, most)
        known.told_us = now_us
        self.bucket.borrow(lender, grant, known.asked_us, now_us, most=most)

    def returned(self, borrower: str, returned: Return, now_us: int) -> None:
        """A borrower has given back a part of its loan, or all of it."""
        self._wanted.pop(borrower, None)
        self.bucket.take_back(borrower, returned, now_us)

    def lost(self, peer: str) -> None:
        """The peer cannot be reached: no answer is coming.

        Its asks go on being numbered from the last: a grant with a number that was passed is not used, and a return
        that is still on its way must not be taken for one of the loans after it.
        """
        known = self._lenders.get(peer)
        if known is not None:
            self._lenders[peer] = _Lender(known.number)
        self._wanted.pop(peer, None)

    def _returns(self, lacking: int, now_us: int) -> dict[str, Return]:
        bucket = self.bucket
        lenders = list(bucket.lenders)
        surplus = sum(map(bucket.borrowed_from, lenders)) - lacking
        returns: dict[str, Return] = {}
        for lender in lenders:
            known = self._lenders.get(lender)
            if surplus < PARTS >> SLACK_SHIFT or known is None:
                break
            held = bucket.borrowed_from(lender)
            kept = bucket.whole(held - min(held, surplus), held)
            if kept == held:
                continue
            surplus -= held - kept
            known.is_open = False
            returns[lender] = bucket.give_back(lender, kept, known.number, now_us)
        return returns

    def _wishes(self, lacking: int, homes: Mapping[str, int], now_us: int) -> dict[str, int]:
        """From each lender a part of what is lacking, in proportion to what it may have to spare.

        Capped by its home, not by what it has to spare: a lender divides fairly only what it is asked for.
        """
        spare = {lender: self._spare_of(lender, home, now_us) for lender, home in homes.items() if home}
        wishes: dict[str, int] = {}
        total = sum(spare.values())
        # Those with the least home for what they have to spare first: what they cannot give the others are asked for.
        for lender in sorted(spare, key=lambda lender: (homes[lender] * PARTS // spare[lender], lender)):
            wishes[lender] = min(homes[lender], lacking * spare[lender] // total)
            lacking -= wishes[lender]
            total -= spare[lender]
        return wishes

    def _spare_of(self, lender: str, home: int, now_us: int) -> int:
        known = self._lenders.get(lender)
        if known is None or known.available is None or now_us - known.told_us > STALE_US:
            return home
        return max(known.available, self.bucket.borrowed_from(lender), home >> UNLIKELY_SHIFT)

    def _is_worth_asking(self, lender: str, parts: int, now_us: int) -> bool:
        if not parts:
            return False
        known = self._lenders.get(lender)
        if known is not None and now_us - known.asked_us < (ASK_AGAIN_US if known.is_open else ASK_MORE_US):
            return False
        held = self.bucket.borrowed_from(lender)
        if held and self.bucket.loan_ends_in_us(lender) <= RENEW_US:
            return True
        return parts - held >= (PARTS >> SLACK_SHIFT if held else 1)

    def _next_ask(self, lender: str, parts: int, now_us: int) -> Ask:
        known = self._lenders.setdefault(lender, _Lender(number=self.first_number))
        known.number += 1
        known.asked_us = now_us
        known.is_open = True
        return Ask(known.number, parts)

    def _wishes_at(self, now_us: int) -> dict[str, int]:
        """By borrower, what it wants: what it asked for of late, or else what it holds."""
        wishes = {}
        for node, (parts, at_us) in list(self._wanted.items()):
            wish = parts if now_us - at_us < STALE_US else min(parts, self.bucket.lent_to(node))
            if wish:
                wishes[node] = wish
            elif now_us - at_us >= STALE_US:
                del self._wanted[node]
        return wishes


def _max_min(spare: int, wishes: Mapping[str, int]) -> dict[str, int]:
    """Divide `spare` so that nobody gets more than wished, and whoever gets less gets as much as any other."""
    parts: dict[str, int] = {}
    left = len(wishes)
    for node, wish in sorted(wishes.items(), key=lambda item: (item[1], item[0])):
        parts[node] = min(wish, spare // left)
        spare -= parts[node]
        left -= 1
    return parts
