"""What runs on sockets runs on uvloop, as the sidecar does, and on asyncio's own loop."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

ON_SOCKETS = {"test_server.py", "test_slow_clients.py"}


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    uv = {"uvloop": uvloop.new_event_loop}
    return {**uv, "asyncio": asyncio.new_event_loop} if item.path.name in ON_SOCKETS else uv
