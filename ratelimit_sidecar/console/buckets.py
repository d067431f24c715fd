"""All buckets in memory, page by page in the order of their keys, while requests are decided in between.

A cursor is the last key of the page before, and a page holds the next greater ones. So the server keeps nothing between
pages, and a bucket that is there from the first page to the last is listed exactly once, whatever comes and goes
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
from ratelimit_sidecar.crdt.shares import PARTS
from ratelimit_sidecar.crdt.strict import StrictBucket
from ratelimit_sidecar.limiter.key import (
    EXACT,
    KEY_ONLY,
    OVERRIDE,
    OVERRIDE_LIMIT,
    PATTERN,
    UNRULED,
    WILDCARD_VALUE,
    decode_bucket_key,
)
from ratelimit_sidecar.limiter.rules import Rules

SLICE_BUCKETS = 512
"""Looked at in one go, in half a millisecond to one, since each is somewhere else in memory."""

_by_key = attrgetter("key")

_MATCH_NAMES = {
    EXACT: "key_value",
    KEY_ONLY: "key",
    PATTERN: "pattern",
    WILDCARD_VALUE: "value",
    UNRULED: "none",
    OVERRIDE: "override",
    OVERRIDE_LIMIT: "override_limit",
}


_CALLERS_OWN = {KEY_ONLY, WILDCARD_VALUE, UNRULED}
"""Entries whose values a caller chooses; all others stand in the rules."""

_SECRET = secrets.token_bytes(32)


class Page(NamedTuple):
    """Some buckets in the order of their keys."""

    buckets: list[Bucket]
    more: bool
    """There are buckets after these."""


class Walked(Protocol):
    """A store, as far as pages need one."""

    def walk(self) -> Iterator[Bucket]:
        """Every bucket, however slowly: one that comes or goes meanwhile may be among them or not."""


class BucketPager:
    """Finds pages in the buckets of several stores, a slice at a time, one search after the other."""

    def __init__(self, *stores: Walked) -> None:
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
    """One entry of a bucket's key, in JSON."""

    key: str
    value: str
    """One that a caller chooses is shown by a hash of this process alone, unless values are to be shown: it may be a
    token or somebody's address."""
    match: str
    """What the rule names: "key_value"; "key" (each value has a bucket of its own); "pattern", with the "value" after
    it when each has a bucket of its own; or "none": no rule matched. "override": the request gave the limit, which
    stands in "override_limit"."""


class BucketDescription(TypedDict):
    """One bucket, in JSON."""

    domain: str
    entries: list[EntryDescription]
    rule: str | None
    """Its name; None when it is in force no more."""
    capacity: int
    remaining: int
    debt: int
    """Tokens taken beyond the limit."""
    full_in_seconds: float
    replicated: bool
    share: float | None
    """Of a strict limit the part that is this node's home. What remains and is owed is of that part."""
    origins: int
    """Replicas, present and past lives of them, with consumption inside the horizon."""
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
        "replicated": bucket.journal is not None,
        "share": bucket.home / PARTS if isinstance(bucket, StrictBucket) else None,
        "origins": len(bucket.taken),
        "slots": sum(map(len, bucket.taken.values())),
    }


def describe_entries(bucket_key: bytes, *, shows_values: bool) -> list[EntryDescription]:
    return [
        {
            "key": entry.key,
            "value": entry.value if shows_values or entry.kind not in _CALLERS_OWN else _hidden(entry.value),
            "match": _MATCH_NAMES[entry.kind],
        }
        for entry in decode_bucket_key(bucket_key).entries
    ]


def _hidden(value: str) -> str:
    """Two values can be told apart by it, and none can be found by trying."""
    return f"hidden:{blake2b(value.encode(), key=_SECRET, digest_size=8).hexdigest()}"
