"""What a gateway says to the accounts of its region, and when it shows other members to other regions."""

from __future__ import annotations

from fabric.test_fabric import connect_to, server
from fabric.test_strict import LIMIT, SECOND_US
from persistence.redis_server import RedisServer, needs_redis

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.granted import COUNTED_US, GrantLedger
from ratelimit_sidecar.crdt.limit import AnyLimit
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.fabric import accounts
from ratelimit_sidecar.fabric.redis_link import RedisLink
from ratelimit_sidecar.fabric.regional_member import SWEPT_BUCKETS, RegionalMember
from ratelimit_sidecar.fabric.scripts import FabricKeys

pytestmark = needs_redis

__all__ = ["server"]

KEYS = FabricKeys("ratelimit", ("1", "2"))
STRICT, SHORT = KEYS.shards[1].of_accounts


class Gateway:
    """One term of it, whose clock is the test's."""

    def __init__(self, server: RedisServer, token: int = 1) -> None:
        self.now_us = 10**12
        self._token = token
        self.link = RedisLink(connect_to(server))
        shares = Shares(Membership(1, {"east": 1, "west": 1}), "east", 0)
        ledger = GrantLedger(shares, Origin("a", 1), limit_of_key, max_buckets=100)
        self.member = RegionalMember(ledger, connect_to(server), KEYS, lambda: self.now_us)

    async def beat(self) -> None:
        await self.member.beat(self.link, self._token)

    async def close(self) -> None:
        await self.link.close()


def limit_of_key(key: bytes) -> AnyLimit:
    if key.startswith(b"odd"):
        raise ValueError("not a bucket key")
    return LIMIT


async def test_members_count_as_said_when_all_shards_have_heard_of_them(server: RedisServer) -> None:
    gateway = Gateway(server)
    async with server.client() as client:
        await client.set(STRICT, "no hash")
        await gateway.beat()
        gateway.now_us += COUNTED_US - 1
        await gateway.beat()
        gateway.now_us += COUNTED_US - 1
        assert not gateway.member.is_settled
        await client.delete(STRICT)
        await gateway.beat()
        gateway.now_us += COUNTED_US
        assert gateway.member.is_settled
    await gateway.close()


async def test_who_follows_a_gateway_that_has_just_said_who_the_members_are_waits_as_well(server: RedisServer) -> None:
    first, second = Gateway(server), Gateway(server, 2)
    await first.beat()
    await second.beat()
    second.now_us += COUNTED_US - SECOND_US
    assert not second.member.is_settled
    second.now_us += SECOND_US
    assert second.member.is_settled
    await first.close()
    await second.close()


async def test_a_short_bucket_that_is_none_is_left_out(server: RedisServer) -> None:
    gateway = Gateway(server)
    await gateway.beat()
    async with server.client() as client:
        await client.zadd(SHORT, {"odd": 2**50, "k": 2**50})
    await gateway.beat()
    assert len(gateway.member.payments.ledger) == 1
    await gateway.close()


async def test_buckets_that_are_no_longer_short_are_dropped(server: RedisServer) -> None:
    gateway = Gateway(server)
    await gateway.beat()
    ledger = gateway.member.payments.ledger
    async with server.client() as client:
        await client.zadd(SHORT, {f"k{number}": 2**50 for number in range(accounts.MAX_TOLD)})
        await gateway.beat()
        await client.delete(SHORT)
    assert len(ledger) == accounts.MAX_TOLD
    gateway.now_us += 10 * SECOND_US
    assert await gateway.member.drawing.tick()
    for _ in range(accounts.MAX_TOLD // SWEPT_BUCKETS):
        await gateway.beat()
    assert len(ledger) == 0
    await gateway.member.drawing.close()
    await gateway.close()


async def test_without_permission_other_limits_are_shared_all_the_same(server: RedisServer) -> None:
    async with server.client() as client:
        await client.acl_setuser("default", enabled=True, nopass=True, commands=["-info"])
    gateway = Gateway(server)
    await gateway.beat()
    assert gateway.member.is_settled
    await gateway.close()
