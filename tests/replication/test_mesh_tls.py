"""Meshes whose nodes show each other certificates, over real TLS on loopback."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from certificates import Authority, config_in
from replication.meshes import (
    TIMEOUT_SECONDS,
    Sidecar,
    address_of,
    at_once,
    events,
    free_addresses,
    sidecar,
    soon,
    told,
)
from structlog.testing import capture_logs

from ratelimit_sidecar.config import tls_files
from ratelimit_sidecar.replication.bounds import MeshBounds
from ratelimit_sidecar.replication.stream_io import METHOD
from ratelimit_sidecar.replication.targets import Target
from ratelimit_sidecar.replication.tls import NodeCertificate, Pinned

ENDS = datetime(2100, 1, 1, tzinfo=UTC)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def last_error_of(each: Sidecar) -> str:
    """Of the only address it dials."""
    await each.until(lambda: each.mesh.status()[0].last_error != "")
    return each.mesh.status()[0].last_error


async def test_nodes_with_certificates_of_one_authority_share_what_they_take(tmp_path: Path) -> None:
    authority, addresses = Authority(), free_addresses(2)
    of_a, of_b = authority.of(tmp_path / "a", "a"), authority.of(tmp_path / "b", "b")
    async with (
        sidecar("a", listen=addresses[0], peers=addresses, certificate=of_a) as a,
        sidecar("b", listen=addresses[1], peers=addresses, certificate=of_b) as b,
    ):
        for each in (a, b):
            assert await each.mesh.wait_joined(TIMEOUT_SECONDS)
        a.take("ann", 5)
        b.take("ann", 7)
        for each in (a, b):
            await each.knows("ann", 12)
            assert each.mesh.protocol_errors == {}
        # Each has dialled itself too, and knows its own certificate.
        await until(lambda: [status.node for status in a.mesh.status()] == ["b"])


async def test_a_node_of_another_authority_is_not_trusted_by_who_dials_it(tmp_path: Path) -> None:
    of_a, of_b = Authority().of(tmp_path / "a", "a"), Authority().of(tmp_path / "b", "b")
    async with (
        sidecar("b", certificate=of_b) as b,
        sidecar("a", listen=None, peers=[address_of(b)], certificate=of_a) as a,
    ):
        assert await last_error_of(a) == (
            "its certificate is not trusted: unable to get local issuer certificate; is it of the authority in"
            " sync.tls.ca?"
        )
        assert b.mesh.status() == []


async def test_a_node_of_another_authority_is_not_trusted_by_whom_it_dials(tmp_path: Path) -> None:
    authority = Authority()
    of_a, of_b = Authority().write(tmp_path / "a", "a"), authority.of(tmp_path / "b", "b")
    # It trusts, and isn't trusted.
    authority_of_b = (tmp_path / "b" / "ca.crt").read_bytes()
    of_a.ca.write_bytes(authority_of_b)
    async with (
        sidecar("b", certificate=of_b) as b,
        sidecar("a", listen=None, peers=[address_of(b)], certificate=NodeCertificate(of_a)) as a,
    ):
        assert "does it trust this node's certificate?" in await last_error_of(a)
        assert b.mesh.status() == []


async def test_a_client_without_a_certificate_gets_no_stream(tmp_path: Path) -> None:
    of_b = Authority().of(tmp_path, "b")
    async with sidecar("b", certificate=of_b) as b:
        credentials = grpc.ssl_channel_credentials((tmp_path / "ca.crt").read_bytes())
        options = (("grpc.ssl_target_name_override", "b"),)
        async with grpc.aio.secure_channel(address_of(b), credentials, options=options) as channel:
            call = channel.stream_stream(METHOD)()
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.insecure_channel(address_of(b)) as channel:
            call = channel.stream_stream(METHOD)()
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert b.mesh.status() == []


async def test_who_answers_without_tls_is_told_apart(tmp_path: Path) -> None:
    of_a = Authority().of(tmp_path, "a")
    async with sidecar("b") as b, sidecar("a", listen=None, peers=[address_of(b)], certificate=of_a) as a:
        assert (await last_error_of(a)).endswith("does it have sync.tls?")


async def test_a_dialled_node_must_be_the_one_that_its_certificate_is_for(tmp_path: Path) -> None:
    authority = Authority()
    of_a, of_c = authority.of(tmp_path / "a", "a"), authority.of(tmp_path / "c", "c", "d")
    async with (
        sidecar("b", certificate=of_c) as b,
        sidecar("a", listen=None, peers=[address_of(b)], certificate=of_a) as a,
    ):
        await a.until(lambda: a.mesh.protocol_errors == {"certificate": 1})
        assert await last_error_of(a) == "certificate: the certificate of 'b' must be for b; it is for c, d"
        assert a.mesh.status()[0].node == ""
        b.take("ann", 7)
        assert a.tokens("ann") == 0


async def test_a_certificate_for_another_node_is_looked_at_again_seldom_and_told_once(tmp_path: Path) -> None:
    waits: list[bool] = []

    def redial_soon(target: Target, *_: object) -> float:
        waits.append(target.is_misconfigured)
        return 0.01

    authority = Authority()
    of_a, of_c = authority.of(tmp_path / "a", "a"), authority.of(tmp_path / "c", "c")
    with capture_logs() as logs:
        async with (
            sidecar("a", certificate=of_a) as a,
            sidecar("b", listen=None, peers=[address_of(a)], certificate=of_c, redial=redial_soon) as b,
        ):
            await a.until(lambda: a.mesh.protocol_errors.get("certificate", 0) >= 4)
            await b.until(lambda: len(waits) >= 3)
    assert all(waits)
    assert len(events(logs, "stream_refused")) == len(events(logs, "peer_unreachable")) == 1


async def test_what_was_for_people_to_mend_and_is_no_longer_is_tried_as_often_as_anything(tmp_path: Path) -> None:
    waits: list[bool] = []

    def redial_soon(target: Target, *_: object) -> float:
        waits.append(target.is_misconfigured)
        return 0.01

    authority, [address] = Authority(), free_addresses(1)
    of_a, of_c = authority.of(tmp_path / "a", "a"), authority.of(tmp_path / "c", "c")
    async with sidecar("a", listen=None, peers=[address], certificate=of_a, redial=redial_soon) as a:
        async with sidecar("b", listen=address, certificate=of_c):
            await a.until(lambda: bool(waits) and waits[-1])
        await a.until(lambda: not waits[-1])


async def test_a_refusal_after_all_was_in_order_is_told_again(tmp_path: Path) -> None:
    authority = Authority()
    of_a, of_b, of_c = (authority.of(tmp_path / name, name) for name in "abc")
    with capture_logs() as logs:
        async with sidecar("a", certificate=of_a) as a:
            async with sidecar("b", listen=None, peers=[address_of(a)], certificate=of_c, redial=soon):
                await a.until(lambda: a.mesh.protocol_errors.get("certificate", 0) >= 3)
            async with sidecar("b", listen=None, peers=[address_of(a)], certificate=of_b, redial=soon) as b:
                await told(logs, "peer_connected", times=2)
                await b.connected_to("a")
            async with sidecar("b", listen=None, peers=[address_of(a)], certificate=of_c, incarnation=2, redial=soon):
                await told(logs, "stream_refused", times=2)


async def test_a_node_that_dials_in_must_be_the_one_that_its_certificate_is_for(tmp_path: Path) -> None:
    authority = Authority()
    of_a, of_c = authority.of(tmp_path / "a", "a"), authority.of(tmp_path / "c", "c")
    async with (
        sidecar("a", certificate=of_a) as a,
        sidecar("b", listen=None, peers=[address_of(a)], certificate=of_c) as b,
    ):
        await a.until(lambda: a.mesh.protocol_errors == {"certificate": 1})
        assert "certificate: the certificate of 'b' must be for b; it is for c" in await last_error_of(b)
        assert a.mesh.status() == []


@pytest.mark.parametrize(
    ("pattern", "of_a", "of_b"),
    [
        ("{node}.mesh.example", "a.mesh.example", "b.mesh.example"),
        ("{node}.mesh.example", "A.Mesh.Example", "B.MESH.example"),
        ("*.mesh.example", "x.mesh.example", "*.mesh.example"),
    ],
)
async def test_certificates_may_be_for_names_made_of_the_node(
    tmp_path: Path, pattern: str, of_a: str, of_b: str
) -> None:
    authority = Authority()
    async with (
        sidecar("a", certificate=authority.of(tmp_path / "a", of_a, peer_names=pattern)) as a,
        sidecar(
            "b",
            listen=None,
            peers=[address_of(a)],
            certificate=authority.of(tmp_path / "b", of_b, peer_names=pattern),
        ) as b,
    ):
        await b.connected_to("a")
        await a.connected_to("b")


async def test_certificates_may_be_for_uris_where_their_common_name_serves_grpc(tmp_path: Path) -> None:
    authority, pattern = Authority(), "spiffe://mesh/ns/ratelimit/sa/{node}"
    certificates = {
        name: NodeCertificate(
            authority.write_with_uri(tmp_path / name, pattern.replace("{node}", name), "sidecar", peer_names=pattern)
        )
        for name in "ab"
    }
    async with (
        sidecar("a", certificate=certificates["a"]) as a,
        sidecar("b", listen=None, peers=[address_of(a)], certificate=certificates["b"]) as b,
    ):
        await b.connected_to("a")
        await a.connected_to("b")


async def test_a_server_with_a_uri_and_no_name_for_grpc_is_told_what_it_lacks(tmp_path: Path) -> None:
    authority, pattern = Authority(), "spiffe://mesh/{node}"
    of_b = NodeCertificate(authority.write_with_uri(tmp_path / "b", "spiffe://mesh/b", "", peer_names=pattern))
    of_a = authority.of(tmp_path / "a", "a", peer_names=pattern)
    async with (
        sidecar("b", certificate=of_b) as b,
        sidecar("a", listen=None, peers=[address_of(b)], certificate=of_a) as a,
    ):
        assert (await last_error_of(a)).startswith("its certificate must have a DNS name")


async def test_renewed_certificates_are_taken_up_without_a_restart_while_streams_go_on(tmp_path: Path) -> None:
    before, after = Authority(), Authority()
    of_a, of_b = before.of(tmp_path / "a", "a"), before.of(tmp_path / "b", "b")
    async with (
        sidecar("a", certificate=of_a) as a,
        sidecar("b", listen=None, peers=[address_of(a)], certificate=of_b) as b,
    ):
        await a.connected_to("b")
        after.write(tmp_path / "a", "a")
        async with sidecar("c", listen=None, peers=[address_of(a)], certificate=after.of(tmp_path / "c", "c")) as c:
            await c.connected_to("a")
            c.take("ann", 5)
            b.take("ann", 7)
            await a.knows("ann", 12)
        status = a.peer("b")
        assert status is not None
        assert (status.connected, status.reconnects) == (True, 0)


async def test_a_dialling_node_shows_its_renewed_certificate_at_the_next_dial(tmp_path: Path) -> None:
    before, after = Authority(), Authority()
    [address] = free_addresses(1)
    of_b = before.of(tmp_path / "b", "b")
    async with sidecar("b", listen=None, peers=[address], certificate=of_b) as b:
        async with sidecar("a", listen=address, certificate=before.of(tmp_path / "a", "a")):
            await b.connected_to("a")
        after.write(tmp_path / "b", "b")
        async with sidecar("a", incarnation=2, listen=address, certificate=after.of(tmp_path / "a", "a")):
            await b.connected_to("a")


async def test_who_is_not_trusted_yet_waits_for_its_peers_all_the_same(tmp_path: Path) -> None:
    authority = Authority()
    async with sidecar("b", certificate=authority.of(tmp_path / "b", "b")) as b:
        b.take("ann", 5)
        Authority().write(tmp_path / "a", "a")
        (tmp_path / "a" / "ca.crt").write_bytes((tmp_path / "b" / "ca.crt").read_bytes())
        untrusted = NodeCertificate(config_in(tmp_path / "a"))
        async with sidecar("a", listen=None, peers=[address_of(b)], certificate=untrusted, redial=at_once) as a:
            joining = asyncio.create_task(a.mesh.wait_joined(TIMEOUT_SECONDS))
            assert (
                await last_error_of(a) == "it hung up after the TLS handshake: does it trust this node's certificate?"
            )
            assert not joining.done()
            authority.write(tmp_path / "a", "a")
            assert await joining
            assert a.mesh.status()[0].node == "b"


def without_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda folder: Authority().write(folder / "new", "a").key.replace(folder / "tls.key"), "not belong together"),
        (lambda folder: without_the_end(folder / "tls.key"), "not a certificate and its key"),
        (lambda folder: without_the_end(folder / "tls.crt"), "not a certificate and its key, in PEM"),
        (lambda folder: (folder / "ca.crt").write_bytes(b""), "no certificates in PEM"),
        (lambda folder: (folder / "tls.key").unlink(), "No such file or directory"),
    ],
    ids=["the key is another's", "half a key", "half a certificate", "no authority", "no key"],
)
async def test_files_that_are_broken_at_a_renewal_change_nothing_and_are_told_once(
    tmp_path: Path, break_it: Callable[[Path], object], why: str
) -> None:
    authority = Authority()
    of_a, of_b, of_c = (authority.of(tmp_path / name, name) for name in "abc")
    async with sidecar("a", certificate=of_a) as a:
        break_it(tmp_path / "a")
        with capture_logs() as logs:
            for name, certificate in (("b", of_b), ("c", of_c)):
                async with sidecar(name, listen=None, peers=[address_of(a)], certificate=certificate) as each:
                    await each.connected_to("a")
            [error] = await told(logs, "certificate_not_renewed")
            assert why in str(error["why"])
            assert len(await told(logs, "certificate_not_renewed")) == 1
            # In order again, it is renewed.
            authority.write(tmp_path / "a", "a")
            async with sidecar("b", listen=None, peers=[address_of(a)], certificate=of_b, incarnation=2) as b:
                await b.connected_to("a")
                await told(logs, "certificate_renewed")


async def test_files_are_read_every_minute_though_nobody_dials(tmp_path: Path) -> None:
    authority, near, later = Authority(), ENDS, ENDS + timedelta(days=1)
    of_a = NodeCertificate(authority.write(tmp_path / "a", "a", not_after=near))
    of_a.read_seconds = 0.01
    with capture_logs() as logs:
        async with sidecar("a", certificate=of_a) as a:
            assert a.mesh.certificate is not None
            assert a.mesh.certificate.not_after_s == near.timestamp()
            (tmp_path / "a" / "ca.crt").rename(tmp_path / "away")
            await told(logs, "certificate_not_renewed")
            failed = a.mesh.certificate.failed_renewals
            assert failed > 0
            await until(lambda: of_a.failed_renewals > failed)
            assert of_a.not_after_s == near.timestamp()
            authority.write(tmp_path / "a", "a", not_after=later)
            await told(logs, "certificate_renewed")
            assert of_a.not_after_s == later.timestamp()
            (tmp_path / "a" / "ca.crt").unlink()
            # Told again, since it was in order meanwhile.
            await told(logs, "certificate_not_renewed", times=2)


async def test_a_certificate_whose_end_cannot_be_read_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_certificate: bytes) -> float:
        raise ValueError("not as strict as is asked for here")

    monkeypatch.setattr(tls_files, "not_after_s", refuse)
    authority = Authority()
    of_a, of_b = authority.of(tmp_path / "a", "a"), authority.of(tmp_path / "b", "b")
    async with (
        sidecar("a", certificate=of_a) as a,
        sidecar("b", listen=None, peers=[address_of(a)], certificate=of_b) as b,
    ):
        await b.connected_to("a")
        assert of_a.not_after_s is None


async def test_certificates_between_a_nodes_and_the_authoritys_are_shown_along(tmp_path: Path) -> None:
    authority = Authority()
    root = authority.write(tmp_path, "root").ca.read_bytes()
    configs = {name: authority.child().write(tmp_path / name, name) for name in "ab"}
    for config in configs.values():
        config.ca.write_bytes(root)
    async with (
        sidecar("a", certificate=NodeCertificate(configs["a"])) as a,
        sidecar("b", listen=None, peers=[address_of(a)], certificate=NodeCertificate(configs["b"])) as b,
    ):
        await b.connected_to("a")
        await a.connected_to("b")


async def test_a_certificate_that_has_ended_is_trusted_by_nobody(tmp_path: Path) -> None:
    authority = Authority()
    of_a = authority.of(tmp_path / "a", "a")
    of_b = NodeCertificate(authority.write(tmp_path / "b", "b", not_after=datetime.now(UTC) - timedelta(minutes=1)))
    async with (
        sidecar("b", certificate=of_b) as b,
        sidecar("a", peers=[address_of(b)], certificate=of_a) as a,
    ):
        assert (await last_error_of(a)).startswith("its certificate is not trusted: certificate has expired")
        async with sidecar("b", listen=None, peers=[address_of(a)], certificate=of_b) as dialling:
            assert "does it trust this node's certificate?" in await last_error_of(dialling)


class Far(NodeCertificate):
    """Its handshakes take their time, each."""

    async def look_at(self, host: str, port: int) -> Pinned:
        await asyncio.sleep(0.6)
        return await super().look_at(host, port)

    def channel_credentials(self, pinned: Pinned) -> grpc.ChannelCredentials:
        time.sleep(0.6)
        return super().channel_credentials(pinned)


async def test_each_of_the_two_handshakes_has_the_whole_time_for_one(tmp_path: Path) -> None:
    bounds = MeshBounds(connect=1.0)
    authority = Authority()
    of_a, of_b = authority.of(tmp_path / "a", "a"), Far(authority.write(tmp_path / "b", "b"))
    async with (
        sidecar("a", certificate=of_a) as a,
        sidecar("b", listen=None, peers=[address_of(a)], certificate=of_b, bounds=bounds) as b,
    ):
        await b.connected_to("a")


async def test_without_usable_files_a_mesh_does_not_start(tmp_path: Path) -> None:
    config = Authority().write(tmp_path, "a")
    Authority().write(tmp_path / "other", "a").key.replace(config.key)
    with pytest.raises(OSError, match="they do not belong together"):
        async with sidecar("a", certificate=NodeCertificate(config)):
            pass


async def test_a_pinned_certificate_is_all_that_is_trusted(tmp_path: Path) -> None:
    """Who answers the second handshake of a dial must be who answered the first."""
    authority = Authority()
    of_a, of_b, of_c = (authority.of(tmp_path / name, name) for name in "abc")
    of_a.load()
    async with sidecar("b", certificate=of_b) as b, sidecar("c", certificate=of_c) as c:
        host, _, port = address_of(b).rpartition(":")
        pinned = await of_a.look_at(host, int(port))
        assert pinned.certificate.names == {"b"}
        assert pinned.pem == ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(pinned.pem.decode())).encode()
        options = (("grpc.ssl_target_name_override", "c"),)
        credentials = of_a.channel_credentials(pinned)
        async with (
            grpc.aio.secure_channel(address_of(c), credentials, options=options) as channel,
            asyncio.timeout(TIMEOUT_SECONDS),
        ):
            call = channel.stream_stream(METHOD)()
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert "CERTIFICATE_VERIFY_FAILED" in await call.details()
