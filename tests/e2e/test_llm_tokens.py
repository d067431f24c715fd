"""examples/llm-tokens with the real Envoy: what responses say that they used is charged, and who is in debt waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from e2e.examples import running

from ratelimit_sidecar.demo.ports import HOST, free_ports

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]


@dataclass(frozen=True, slots=True)
class Proxy:
    client: httpx.AsyncClient
    holding: httpx.AsyncClient
    """To the Envoy that holds 500 tokens for each request."""
    console: httpx.AsyncClient

    async def complete(self, team: str, prompt: str, max_tokens: int, *, stream: bool = False) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "stream": stream}
        return await self.client.post("/v1/chat/completions", headers={"x-team": team}, json=body)

    async def hold(self, team: str, max_tokens: int, *, stream: bool = False) -> httpx.Response:
        """Ask where tokens are held first."""
        return await Proxy(self.holding, self.holding, self.console).complete(
            team, "one two three", max_tokens, stream=stream
        )

    async def until_settled(self, tokens: int) -> None:
        """Wait until exactly so many are taken."""
        async with asyncio.timeout(60):
            while await self.taken() != tokens:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.01)

    async def taken(self) -> int:
        """Tokens of all teams together."""
        page = (await self.console.get("/buckets", params={"limit": 200})).json()
        return sum(each["capacity"] - each["remaining"] + each["debt"] for each in page["buckets"])

    async def used(self, team: str, max_tokens: int, *, stream: bool = False) -> int:
        """Tokens charged for a request that passes: that is done once its response is sent."""
        before = await self.taken()
        response = await self.complete(team, "one two three", max_tokens, stream=stream)
        assert response.status_code == 200
        return await self.until_taken(before + 1) - before

    async def until_taken(self, tokens: int) -> int:
        """Wait until so many are taken, or more.

        Returns:
            How many.
        """
        async with asyncio.timeout(60):
            while (taken := await self.taken()) < tokens:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.01)
        return taken


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proxy]:
    folder = tmp_path_factory.mktemp("llm")
    # So that nothing to speak of is refilled meanwhile.
    changed = {"unit: minute": "unit: year"}
    envoys = ["envoy", "envoy-holding"]
    async with running(folder, "llm-tokens", "llm-tokens/model.py", envoys, changed_rules=changed) as clients:
        yield Proxy(clients["envoy"], clients["envoy-holding"], clients["console"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_charged_what_it_says_that_it_used(proxy: Proxy, *, stream: bool) -> None:
    assert await proxy.used(f"charged {stream}", 497, stream=stream) == 500


async def test_who_is_in_debt_waits_and_is_told_so_and_a_denied_request_costs_nothing(proxy: Proxy) -> None:
    assert [await proxy.used("eve", 597) for _ in range(2)] == [600, 600]
    before = await proxy.taken()
    denied = await proxy.complete("eve", "one two three", 10)
    assert denied.status_code == 429
    assert denied.json()["error"]["type"] == "tokens"
    assert int(denied.headers["retry-after"]) > 0
    assert denied.headers["ratelimit-policy"] == '"tokens";q=1000;w=31536000'
    assert await proxy.used("ada", 7) == 10
    assert await proxy.taken() == before + 10


async def test_a_response_that_says_nothing_costs_nothing(proxy: Proxy) -> None:
    before = await proxy.taken()
    assert (await proxy.client.get("/v1/models", headers={"x-team": "bob"})).status_code == 404
    assert await proxy.used("bob", 7) == 10
    assert await proxy.taken() == before + 10


@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_held_is_given_back_once_the_response_says_what_was_used(proxy: Proxy, *, stream: bool) -> None:
    before = await proxy.taken()
    assert (await proxy.hold(f"holding {stream}", 297, stream=stream)).status_code == 200
    await proxy.until_settled(before + 300)
    # More than was held is debt of the 700 that are left.
    assert (await proxy.hold(f"holding {stream}", 797, stream=stream)).status_code == 200
    await proxy.until_settled(before + 1_100)
    assert (await proxy.hold(f"holding {stream}", 1)).status_code == 429


async def test_what_is_under_way_holds_its_tokens_and_who_cannot_hold_them_is_denied_and_charged_nothing(
    proxy: Proxy,
) -> None:
    before = await proxy.taken()
    for _ in range(2):
        # Their responses say nothing, so what they hold stays charged.
        assert (await proxy.holding.get("/v1/models", headers={"x-team": "zoe"})).status_code == 404
    for _ in range(3):
        assert (await proxy.hold("zoe", 1)).status_code == 429
    assert (await proxy.hold("tom", 7)).status_code == 200
    await proxy.until_settled(before + 1_010)


async def test_what_is_used_in_one_region_counts_in_all(tmp_path: Path) -> None:
    addresses = [f"{HOST}:{region.sync}" for region in free_ports(3).regions]
    async with AsyncExitStack() as stack:
        regions = []
        for number, address in enumerate(addresses):
            folder = tmp_path / f"region-{number}"
            folder.mkdir()
            peers = [each for each in addresses if each != address]
            sync = f'node: {{id: region-{number}}}\nsync: {{peers: {peers}}}\nlisten: {{sync: "{address}", '
            clients = await stack.enter_async_context(
                running(
                    folder,
                    "llm-tokens",
                    "llm-tokens/model.py",
                    ["envoy"],
                    changed_rules={"unit: minute": "unit: year"},
                    changed_sidecar={"listen: {": sync},
                )
            )
            regions.append(Proxy(clients["envoy"], clients["envoy"], clients["console"]))
        for region in regions[:2]:
            assert (await region.complete("eve", "one two three", 597)).status_code == 200
        for region in regions:
            # Each counts what others took from the middle of its slot on, which is days long for a limit of a year: it
            # has refilled by some of the 1,200 tokens.
            await region.until_taken(1_150)
            assert (await region.complete("eve", "one two three", 10)).status_code == 429
