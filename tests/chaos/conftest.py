"""Scenarios that mostly wait run beside each other, each with regions of its own, while tests await them one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from chaos.namespaces import why_impossible
from chaos.regions import Lab
from chaos.scenarios import ScenarioTasks, scenario_of

AT_ONCE = 4
"""A dozen sidecars: more would make two processors the bottleneck."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def scenarios(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ScenarioTasks]:
    """The scenarios of a file's tests that were selected, begun. Those of others may run in another process."""
    why = why_impossible()
    if why is not None:
        pytest.skip(why)
    quiet, turns = asyncio.Lock(), asyncio.Semaphore(AT_ONCE)
    tasks: ScenarioTasks = {}
    for item in request.session.items:
        scenario = scenario_of(item) if item.path == request.path else None
        if scenario is not None:
            lab = Lab(tmp_path_factory.mktemp(item.name, numbered=True), quiet)
            tasks[scenario] = asyncio.create_task(_run(scenario, lab, turns))
    yield tasks
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)


async def _run(scenario, lab: Lab, turns: asyncio.Semaphore) -> None:
    async with turns:
        await scenario(lab)
