"""The calls by which a gateway tells its region what others took, and reads what the region took."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Final

from ratelimit_sidecar.crdt.bucket import Bucket, Entry
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.fabric.redis_link import RedisLink, ScriptCall
from ratelimit_sidecar.fabric.region import TOLD_BUCKETS, Region, Shard, Told
from ratelimit_sidecar.fabric.scripts import GATEWAY, FabricKeys, ShardKeys

MAX_ANSWERED: Final = 128
"""Buckets of one answer; more than one call of a sidecar may raise (`sharing.BATCH_BUCKETS`)."""

Tell = Callable[[Bucket, Sequence[Entry]], object]
"""Sends other regions what this one took."""


class RegionExchange:
    """What passes between the fabric and the state of its region. Call `run` at each tick, and `failed` when it raises.

    Args:
        link: closed by `failed`; its owner closes it in the end.
        store: of this sidecar.
    """

    def __init__(self, link: RedisLink, keys: FabricKeys, store: Store, now_us: Callable[[], int]) -> None:
        self._link = link
        self._keys = keys
        self._store = store
        self._now_us = now_us
        self._reads_again = False

    def use_rules(self) -> None:
        """Other rules are in force: what had no rule before is read, and told, at the next tick."""
        self._reads_again = True

    async def run(self, region: Region, tell: Tell | None, token: int) -> bool:
        """Tell the region what others took, and the others what the region took.

        Args:
            tell: None while there are no others.
            token: of the lease.

        Returns:
            Whether there is more to be done at once.

        Raises:
            FAILURES: see `link`; a ResponseError with FENCED when another gateway has the lease.
        """
        if self._reads_again:
            self._reads_again = False
            region.tell_again()
        region.note_again()
        now_us = self._now_us()
        told = [await region.told(shard, now_us) for shard in region.shards]
        connections = self._link.connections
        is_told = [False for _ in region.shards]
        is_more = False
        try:
            calls = [
                self._call(shard, keys, what, token)
                for shard, keys, what in zip(region.shards, self._keys.shards, told, strict=True)
            ]
            for number, answer in enumerate(await self._link.call(GATEWAY, calls)):
                if isinstance(answer, Exception):
                    if "FENCED" in str(answer):
                        raise answer
                    # A shard of a Cluster that is being moved; the others are not.
                    region.tell_again()
                    continue
                changes, is_rest = await region.answered(region.shards[number], answer, self._now_us())
                is_told[number] = True
                is_more = is_more or is_rest or len(told[number]) >= TOLD_BUCKETS
                if tell is not None:
                    for bucket, entries in changes:
                        tell(bucket, entries)
        finally:
            for shard, what, done in zip(region.shards, told, is_told, strict=True):
                if not done:
                    region.failed(shard, what)
        if 0 < connections < self._link.connections:
            # The server may be an older copy of itself.
            region.tell_again()
        return is_more

    async def failed(self, region: Region) -> None:
        """Begin anew with another connection."""
        region.tell_again()
        await self._link.close()

    def _call(self, shard: Shard, keys: ShardKeys, told: Told, token: int) -> ScriptCall:
        names = [name for key in told for name in keys.of_bucket(key)]
        places = self._keys.places(self._store.places.max_buckets)
        arguments: list[bytes | str] = [
            *(secrets.token_hex(8), str(token), keys.head, str(places), str(shard.since), str(MAX_ANSWERED)),
            *[text for text, _ in told.values()],
        ]
        return [keys.clock, keys.changed, keys.held, keys.fence, *names], arguments
