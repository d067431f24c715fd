"""The most that `eventual` can admit beyond the limit, from what is known beforehand.

A region misses at most what the others admitted and it could not yet have heard of. From region j to region i that is
what j admits within a wait and a one-way delay, `_delivery_us`; and j admits at most what it is asked for, and at most
what a bucket of its own would. What was admitted on the other side of a cut can have been sealed before it is told:
then it is missing until the debt is repaid, beside the usual.

**Proof.** D(t) is the deficit of one bucket charged with everything that all regions admit, at the instants they do.
D_i(t) is the deficit that region i sees. U_i(t) are the tokens that others have admitted by t and i has not heard of.

1. A missing token costs at most a token. `D(t) = max(0, sup over s of [taken(s, t] - rate * (t - s)])`, and n
   tokens more raise `taken(s, t]` by at most n for every s.
2. A slot costs at most half a slot's refill. Region i places what it hears of at the middle of its slot, and its
   own admissions when it folds: up to half a slot width w early. What was taken in (s, t] is then in (s - w/2, t], so
   the supremum falls by at most rate * w/2.
3. Region i admits n tokens at t only if `D_i(t) + n <= capacity`. Hence after any admission
   `D <= capacity + U_i(t) + rate * w/2`, and in between D only drains. So, over all admissions (i, t):

       worst burst <= max U_i(t) + rate * w/2                                                    (undelivered)

4. What can be undelivered. An admission of j is noted within a flush f = 20 ms. It may then wait while M = 256
   batches, or 8,192 buckets, are unacknowledged. M batches take half a second at least, even where flushes come every
   2 ms, because one bucket after the other gets nearly used up. With the one-way delay d, of up to half of that, and
   if fewer buckets change within a round trip, i has heard of the admission after at most

       W = d + f

   Within W region j admits at most what it is asked for, `asked_j(W)`, and at most what a bucket of its own would.
   Therefore

       U_i <= sum over j != i of min(asked_j(W), capacity + rate * (W + w))                        (bound)

   With 80 ms links W is 100 ms, and less than 1 ms for the steps in which a batch is written and applied.
5. A cut of length L makes W as long as L and reconnecting, 8 s at worst. What the other side admitted before the
   horizon is told as its base only, and of two bases the larger counts. So this comes on top until the debt is repaid.

Debt above `max_debt` capacities that gets older than the horizon is forgiven, and can be admitted again beyond this
bound.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from benchmarks.admission.demand import Request
from benchmarks.admission.links import Cut
from benchmarks.admission.policies.policy import FLUSH_US
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS
from ratelimit_sidecar.replication.stream_io import CHECK_TIME_SECONDS
from simulation.network import STEP_US

AGAIN_US = int((DEFAULT_BOUNDS.connect + DEFAULT_BOUNDS.most_redial + CHECK_TIME_SECONDS) * 1_000_000)
"""An attempt that has begun during the cut, a wait, and until both ends have looked."""

STEPS_US = 4 * STEP_US
"""A flush, a batch and its application are done in steps."""

Delays = Sequence[Sequence[int]]
"""From region to region, the longest that a frame was on its way: it is known after the run."""


def bound(limit: TokenBucketLimit, requests: Sequence[Request], delays_us: Delays, cuts: Sequence[Cut]) -> int:
    """Tokens, rounded up."""
    regions = frozenset(range(len(delays_us)))
    asked_us = [[request.at_us for request in requests if request.region == region] for region in sorted(regions)]
    connected = _overshoot(limit, asked_us, delays_us, regions)
    lasting = [cut for cut in cuts if cut.ends_connections]
    return connected + sum(
        max(_beyond(limit, asked_us, delays_us, cut, side) for side in (cut.isolated, regions - cut.isolated))
        for cut in lasting
    )


def slot_refill(limit: TokenBucketLimit) -> int:
    """What a remote entry placed half a slot too early lets drain too much: tokens, rounded up."""
    return -(-(limit.tokens << limit.exponent) // (2 * limit.period_us))


def _overshoot(limit: TokenBucketLimit, asked_us: Sequence[Sequence[int]], delays_us: Delays, group: Set[int]) -> int:
    """Of regions that are connected."""
    return slot_refill(limit) + max(
        sum(_unheard(limit, asked_us[other], delays_us, other, region) for other in group if other != region)
        for region in group
    )


def _unheard(limit: TokenBucketLimit, asked_us: Sequence[int], delays_us: Delays, origin: int, target: int) -> int:
    """The most that `origin` can have admitted and `target` not heard of."""
    span_us = _delivery_us(delays_us, origin, target)
    return min(_most_within(asked_us, span_us), _one_bucket(limit, span_us))


def _delivery_us(delays_us: Delays, origin: int, target: int) -> int:
    """The longest from an admission to its being heard of."""
    return FLUSH_US + delays_us[origin][target] + STEPS_US


def _beyond(
    limit: TokenBucketLimit, asked_us: Sequence[Sequence[int]], delays_us: Delays, cut: Cut, side: Set[int]
) -> int:
    """The most that one side of a cut can have admitted before the other side hears of it again."""
    round_trip_us = max(map(max, delays_us)) * 2
    # An attempt that has begun during the cut, a wait, the handshake, both Hellos, and the full state.
    again_us = AGAIN_US + 2 * round_trip_us + FLUSH_US
    span_us = round_trip_us + cut.end_us - cut.start_us + again_us
    asked = sum(_most_within(asked_us[region], span_us) for region in side)
    return min(asked, _one_bucket(limit, span_us) + _overshoot(limit, asked_us, delays_us, side))


def _one_bucket(limit: TokenBucketLimit, span_us: int) -> int:
    """The most that one bucket admits within `span_us`, its events known by their slots."""
    return limit.capacity + (span_us + (1 << limit.exponent)) * limit.tokens // limit.period_us


def _most_within(times_us: Sequence[int], span_us: int) -> int:
    most = first = 0
    for last, at_us in enumerate(times_us):
        while times_us[first] < at_us - span_us:
            first += 1
        most = max(most, last - first + 1)
    return most
