"""Real sidecars that run out of something: nobody reads their log, their disk is full, descriptors are used up."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
import yaml
from certificates import Authority
from e2e.sidecars import status
from server.raw_http2 import connected

from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.envoy_api.envoy.extensions.common.ratelimit.v3.ratelimit_pb2 import RateLimitDescriptor
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub
from ratelimit_sidecar.persistence.snapshot_format import check
from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS as MESH_BOUNDS
from ratelimit_sidecar.server.bounds import DEFAULT_BOUNDS
from ratelimit_sidecar.server.file_limit import RESERVED

RULES = """
domain: openclaw
descriptors:
  - key: agent
    rate_limit: {unit: day, requests_per_unit: 20}
"""

TLS_FILES = {"certificate": "tls.crt", "key": "tls.key", "ca": "ca.crt"}

WITHIN_S = 90.0


has_namespaces = pytest.mark.skipif(
    subprocess.call(["unshare", "-Urpf", "true"], stderr=subprocess.DEVNULL) != 0, reason="no user namespaces here"
)


@dataclass
class Serving:
    process: asyncio.subprocess.Process
    ports: RegionPorts
    admin: httpx.AsyncClient

    async def answers(self, path: str) -> httpx.Response:
        """Ask until there is an answer."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                with suppress(httpx.TransportError):
                    return await self.admin.get(path)
                await asyncio.sleep(0.05)

    async def is_ready(self) -> None:
        async with asyncio.timeout(WITHIN_S):
            while (await self.answers("/readyz")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def decides(self) -> None:
        async with grpc.aio.insecure_channel(f"{HOST}:{self.ports.grpc}") as channel:
            assert (await status(RateLimitServiceStub(channel), "openclaw", "agent", "claw")).limit_remaining < 20

    async def metric(self, name: str) -> float:
        """The sum of its samples."""
        text = (await self.answers("/metrics")).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    async def stopped(self) -> int:
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WITHIN_S):
            return await self.process.wait()


@asynccontextmanager
async def serving(
    folder: Path,
    *,
    stderr: int | None = None,
    arguments: Sequence[str] = (),
    shell: str = 'exec "$@"',
    program: Sequence[str] = (),
    config: dict[str, object] | None = None,
) -> AsyncIterator[Serving]:
    """A sidecar that serves for as long as the context lasts.

    Args:
        shell: starts the sidecar, which is its arguments.
        program: what Python runs in place of the sidecar's module.
    """
    ports = free_ports(1).regions[0]
    rules = folder / "rules"
    rules.mkdir(exist_ok=True)
    (rules / "openclaw.yaml").write_text(RULES)
    listen = {"grpc": [f"{HOST}:{ports.grpc}"], "admin": f"{HOST}:{ports.admin}", "sync": f"{HOST}:{ports.sync}"}
    file = folder / "sidecar.yaml"
    file.write_text(yaml.safe_dump({"listen": listen, "rules": [str(rules)], **(config or {})}))
    serve = [sys.executable, *(program or ["-m", "ratelimit_sidecar"]), "serve", "--config", str(file), *arguments]
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", shell, "sh", *serve, stdin=asyncio.subprocess.DEVNULL, stderr=stderr
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{ports.admin}", trust_env=False) as admin:
            yield Serving(process, ports, admin)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextmanager
def full_pipe() -> Iterator[int]:
    """The end to write to of a pipe that nobody reads."""
    read, write = os.pipe()
    filling = os.open(f"/proc/self/fd/{write}", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(filling, bytes(65_536))
    os.close(filling)
    yield write
    os.close(write)
    os.close(read)


async def test_a_log_that_nobody_reads_holds_up_nothing(tmp_path: Path) -> None:
    with full_pipe() as stderr:
        async with serving(tmp_path, stderr=stderr) as sidecar:
            await sidecar.is_ready()
            for _ in range(3):
                # Each is logged.
                sidecar.process.send_signal(signal.SIGHUP)
                await sidecar.decides()
            assert (await sidecar.answers("/healthz")).status_code == 200
            assert await sidecar.stopped() == 0


@pytest.mark.slow
async def test_a_start_that_fails_ends_though_nobody_reads_why(tmp_path: Path) -> None:
    with full_pipe() as stderr:
        async with serving(tmp_path, stderr=stderr, config={"no_such_key": 1}) as sidecar, asyncio.timeout(WITHIN_S):
            assert await sidecar.process.wait() == 2


@pytest.mark.slow
async def test_a_full_disk_costs_log_lines_and_nothing_else(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    async with serving(tmp_path, stderr=full) as sidecar:
        os.close(full)
        await sidecar.is_ready()
        await sidecar.decides()
        assert await sidecar.metric("ratelimit_log_lines_dropped_total") > 0
        assert await sidecar.stopped() == 0


@pytest.mark.slow
@has_namespaces
async def test_without_inotify_watches_a_change_of_the_rules_is_only_seen_later_and_it_says_so(tmp_path: Path) -> None:
    limited = 'echo 0 > /proc/sys/user/max_inotify_watches && exec "$@"'
    async with serving(tmp_path, shell=f"exec unshare -Ur sh -c '{limited}' sh \"$@\"") as sidecar:
        await sidecar.is_ready()
        async with asyncio.timeout(WITHIN_S):
            while "watch limit" not in (await sidecar.answers("/readyz")).text:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await sidecar.metric("ratelimit_config_watched") == 0
        assert await sidecar.stopped() == 0


HANGING = """
import sys, threading
from ratelimit_sidecar.cli import main
from ratelimit_sidecar.config import rules_file

load, loaded = rules_file.load, []

def hang(*arguments, **options):
    # The first time it answers.
    if loaded:
        threading.Event().wait()
    loaded.append(True)
    return load(*arguments, **options)

rules_file.load = hang
main()
"""


@pytest.mark.slow
async def test_rules_that_cannot_be_read_for_ever_do_not_keep_it_from_ending(tmp_path: Path) -> None:
    async with serving(tmp_path, program=["-c", HANGING]) as sidecar:
        await sidecar.is_ready()
        sidecar.process.send_signal(signal.SIGHUP)
        await sidecar.decides()
        assert await sidecar.stopped() == 0


@pytest.mark.slow
@has_namespaces
async def test_as_the_first_process_of_a_container_it_can_be_ended_while_it_starts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    serve = [sys.executable, "-m", "ratelimit_sidecar", "serve", "--config", str(tmp_path / "fifo")]
    container = await asyncio.create_subprocess_exec("unshare", "-Urpf", "--kill-child", *serve)
    try:
        async with asyncio.timeout(WITHIN_S):
            # It waits for its configuration.
            writer = await asyncio.to_thread(os.open, tmp_path / "fifo", os.O_WRONLY)
            os.kill(child_of(container.pid), signal.SIGTERM)
            assert await container.wait() == 0
        os.close(writer)
    finally:
        with suppress(ProcessLookupError):
            container.kill()
        await container.wait()


def child_of(pid: int) -> int:
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


STUCK = """
import pathlib, sys, threading
from ratelimit_sidecar import app
from ratelimit_sidecar.cli import main
from ratelimit_sidecar.console import rules

def hang(*_):
    pathlib.Path(sys.argv[3]).with_name("hangs").touch()
    threading.Event().wait()

app.STOP_SECONDS = 0.5
rules.lines_of = hang
main()
"""


@pytest.mark.slow
async def test_whatever_hangs_a_stop_ends_it(tmp_path: Path) -> None:
    async with serving(tmp_path, program=["-c", STUCK]) as sidecar:
        await sidecar.is_ready()
        asking = asyncio.create_task(sidecar.admin.get("/rlconfig", timeout=None))
        async with asyncio.timeout(WITHIN_S):
            while not (tmp_path / "hangs").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await sidecar.stopped() == 1
        await asyncio.wait([asking])


LARGE = """
import threading
from ratelimit_sidecar import app
from ratelimit_sidecar.cli import main
from ratelimit_sidecar.persistence.purse_file import PurseFile
from ratelimit_sidecar.persistence.snapshot_file import SnapshotFile

keep_purses, save = PurseFile.keep, SnapshotFile.save

async def purses_kept(purses, *arguments, **options):
    app.STOP_SECONDS = 0.25
    await keep_purses(purses, *arguments, **options)

async def save_for_ever(snapshots, at_once=False):
    if at_once:
        threading.Event().wait()
    await save(snapshots)

app.SNAPSHOT_BUCKET_SECONDS = 1.0
PurseFile.keep, SnapshotFile.save = purses_kept, save_for_ever
main()
"""


@pytest.mark.slow
async def test_a_last_snapshot_has_time_for_each_of_its_buckets_and_purses_do_not_wait_for_it(tmp_path: Path) -> None:
    config = {"node": {"id": "a"}, "sync": {"members": {"a": 1}}, "persistence": {"file": str(tmp_path / "state")}}
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        async with serving(tmp_path, stderr=stderr.fileno(), program=["-c", LARGE], config=config) as sidecar:
            await sidecar.is_ready()
            await sidecar.decides()
            assert await sidecar.stopped() == 1
    assert "after_seconds=1.25" in log.read_text()
    assert (tmp_path / "state.purses").exists()


READS_UNTIL_THE_STOP = """
import asyncio
from ratelimit_sidecar.app import Sidecar
from ratelimit_sidecar.cli import main
from ratelimit_sidecar.persistence.snapshot_file import SnapshotFile

stop = asyncio.Event()
begin_stop, load = Sidecar._begin_stop, SnapshotFile.load

def begin_to_stop(sidecar):
    begin_stop(sidecar)
    stop.set()

async def load_slowly(snapshots):
    await stop.wait()
    await asyncio.sleep(1)
    await load(snapshots)

Sidecar._begin_stop, SnapshotFile.load = begin_to_stop, load_slowly
main()
"""


@pytest.mark.slow
async def test_what_was_taken_while_the_state_was_being_read_is_kept_at_a_stop(tmp_path: Path) -> None:
    config, log = {"persistence": {"file": str(tmp_path / "state")}}, tmp_path / "log"
    program = ["-c", READS_UNTIL_THE_STOP]
    with log.open("wb") as stderr:
        async with serving(tmp_path, program=program, config=config, stderr=stderr.fileno()) as sidecar:
            async with asyncio.timeout(WITHIN_S):
                while "started" not in log.read_text():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await sidecar.decides()
            assert await sidecar.stopped() == 0
    with (tmp_path / "state").open("rb") as state:
        assert check(state).buckets == 1


@has_namespaces
async def test_on_a_disk_that_has_become_read_only_it_starts_with_what_there_is_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    config = {"persistence": {"file": str(folder / "state")}}
    async with serving(tmp_path, config=config) as sidecar:
        await sidecar.is_ready()
        await sidecar.decides()
        assert await sidecar.stopped() == 0
    read_only = f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}"
    shell = f'exec unshare -Urm sh -c \'{read_only} && exec "$@"\' sh "$@"'
    async with serving(tmp_path, config=config, shell=shell) as sidecar:
        await sidecar.is_ready()
        assert (await sidecar.answers("/readyz")).json()["degraded"] == ["the state is not kept: Read-only file system"]
        assert await sidecar.metric("ratelimit_snapshot_buckets") == 1
        await sidecar.decides()
        assert await sidecar.stopped() == 0


LITTLE_MEMORY = """
from ratelimit_sidecar import app
from ratelimit_sidecar.cli import main

app.memory_limit_bytes = lambda: 64 * 1_024 * 1_024
main()
"""


@pytest.mark.parametrize("program", [pytest.param((), id="much"), pytest.param(["-c", LITTLE_MEMORY], id="little")])
async def test_with_little_memory_calls_may_hold_less(program: Sequence[str], tmp_path: Path) -> None:
    agent = RateLimitDescriptor(entries=[RateLimitDescriptor.Entry(key="agent", value="a" * 2 * 1_024 * 1_024)])
    large = RateLimitRequest(domain="openclaw", descriptors=[agent])
    async with serving(tmp_path, program=program) as sidecar:
        await sidecar.is_ready()
        async with grpc.aio.insecure_channel(f"{HOST}:{sidecar.ports.grpc}") as channel:
            try:
                await RateLimitServiceStub(channel).ShouldRateLimit(large, timeout=WITHIN_S)
            except grpc.aio.AioRpcError as error:
                answer = error.code()
            else:
                answer = grpc.StatusCode.OK
        assert answer == (grpc.StatusCode.RESOURCE_EXHAUSTED if program else grpc.StatusCode.OK)


@pytest.mark.slow
async def test_no_first_request_to_the_console_waits_for_imports(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        program = ["-X", "importtime", "-m", "ratelimit_sidecar"]
        async with serving(tmp_path, program=program, stderr=log.fileno()) as sidecar:
            await sidecar.is_ready()
            for path in ("/metrics", "/", "/healthz", "/readyz", "/healthcheck", "/buckets", "/rlconfig", "/peers"):
                assert (await sidecar.admin.get(path)).status_code == 200
            await sidecar.stopped()
    started, _, later = (tmp_path / "log").read_text().partition("[info     ] ready ")
    assert "import time:" in started
    assert "import time:" not in later.partition("[info     ] draining")[0]


@pytest.mark.parametrize("front_end", ["h2", "grpcio"])
async def test_a_path_that_is_no_text_ends_nothing_and_is_told_of(front_end: str, tmp_path: Path) -> None:
    async with serving(tmp_path, arguments=["--frontend", front_end]) as sidecar:
        await sidecar.is_ready()
        for port in (sidecar.ports.sync, sidecar.ports.grpc):
            async with connected(f"{HOST}:{port}") as client:
                client.open(b"/caf\xe9\xff", end=True)
                if (port, front_end) == (sidecar.ports.grpc, "h2"):
                    await client.ping()
                else:
                    await asyncio.wait_for(client.gone.wait(), WITHIN_S)
        failed = {"mesh_listener", "grpc_listener"} if front_end == "grpcio" else {"mesh_listener"}
        async with asyncio.timeout(WITHIN_S):
            while await sidecar.metric("ratelimit_task_failures_total") < len(failed):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await sidecar.is_ready()
        await sidecar.decides()
        told = (await sidecar.answers("/readyz")).json()["degraded"]
        assert {line.split()[0] for line in told} == failed
        assert await sidecar.stopped() == 0


@pytest.mark.slow
async def test_the_soft_limit_on_descriptors_is_raised_to_what_the_bounds_on_connections_need(tmp_path: Path) -> None:
    async with serving(tmp_path, shell='ulimit -Sn 256 && exec "$@"') as sidecar:
        await sidecar.is_ready()
        assert (
            await sidecar.metric("process_max_fds") == MESH_BOUNDS.connections + DEFAULT_BOUNDS.connections + RESERVED
        )


@pytest.mark.parametrize(
    ("port", "front_end", "tls"),
    [
        ("grpc", "h2", False),
        pytest.param("grpc", "grpcio", False, marks=pytest.mark.slow),
        pytest.param("admin", "h2", False, marks=pytest.mark.slow),
        pytest.param("sync", "h2", True, marks=pytest.mark.slow),
    ],
)
async def test_silent_connections_use_up_no_descriptors_of_others(
    port: str, front_end: str, tls: bool, tmp_path: Path
) -> None:
    config: dict[str, object] = {}
    if tls:
        Authority().write(tmp_path / "tls", "a", "localhost")
        files = {kind: str(tmp_path / "tls" / name) for kind, name in TLS_FILES.items()}
        config = {"node": {"id": "a"}, "sync": {"tls": files, "peers": ["localhost:1"]}}
    arguments = ["--frontend", front_end]
    async with serving(tmp_path, arguments=arguments, shell='ulimit -n 420 && exec "$@"', config=config) as sidecar:
        await sidecar.is_ready()
        silent = [await asyncio.open_connection(HOST, getattr(sidecar.ports, port)) for _ in range(700)]
        assert (await sidecar.answers("/healthz")).status_code == 200
        for _, writer in silent:
            writer.close()
        await sidecar.is_ready()
        await sidecar.decides()
        sidecar.process.send_signal(signal.SIGHUP)
        assert await sidecar.stopped() == 0


async def test_without_descriptors_it_waits_for_some_and_says_so(tmp_path: Path) -> None:
    # The limit is lowered behind its back, as when the whole system runs out.
    async with serving(tmp_path) as sidecar:
        await sidecar.is_ready()
        _, hard = resource.prlimit(sidecar.process.pid, resource.RLIMIT_NOFILE)
        before = await sidecar.metric("process_open_fds")
        resource.prlimit(sidecar.process.pid, resource.RLIMIT_NOFILE, (int(before) + 2, hard))
        waiting = [await asyncio.open_connection(HOST, sidecar.ports.grpc) for _ in range(20)]
        async with asyncio.timeout(WITHIN_S):
            # On the connection that it has.
            while not await sidecar.metric("ratelimit_accept_failures_total"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            while "refused" not in (await sidecar.answers("/readyz")).text:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        resource.prlimit(sidecar.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        await sidecar.decides()
        for _, writer in waiting:
            writer.close()
        assert await sidecar.stopped() == 0
