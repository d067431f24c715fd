"""examples/llm-tokens with the real Envoy: a request costs what its response says that it used, or else the most."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from e2e.examples import running
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ResponseReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes, Settings

from ratelimit_sidecar.demo.ports import HOST, free_ports

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

PATH = "/v1/chat/completions"
MOST = 600
"""What a request can use, and so what it costs when nothing says what it used."""

BOTH = pytest.mark.parametrize("name", ["envoy", "envoy-afterwards"])


@dataclass(frozen=True, slots=True)
class Proxy:
    client: httpx.AsyncClient
    console: httpx.AsyncClient

    async def complete(self, team: str, tokens: int, *, stream: bool = False, **headers: str) -> httpx.Response:
        """A request that uses so many tokens, three of them for its message."""
        return await self.client.post(PATH, headers={"x-team": team, **headers}, json=body(tokens, stream=stream))

    async def until_settled(self, tokens: int) -> None:
        """Wait until exactly so many are taken."""
        async with asyncio.timeout(60):
            while await self.taken() != tokens:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.01)

    async def until_taken(self, tokens: int) -> None:
        """Wait until so many are taken, or more."""
        async with asyncio.timeout(60):
            while await self.taken() < tokens:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.01)

    async def taken(self) -> int:
        """Tokens of all teams together."""
        page = (await self.console.get("/buckets", params={"limit": 200})).json()
        return sum(each["capacity"] - each["remaining"] + each["debt"] for each in page["buckets"])


def body(tokens: int, *, stream: bool = False) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": "one two three"}],
        "max_tokens": tokens - 3,
        "stream": stream,
        "stream_options": {"include_usage": True},
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxies(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Proxy]]:
    folder = tmp_path_factory.mktemp("llm")
    # So that nothing to speak of is refilled meanwhile.
    changed = {"unit: minute": "unit: year"}
    names = ["envoy", "envoy-afterwards"]
    model = str(Path(__file__).with_name("stalling_model.py"))
    async with running(folder, "llm-tokens", model, names, changed_rules=changed) as clients:
        yield {name: Proxy(clients[name], clients["console"]) for name in names}


@pytest.fixture
def holding(proxies: dict[str, Proxy]) -> Proxy:
    return proxies["envoy"]


@pytest.fixture
def afterwards(proxies: dict[str, Proxy]) -> Proxy:
    return proxies["envoy-afterwards"]


@BOTH
@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_charged_what_it_says_that_it_used(
    proxies: dict[str, Proxy], name: str, *, stream: bool
) -> None:
    proxy = proxies[name]
    before = await proxy.taken()
    assert (await proxy.complete(f"honest {stream}", 300, stream=stream)).status_code == 200
    await proxy.until_settled(before + 300)


@BOTH
@pytest.mark.parametrize("stream", [False, True])
async def test_who_hangs_up_before_the_usage_pays_the_most(
    proxies: dict[str, Proxy], name: str, *, stream: bool
) -> None:
    proxy = proxies[name]
    before = await proxy.taken()
    sent, headers = body(300, stream=stream), {"x-team": f"hasty {stream}", "x-stalls": ""}
    if stream:
        async with proxy.client.stream("POST", PATH, headers=headers, json=sent) as response:
            assert response.status_code == 200
            text = ""
            async for chunk in response.aiter_text():
                text += chunk
                if text.count("token ") == 297:
                    break
    else:
        # The model is silent, so the client hears nothing either.
        with pytest.raises(httpx.ReadTimeout):
            await proxy.client.post(PATH, headers=headers, json=sent, timeout=httpx.Timeout(60, read=0.5))
    # Whatever is settled for who hung up is settled before this one.
    assert (await proxy.complete("patient", 10)).status_code == 200
    await proxy.until_settled(before + MOST + 10)


@BOTH
async def test_a_stream_that_was_not_asked_for_its_usage_costs_the_most(proxies: dict[str, Proxy], name: str) -> None:
    proxy = proxies[name]
    before = await proxy.taken()
    sent = body(300, stream=True) | {"stream_options": {"include_usage": False}}
    assert (await proxy.client.post(PATH, headers={"x-team": "silent"}, json=sent)).status_code == 200
    await proxy.until_settled(before + MOST)


@BOTH
async def test_who_accepts_compressed_responses_gets_none_and_pays_what_was_used(
    proxies: dict[str, Proxy], name: str
) -> None:
    proxy = proxies[name]
    before = await proxy.taken()
    response = await proxy.complete("zip", 300, **{"accept-encoding": "gzip"})
    assert (response.status_code, response.headers.get("content-encoding")) == (200, None)
    await proxy.until_settled(before + 300)


@BOTH
async def test_an_error_costs_nothing(proxies: dict[str, Proxy], name: str) -> None:
    proxy = proxies[name]
    before = await proxy.taken()
    too_long = {"messages": [{"role": "user", "content": "word " * MOST}]}
    assert (await proxy.client.post(PATH, headers={"x-team": "bob"}, json=too_long)).status_code == 400
    # Whatever is settled for the error is settled before this one.
    assert (await proxy.complete("bob", 10)).status_code == 200
    await proxy.until_settled(before + 10)


@BOTH
async def test_nobody_passes_without_a_team(proxies: dict[str, Proxy], name: str) -> None:
    assert (await proxies[name].client.post(PATH, json=body(10))).status_code == 404


async def test_what_is_under_way_holds_its_tokens_and_who_cannot_hold_them_is_denied_and_charged_nothing(
    holding: Proxy,
) -> None:
    before = await holding.taken()
    headers = {"x-team": "zoe", "x-stalls": ""}
    async with holding.client.stream("POST", PATH, headers=headers, json=body(300, stream=True)) as response:
        assert response.status_code == 200
        assert await holding.taken() == before + MOST
        for _ in range(3):
            assert (await holding.complete("zoe", 10)).status_code == 429
        assert (await holding.complete("tom", 10)).status_code == 200
        await holding.until_settled(before + MOST + 10)


async def rude_request(proxy: Proxy, team: str, *, is_finished: bool) -> str:
    """Send a request without an end, or read all of its response but the last byte. Returns its status, once Envoy has
    ended it.
    """
    url = proxy.client.base_url
    connection = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
    connection.local_settings = Settings(client=True, initial_values={SettingCodes.INITIAL_WINDOW_SIZE: 0})
    connection.initiate_connection()
    headers = [(":method", "POST"), (":scheme", "http"), (":authority", "llm"), (":path", PATH), ("x-team", team)]
    connection.send_headers(1, headers)
    connection.send_data(1, json.dumps(body(300)).encode(), end_stream=is_finished)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    status = ""
    async with asyncio.timeout(60):
        while True:
            writer.write(connection.data_to_send())
            for event in connection.receive_data(await reader.read(65_536)):
                if isinstance(event, ResponseReceived):
                    answered = dict(event.headers)
                    status = answered[":status"]
                    if is_finished:
                        connection.increment_flow_control_window(int(answered["content-length"]) - 1, 1)
                elif isinstance(event, (StreamEnded, StreamReset)):
                    writer.close()
                    return status


async def test_a_request_that_stays_unfinished_is_ended_and_costs_the_most_as_the_model_may_have_worked(
    holding: Proxy,
) -> None:
    before = await holding.taken()
    assert await rude_request(holding, "ida", is_finished=False) == "408"
    # Whatever is settled for it is settled before this one.
    assert (await holding.complete("ada", 10)).status_code == 200
    await holding.until_settled(before + MOST + 10)


@BOTH
async def test_a_response_whose_end_is_not_read_is_settled_all_the_same(proxies: dict[str, Proxy], name: str) -> None:
    before = await proxies[name].taken()
    assert await rude_request(proxies[name], "ivo", is_finished=True) == "200"
    await proxies[name].until_settled(before + 300)


async def test_who_is_in_debt_waits_and_is_told_so_and_a_denied_request_costs_nothing(afterwards: Proxy) -> None:
    before = await afterwards.taken()
    for used in (600, 1_200):
        assert (await afterwards.complete("eve", 600)).status_code == 200
        await afterwards.until_settled(before + used)
    denied = await afterwards.complete("eve", 10)
    assert denied.status_code == 429
    assert denied.json()["error"]["type"] == "tokens"
    assert int(denied.headers["retry-after"]) > 0
    assert denied.headers["ratelimit-policy"] == '"tokens";q=1000;w=31536000'
    assert (await afterwards.complete("ada", 10)).status_code == 200
    await afterwards.until_settled(before + 1_210)


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
                    ["envoy-afterwards"],
                    changed_rules={"unit: minute": "unit: year"},
                    changed_sidecar={"listen: {": sync},
                )
            )
            regions.append(Proxy(clients["envoy-afterwards"], clients["console"]))
        for region in regions[:2]:
            assert (await region.complete("eve", 600)).status_code == 200
        for region in regions:
            # Each counts what others took from the middle of its slot on, which is days long for a limit of a year: it
            # has refilled by some of the 1,200 tokens.
            await region.until_taken(1_150)
            assert (await region.complete("eve", 10)).status_code == 429
