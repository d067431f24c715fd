"""`ratelimit-sidecar reset` and `grant`, against a real console."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from console.small_console import Console
from observed import NOW_US, request
from structlog.testing import capture_logs

from ratelimit_sidecar.cli import main
from ratelimit_sidecar.console.server import HttpServer


@asynccontextmanager
async def used_up(token_file: Path | None = None) -> AsyncIterator[str]:
    """The URL of a console whose tenant has nothing left."""
    console = Console(token_file=token_file)
    console.limiter.decide(request(("tenant", "acme"), hits=2), NOW_US)
    server = HttpServer(console.app, "127.0.0.1:0")
    await server.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        await server.ready.wait()
        try:
            # The log of this process would be taken for the command's output.
            with capture_logs():
                yield f"http://{server.address}"
        finally:
            await server.stop()


async def run(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, main, arguments)


async def test_reset_fills_the_bucket_and_shows_before_and_after() -> None:
    async with used_up() as url:
        result = await run("reset", "edge", "tenant=acme", "--admin", f"{url}/")
    assert result.output == (
        "edge / tenant=acme\n  rule    edge.tenant, 2 at most\n  before  0 left\n  given   2\n  after   2 left\n"
    )
    assert result.exit_code == 0


async def test_grant_gives_as_many_as_it_says() -> None:
    async with used_up() as url:
        result = await run("grant", "1", "edge", "tenant=acme", "--admin", url, "--json")
    body = json.loads(result.output)
    assert (body["given"], body["after"]["remaining"]) == (1, 1)


@pytest.mark.parametrize(
    ("domain", "descriptor", "reason"),
    [
        ("egde", "tenant=acme", "no rules for the domain egde; there are rules for: edge"),
        ("edge", "tenant=acme,user=eve", "the rules end before user=eve"),
        ("edge", "plan=gold", "the rule edge.plan_gold is unlimited"),
    ],
)
async def test_what_the_sidecar_refuses_exits_with_1_and_its_reason(domain: str, descriptor: str, reason: str) -> None:
    async with used_up() as url:
        result = await run("reset", domain, descriptor, "--admin", url)
    assert result.exit_code == 1
    assert reason in result.output


async def test_the_token_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret\n")
    async with used_up(file) as url:
        without = await run("reset", "edge", "tenant=acme", "--admin", url)
        with_it = await run("reset", "edge", "tenant=acme", "--admin", url, "--token-file", str(file))
    assert (without.exit_code, with_it.exit_code) == (1, 0)
    assert "Authorization: Bearer" in without.output


@pytest.mark.parametrize("content", [None, b"", b"two\nlines", b"\xff"])
async def test_a_file_that_holds_no_token_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    result = await run("reset", "edge", "tenant=acme", "--token-file", str(file))
    assert result.exit_code == 2
    assert "--token-file" in result.output


async def test_a_sidecar_that_is_not_there_exits_with_2_and_names_the_address() -> None:
    result = await run("reset", "edge", "tenant=acme", "--admin", "http://127.0.0.1:1")
    assert result.exit_code == 2
    assert "http://127.0.0.1:1/refund can't be reached" in result.output


@pytest.mark.parametrize(
    "arguments", [("0", "edge", "tenant=acme"), ("many", "edge", "tenant=acme"), ("1", "edge", "acme")]
)
async def test_what_is_no_number_or_descriptor_is_refused_before_anybody_is_asked(arguments: tuple[str, ...]) -> None:
    assert (await run("grant", *arguments)).exit_code == 2


@pytest.mark.parametrize("command", ["reset", "grant"])
async def test_the_help_shows_an_example(command: str) -> None:
    assert f"ratelimit-sidecar {command}" in (await run(command, "--help")).output
