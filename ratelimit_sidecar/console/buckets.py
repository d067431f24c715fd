"""All buckets in memory, page by page in the order of their keys, while requests are decided in between.

A cursor is the last key of the page before, and a page has the next greater ones. So the server keeps nothing between
pages, and a bucket that exists from the first page to the last is listed exactly once, whatever is added or dropped
meanwhile. The price is a pass over all buckets for each page, since a dict has no order to seek in. The pass goes in
slices of `SLICE_BUCKETS`, and only one request at a time makes one.
"""

from __future__ import annotations

import asyncio
import heapq
import secrets
from collections.abc import Iterator
from hashlib import blake2b
from itertools import chain, islice
from operator import attrgetter
from typing import NamedTuple, Protocol, TypedDict

from ratelimit_sidecar.crdt.bucket import Bucket
from ratelimit_sidecar.crdt.shares import TOKEN
from ratelimit_sidecar.crdt.strict import StrictBucket
from ratelimit_sidecar.limiter.key import (
    DEFAULT_RULE,
    EXACT,
    KEY_ONLY,
    OVERRIDE,
    OVERRIDE_LIMIT,
    PATTERN,
    WILDCARD_VALUE,
    decode_bucket_key,
)
from ratelimit_sidecar.limiter.rules import Rules

SLICE_BUCKETS = 512
"""The buckets of one slice. It takes half a millisecond to one, mostly for memory access."""

_by_key = attrgetter("key")

_MATCH_NAMES = {
    EXACT: "key_value",
    KEY_ONLY: "key",
    PATTERN: "pattern",
    WILDCARD_VALUE: "value",
    DEFAULT_RULE: "none",
    OVERRIDE: "override",
    OVERRIDE_LIMIT: "override_limit",
}


_CALLER_CHOSEN = {KEY_ONLY, WILDCARD_VALUE, DEFAULT_RULE, OVERRIDE}
"""Kinds of entries whose values a caller chooses; all others are from the rules."""

_SECRET = secrets.token_bytes(32)


class Page(NamedTuple):
    """Some buckets in the order of their keys."""

    buckets: list[Bucket]
    more: bool
    """True if there are buckets after these."""


class BucketSource(Protocol):
    """A store of buckets to list."""

    def walk(self) -> Iterator[Bucket]:
        """Every bucket. The caller may pause between two; buckets added or dropped meanwhile may or may not be
        included."""


class BucketPager:
    """Makes pages of the buckets of several stores, a slice at a time. One request at a time."""

    def __init__(self, *stores: BucketSource) -> None:
        self._stores = stores
        self._one_pass = asyncio.Lock()

    async def page(self, after: bytes, limit: int, prefixes: tuple[bytes, ...] = (b"",)) -> Page:
        """The first `limit` buckets whose key is greater than `after` and begins with one of `prefixes`."""
        async with self._one_pass:
            buckets = chain.from_iterable(store.walk() for store in self._stores)
            first: list[Bucket] = []
            while some := list(islice(buckets, SLICE_BUCKETS)):
                found = [bucket for bucket in some if bucket.key > after and bucket.key.startswith(prefixes)]
                # One more than asked for tells whether there are more.
                first = heapq.nsmallest(limit + 1, first + found, _by_key)
                await asyncio.sleep(0)
        return Page(first[:limit], len(first) > limit)


class EntryDescription(TypedDict):
    """One entry of a bucket's key, as JSON shows it."""

    key: str
    value: str
    """A value that a caller chose is replaced by a hash, unless values are to be shown: it may be a token or an
    address.
    """
    match: str
    """How the rule matched: "key_value"; "key" (each value has a bucket of its own); "pattern", followed by an entry
    "value" if each value has a bucket of its own; "none": no rule matched; "override": the request has the limit, which
    is in "override_limit".
    """


class BucketDescription(TypedDict):
    """One bucket, as JSON shows it."""

    domain: str
    entries: list[EntryDescription]
    rule: str | None
    """The rule's name; None if it is no longer in force."""
    capacity: int
    remaining: int
    debt: int
    """Tokens taken beyond the limit."""
    full_in_seconds: float
    replicated: bool
    share: float | None
    """For a strict limit, the part that is this node's home. `remaining` and `debt` are of that part. On a fabric it is
    the region's, and what remains is held here, or was left there a moment ago."""
    origins: int
    """The number of origins with entries within the horizon, former lives of replicas included."""
    slots: int


def describe_bucket(bucket: Bucket, rules: Rules, now_us: int, *, shows_values: bool) -> BucketDescription:
    """A bucket as it is at `now_us`, by its own clock."""
    bucket.advance(now_us)
    rule = rules.rule_of_key(bucket.key)
    return {
        "domain": decode_bucket_key(bucket.key).domain,
        "entries": describe_entries(bucket.key, shows_values=shows_values),
        "rule": rule.name if rule is not None else None,
        "capacity": bucket.limit.capacity,
        "remaining": bucket.remaining,
        "debt": bucket.debt,
        "full_in_seconds": bucket.full_in_us / 1e6,
        "replicated": bucket.is_replicated,
        "share": bucket.home / (TOKEN * max(1, bucket.limit.capacity)) if isinstance(bucket, StrictBucket) else None,
        "origins": len(bucket.taken),
        "slots": sum(map(len, bucket.taken.values())),
    }


def describe_entries(bucket_key: bytes, *, shows_values: bool) -> list[EntryDescription]:
    return [
        {
            "key": entry.key,
            "value": entry.value if shows_values or entry.kind not in _CALLER_CHOSEN else _hidden(entry.value),
            "match": _MATCH_NAMES[entry.kind],
        }
        for entry in decode_bucket_key(bucket_key).entries
    ]


def _hidden(value: str) -> str:
    """A hash of the value with a key of this process. Equal values look equal, and cannot be found by trying."""
    return f"hidden:{blake2b(value.encode(), key=_SECRET, digest_size=8).hexdigest()}"
