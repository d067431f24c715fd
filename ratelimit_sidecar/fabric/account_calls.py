"""One sidecar's calls to the accounts of one shard: what they say, and what the answers mean. No I/O.

The members, by which it computes the region's home of each limit, are what the gateway says, not its own configuration.
So all sidecars of a region go by the same ones, also while a configuration is rolled out.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ratelimit_sidecar.crdt.granted import DrawReply, DrawRequest, GrantedBucket, Needs
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.places import BucketPlaces
from ratelimit_sidecar.crdt.shares import TOKEN, home_of
from ratelimit_sidecar.fabric.scripts import class_of
from ratelimit_sidecar.fabric.status import DrawStatus
from ratelimit_sidecar.persistence.redis_record import BadRecord
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES

CALLER_RENEWED_US: Final = 60_000_000
"""Without an answer for so long calls get another caller id. The server forgets ids ten times as old."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call asks about one bucket."""

    bucket: GrantedBucket
    request: DrawRequest
    lineage: bytes


class AccountCalls:
    """One sidecar's calls to the accounts of one shard: build a call with `arguments`, send it once, and pass its
    answer to `receive`. Do nothing when no answer comes.

    Args:
        region: this sidecar's, as a member of strict limits.
        places: of its ledger. The shard may have as many accounts as it has buckets, or that part of them.
        shards: of the fabric.
    """

    def __init__(self, region: str, status: DrawStatus, places: BucketPlaces, shards: int = 1) -> None:
        self._region = region
        self._places = places
        self._shards = shards
        self._status = status
        self._caller = ""
        """The caller id: random, and another one after a silence (`CALLER_RENEWED_US`)."""
        self._caller_us = -CALLER_RENEWED_US
        """When the caller id began, or sent what was answered last."""
        self._number = self._answered = 0
        self._lineage = b""
        self._version = b""
        self._members: list[Mapping[str, int]] = []
        self._members_number = 0
        """Counts up with each other version."""

    def ask(self, bucket: GrantedBucket, needs: Needs) -> Asked | None:
        """What a call says of this bucket; None if it cannot be said."""
        if len(bucket.key) > MAX_KEY_BYTES:
            return None
        if bucket.lineage != self._lineage:
            bucket.lineage, bucket.generation = self._lineage, -1
        if bucket.home_version != self._members_number:
            bucket.home_version = self._members_number
            bucket.home = self._home(bucket.key, bucket.limit)
        return Asked(bucket, bucket.draw(needs), self._lineage)

    def _home(self, key: bytes, limit: TokenBucketLimit) -> int:
        return min((home_of(weights, self._region, key, limit.capacity) for weights in self._members), default=0)

    def arguments(self, asked: Iterable[Asked], sent_us: int) -> list[bytes | str]:
        """The arguments of `DRAW`. An answer to an earlier call must not be passed to `receive` after this."""
        if sent_us - self._caller_us >= CALLER_RENEWED_US:
            self._renew_caller()
            self._caller_us = sent_us
        self._number += 1
        arguments: list[bytes | str] = [
            *(secrets.token_hex(8), self._caller, str(self._number), str(self._answered)),
            *(self._lineage, self._version, str(-(-self._places.max_buckets // self._shards))),
        ]
        for each in asked:
            limit, request, home = each.bucket.limit, each.request, each.bucket.home // TOKEN
            rate = limit.tokens * home / (max(1, limit.capacity) * limit.period_us)
            was = f"{request.generation} {request.ends} {request.kept} {request.back}"
            needed = f"{request.wanted} {request.room} {request.spared}"
            key = each.bucket.key
            arguments += [key, f"{home} {rate:.17g} {was} {needed} {class_of(self._places.rule_key(key))}"]
        return arguments

    @property
    def _number_said(self) -> bytes:
        return str(self._number).encode()

    def _renew_caller(self) -> None:
        self._caller, self._number, self._answered = secrets.token_hex(8), 0, 0

    def receive(self, asked: Sequence[Asked], answer: Any, sent_us: int) -> None:
        """Apply the answer to a call.

        Raises:
            BadRecord: it is malformed. Nobody knows what was done.
        """
        match answer:
            case [bytes(lineage), bytes(version), number, bytes(members)] if number == self._number_said:
                self._caller_us = sent_us
                self._learn(asked, lineage, version, members)
            case [bytes(), int(generation), number, *texts] if len(texts) == len(asked) and number == self._number_said:
                self._caller_us = sent_us
                self._answered = self._number
                for each, text in zip(asked, texts, strict=True):
                    self._receive_grant(each, text, generation, sent_us)
            case _:
                raise BadRecord("an answer of another script")

    def _learn(self, asked: Sequence[Asked], lineage: bytes, version: bytes, members: bytes) -> None:
        if lineage == self._lineage:
            for each in asked:
                each.bucket.not_done(each.request)
        else:
            self._status.lineages += bool(self._lineage)
            # The server knows of no call of it.
            self._renew_caller()
        if version != self._version:
            self._members = read_members(members) if version else []
            self._members_number += 1
        self._lineage, self._version = lineage, version

    def _receive_grant(self, asked: Asked, text: Any, generation: int, sent_us: int) -> None:
        request = asked.request
        try:
            kept, tokens, room, left = map(int, text.split())
        except (AttributeError, ValueError) as error:
            raise BadRecord("an answer of another script") from error
        if kept not in (0, request.kept) or not 0 <= tokens <= request.wanted or not 0 <= room <= request.room:
            raise BadRecord("more than was asked for")
        bucket = asked.bucket
        left = max(0, min(left, bucket.home // TOKEN))
        bucket.grant_received(request, DrawReply(kept, tokens, room, left), generation, sent_us)
        if tokens < request.wanted:
            bucket.paced_us = sent_us
        self._status.drawn += tokens
        self._status.returned += request.back


def members_text(in_force: Iterable[Mapping[str, int]]) -> str:
    """What the gateway says of the memberships in force: a home is the smallest in any of them."""
    return json.dumps([dict(weights) for weights in in_force], sort_keys=True)


def read_members(text: bytes) -> list[Mapping[str, int]]:
    """Read what `members_text` wrote.

    Raises:
        BadRecord: it is malformed.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord("malformed members") from error
    is_list = isinstance(found, list) and all(isinstance(each, dict) and each for each in found)
    if not is_list or not all(isinstance(w, int) and w >= 0 for each in found for w in each.values()):
        raise BadRecord("malformed members")
    return [dict(each) for each in found]
