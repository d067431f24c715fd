"""`ratelimit-sidecar log-level`, against a real console."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from cli.test_refund import run, used_up


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(before)


async def test_another_level_holds_for_as_long_as_asked() -> None:
    async with used_up() as url:
        result = await run("log-level", "debug", "--seconds", "600", "--admin", url)
    assert result.output == "level debug, for 600 s; before info, configured info\n"
    assert logging.getLogger().level == logging.DEBUG


async def test_what_the_sidecar_refuses_exits_with_1_and_its_reason() -> None:
    async with used_up() as url:
        result = await run("log-level", "debug", "--seconds", "1000000", "--admin", url)
    assert (result.exit_code, "refused: seconds: expected 1 to" in result.output) == (1, True)


async def test_what_is_no_level_is_refused_before_anybody_is_asked() -> None:
    assert (await run("log-level", "loud")).exit_code == 2
