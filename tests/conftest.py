"""Hypothesis profiles: `make test` has the default one, and the quick one for what is compiled; `make test-slow` the
thorough one; `HYPOTHESIS_PROFILE=nightly make test` runs the long one."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Callable, Iterator, Mapping

import pytest
import structlog
import uvloop
from hypothesis import Phase, settings

# No deadline: on a busy machine a slow example says nothing about the code.
settings.register_profile("default", deadline=None, max_examples=20)
settings.register_profile("quick", deadline=None, max_examples=10)
settings.register_profile("thorough", deadline=None, max_examples=100)
# Of what fails nobody reads the example (dev/mutations).
settings.register_profile(
    "unshrunk", settings.get_profile("default"), database=None, phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("nightly", deadline=None, max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the sidecar's event loop."""
    return {"uvloop": uvloop.new_event_loop}


FIRST = ("stalls", "chaos", "e2e", "simulation", "fabric", "persistence", "deploy", "demo", "telemetry")
"""Folders whose files take longest. Several processes run a file each, so what takes long must not come last."""


# uvloop forks this process to start another. Until that becomes the other program it has none of gRPC's threads: gRPC's
# handlers of a fork may crash there, and a garbage collection of its objects waits for a thread for ever.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
os.register_at_fork(before=gc.disable, after_in_parent=gc.enable)


# Ten thousand tests are found, and stay until the end. Python need not look through them for garbage, which takes a
# quarter of the time to find them, and again in each full collection.
def pytest_configure() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return FIRST.index(folder) if folder in FIRST else len(FIRST)

    items.sort(key=rank)


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """For tests that configure the logs of the process: others are told nothing of it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
