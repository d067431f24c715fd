"""The region as one member of strict limits: its gateway asks and pays other members for the region's accounts."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

from redis import exceptions

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.gateway_ledger import GatewayLedger, gateway_needs
from ratelimit_sidecar.crdt.granted import COUNTED_US, GrantLedger
from ratelimit_sidecar.crdt.limit import AnyLimit
from ratelimit_sidecar.crdt.shares import Shares
from ratelimit_sidecar.fabric.account_calls import members_text
from ratelimit_sidecar.fabric.accounts import BEAT
from ratelimit_sidecar.fabric.drawing import Drawing
from ratelimit_sidecar.fabric.redis_link import RedisLink, ScriptCall
from ratelimit_sidecar.fabric.scripts import FabricKeys
from ratelimit_sidecar.persistence.redis_calls import Connect, is_permitted
from ratelimit_sidecar.persistence.redis_record import BadRecord
from ratelimit_sidecar.persistence.time_slice import TimeSlice
from ratelimit_sidecar.replication.payments import PaymentExchange

SWEPT_FIELDS: Final = 64
"""Fields of a shard's accounts that are looked at in a beat: 0.1 ms of the server."""

SWEPT_BUCKETS: Final = 16
"""Buckets of the gateway's own ledger that are swept in a beat."""


class RegionalMember:
    """The member of strict limits that a region is, for one term of a sidecar as its gateway. Call `beat` at each tick,
    and run `drawing`. The mesh, which is to have `payments`, begins when `is_settled`.

    Args:
        ledger: of this sidecar. Its shares say what member the region is, and it which limit a key has.
        strict_us: the clock of its buckets.
    """

    def __init__(self, ledger: GrantLedger, connect: Connect, keys: FabricKeys, strict_us: Callable[[], int]) -> None:
        self._keys = keys
        self._strict_us = strict_us
        self._beaten_us = strict_us()
        self._shares = Shares(ledger.shares.membership, ledger.shares.node, self._beaten_us, has_never_lent=True)
        self.origin = Origin(self._shares.node, secrets.randbelow(2**64 - 1) + 1)
        """The mesh's origin: a member of strict limits has one name, whichever sidecar is the gateway."""
        self._limits = ledger
        most, rule_key = ledger.places.max_buckets, ledger.places.rule_key
        self._ledger = GatewayLedger(self._shares, self.origin, self._limit_of_key, max_buckets=most, rule_key=rule_key)
        self.payments = PaymentExchange(self._ledger, strict_us)
        self.drawing = Drawing(connect, keys, self._ledger, strict_us, region=self._shares.node, needs=gateway_needs)
        self._cursors = ["0" for _ in keys.shards]
        """Where the search for accounts that can be dropped goes on, by shard."""
        self._settled_us = self._beaten_us

    def _limit_of_key(self, key: bytes) -> AnyLimit | None:
        # Other rules may be in force meanwhile.
        return self._limits.limit_of_key(key)

    @property
    def is_settled(self) -> bool:
        """False while sidecars may hold what is granted by other members: others may count on those that are shown."""
        return self._strict_us() >= self._settled_us

    def clear(self) -> Iterator[None]:
        """Forget all buckets, in steps; then it must not be used any more."""
        return self._ledger.clear()

    async def beat(self, link: RedisLink, token: int) -> None:
        """Call `BEAT`: let the clocks of the accounts go on, say who the members are, and learn what is short.

        Raises:
            exceptions.RedisError, OSError, TimeoutError, BadRecord: as of `RedisLink.call`, and when it is fenced. A
                call that the server does not permit raises nothing, since other limits can do without: the sidecars log
                it.
        """
        strict_us = self._strict_us()
        every_us, self._beaten_us = strict_us - self._beaten_us, strict_us
        self._ledger.sweep(strict_us, SWEPT_BUCKETS)
        members, epoch = members_text(self._shares.in_force(strict_us)), str(self._shares.membership.epoch)
        calls: list[ScriptCall] = [
            (
                [*keys.of_accounts, keys.fence],
                [secrets.token_hex(8), str(token), members, cursor, str(SWEPT_FIELDS), epoch],
            )
            for keys, cursor in zip(self._keys.shards, self._cursors, strict=True)
        ]
        try:
            answers = await link.call(BEAT, calls)
        except exceptions.ResponseError as error:
            answers = [error]
        time_slice = TimeSlice()
        for number, answer in enumerate(answers):
            if isinstance(answer, Exception):
                if "FENCED" in str(answer):
                    raise answer
                # A shard of a Cluster may be moved, while the others are not. It knows the former members as yet.
                if is_permitted(answer):
                    self._settle_after(COUNTED_US)
                continue
            for key in self._short_keys(number, answer):
                self._note_short(key, every_us)
                await time_slice.rest_when_due()

    def _short_keys(self, number: int, answer: Any) -> list[bytes]:
        """The keys of buckets that are short."""
        match answer:
            case [int(after_us), bytes(cursor), [*short]] if all(isinstance(key, bytes) for key in short):
                self._cursors[number] = cursor.decode()
                self._settle_after(after_us)
                return short
            case _:
                raise BadRecord("an answer of another script")

    def _settle_after(self, after_us: int) -> None:
        self._settled_us = max(self._settled_us, self._strict_us() + after_us)

    def _note_short(self, key: bytes, every_us: int) -> None:
        # What is not a bucket key was not written by a sidecar.
        with suppress(ValueError):
            self._ledger.note_short(key, self._strict_us(), every_us)
