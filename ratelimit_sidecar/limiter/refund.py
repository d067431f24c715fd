"""Refunds: finds the bucket of one descriptor, as for a request, and gives tokens back to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ratelimit_sidecar.crdt.bucket import Bucket
from ratelimit_sidecar.crdt.store import StoreFull
from ratelimit_sidecar.limiter.counts import counts_of
from ratelimit_sidecar.limiter.explanation import why_unlimited
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Consistency, Rule


class NoSuchLimit(Exception):
    """No rule limits the descriptor; the text says what came closest."""


class NotRefundable(Exception):
    """The rule's tokens cannot be given back; the text says why."""


@dataclass(frozen=True, slots=True)
class BucketLevel:
    """How full a bucket is.

    Args:
        remaining: whole tokens left.
        debt: whole tokens taken beyond the limit.
    """

    remaining: int
    debt: int


@dataclass(frozen=True, slots=True)
class Refunded:
    """The result of a refund.

    Args:
        given: the tokens that were given back.
    """

    rule: Rule
    bucket: Bucket
    before: BucketLevel
    given: int
    after: BucketLevel


def refund(
    limiter: Limiter, domain: str, entries: Sequence[tuple[str, str]], tokens: int | None, now_us: int
) -> Refunded:
    """Give tokens back to the bucket of a descriptor. Peers receive it with the next flush.

    Args:
        tokens: at least 1; None to fill the bucket. No more are given back than fill it.

    Raises:
        NoSuchLimit: no rule matches.
        NotRefundable: the rule is unlimited or strict, or the descriptor has no bucket of its own.
    """
    rules = limiter.rules
    match = rules.match(domain, entries)
    if match is None:
        raise NoSuchLimit(why_unlimited(rules, domain, entries))
    rule = match.rule
    if rule.limit is None:
        raise NotRefundable(f"the rule {rule.name} is unlimited: there is nothing to give back")
    if rule.consistency is Consistency.STRICT:
        raise NotRefundable(
            f"the rule {rule.name} is strict: all sidecars together never admit more than its limit, and what is given"
            " back would be more"
        )
    is_replicated = rule.consistency is Consistency.EVENTUAL
    try:
        bucket = limiter.store.bucket(match.bucket_key, rule.limit, now_us, replicated=is_replicated)
    except StoreFull as error:
        raise NotRefundable(
            f"there is no room for a bucket of its own (max_buckets): it shares one of the rule {rule.name} with others"
        ) from error
    bucket.advance(now_us)
    before = BucketLevel(bucket.remaining, bucket.debt)
    given = bucket.refund(tokens, now_us)
    counts_of(limiter.counts, domain, match.metric_name, rule.name).given_back += given
    return Refunded(rule, bucket, before, given, BucketLevel(bucket.remaining, bucket.debt))
