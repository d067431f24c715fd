"""A bounded cache of plans by the bytes of their requests. It stays useful while callers invent values without end.

Once it is full, a plan is kept only if its request was seen lately. So requests that come once do not push out those
that come again and again. Of requests seen only a byte of the hash is remembered, in a table of 65,536 in which a
newer one replaces an older one: it stays in the processor's cache, and one new request in 256 is taken for one seen.
To make room, the oldest plans are dropped.

CPython's cycle collector must not see the plans. It counts objects made less objects freed, and a full cache frees an
old plan for each new one: so its youngest generation, meant for a thousand objects, would come to hold all plans, and
one collection would stop the loop for 50 ms.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from ratelimit_sidecar.crdt.untracked_dict import untrack
from ratelimit_sidecar.limiter.plan import Plan

MAX_PLANS_BYTES: Final = 32 * 1_024 * 1_024
"""The most bytes of all plans, as `_bytes_of` estimates them: about 16,000 plans of the usual size."""

MAX_PLAN_BYTES: Final = 32 * 1_024
"""The plan of a larger request is never kept."""


class PlanCache:
    """A cache of plans. Look one up in `plans`; after a miss, make the plan and `keep` it.

    Args:
        max_bytes: of all plans, as `_bytes_of` estimates them.
    """

    def __init__(self, max_bytes: int = MAX_PLANS_BYTES) -> None:
        self._max_bytes = max_bytes
        self.plans: dict[bytes, Plan] = {}
        """For look-ups; only `keep` changes it."""
        self.bytes = 0
        """The estimated bytes of all plans."""
        self._oldest_first: deque[bytes] = deque()
        """The keys of `plans`. A dict alone would be searched from its start, past all that was dropped."""
        self._seen = bytearray(1 << 16)
        """By two bytes of a request's hash, a third byte of the hash of the request that was seen last."""

    def keep(self, request: bytes, plan: Plan) -> None:
        """Add a plan that was just made and is not in here, if it is worth keeping."""
        size = _bytes_of(request, plan)
        if size > MAX_PLAN_BYTES:
            return
        if self.bytes + size > self._max_bytes:
            hashed = hash(request) & 0xFF_FFFF
            seen, place = hashed >> 16, hashed & 0xFFFF
            if self._seen[place] != seen:
                self._seen[place] = seen
                return
            while self.bytes + size > self._max_bytes:
                oldest = self._oldest_first.popleft()
                self.bytes -= _bytes_of(oldest, self.plans.pop(oldest))
        _untrack(plan)
        self.plans[request] = plan
        self._oldest_first.append(request)
        self.bytes += size


def _bytes_of(request: bytes, plan: Plan) -> int:
    """An estimate of the memory of both. Each text is held three times: in the request, the descriptor and the bucket
    key.
    """
    entries = 0
    for descriptor in plan.descriptors:
        entries += len(descriptor)
    return 300 + 3 * len(request) + 400 * len(plan.takes) + 200 * entries


def _untrack(plan: Plan) -> None:
    """Make the cycle collector ignore a plan. It is in no cycle."""
    untrack(plan)
    untrack(plan.takes)
    for take in plan.takes:
        untrack(take)
    untrack(plan.descriptors)
    for descriptor in plan.descriptors:
        untrack(descriptor)
        # As objects: compiled, a pair of texts would be copied, and the copy untracked.
        entries: Sequence[object] = descriptor
        for entry in entries:
            untrack(entry)
