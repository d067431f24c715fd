"""examples/edge: the worker in Cloudflare's local runtime, before an origin, asking sidecars of two regions."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from e2e.examples import EXAMPLES, running

from deployment.cache import Unavailable
from deployment.tools import ensure, path
from ratelimit_sidecar.demo.ports import HOST, free_ports

pytestmark = pytest.mark.deployment

TOKEN = "change-me"


@asynccontextmanager
async def edge(sidecars: dict[str, str], continent: str, upstream: str, fail: str = "open") -> AsyncIterator[str]:
    """The URL of an edge at which the worker runs."""
    port = free_ports(1).upstream
    settings = {
        "worker": str(EXAMPLES / "edge/worker.js"),
        "host": HOST,
        "port": port,
        "upstream": upstream,
        "continent": continent,
        "bindings": {"SIDECARS": json.dumps(sidecars), "ASK_MS": "30000", "FAIL": fail, "EDGE_TOKEN": TOKEN},
    }
    node = shutil.which("node")
    assert node is not None
    process = await asyncio.create_subprocess_exec(
        node,
        str(Path(__file__).with_name("edge.mjs")),
        str(path("miniflare", "node_modules")),
        json.dumps(settings),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"ready\n"
        yield f"http://{HOST}:{port}"
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(30):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


@pytest.fixture(scope="module", autouse=True)
def _runtime() -> None:
    try:
        ensure("miniflare")
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))


async def statuses(client: httpx.AsyncClient, url: str, number: int, **headers: str) -> list[int]:
    return [(await client.get(f"{url}/healthz", headers=headers)).status_code for _ in range(number)]


async def test_an_edge_of_one_continent_denies_what_was_used_up_at_that_of_another(tmp_path: Path) -> None:
    addresses = [f"{HOST}:{region.sync}" for region in free_ports(2).regions]
    async with AsyncExitStack() as stack:
        sidecars, upstream = {}, ""
        for continent, address in zip(("EU", "AS"), addresses, strict=True):
            folder = tmp_path / continent
            folder.mkdir()
            sync = f'node: {{id: {continent}}}\nsync: {{peers: {addresses}}}\nlisten: {{sync: "{address}", '
            clients = await stack.enter_async_context(
                running(
                    folder,
                    "edge",
                    "llm-tokens/model.py",
                    ["envoy"],
                    changed_rules={"unit: second, requests_per_unit: 50": "unit: year, requests_per_unit: 3"},
                    changed_sidecar={"listen: {": sync},
                )
            )
            sidecars[continent] = str(clients["envoy"].base_url).rstrip("/")
            upstream = str(clients["upstream"].base_url)
        client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=60))
        europe = await stack.enter_async_context(edge({**sidecars, "*": sidecars["EU"]}, "EU", upstream))
        asia = await stack.enter_async_context(edge({**sidecars, "*": sidecars["EU"]}, "AS", upstream))
        assert await statuses(client, europe, 3, **{"x-api-key": "eve"}) == [200, 200, 200]
        async with asyncio.timeout(60):
            # It is a few milliseconds until the other region has heard of them.
            while (denied := await client.get(f"{asia}/healthz", headers={"x-api-key": "eve"})).status_code == 200:
                pass
        assert denied.status_code == 429
        assert int(denied.headers["retry-after"]) > 0
        assert await statuses(client, asia, 1, **{"x-api-key": "ada"}) == [200]


async def test_who_may_ask_and_what_is_done_when_nobody_answers(tmp_path: Path) -> None:
    async with running(tmp_path, "edge", "llm-tokens/model.py", ["envoy"]) as clients:
        proxy, upstream = clients["envoy"], str(clients["upstream"].base_url)
        about = {"x-edge-address": "198.51.100.1"}
        mine = {"authorization": f"Bearer {TOKEN}", **about}
        assert (await proxy.post("/ask", headers=about)).status_code == 403
        for path in ("/ask", "/buckets"):
            assert (await proxy.get(path, headers=mine)).status_code == 403
        assert (await proxy.post("/ask", headers=mine)).status_code == 200
        # Those that were refused were charged nothing.
        [bucket] = (await clients["console"].get("/buckets")).json()["buckets"]
        assert bucket["remaining"] == 599
        nobody = f"http://{HOST}:{free_ports(1).upstream}"
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            async with edge({"*": nobody}, "EU", upstream) as url:
                assert await statuses(client, url, 1) == [200]
            async with edge({"*": nobody}, "EU", upstream, fail="closed") as url:
                assert await statuses(client, url, 1) == [503]


async def test_whatever_a_client_makes_of_its_key_is_asked_about_and_of_two_keys_the_first(tmp_path: Path) -> None:
    unit = {"unit: second, requests_per_unit: 50": "unit: year, requests_per_unit: 1"}
    async with (
        running(tmp_path, "edge", "llm-tokens/model.py", ["envoy"], changed_rules=unit) as clients,
        edge(
            {"*": str(clients["envoy"].base_url).rstrip("/")}, "EU", str(clients["upstream"].base_url), "closed"
        ) as url,
    ):
        assert await status_of(url, b"eve") == 200
        # As a header it is three times as long.
        assert await status_of(url, b"\x01" * 45_000) == 200
        # What is cut off is a half of the last character.
        halved = b"a" * 255 + "\U0001f600".encode()
        assert [await status_of(url, halved) for _ in range(2)] == [200, 429]
        for keys in ([b"eve", b"another"], [b"", b"eve"], [b"eve,another"]):
            assert await status_of(url, *keys) == 429


@pytest.mark.parametrize(
    ("one", "other", "status"),
    [
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2:7:8:9:10", 429),
        ("2001:db8::1", "2001:db8::2", 429),
        ("198.51.100.1", "198.51.100.2", 200),
    ],
)
async def test_whoever_has_one_ipv6_address_has_its_network(tmp_path: Path, one: str, other: str, status: int) -> None:
    unit = {"unit: minute, requests_per_unit: 600": "unit: year, requests_per_unit: 1"}
    async with (
        running(tmp_path, "edge", "llm-tokens/model.py", ["envoy"], changed_rules=unit) as clients,
        edge({"*": str(clients["envoy"].base_url).rstrip("/")}, "EU", str(clients["upstream"].base_url)) as url,
        httpx.AsyncClient(trust_env=False, timeout=60) as client,
    ):
        # The local runtime lets a client say its address.
        answers = [(await statuses(client, url, 1, **{"cf-connecting-ip": each}))[0] for each in (one, other, one)]
        assert answers == [200, status, 429]


async def status_of(url: str, *keys: bytes) -> int:
    """Of a request with these keys as they are; a library would not send all of them."""
    address = httpx.URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        lines = [b"GET /healthz HTTP/1.1", b"host: shop", b"connection: close", *(b"x-api-key: " + key for key in keys)]
        writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()
