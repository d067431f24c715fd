"""The client of an xDS server, against a real one."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import grpc
import pytest
from rules_source.loading import Recorder
from rules_source.xds_server import XdsServer, broken, config, serving
from structlog.testing import capture_logs

from ratelimit_sidecar import __version__
from ratelimit_sidecar.config.rules_file import rules_of_resources
from ratelimit_sidecar.config.sidecar_schema import XdsConfig, XdsTlsConfig
from ratelimit_sidecar.demo.ports import free_ports
from ratelimit_sidecar.rules_source import xds as module
from ratelimit_sidecar.rules_source.resources import TYPE_URL
from ratelimit_sidecar.rules_source.v3.rls_conf_pb2 import RateLimitConfig
from ratelimit_sidecar.rules_source.xds import XdsClient

RETRY_SECONDS = 0.2


@contextlib.asynccontextmanager
async def following(
    address: str, tls: XdsTlsConfig | None = None, headers: Mapping[str, str] = {}
) -> AsyncIterator[Recorder]:
    """A client that runs meanwhile."""
    where = XdsConfig(
        server=address,
        node_id="sidecar-1",
        node_metadata={"zone": "a"},
        headers=dict(headers),
        tls=tls,
        retry_seconds=RETRY_SECONDS,
    )
    recorder = Recorder(f"xDS server {address}")
    client = XdsClient(where, rules_of_resources)
    recorder.settled = client.settled
    running = asyncio.create_task(client.run(recorder.reloader))
    try:
        yield recorder
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


@contextlib.asynccontextmanager
async def left_by_its_server(*configs: RateLimitConfig) -> AsyncIterator[tuple[Recorder, str]]:
    """A client whose server has sent these and is gone, and the address at which another one is looked for."""
    server = XdsServer()
    server.publish("1", *configs)
    async with contextlib.AsyncExitStack() as stack:
        async with serving(server):
            recorder = await stack.enter_async_context(following(server.address))
            assert await recorder.next_load() == sorted(each.domain for each in configs)
        yield recorder, server.address


async def until_trouble(recorder: Recorder, text: str) -> None:
    async with asyncio.timeout(20):
        while text not in recorder.reloader.degraded_reason:  # noqa: ASYNC110 (nothing else tells of it)
            await asyncio.sleep(0.01)


async def test_the_first_configuration_is_put_in_force_and_accepted() -> None:
    server = XdsServer()
    nonce = server.publish("1", config("shop", "user"), config("bank", "user"))
    async with serving(server), following(server.address, headers={"x-tenant": "acme"}) as recorder:
        assert await recorder.next_load() == ["bank", "shop"]
        first, ack = await server.heard(), await server.heard()
        assert recorder.reloader.degraded_reason == ""
    assert (first.type_url, first.version_info, first.response_nonce) == (TYPE_URL, "", "")
    assert (first.node.id, dict(first.node.metadata), list(first.resource_names)) == ("sidecar-1", {"zone": "a"}, [])
    assert (first.node.user_agent_name, first.node.user_agent_version) == ("ratelimit-sidecar", __version__)
    assert (ack.type_url, ack.version_info, ack.response_nonce) == (TYPE_URL, "1", nonce)
    assert not ack.HasField("error_detail")
    assert server.metadata["x-tenant"] == "acme"
    assert recorder.reloader.loaded is not None
    assert recorder.reloader.loaded.version == "1"


async def test_an_update_takes_the_place_of_all_there_was() -> None:
    server = XdsServer()
    server.publish("1", config("shop", "user"), config("bank", "user"))
    async with serving(server), following(server.address) as recorder:
        assert await recorder.next_load() == ["bank", "shop"]
        nonce = server.publish("2", config("shop", "user"))
        assert await recorder.next_load() == ["shop"]
        acks = [await server.heard() for _ in range(3)][1:]
    assert [(ack.version_info, ack.response_nonce) for ack in acks] == [("1", "nonce 1"), ("2", nonce)]


async def test_no_resources_are_no_rules() -> None:
    server = XdsServer()
    server.publish("1", config("shop", "user"))
    async with serving(server), following(server.address) as recorder:
        assert await recorder.next_load() == ["shop"]
        server.publish("2")
        assert await recorder.next_load() == []


async def test_a_bad_update_is_refused_with_the_error_and_changes_nothing() -> None:
    server = XdsServer()
    server.publish("1", config("shop", "user"))
    async with serving(server), following(server.address) as recorder:
        assert await recorder.next_load() == ["shop"]
        bad_nonce = server.publish("2", broken("mint"))
        nack = [await server.heard() for _ in range(3)][-1]
        assert (nack.version_info, nack.response_nonce) == ("1", bad_nonce)
        assert nack.error_detail.code == 3
        assert nack.error_detail.message.startswith("mint: descriptors[0].rate_limit.unit: found nothing")
        assert recorder.in_force == ["shop"]
        assert recorder.reloader.rejected is not None
        assert recorder.reloader.rejected.version == "2"
        good_nonce = server.publish("3", config("bank", "user"))
        assert await recorder.next_load() == ["bank"]
        ack = await server.heard()
        assert (ack.version_info, ack.response_nonce) == ("3", good_nonce)
        assert recorder.reloader.rejected is None


async def test_what_is_bad_in_one_resource_holds_up_no_other_and_that_one_stays_as_it_was() -> None:
    """One team's mistake at an Envoy Gateway is not the end of all other teams' limits."""
    server = XdsServer()
    server.publish("1", config("shop", "user"), config("mint", "user"))
    async with serving(server), following(server.address) as recorder:
        assert await recorder.next_load() == ["mint", "shop"]
        bad_nonce = server.publish("2", config("shop", "user"), broken("mint"), config("bank", "user"))
        assert await recorder.next_load() == ["bank", "mint", "shop"]
        nack = [await server.heard() for _ in range(3)][-1]
        assert (nack.version_info, nack.response_nonce) == ("1", bad_nonce)
        assert nack.error_detail.message.startswith("mint: ")
        assert recorder.reloader.rejected is not None
        assert recorder.reloader.loaded is not None
        assert recorder.reloader.loaded.version == "2"
        server.publish("3", config("shop", "user"))
        assert await recorder.next_load() == ["shop"]
        assert (await server.heard()).version_info == "3"
        assert recorder.reloader.rejected is None


async def test_at_the_first_start_a_bad_resource_keeps_the_others_from_nothing() -> None:
    server = XdsServer()
    server.publish("1", config("shop", "user"), broken("mint"))
    async with serving(server), following(server.address) as recorder:
        assert await recorder.next_load() == ["shop"]
        nack = [await server.heard() for _ in range(2)][-1]
        assert (nack.version_info, nack.error_detail.code) == ("", 3)


async def test_a_server_that_begins_anew_and_says_what_it_has_piece_by_piece_takes_no_rules_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Envoy Gateway does, Gateway by Gateway. What it has said nothing of goes once it is silent."""
    monkeypatch.setattr(module, "SETTLED_SECONDS", 3_600)
    before = config("shop", "user"), config("bank", "user"), config("mint", "user")
    async with left_by_its_server(*before) as (recorder, address):
        restarted = XdsServer()
        restarted.publish("1", config("shop", "user"))
        async with serving(restarted, address):
            assert await recorder.next_load() == ["bank", "mint", "shop"]
            # It waits for so long from the next response on.
            monkeypatch.setattr(module, "SETTLED_SECONDS", 0.1)
            restarted.publish("2", config("shop", "user"), config("bank", "user"))
            assert await recorder.next_load() == ["bank", "mint", "shop"]
            assert await recorder.next_load() == ["bank", "shop"]
            # From now on it is believed at once.
            monkeypatch.setattr(module, "SETTLED_SECONDS", 3_600)
            restarted.publish("3", config("bank", "user"))
            assert await recorder.next_load() == ["bank"]


async def test_a_server_has_said_all_once_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sidecar that starts while one says piece by piece what it has is not ready before."""
    monkeypatch.setattr(module, "SETTLED_SECONDS", 3_600)
    server = XdsServer()
    server.publish("1", config("shop", "user"))
    async with serving(server), following(server.address) as recorder:
        assert await recorder.next_load() == ["shop"]
        monkeypatch.setattr(module, "SETTLED_SECONDS", 0.1)
        assert not recorder.settled.is_set()
        server.publish("2", config("shop", "user"), config("bank", "user"))
        assert await recorder.next_load() == ["bank", "shop"]
        async with asyncio.timeout(20):
            await recorder.settled.wait()


async def test_what_is_refused_again_and_again_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad resource keeps no sidecar from being ready, and nothing that the server took away in force."""
    monkeypatch.setattr(module, "SETTLED_SECONDS", 3_600)
    async with left_by_its_server(config("shop", "user"), config("bank", "user")) as (recorder, address):
        monkeypatch.setattr(module, "SETTLED_SECONDS", 1)
        server = XdsServer(repeats_refused=True)
        server.publish("1", config("shop", "user"), broken("mint"))
        async with serving(server, address):
            assert await recorder.next_load() == ["bank", "shop"]
            async with asyncio.timeout(20):
                await recorder.settled.wait()
            await recorder.until_loaded("shop")


async def test_what_a_server_lacked_before_it_broke_off_is_no_reason_to_drop_anything_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SETTLED_SECONDS", 3_600)
    async with left_by_its_server(config("shop", "user"), config("bank", "user")) as (recorder, address):
        lacking = XdsServer()
        lacking.publish("1", config("shop", "user"))
        async with serving(lacking, address):
            assert await recorder.next_load() == ["bank", "shop"]
        monkeypatch.setattr(module, "SETTLED_SECONDS", 0.1)
        unusable = XdsServer()
        unusable.publish("1", type_url="type.googleapis.com/envoy.config.cluster.v3.Cluster")
        async with serving(unusable, address):
            async with asyncio.timeout(20):
                await recorder.settled.wait()
            assert recorder.in_force == ["bank", "shop"]


async def test_of_a_resource_with_another_name_after_a_restart_the_former_one_goes_at_once() -> None:
    async with left_by_its_server(config("shop", "user")) as (recorder, address):
        renamed = config("shop", "user", "path")
        renamed.name = "another"
        restarted = XdsServer()
        restarted.publish("1", renamed)
        async with serving(restarted, address):
            assert await recorder.next_load() == ["shop"]
            assert recorder.reloader.loaded is not None
            assert recorder.reloader.loaded.rules == 2


async def test_a_resource_with_another_name_takes_away_none_of_other_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLED_SECONDS", 3_600)
    async with left_by_its_server(config("shop", "user"), config("bank", "user")) as (recorder, address):
        renamed = config("shop", "user")
        renamed.name = "another"
        restarted = XdsServer()
        restarted.publish("1", renamed)
        async with serving(restarted, address):
            assert await recorder.next_load() == ["bank", "shop"]


async def test_a_server_that_sends_what_was_refused_again_at_once_is_answered_ever_more_slowly() -> None:
    """go-control-plane does, for a version that was not accepted."""
    server = XdsServer()
    server.publish("1", broken("shop"))
    async with serving(server), following(server.address) as recorder:
        await server.heard()
        began = asyncio.get_running_loop().time()
        for _ in range(5):
            assert (await server.heard()).error_detail.code == 3
            server.publish("1", broken("shop"))
        assert round(asyncio.get_running_loop().time() - began, 3) >= 1.5
        server.publish("2", config("shop", "user"))
        assert await recorder.next_load() == ["shop"]


async def test_a_bad_first_configuration_is_refused_without_a_version() -> None:
    server = XdsServer()
    server.publish("1", broken("shop"))
    async with serving(server), following(server.address) as recorder:
        _, nack = await server.heard(), await server.heard()
        assert nack.version_info == ""
        assert nack.error_detail.message.startswith("shop: descriptors[0].rate_limit.unit: found nothing")
        assert recorder.reloader.loaded is None


async def test_resources_of_another_type_are_refused_and_change_nothing() -> None:
    server = XdsServer()
    server.publish("1", config("shop", "user"))
    async with serving(server), following(server.address) as recorder:
        assert await recorder.next_load() == ["shop"]
        server.publish("2", type_url="type.googleapis.com/envoy.config.cluster.v3.Cluster")
        nack = [await server.heard() for _ in range(3)][-1]
        assert (nack.type_url, nack.version_info) == (TYPE_URL, "1")
        assert "envoy.config.cluster.v3.Cluster" in nack.error_detail.message
        assert recorder.in_force == ["shop"]


async def test_after_a_restart_the_server_is_asked_again_and_the_rules_stay_meanwhile() -> None:
    async with left_by_its_server(config("shop", "user")) as (recorder, address):
        await until_trouble(recorder, "UNAVAILABLE")
        assert recorder.in_force == ["shop"]
        # It counts its versions from its start, so this is another 1.
        restarted = XdsServer()
        restarted.publish("1", config("bank", "user"))
        async with serving(restarted, address):
            assert await recorder.next_load() == ["bank", "shop"]
            first, ack = await restarted.heard(), await restarted.heard()
            assert (first.node.id, first.version_info, first.response_nonce) == ("sidecar-1", "", "")
            assert (ack.version_info, ack.response_nonce) == ("1", "nonce 1")
            assert recorder.reloader.degraded_reason == ""


async def test_a_server_that_is_down_at_the_start_is_dialled_until_it_is_there() -> None:
    address = f"127.0.0.1:{free_ports(1).upstream}"
    with capture_logs() as logs:
        async with following(address) as recorder:
            await until_trouble(recorder, "UNAVAILABLE")
            assert recorder.reloader.loaded is None
            server = XdsServer()
            server.publish("1", config("shop", "user"))
            async with serving(server, address):
                assert await recorder.next_load() == ["shop"]
                assert recorder.reloader.degraded_reason == ""
    events = [log["event"] for log in logs]
    assert events.index("xds_disconnected") < events.index("xds_connected")


async def test_a_server_that_hangs_up_is_dialled_again() -> None:
    server = XdsServer()
    server.publish("1", config("shop", "user"))
    async with serving(server), following(server.address) as recorder:
        assert await recorder.next_load() == ["shop"]
        server.hang_up()
        assert await recorder.next_load() == ["shop"]


async def test_a_server_that_sends_noise_is_left_and_dialled_again() -> None:
    server = XdsServer()
    server.publish("1", config("shop", "user"))
    async with serving(server), following(server.address) as recorder:
        assert await recorder.next_load() == ["shop"]
        server.publish_bytes(b"\xff\xff\xff")
        await until_trouble(recorder, "something else than a DiscoveryResponse")
        server.publish("2", config("bank", "user"))
        assert await recorder.next_load() == ["bank", "shop"]


async def test_a_server_that_takes_the_connection_and_nothing_else_is_given_up() -> None:
    silent = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
    async with silent:
        host, port = silent.sockets[0].getsockname()
        async with following(f"{host}:{port}") as recorder:
            await until_trouble(recorder, "no progress within 5 s")


async def test_a_fault_of_this_program_does_not_end_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    server = XdsServer()
    server.publish("1", config("shop", "user"))
    faults = iter([ZeroDivisionError("a fault")])

    def faulty(raw: bytes) -> None:
        raise next(faults)

    async with serving(server):
        with monkeypatch.context() as patched, capture_logs() as logs:
            patched.setattr(module.DiscoveryResponse, "FromString", faulty, raising=False)
            async with following(server.address) as recorder:
                await until_trouble(recorder, "an internal error")
                patched.undo()
                assert await recorder.next_load() == ["shop"]
    assert "xds_stream_failed" in [log["event"] for log in logs]


def make_certificates(folder: Path) -> None:
    """An authority, and a server and a client that it vouches for."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=authority")
    for name in ("server", "client"):
        subject = ("-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}.example.com")
        issuer = ("-CA", "ca.crt", "-CAkey", "ca.key")
        openssl("req", "-x509", *new, *issuer, "-keyout", f"{name}.key", "-out", f"{name}.crt", *subject)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """That ask for a client's certificate."""
    pair = ((folder / "server.key").read_bytes(), (folder / "server.crt").read_bytes())
    return grpc.ssl_server_credentials([pair], (folder / "ca.crt").read_bytes(), require_client_auth=True)


async def test_both_ends_show_certificates_when_tls_is_asked_for(certificates: Path) -> None:
    server = XdsServer()
    server.publish("1", config("shop", "user"))
    tls = XdsTlsConfig(
        ca=certificates / "ca.crt",
        certificate=certificates / "client.crt",
        key=certificates / "client.key",
        server_name="server.example.com",
    )
    async with (
        serving(server, credentials=server_credentials(certificates)),
        following(server.address, tls) as recorder,
    ):
        assert await recorder.next_load() == ["shop"]


async def test_a_server_with_a_certificate_for_another_name_is_not_followed(certificates: Path) -> None:
    server = XdsServer()
    server.publish("1", config("shop", "user"))
    tls = XdsTlsConfig(
        ca=certificates / "ca.crt",
        certificate=certificates / "client.crt",
        key=certificates / "client.key",
        server_name="another.example.com",
    )
    async with (
        serving(server, credentials=server_credentials(certificates)),
        following(server.address, tls) as recorder,
    ):
        await until_trouble(recorder, "UNAVAILABLE")
        assert recorder.in_force == []


async def test_files_of_certificates_that_come_later_are_taken_up(certificates: Path, tmp_path: Path) -> None:
    server = XdsServer()
    server.publish("1", config("shop", "user"))
    tls = XdsTlsConfig(
        ca=tmp_path / "ca.crt",
        certificate=certificates / "client.crt",
        key=certificates / "client.key",
        server_name="server.example.com",
    )
    async with (
        serving(server, credentials=server_credentials(certificates)),
        following(server.address, tls) as recorder,
    ):
        await until_trouble(recorder, "No such file or directory")
        (tmp_path / "ca.crt").write_bytes((certificates / "ca.crt").read_bytes())
        assert await recorder.next_load() == ["shop"]
