"""The example upstream, imported from its file as `python examples/openclaw/rating_api.py` runs it."""

import asyncio
import importlib.util
import signal
import sys
from itertools import count
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from ratelimit_sidecar.demo.ports import free_ports
from ratelimit_sidecar.demo.processes import Children, Command

FILE = Path(__file__).parents[2] / "examples/openclaw/rating_api.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rating_api", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rating_api = load()


async def get(path: str) -> httpx.Response:
    transport = httpx.ASGITransport(rating_api.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://rating-api") as client:
        return await client.get(path)


async def test_an_agent_has_a_score_and_the_same_one_every_time() -> None:
    first, second = await get("/rate?agent=claw"), await get("/rate?agent=claw")

    assert first.status_code == 200
    assert first.json() == second.json()
    assert first.json()["agent"] == "claw"
    assert first.json()["score"] in range(101)


@pytest.mark.parametrize(("points", "grade"), [(0, "E"), (19, "E"), (20, "D"), (80, "A"), (100, "A")])
async def test_the_grade_follows_from_the_score(points: int, grade: str) -> None:
    agent = next(agent for agent in map(str, count()) if rating_api.score(agent) == points)

    assert (await get(f"/rate?agent={agent}")).json()["grade"] == grade


@pytest.mark.parametrize("path", ["/rate", "/rate?agent=", f"/rate?agent={'a' * 201}"])
async def test_without_a_usable_agent_there_is_no_score(path: str) -> None:
    response = await get(path)

    assert response.status_code == 400
    assert "name an agent" in response.json()["error"]


async def test_of_two_agents_the_first_counts_as_it_does_for_envoy() -> None:
    assert (await get("/rate?agent=claw&agent=other")).json()["agent"] == "claw"


async def test_it_says_that_it_is_up() -> None:
    assert (await get("/healthz")).status_code == 200


async def test_as_a_command_it_serves_until_it_is_told_to_end_and_prints_nothing(tmp_path: Path) -> None:
    port = free_ports(1).upstream
    argv = [sys.executable, "-W", "error", str(FILE), "--port", str(port)]
    async with Children(tmp_path) as children, httpx.AsyncClient(trust_env=False) as client:
        child = await children.start(Command("rating-api", argv, f"http://127.0.0.1:{port}/healthz"))
        assert (await client.get(f"http://127.0.0.1:{port}/rate?agent=claw")).status_code == 200
        child.signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await child.wait() == -signal.SIGTERM
    assert child.log.read_text() == ""
