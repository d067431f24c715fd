"""Plans by the bytes of their requests: bounded, and of use also while callers invent values without end.

Once it is full, a plan is kept only if its request was seen lately: what comes once does not push out what comes again
and again, and costs no more than its plan. What was seen is known by its hash alone, in a table in which a newer hash
overwrites an older one of the same place. When one is let in, the plan that has been there longest goes.
"""

from __future__ import annotations

from array import array
from typing import Final

from ratelimit_sidecar.limiter.plan import Plan

MAX_PLANS: Final = 16_384

MAX_REQUEST_BYTES: Final = 1_024
"""The plan of a longer request is never kept; with `MAX_PLANS` this bounds the memory."""

_SEEN_PLACES: Final = 1 << 16


class PlanCache:
    def __init__(self) -> None:
        self.plans: dict[bytes, Plan] = {}
        """To look up in; `keep` alone adds to it."""
        self._seen = array("q", bytes(8 * _SEEN_PLACES))

    def keep(self, request: bytes, plan: Plan) -> None:
        """A plan was made that is not in here."""
        if len(request) > MAX_REQUEST_BYTES:
            return
        if len(self.plans) >= MAX_PLANS:
            seen = hash(request)
            place = seen % _SEEN_PLACES
            if self._seen[place] != seen:
                self._seen[place] = seen
                return
            del self.plans[next(iter(self.plans))]
        self.plans[request] = plan
