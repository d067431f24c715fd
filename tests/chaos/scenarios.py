"""How a test is written as a scenario, which then runs beside the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from chaos.regions import Lab

Scenario = Callable[[Lab], Awaitable[None]]
ScenarioTasks = dict[Scenario, asyncio.Task[None]]

_TESTED = "scenario"


def scenario(function: Scenario) -> Callable[[ScenarioTasks], Awaitable[None]]:
    """A test that awaits the scenario. All of a file begin, a few at a time, with its first test."""

    async def test(scenarios: ScenarioTasks) -> None:
        await scenarios[function]

    test.__name__ = test.__qualname__ = function.__name__
    test.__doc__ = function.__doc__
    setattr(test, _TESTED, function)
    return pytest.mark.asyncio(loop_scope="session")(test)


def scenario_of(item: pytest.Item) -> Scenario | None:
    """What a test awaits; None when it is another kind of test."""
    return getattr(item.obj, _TESTED, None) if isinstance(item, pytest.Function) else None
