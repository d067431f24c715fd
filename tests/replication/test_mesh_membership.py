"""Who is in a mesh: names and their addresses, peers under several of them, and two nodes with one id."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import pytest
from replication.builders import RULES, SECOND_US
from replication.meshes import (
    TIMEOUT_SECONDS,
    Sidecar,
    address_of,
    at_once,
    dialled,
    events,
    free_addresses,
    hello,
    now_us,
    sidecar,
    soon,
    told,
)
from structlog.testing import capture_logs
from tenacity import RetryCallState

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.shares import OLD_LOAN_US, Membership, Shares
from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS, MeshBounds
from ratelimit_sidecar.replication.dialler import redial_seconds
from ratelimit_sidecar.replication.open_streams import CERTAIN_US
from ratelimit_sidecar.replication.payments import PaymentExchange
from ratelimit_sidecar.replication.peers import PEER_FORGOTTEN_US
from ratelimit_sidecar.replication.resolver import Resolver
from ratelimit_sidecar.replication.targets import GRACE_US, Target, port_of
from ratelimit_sidecar.supervision import Supervisor

ID_TAKEN_US = int(3e6 * DEFAULT_BOUNDS.misconfigured_redial)
"""Longer than a refusal is remembered: until the peer was dialled again twice."""


class Names:
    """What names resolve to, as a test says. What is missing has no address."""

    def __init__(self, **addresses: list[str]) -> None:
        self.addresses = addresses
        self.asked = 0

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        try:
            return self.addresses[host]
        except KeyError:
            raise OSError(-2, "Name or service not known") from None

    @property
    def resolver(self) -> Resolver:
        return Resolver(self, every_seconds=0.01, first_seconds=0.01)


def port_free_on_loopback() -> int:
    """Of every address of 127.0.0.0/8, which are all this machine's."""
    return port_of(free_addresses(1)[0])


async def test_every_address_of_a_name_is_dialled_and_new_ones_when_they_come() -> None:
    port, names = port_free_on_loopback(), Names(mesh=["127.0.0.2"])
    async with (
        sidecar("b", listen=f"127.0.0.2:{port}"),
        sidecar("c", listen=f"127.0.0.3:{port}"),
        sidecar("a", listen=None, peers=[f"mesh:{port}"], resolver=names.resolver) as a,
    ):
        assert await a.mesh.wait_joined(TIMEOUT_SECONDS)
        assert [(status.node, status.address) for status in a.mesh.status()] == [("b", f"127.0.0.2:{port}")]
        names.addresses["mesh"].append("127.0.0.3")
        await a.connected_to("c")


async def test_a_name_that_cannot_be_looked_up_for_want_of_threads_disturbs_no_other_and_is_tried_again() -> None:
    port, names = port_free_on_loopback(), Names(mesh=["127.0.0.2"], other=["127.0.0.3"])

    async def without_threads(host: str, port: int) -> Sequence[str]:
        if host == "other" and names.asked < 5:
            names.asked += 1
            raise RuntimeError("can't start new thread")
        return names.addresses[host]

    supervisor = Supervisor()
    async with (
        sidecar("b", listen=f"127.0.0.2:{port}"),
        sidecar("c", listen=f"127.0.0.3:{port}"),
        sidecar(
            "a",
            listen=None,
            peers=[f"mesh:{port}", f"other:{port}"],
            resolver=Resolver(without_threads, every_seconds=0.01, first_seconds=0.01),
            supervisor=supervisor,
        ) as a,
    ):
        await a.until(lambda: any(status.last_error == "can't start new thread" for status in a.mesh.status()))
        await a.connected_to("b")
        await a.connected_to("c")
        assert supervisor.restarts["mesh_dial"] == 0


async def test_a_node_finds_itself_behind_a_name_and_ignores_it() -> None:
    port, names = port_free_on_loopback(), Names(mesh=["127.0.0.2", "127.0.0.3"])
    async with (
        sidecar("b", listen=f"127.0.0.2:{port}", peers=[f"mesh:{port}"], resolver=names.resolver) as b,
        sidecar("c", listen=f"127.0.0.3:{port}", peers=[f"mesh:{port}"], resolver=names.resolver) as c,
    ):
        for each, other in ((b, "c"), (c, "b")):
            assert await each.mesh.wait_joined(TIMEOUT_SECONDS)
            assert [status.node for status in each.mesh.status()] == [other]


async def test_a_region_that_has_a_gateway_is_that_one_and_not_the_sidecars_that_could_follow_it() -> None:
    port, names = port_free_on_loopback(), Names(east=["127.0.0.2", "127.0.0.3", "127.0.0.4"], west=["127.0.0.5"])
    peers = [f"{name}:{port}" for name in ("east", "west")]

    def gateway(name: str, address: str, region: str = "east") -> AbstractAsyncContextManager[Sidecar]:
        return sidecar(name, listen=f"{address}:{port}", region=region, is_gateway=True)

    async with sidecar("a", listen=None, peers=peers, resolver=names.resolver) as a:

        def shown() -> list[tuple[str, str, bool]]:
            return [(status.node, status.address.partition(":")[0], status.connected) for status in a.mesh.status()]

        unreached = ("", "127.0.0.5", False)
        async with gateway("b", "127.0.0.2"):
            await a.connected_to("b")
            await a.until(lambda: shown() == [("b", "127.0.0.2", True), unreached])
        # Until another one follows it is missed, and so is whoever could be the next.
        await a.until(lambda: ("b", "127.0.0.2", False) in shown())
        assert sorted(shown()) == [
            ("", "127.0.0.3", False),
            ("", "127.0.0.4", False),
            unreached,
            ("b", "127.0.0.2", False),
        ]
        async with gateway("c", "127.0.0.3"):
            await a.connected_to("c")
            assert shown() == [("c", "127.0.0.3", True), unreached]
            async with gateway("d", "127.0.0.5", "west"):
                await a.connected_to("d")
                assert shown() == [("c", "127.0.0.3", True), ("d", "127.0.0.5", True)]
            await a.until(lambda: ("d", "127.0.0.5", False) in shown())


async def test_an_address_beside_one_that_speaks_for_itself_alone_is_missed() -> None:
    port, names = port_free_on_loopback(), Names(mesh=["127.0.0.2", "127.0.0.3"])
    async with (
        sidecar("b", listen=f"127.0.0.2:{port}"),
        sidecar("a", listen=None, peers=[f"mesh:{port}"], resolver=names.resolver) as a,
    ):
        await a.connected_to("b")
        assert [status.node for status in a.mesh.status()] == ["b", ""]


async def test_an_address_that_is_gone_is_dialled_no_more_after_a_while_and_its_peer_forgotten() -> None:
    port, names, jump_us = port_free_on_loopback(), Names(mesh=["127.0.0.2", "127.0.0.3"]), 0
    async with (
        sidecar("b", listen=f"127.0.0.2:{port}"),
        sidecar(
            "a", listen=None, peers=[f"mesh:{port}"], resolver=names.resolver, clock=lambda: now_us() + jump_us
        ) as a,
    ):
        async with sidecar("c", listen=f"127.0.0.3:{port}"):
            await a.connected_to("b")
            await a.connected_to("c")
        await a.until(lambda: (status := a.peer("c")) is not None and not status.connected)
        names.addresses["mesh"].remove("127.0.0.3")
        asked = names.asked
        await a.until(lambda: names.asked >= asked + 2)
        assert a.peer("c") is not None
        with capture_logs() as logs:
            jump_us = GRACE_US
            await a.until(lambda: a.peer("c") is None)
            assert events(logs, "peer_address_gone")[0]["address"] == f"127.0.0.3:{port}"
            await a.connected_to("b")


async def test_an_address_that_is_gone_is_dialled_no_more_while_others_are() -> None:
    dials = Counter[str]()

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dials[writer.get_extra_info("sockname")[0]] += 1
        writer.transport.abort()

    port, names, jump_us = port_free_on_loopback(), Names(mesh=["127.0.0.2", "127.0.0.3"]), 0
    with capture_logs() as logs:
        async with (
            await asyncio.start_server(hang_up, "127.0.0.2", port),
            await asyncio.start_server(hang_up, "127.0.0.3", port),
            sidecar(
                "a",
                listen=None,
                peers=[f"mesh:{port}"],
                resolver=names.resolver,
                clock=lambda: now_us() + jump_us,
                redial=at_once,
            ) as a,
        ):
            await a.until(lambda: min(dials["127.0.0.2"], dials["127.0.0.3"]) >= 3)
            names.addresses["mesh"].remove("127.0.0.3")
            asked = names.asked
            await a.until(lambda: names.asked >= asked + 2)
            jump_us = GRACE_US
            await told(logs, "peer_address_gone")
            before = dials.copy()
            await a.until(lambda: dials["127.0.0.2"] >= before["127.0.0.2"] + 20)
            # One may have been under way.
            assert dials["127.0.0.3"] <= before["127.0.0.3"] + 1


async def test_a_dial_that_was_given_up_leaves_no_connection() -> None:
    bounds = MeshBounds(connect=0.01)
    hung_up, waits = asyncio.Event(), list[bool]()

    def redial_soon(target: Target, *_: object) -> float:
        waits.append(target.is_mute)
        return 0.01

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while await reader.read(65_536):
                pass
        hung_up.set()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with (
        server,
        sidecar("a", listen=None, peers=[f"{host}:{port}"], bounds=bounds, redial=redial_soon) as a,
        asyncio.timeout(TIMEOUT_SECONDS),
    ):
        await a.until(lambda: a.mesh.status()[0].last_error == "not connected within 0.01 s")
        await a.until(lambda: bool(waits) and waits[-1])
        await hung_up.wait()
        server.close()
        # Now it is refused.
        await a.until(lambda: not waits[-1])


async def test_a_node_that_drains_dials_no_more() -> None:
    # As long as nothing moves it, no peer is taken for dead.
    at_us = now_us()
    dials = Counter[str]()

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dials[writer.get_extra_info("sockname")[0]] += 1
        writer.transport.abort()

    port = port_free_on_loopback()
    async with (
        await asyncio.start_server(hang_up, "127.0.0.2", port),
        await asyncio.start_server(hang_up, "127.0.0.3", port),
        sidecar(
            "a",
            peers=[f"127.0.0.2:{port}"],
            clock=lambda: at_us,
            bounds=MeshBounds(drain=3_600.0),
            redial=at_once,
        ) as a,
        sidecar("b", listen=None, peers=[f"127.0.0.3:{port}"], redial=at_once) as b,
        dialled(a) as mute,
    ):
        await mute.write(hello("c"))
        await a.connected_to("c")
        await a.until(lambda: dials["127.0.0.2"] >= 3)
        # That is never acknowledged.
        a.take("ann", 5)
        a.mesh.stop()
        before = dials.copy()
        await b.until(lambda: dials["127.0.0.3"] >= before["127.0.0.3"] + 20)
        assert not a.task.done()
        # One may have been under way.
        assert dials["127.0.0.2"] <= before["127.0.0.2"] + 1


async def test_a_peer_that_has_lost_one_of_two_addresses_is_configured_by_the_other() -> None:
    port, names, jump_us, steady_jump_us = port_free_on_loopback(), Names(mesh=["127.0.0.2", "127.0.0.3"]), 0, 0
    with capture_logs() as logs:
        async with sidecar(
            "a",
            listen=None,
            peers=[f"mesh:{port}"],
            resolver=names.resolver,
            clock=lambda: now_us() + jump_us,
            steady=lambda: now_us() + steady_jump_us,
        ) as a:
            async with sidecar("b", listen=f"0.0.0.0:{port}"):
                [parked] = await told(logs, "peer_has_two_addresses")
                names.addresses["mesh"].remove(parked["address"].rpartition(":")[0])
                asked = names.asked
                await a.until(lambda: names.asked >= asked + 2)
                # The clock of streams does not jump, so the stream lives on.
                steady_jump_us = GRACE_US
                [gone] = await told(logs, "peer_address_gone")
                assert gone["address"] == parked["address"]
                assert events(logs, "peer_lost") == []
            # It is not one that only dials in, which would be forgotten.
            jump_us = PEER_FORGOTTEN_US
            asked = names.asked
            await a.until(lambda: names.asked >= asked + 10)
            assert [status.node for status in a.mesh.status()] == ["b"]


async def test_an_address_of_a_connected_peer_is_looked_at_now_and_then() -> None:
    bounds = MeshBounds(parked=0.01)
    async with (
        sidecar("b") as b,
        way(address_of(b)) as one,
        way(address_of(b)) as other,
        sidecar("a", listen=None, peers=[one.address, other.address], bounds=bounds, redial=at_once) as a,
    ):
        await a.until(lambda: sorted([one.opened, other.opened])[1] >= 4)
        assert sorted([one.opened, other.opened])[0] == 1


async def test_a_name_that_cannot_be_resolved_keeps_its_addresses_and_is_told_once() -> None:
    port, names = port_free_on_loopback(), Names(mesh=["127.0.0.2"])
    with capture_logs() as logs:
        async with sidecar("a", listen=None, peers=[f"mesh:{port}"], resolver=names.resolver) as a:
            async with sidecar("b", listen=f"127.0.0.2:{port}"):
                await a.connected_to("b")
                del names.addresses["mesh"]
                await a.until(lambda: a.mesh.status()[-1].last_error == "Name or service not known")
                assert [(status.node, status.address) for status in a.mesh.status()] == [
                    ("b", f"127.0.0.2:{port}"),
                    ("", f"mesh:{port}"),
                ]
            async with sidecar("b", listen=f"127.0.0.2:{port}", incarnation=2):
                await a.connected_to("b")
            asked = names.asked
            await a.until(lambda: names.asked >= asked + 2)
            [line] = events(logs, "name_not_resolved")
            assert (line["name"], line["kept"]) == (f"mesh:{port}", [f"127.0.0.2:{port}"])
            names.addresses["mesh"] = ["127.0.0.2"]
            await a.until(lambda: [status.node for status in a.mesh.status()] == ["b"])


async def test_a_name_without_addresses_does_not_hold_up_who_waits_for_the_peers() -> None:
    names = Names(empty=[])
    async with sidecar("a", listen=None, peers=["nowhere:1", "empty:1"], resolver=names.resolver) as a:
        assert await a.mesh.wait_joined(TIMEOUT_SECONDS)
        assert [(status.address, status.last_error) for status in a.mesh.status()] == [
            ("nowhere:1", "Name or service not known"),
            ("empty:1", "it has no addresses"),
        ]


@pytest.mark.parametrize(
    ("failures", "error"),
    [
        (2, socket.gaierror(socket.EAI_NONAME, "Name or service not known")),
        (9, socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")),
    ],
    ids=["not known yet", "nobody can tell"],
)
async def test_a_name_that_cannot_be_resolved_at_first_is_waited_for(failures: int, error: OSError) -> None:
    port, names = port_free_on_loopback(), Names(mesh=["127.0.0.2"])

    async def addresses(host: str, port: int) -> Sequence[str]:
        found = await names(host, port)
        if names.asked <= failures:
            raise error
        return found

    resolver = Resolver(addresses, every_seconds=60, first_seconds=0.01)
    async with (
        sidecar("b", listen=f"127.0.0.2:{port}") as b,
        sidecar("a", listen=None, peers=[f"mesh:{port}"], resolver=resolver) as a,
    ):
        b.take("ann", 5)
        assert await a.mesh.wait_joined(TIMEOUT_SECONDS)
        assert names.asked == failures + 1
        assert [status.node for status in a.mesh.status()] == ["b"]


async def test_a_peer_that_cannot_be_reached_at_first_is_waited_for() -> None:
    [address] = free_addresses(1)
    async with sidecar("a", listen=None, peers=[address], bounds=MeshBounds(absent=TIMEOUT_SECONDS)) as a:
        joining = asyncio.create_task(a.mesh.wait_joined(TIMEOUT_SECONDS))
        await a.until(lambda: a.mesh.status()[0].last_error != "")
        assert not joining.done()
        async with sidecar("b", listen=address):
            assert await joining
            assert a.mesh.status()[0].node == "b"


class Way:
    """Carries connections to another address, until it is cut."""

    def __init__(self, to: str) -> None:
        self.opened = 0
        self._host, _, port = to.rpartition(":")
        self._port = int(port)
        self._writers: list[asyncio.StreamWriter] = []
        self._is_cut = False
        self.address = ""

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        self.opened += 1
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, far_writer]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pump(reader, far_writer))
            tasks.create_task(self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
        except ConnectionError:
            pass
        writer.transport.abort()

    def cut(self) -> None:
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()


@asynccontextmanager
async def way(to: str) -> AsyncIterator[Way]:
    found = Way(to)
    server = await asyncio.start_server(found.carry, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    found.address = f"{host}:{port}"
    try:
        yield found
    finally:
        server.close()
        found.cut()


async def test_a_peer_under_two_addresses_has_one_stream_and_the_other_address_when_that_is_lost() -> None:
    with capture_logs() as logs:
        async with (
            sidecar("b") as b,
            way(address_of(b)) as one,
            way(address_of(b)) as other,
            sidecar("a", listen=None, peers=[one.address, other.address]) as a,
        ):
            await a.until(lambda: bool(events(logs, "peer_has_two_addresses")))
            assert await a.mesh.wait_joined(TIMEOUT_SECONDS)
            line = events(logs, "peer_has_two_addresses")[0]
            parked, used = (one, other) if line["address"] == one.address else (other, one)
            [status] = a.mesh.status()
            assert (status.node, status.address, status.connected) == ("b", used.address, True)
            assert a.mesh.protocol_errors == b.mesh.protocol_errors == {}
            assert events(logs, "stream_refused") == []
            used.cut()
            await a.until(lambda: (status := a.peer("b")) is not None and status.address == parked.address)
            await a.connected_to("b")
            a.take("ann", 7)
            await b.knows("ann", 7)
            assert len(a.mesh.status()) == 1


async def test_an_address_of_a_connected_peer_waits_and_is_not_dialled_again_and_again() -> None:
    async with (
        sidecar("b") as b,
        way(address_of(b)) as one,
        way(address_of(b)) as other,
        sidecar("a", listen=None, peers=[one.address, other.address], redial=at_once) as a,
    ):
        assert await a.mesh.wait_joined(TIMEOUT_SECONDS)
        # Time enough for a dial each.
        for hits in range(1, 21):
            a.take(f"user {hits}", hits)
            await b.knows(f"user {hits}", hits)
        assert sorted([one.opened, other.opened]) == [1, 1]


async def test_two_nodes_with_one_id_are_told_once_with_their_addresses_and_what_to_do() -> None:
    jump_us = 0
    waits: list[bool] = []

    def redial_soon(target: Target, *_: object) -> float:
        waits.append(target.is_misconfigured)
        return 0.01

    def clock() -> int:
        return now_us() + jump_us

    with capture_logs() as logs:
        async with (
            sidecar("a", incarnation=1, clock=clock) as a,
            sidecar(
                "a", incarnation=2, listen=None, peers=[address_of(a)], clock=clock, redial=redial_soon
            ) as namesake,
        ):
            await a.until(lambda: a.mesh.protocol_errors.get("duplicate_node", 0) >= 2)
            # It may be the same node, just restarted.
            assert events(logs, "two_nodes_with_one_id") == []
            assert not any(waits)
            assert not a.mesh.is_id_taken
            jump_us = CERTAIN_US
            # Once by each of them.
            for error in await told(logs, "two_nodes_with_one_id", times=2):
                assert (error["log_level"], error["node"]) == ("error", "a")
                assert error["fix"] == "give each a node.id of its own"
                assert any("127.0.0.1" in address for address in error["addresses"])
            tried = a.mesh.protocol_errors["duplicate_node"]
            await a.until(lambda: a.mesh.protocol_errors["duplicate_node"] >= tried + 3)
            assert len(events(logs, "two_nodes_with_one_id")) == 2
            assert waits[-1]
            assert a.mesh.is_id_taken
            assert namesake.mesh.is_id_taken
            # It shows for as long as streams are refused for it.
            jump_us += 2 * ID_TAKEN_US
            await a.until(lambda: a.mesh.protocol_errors["duplicate_node"] >= tried + 10)
            assert a.mesh.is_id_taken
            [status] = namesake.mesh.status()
            assert "two live sidecars have the node id 'a'" in status.last_error
            assert events(logs, "peer_unreachable") == events(logs, "stream_refused") == []


async def test_a_node_whose_id_a_third_one_knows_as_anothers_is_told_so_and_has_no_share_of_strict_limits() -> None:
    jump_us = 0
    shares = Shares(Membership(1, {"a": 1, "b": 1}), "b", now_us() - 2 * OLD_LOAN_US)
    ledger = Ledger(shares, Origin("b", 2), RULES.strict_limit_of_key)
    with capture_logs() as logs:
        async with (
            sidecar("a") as a,
            sidecar("b", incarnation=1, listen=None, peers=[address_of(a)], redial=soon) as b,
        ):
            await a.connected_to("b")
            await told(logs, "peer_connected", times=2)
            async with sidecar(
                "b",
                incarnation=2,
                listen=None,
                peers=[address_of(a)],
                clock=lambda: now_us() + jump_us,
                redial=soon,
                payments=PaymentExchange(ledger, now_us),
            ) as namesake:
                assert ledger.bucket(b"k", TokenBucketLimit(100, SECOND_US, 100), now_us()).remaining == 50
                # Refused twice, so it has noted the first time.
                await a.until(lambda: a.mesh.protocol_errors.get("duplicate_node", 0) >= 2)
                jump_us = CERTAIN_US
                # The first to be certain is the one whose clock has jumped.
                error = (await told(logs, "two_nodes_with_one_id"))[0]
                assert (error["node"], error["addresses"]) == ("b", ["this node", address_of(a)])
                assert namesake.mesh.is_id_taken
                await namesake.until(lambda: shares.home_fraction(now_us()) == 0)
                ledger.tick({}, now_us(), 1, 1)
                assert ledger.bucket(b"k", TokenBucketLimit(100, SECOND_US, 100), now_us()).remaining == 0
                jump_us += ID_TAKEN_US
                assert not b.mesh.is_id_taken
                assert not a.mesh.is_id_taken
                [status] = namesake.mesh.status()
                assert status.last_error.startswith("the peer closed the stream: duplicate_node: two live sidecars")
            status_of_b = a.peer("b")
            assert status_of_b is not None
            assert status_of_b.last_error.startswith("duplicate_node: two live sidecars have the node id 'b'")
            b.take("ann", 7)
            await a.knows("ann", 7)
            # Those of a and of the first b: the second was never connected.
            assert len(events(logs, "peer_connected")) == 2
            assert events(logs, "peer_lost") == events(logs, "peer_unreachable") == []


@pytest.mark.parametrize(
    ("target", "seconds"),
    [
        (Target("10.0.0.1:1"), 1.5),
        (Target("10.0.0.1:1", is_misconfigured=True), DEFAULT_BOUNDS.misconfigured_redial),
        (Target("10.0.0.1:1", is_mute=True), 0.0),
    ],
)
def test_what_only_people_can_mend_is_tried_seldom_and_what_did_not_answer_at_once(
    target: Target, seconds: float
) -> None:
    backoff: Callable[[RetryCallState], float] = lambda _: 1.5  # noqa: E731
    state = RetryCallState(retry_object=None, fn=None, args=(), kwargs={})  # type: ignore[arg-type]
    assert redial_seconds(target, backoff, DEFAULT_BOUNDS, state) == seconds
