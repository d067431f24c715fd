"""Real Redis servers of their own, for one test each."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ratelimit_sidecar.demo.ports import HOST, free_ports

SERVERS = [name for name in ("redis-server", "valkey-server") if shutil.which(name) is not None]
"""Those that are here; where one is enough the first is taken."""

needs_redis = pytest.mark.skipif(not SERVERS, reason="needs redis-server or valkey-server in PATH")

WITHIN_S = 60.0


def free_port_numbers(count: int) -> list[int]:
    return free_ports(count).all()[:count]


class RedisServer:
    """One process; `async with RedisServer(folder) as server`.

    Args:
        options: of the command line, beside those that keep it to itself and without files.
        port: 0 for a unix socket alone.
        sentinel: the configuration of a Sentinel, which this is then.
        program: one of `SERVERS`; "" for the first.
    """

    def __init__(self, folder: Path, *options: str, port: int = 0, sentinel: str = "", program: str = "") -> None:
        self._program = program or SERVERS[0]
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.port = port
        self.socket = folder / "redis.sock"
        self._options = [*("--save", ""), *("--appendonly", "no"), *options]
        self._file: list[str] = []
        if sentinel:
            # It writes down there what it has found out.
            (folder / "sentinel.conf").write_text(sentinel)
            self._file, self._options = [str(folder / "sentinel.conf")], ["--sentinel"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    async def __aenter__(self) -> RedisServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Start it, or start it again, and wait until it answers."""
        self.socket.unlink(missing_ok=True)
        argv = [
            *(self._program, *self._file, "--port", str(self.port), "--bind", HOST, "--dir", str(self.folder)),
            *("--unixsocket", str(self.socket), *self._options),
        ]
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log)  # noqa: ASYNC220 (of no one loop)
        async with asyncio.timeout(WITHIN_S):
            while not await self._answers():
                assert self._process.poll() is None, (self.folder / "redis.log").read_text()[-2_000:]
                await asyncio.sleep(0.02)

    async def _answers(self) -> bool:
        client = self.client()
        try:
            return bool(await client.ping())
        except RedisError as error:
            # One that wants a password is up.
            return "NOAUTH" in str(error)
        finally:
            await client.aclose()

    async def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def restart_at_once(self) -> None:
        """Kill it and start it again, while this thread and its event loop do nothing."""

        async def restart() -> None:
            await self.kill()
            await self.start()

        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(asyncio.run, restart()).result()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Stopped by SIGSTOP: connections are taken, and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def client(self, **options: str) -> Redis:
        return Redis(unix_socket_path=str(self.socket), **options)  # type: ignore[arg-type]

    async def names(self) -> Sequence[bytes]:
        """Of all buckets in it."""
        async with self.client() as client:
            return sorted([name async for name in client.scan_iter(match="*:1:{*", count=1_000)])
