"""`ratelimit-sidecar` run as its users run it, in a session of its own."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from ratelimit_sidecar.demo.ports import PortTaken, ensure_free, ports_from

ENDS_WITHIN_S = 60.0


class RunningCommand:
    """A command that runs, and what it has printed. Wait for what it prints, or for its end.

    Args:
        process: its stdout and stderr are one pipe.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.output = ""

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def printed(self, text: str) -> None:
        """Wait until it has printed that."""
        assert self._process.stdout is not None
        async with asyncio.timeout(ENDS_WITHIN_S):
            while text not in self.output:
                line = await self._process.stdout.readline()
                assert line, f"ended without printing {text!r}:\n{self.output}"
                self.output += line.decode()

    async def ended(self) -> int:
        """Wait until it has ended, and give its exit code."""
        assert self._process.stdout is not None
        async with asyncio.timeout(ENDS_WITHIN_S):
            self.output += (await self._process.stdout.read()).decode()
            return await self._process.wait()


@asynccontextmanager
async def command(*arguments: str, environment: Mapping[str, str] | None = None) -> AsyncIterator[RunningCommand]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "ratelimit_sidecar",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "120", **(environment or {})},
        start_new_session=True,
    )
    try:
        yield RunningCommand(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def free_base_port() -> int:
    """A --base-port for the demo."""
    while True:
        base = random.randrange(15_000, 32_000)
        with suppress(PortTaken):
            ensure_free(ports_from(base, 3).all())
            return base
