"""The examples of examples/filters, each as a real Envoy beside one sidecar: what callers see of each filter."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.demo.regions import find_envoy

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/filters"
FILTERS = ("envoy-ratelimit", "envoy-ext-authz", "envoy-ext-authz-http")
OVER_EXT_AUTHZ = FILTERS[1:]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@asynccontextmanager
async def running(
    folder: Path, names: tuple[str, ...], *, with_sidecar: bool
) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    """Envoys of the examples, with an upstream and perhaps a sidecar.

    Yields:
        A client of each Envoy by the example's name, and one of the sidecar's console.
    """
    ports = free_ports(len(names) + 1)
    own, *of_envoys = ports.regions
    sidecars = {8_000: ports.upstream, 8_080: own.admin, 8_081: own.grpc, 8_082: own.envoy}
    async with Children(folder) as children, AsyncExitStack() as clients:
        upstream = [sys.executable, str(ROOT / "examples/openclaw/rating_api.py"), "--port", str(ports.upstream)]
        starting = [Command("upstream", upstream, f"http://{HOST}:{ports.upstream}/healthz")]
        if with_sidecar:
            text = (EXAMPLES / "sidecar.yaml").read_text().replace("[rules]", f"[{EXAMPLES / 'rules'}]")
            text = with_ports(text.replace("listen:\n", f"listen:\n  admin: {HOST}:8080\n"), sidecars)
            argv = [sys.executable, "-m", "ratelimit_sidecar", "serve", "--config", written(folder, "sidecar", text)]
            starting.append(Command("sidecar", argv, f"http://{HOST}:{own.admin}/readyz"))
        for name, of_envoy in zip(names, of_envoys, strict=True):
            text = with_ports(example(name), {**sidecars, 10_000: of_envoy.envoy, 9_901: of_envoy.envoy_admin})
            argv = [find_envoy(), "-c", written(folder, name, text), "--concurrency", "1", "--disable-hot-restart"]
            starting.append(Command(name, argv, f"http://{HOST}:{of_envoy.envoy_admin}/ready"))
        await asyncio.gather(*[children.start(command) for command in starting])
        addresses = {"console": own.admin, **{name: of.envoy for name, of in zip(names, of_envoys, strict=True)}}
        yield {
            name: await clients.enter_async_context(
                httpx.AsyncClient(base_url=f"http://{HOST}:{port}", trust_env=False, timeout=60)
            )
            for name, port in addresses.items()
        }


def example(name: str) -> str:
    # On a machine that is busy with other tests the sidecar may take longer than an example lets it.
    return (EXAMPLES / f"{name}.yaml").read_text().replace("timeout: 0.1s", "timeout: 30s")


def with_ports(text: str, ports: Mapping[int, int]) -> str:
    for port, free in ports.items():
        text = text.replace(f"port_value: {port}}}", f"port_value: {free}}}").replace(
            f"{HOST}:{port}", f"{HOST}:{free}"
        )
    return text


def written(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxies(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    async with running(tmp_path_factory.mktemp("filters"), FILTERS, with_sidecar=True) as clients:
        yield clients


async def ask(proxy: httpx.AsyncClient, user: str | bytes | None) -> httpx.Response:
    headers = [] if user is None else [(b"x-user-id", user.encode() if isinstance(user, str) else user)]
    return await proxy.get("/rate?agent=claw", headers=headers)


@pytest.mark.parametrize("name", FILTERS)
async def test_a_caller_passes_three_times_and_is_then_told_when_to_come_back(
    proxies: dict[str, httpx.AsyncClient], name: str
) -> None:
    responses = [await ask(proxies[name], name) for _ in range(4)]
    assert [response.status_code for response in responses] == [200, 200, 200, 429]
    assert responses[0].json()["agent"] == "claw"
    denied = responses[-1]
    assert denied.text == "three a minute"
    wait = int(denied.headers["retry-after"])
    assert 0 < wait <= 20
    assert denied.headers["ratelimit-policy"] == '"shop.user";q=3;w=60'
    assert denied.headers["ratelimit"] == f'"shop.user";r=0;t={wait}'


@pytest.mark.parametrize("name", OVER_EXT_AUTHZ)
async def test_over_ext_authz_a_caller_that_passes_sees_what_is_left(
    proxies: dict[str, httpx.AsyncClient], name: str
) -> None:
    response = await ask(proxies[name], f"first of {name}")
    assert response.status_code == 200
    assert response.headers["ratelimit-policy"] == '"shop.user";q=3;w=60'
    assert response.headers["ratelimit"] == '"shop.user";r=2;t=20'


async def test_one_limit_is_shared_by_all_filters(proxies: dict[str, httpx.AsyncClient]) -> None:
    statuses = [(await ask(proxies[name], "eve")).status_code for name in (*FILTERS, *FILTERS)]
    assert statuses == [200] * 3 + [429] * 3


@pytest.mark.parametrize(("name", "of_another"), [*zip(FILTERS, (200, 200, 429), strict=True)])
async def test_a_value_that_is_not_utf_8_is_limited(
    proxies: dict[str, httpx.AsyncClient], name: str, of_another: int
) -> None:
    """Over HTTP together with others: Envoy sends one `!` for all bytes that are no UTF-8."""
    mine, other = name.encode() + b"\xff", name.encode() + b"\xfe"
    statuses = [(await ask(proxies[name], user)).status_code for user in (mine, mine, mine, mine, other)]
    assert statuses == [200, 200, 200, 429, of_another]


@pytest.mark.parametrize("name", FILTERS)
async def test_a_caller_without_a_name_is_not_limited(proxies: dict[str, httpx.AsyncClient], name: str) -> None:
    assert [(await ask(proxies[name], None)).status_code for _ in range(5)] == [200] * 5


@pytest.mark.long
@pytest.mark.parametrize("name", FILTERS)
async def test_while_the_sidecar_is_away_requests_pass(tmp_path: Path, name: str) -> None:
    async with running(tmp_path, (name,), with_sidecar=False) as clients:
        assert [(await ask(clients[name], "eve")).status_code for _ in range(5)] == [200] * 5
