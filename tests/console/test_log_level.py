"""POST /log-level: who may, what it changes, what the log says of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from console.small_console import Console
from structlog.testing import capture_logs

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    """Info is configured; afterwards it is as it was."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(before)


async def post(console: Console, body: object, client: str = "127.0.0.1", **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(console.app, client=(client, 1234))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as session:
        return await session.post("/log-level", json=body, headers=headers)


async def test_another_level_holds_and_the_log_says_who_asked() -> None:
    console = Console()
    with capture_logs() as logs:
        response = await post(console, {"level": "Debug"}, traceparent=f"00-{TRACE_ID}-b7ad6b7169203331-01")
    told = {"level": "debug", "before": "info", "configured": "info", "seconds": None}
    assert (response.status_code, response.json()) == (200, told)
    assert logging.getLogger().level == logging.DEBUG
    [line] = logs
    assert (line["event"], line["by"], line["audit"], line["to"]) == ("log_level_set", "127.0.0.1", True, "debug")
    assert line["trace_id"] == TRACE_ID


async def test_for_a_while_it_is_another_one() -> None:
    response = await post(Console(), {"level": "error", "seconds": 600})
    assert response.json()["seconds"] == 600
    assert logging.getLogger().level == logging.ERROR


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"level": "loud"}, "level: expected one of trace, debug"),
        ({"level": 10}, "level: expected one of trace, debug"),
        ({}, "expected an object with level"),
        ([], "expected an object with level"),
        ({"level": "debug", "minutes": 1}, "expected an object with level"),
        ({"level": "debug", "seconds": 0}, "seconds: expected 1 to 86400"),
        ({"level": "debug", "seconds": True}, "seconds: expected 1 to 86400"),
        ({"level": "debug", "seconds": 10**9}, "seconds: expected 1 to 86400"),
    ],
)
async def test_what_cannot_be_done_is_refused_with_the_reason(body: object, error: str) -> None:
    response = await post(Console(), body)
    assert response.status_code == 400
    assert error in response.json()["error"]
    assert logging.getLogger().level == logging.INFO


async def test_only_who_may_change_state_may_change_the_level(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret")
    with capture_logs() as logs:
        assert (await post(Console(), {"level": "debug"}, client="10.0.0.9")).status_code == 403
        console = Console(token_file=file)
        assert (await post(console, {"level": "debug"})).status_code == 401
        assert (await post(console, {"level": "debug"}, origin="https://evil.example.com")).status_code == 403
    assert logging.getLogger().level == logging.INFO
    assert [line["event"] for line in logs] == ["log_level_refused"] * 2
    assert (await post(console, {"level": "debug"}, authorization="Bearer secret")).status_code == 200
