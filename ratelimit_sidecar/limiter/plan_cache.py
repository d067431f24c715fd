"""Plans by the bytes of their requests: bounded, and of use also while callers invent values without end.

Once it is full, a plan is kept only if its request was seen lately: what comes once does not push out what comes again
and again, and costs no more than its plan. What was seen is known by its hash alone, in a table in which a newer hash
overwrites an older one of the same place. When one is let in, those that have been there longest go.
"""

from __future__ import annotations

from array import array
from typing import Final

from ratelimit_sidecar.limiter.plan import Plan

MAX_BYTES: Final = 32 * 1_024 * 1_024
"""Of all plans, as `_bytes_of` estimates them: some 16,000 of the usual size."""

MAX_PLAN_BYTES: Final = 32 * 1_024
"""The plan of a larger request is never kept."""

_SEEN_PLACES: Final = 1 << 16


class PlanCache:
    """Plans of requests that come again and again. Look one up in `plans`, and `keep` one that was made."""

    def __init__(self) -> None:
        self.plans: dict[bytes, Plan] = {}
        """To look up in; `keep` alone adds to it."""
        self.bytes = 0
        """Of all of them."""
        self._seen = array("q", bytes(8 * _SEEN_PLACES))

    def keep(self, request: bytes, plan: Plan) -> None:
        """A plan was made that is not in here."""
        size = _bytes_of(request, plan)
        if size > MAX_PLAN_BYTES:
            return
        if self.bytes + size > MAX_BYTES:
            seen = hash(request)
            place = seen % _SEEN_PLACES
            if self._seen[place] != seen:
                self._seen[place] = seen
                return
            while self.bytes + size > MAX_BYTES:
                oldest = next(iter(self.plans))
                self.bytes -= _bytes_of(oldest, self.plans.pop(oldest))
        self.plans[request] = plan
        self.bytes += size


def _bytes_of(request: bytes, plan: Plan) -> int:
    """About what they take: each text three times, in the request, the descriptor and the bucket's name."""
    entries = 0
    for descriptor in plan.descriptors:
        entries += len(descriptor)
    return 300 + 3 * len(request) + 400 * len(plan.steps) + 200 * entries
