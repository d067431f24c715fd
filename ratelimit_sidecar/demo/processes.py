"""Child processes with one owner: it starts them, waits until they serve, stops them, and never leaves one behind.

Each child leads a session of its own. So Ctrl-C in the terminal reaches only the owner, which stops the children in
order. Output goes to one log file for each child; when a child fails, the error has the end of it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from ratelimit_sidecar.demo import DemoError

_POLL_S = 0.05
_PROBE_TIMEOUT_S = 2.0
_TAIL_LINES = 20


class ChildFailed(DemoError):
    """A child ended, or was not ready in time; the text ends with the child's last output."""


@contextmanager
def first_failure() -> Iterator[None]:
    """Raise the first `ChildFailed` of a task group alone, not as a group of exceptions."""
    failures: list[ChildFailed] = []
    try:
        yield
    except* ChildFailed as group:
        failures = list(_leaves(group))
    if failures:
        raise failures[0]


def _leaves(group: BaseExceptionGroup[ChildFailed]) -> Iterator[ChildFailed]:
    for exception in group.exceptions:
        if isinstance(exception, BaseExceptionGroup):
            yield from _leaves(exception)
        else:
            yield exception


@dataclass(frozen=True, slots=True)
class Command:
    """A command to run.

    Args:
        name: of the child and its log file.
        ready_url: answers 200 over HTTP once the child serves.
        environment: on top of this process's.
    """

    name: str
    argv: Sequence[str]
    ready_url: str
    environment: Mapping[str, str] = field(default_factory=dict)


class Child:
    """One running child; `Children.start` makes it."""

    def __init__(self, command: Command, process: asyncio.subprocess.Process, log: Path) -> None:
        self.command = command
        self.log = log
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal's number when a signal ended it."""
        return self._process.returncode

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child and all processes that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def wait(self) -> int:
        """Wait until it has ended; returns its exit code."""
        return await self._process.wait()

    async def watch(self) -> None:
        """Run until the child ends.

        Raises:
            ChildFailed: always, then.
        """
        raise self.failure(f"ended with exit code {await self.wait()}")

    def failure(self, what: str) -> ChildFailed:
        tail = self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return ChildFailed("\n".join([f"{self.command.name} {what}; its last output:", *tail]))


class Children:
    """Owns children: `async with Children(logs) as children: await children.start(command)`.

    Args:
        logs: an existing folder for the log files. A restarted child appends to its old one.
        ready_within_s: for each child. Six Python processes and three Envoys start at once, on as few as two cores.
        stop_within_s: from SIGTERM to SIGKILL.
    """

    def __init__(self, logs: Path, *, ready_within_s: float = 30.0, stop_within_s: float = 5.0) -> None:
        self._logs = logs
        self._ready_within_s = ready_within_s
        self._stop_within_s = stop_within_s
        self._running: list[Child] = []
        # Without the environment's proxies: everything here is on loopback.
        self._probe = httpx.AsyncClient(trust_env=False, timeout=_PROBE_TIMEOUT_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        try:
            await self._probe.aclose()
            await self.stop(*self._running)
        finally:
            # Reached with children left when a second Ctrl-C cuts the waiting short.
            for child in self._running:
                child.signal(signal.SIGKILL)

    async def start(self, command: Command) -> Child:
        """Start a child and wait until it is ready.

        Raises:
            ChildFailed: it ended, or was not ready in time.
            OSError: the program can't be started.
        """
        log = self._logs / f"{command.name}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **command.environment},
                start_new_session=True,
            )
        child = Child(command, process, log)
        self._running.append(child)
        try:
            async with asyncio.timeout(self._ready_within_s):
                await self._until_ready(child)
        except TimeoutError:
            raise child.failure(f"was not ready within {self._ready_within_s:g} s") from None
        return child

    async def watch(self) -> None:
        """Run until one of the children ends.

        Raises:
            ChildFailed: always, then.
        """
        async with asyncio.TaskGroup() as watching:
            for child in self._running:
                watching.create_task(child.watch())

    async def stop(self, *children: Child) -> None:
        """Ask children to end (SIGTERM), all at once; kill those that have not in time."""
        for child in children:
            child.signal(signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._stop_within_s):
                for child in children:
                    await child.wait()
        for child in children:
            await self.kill(child)

    async def kill(self, child: Child) -> None:
        """Kill a child and all processes that it has started (SIGKILL), and wait until they are gone."""
        child.signal(signal.SIGKILL)
        await child.wait()
        if child in self._running:
            self._running.remove(child)

    async def _until_ready(self, child: Child) -> None:
        while child.returncode is None:
            with suppress(httpx.TransportError):
                if (await self._probe.get(child.command.ready_url)).status_code == httpx.codes.OK:
                    return
            await asyncio.sleep(_POLL_S)
        raise child.failure(f"ended with exit code {child.returncode} before it was ready")
