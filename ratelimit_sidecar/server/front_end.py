"""The interface of front ends: `start` binds, `serve` answers, `stop` drains.

In an `asyncio.TaskGroup`: `await front_end.start()`, then `tasks.create_task(front_end.serve())`, and `await
front_end.stop()` at the end. A front end can be used once. It installs no signal handlers and starts no processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol


class FrontEnd(Protocol):
    """Carries gRPC calls to handlers."""

    ready: asyncio.Event
    """Set while calls are answered."""

    @property
    def addresses(self) -> Sequence[str]:
        """The addresses it listens on since `start`, with the chosen ports in place of 0."""

    async def start(self) -> None:
        """Bind every address; clients can connect from here on.

        Raises:
            ListenError: one address cannot be bound; then none is.
        """

    async def serve(self) -> None:
        """Answer calls until `stop`, or until cancelled, which drains as well.

        It returns after the last call; any other end is an exception.
        """

    async def stop(self) -> None:
        """Refuse new connections and calls, and return when those in flight are answered or the drain time is
        over."""
