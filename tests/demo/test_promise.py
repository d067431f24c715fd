"""The judge, against replicas whose deltas take their time, and replicas that tell nobody."""

from heapq import heappop, heappush
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.crdt.bucket import Entry, Origin
from ratelimit_sidecar.crdt.journal import Journal
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.token_bucket import TokenBucket
from ratelimit_sidecar.demo.promise import OneBucket, Verdict, judge, most_within

REPLICAS = 3
LAG_S = 0.3


def simulate(limit: TokenBucketLimit, *, seed: int, requests: int, mean_gap_s: float, delivered: bool) -> Verdict:
    """Random requests at random replicas; what one takes reaches each other after up to `LAG_S`, or never."""
    random = Random(seed)
    replicas = [
        TokenBucket(b"demo", limit, Origin(f"replica-{number}", 1), 0, journal=Journal()) for number in range(REPLICAS)
    ]
    one_bucket = OneBucket(limit)
    sent_at: list[list[float]] = [[] for _ in replicas]
    under_way: list[tuple[float, int, int, list[Entry]]] = []
    now_s = last_admitted_at = 0.0
    admitted = 0
    for number in range(requests):
        now_s += random.expovariate(1 / mean_gap_s)
        while under_way and under_way[0][0] <= now_s:
            arrival_s, _, to, entries = heappop(under_way)
            replicas[to].merge(entries, round(arrival_s * 1e6))
        chosen = random.randrange(REPLICAS)
        sent_at[chosen].append(now_s)
        one_bucket.offer(now_s)
        replica = replicas[chosen]
        if replica.take(1, round(now_s * 1e6)):
            admitted += 1
            last_admitted_at = now_s
            entries = list(replica.own_entries(replica.drain_changed_slots()))
            for to in range(REPLICAS):
                if delivered and to != chosen:
                    heappush(under_way, (now_s + random.uniform(0, LAG_S), number * REPLICAS + to, to, entries))
    return judge(
        limit,
        admitted=admitted,
        errors=0,
        one_bucket=one_bucket.admitted,
        sent_at=sent_at,
        last_admitted_at=last_admitted_at,
        lag_s=LAG_S,
    )


limits = st.sampled_from(
    [TokenBucketLimit(10, 1_000_000, 100), TokenBucketLimit(20, 60_000_000, 20), TokenBucketLimit(50, 1_000_000, 10)]
)


@given(limit=limits, seed=st.integers(0, 2**32), mean_gap_s=st.sampled_from([0.002, 0.01, 0.05]))
def test_replicas_whose_deltas_arrive_within_the_lag_keep_the_promise(
    limit: TokenBucketLimit, seed: int, mean_gap_s: float
) -> None:
    verdict = simulate(limit, seed=seed, requests=600, mean_gap_s=mean_gap_s, delivered=True)

    assert verdict.broken is None, verdict


@pytest.mark.parametrize("seed", range(5))
def test_replicas_that_tell_nobody_break_it(seed: int) -> None:
    verdict = simulate(
        TokenBucketLimit(10, 1_000_000, 100), seed=seed, requests=900, mean_gap_s=1 / 90, delivered=False
    )

    assert verdict.broken is not None
    assert "more than" in verdict.broken


def verdict_of(*, admitted: int, errors: int = 0, one_bucket: int = 200) -> Verdict:
    return Verdict(offered=1_000, admitted=admitted, errors=errors, one_bucket=one_bucket, ceiling=205, allowance=20)


@pytest.mark.parametrize("admitted", [180, 200, 225])
def test_within_the_allowance_the_promise_is_kept(admitted: int) -> None:
    assert verdict_of(admitted=admitted).broken is None


def test_admitting_more_than_the_allowance_above_the_ceiling_breaks_it() -> None:
    assert "226 admitted, more than 205 + 20" in str(verdict_of(admitted=226).broken)


def test_admitting_less_than_the_allowance_below_one_bucket_breaks_it() -> None:
    assert "one bucket would have admitted 200" in str(verdict_of(admitted=179).broken)


def test_failed_requests_may_have_been_charged_but_too_many_of_them_break_it() -> None:
    assert verdict_of(admitted=175, errors=5).broken is None
    assert "11 of 1000 requests failed" in str(verdict_of(admitted=200, errors=11).broken)


def test_the_ceiling_grows_with_the_time_until_the_last_admission() -> None:
    verdict = judge(
        TokenBucketLimit(10, 1_000_000, 100),
        admitted=0,
        errors=0,
        one_bucket=0,
        sent_at=[[5.0, 6.0], [5.5], []],
        last_admitted_at=7.0,
        lag_s=0.0,
    )

    assert verdict.ceiling == 100 + 10 * 2


def test_nothing_sent_promises_nothing_but_the_capacity() -> None:
    verdict = judge(
        TokenBucketLimit(10, 1_000_000, 100),
        admitted=0,
        errors=0,
        one_bucket=0,
        sent_at=[[], [], []],
        last_admitted_at=float("-inf"),
        lag_s=0.1,
    )

    assert verdict.ceiling == 100
    assert verdict.broken is None


@given(
    st.lists(st.integers(0, 50), max_size=40).map(sorted),
    st.integers(0, 20),
)
def test_most_within_counts_the_fullest_window(instants: list[int], window: int) -> None:
    expected = max((sum(0 <= at - start <= window for at in instants) for start in instants), default=0)

    assert most_within(map(float, instants), float(window)) == expected
