"""Servers under load, each a process of its own, stopped when the block ends that started them.

A server counts as started when it has answered a call. Sidecars with peers are waited for until all of them are
connected, so that nothing measured afterwards is their first exchange.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import grpc
import yaml

from benchmarks.serving.requests import METHOD, ONE_DESCRIPTOR, RULES
from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports

START_WITHIN_SECONDS = 30.0
STOP_WITHIN_SECONDS = 10.0
POLL_SECONDS = 0.02


class ServerFailed(Exception):
    """A server ended or did not answer; its text ends with its last output."""


@dataclass(frozen=True, slots=True)
class Build:
    """Which sidecar is run, and by which Python: unless it is said otherwise, the one that this process would import.

    Args:
        folder: holds the package `ratelimit_sidecar`, for example another checkout or its `build/compiled`.
        python: has the packages that it needs.
    """

    folder: Path | None = None
    python: str = sys.executable

    @classmethod
    def at(cls, folder: Path) -> Build:
        """The one in a folder, with the virtual environment of the checkout that the folder is part of.

        Raises:
            ServerFailed: there is none.
        """
        folder = folder.resolve()
        if not (folder / "ratelimit_sidecar").is_dir():
            raise ServerFailed(f"{folder} holds no package ratelimit_sidecar: run 'make compile' in its checkout")
        for around in (folder, *folder.parents):
            python = around / ".venv" / "bin" / "python"
            if python.exists():
                return cls(folder, str(python))
        raise ServerFailed(f"no .venv around {folder}: run 'make compile' in its checkout")

    @property
    def environment(self) -> Mapping[str, str]:
        """Safe path: the working directory would come first otherwise, and it may hold a sidecar itself."""
        return {} if self.folder is None else {"PYTHONPATH": str(self.folder), "PYTHONSAFEPATH": "1"}


class _BuildType(click.ParamType[tuple[str, Build]]):
    """Of the command line: `NAME=FOLDER`."""

    name = "build"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Build]:
        name, equals, folder = str(value).partition("=")
        if not name or not equals:
            self.fail(f"{value!r} is not NAME=FOLDER", param, ctx)
        try:
            return name, Build.at(Path(folder))
        except ServerFailed as error:
            self.fail(str(error), param, ctx)


build_option = click.option(
    "--build",
    "builds",
    metavar="NAME=FOLDER",
    multiple=True,
    type=_BuildType(),
    help="Measure another build of the sidecar beside this one: the package in FOLDER, which is a checkout "
    "(interpreted) or its build/compiled, both made by 'make compile' there. To be given again for more.",
)


@dataclass(frozen=True, slots=True)
class Server:
    """A server under test: where it answers, and the process that it is.

    Args:
        address: where it answers, `host:port` or `unix:/path`.
        admin: `host:port` of the sidecar's admin server; "" where there is none.
        process: None for one that somebody else runs.
        pid: of its process; None when that is not known.
    """

    name: str
    address: str
    admin: str = ""
    process: subprocess.Popen[bytes] | None = None
    pid: int | None = None

    def metric(self, name: str) -> list[float]:
        """The values of all series of a metric, in the order they are exposed."""
        with urllib.request.urlopen(f"http://{self.admin}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]

    @property
    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * 4_096

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all its threads, and of its children that live, since their start."""
        assert self.pid is not None
        return sum(time.clock_gettime(_processor_clock(pid)) for pid in _with_children(self.pid))

    @property
    def open_files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def kill(self) -> None:
        """End it without a farewell, and wait until it has gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def _processor_clock(pid: int) -> int:
    """The clock of a process, in nanoseconds where /proc counts ticks of 10 ms: clock_getcpuclockid(3) on Linux."""
    return ~pid << 3 | 2


def _with_children(pid: int) -> Iterator[int]:
    """The process, its children and theirs."""
    yield pid
    for thread in Path(f"/proc/{pid}/task").iterdir():
        # The thread may have ended since.
        with suppress(OSError):
            for child in (thread / "children").read_text(encoding="ascii").split():
                yield from _with_children(int(child))


def first_answer(address: str, within_seconds: float = START_WITHIN_SECONDS, request: bytes = ONE_DESCRIPTOR) -> bytes:
    """Call once.

    Raises:
        grpc.RpcError: no answer within the time.
    """
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        answer: bytes = channel.unary_unary(METHOD)(request, timeout=within_seconds, wait_for_ready=True)
        return answer


class Servers:
    """Starts servers, and stops them all in `close`: use `with running_servers() as servers`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._ports = iter(free_ports(32).regions)

    def close(self) -> None:
        self._stack.close()

    def ports(self) -> RegionPorts:
        """Free ports for one more server."""
        return next(self._ports)

    def module(self, name: str, module: str, *arguments: str, address: str) -> Server:
        """Start `python -m module arguments` and wait for its first answer."""
        server = self.run(name, [sys.executable, "-m", module, *arguments], address=address)
        self._wait(server)
        return server

    def run(
        self,
        name: str,
        argv: Sequence[str],
        *,
        address: str,
        admin: str = "",
        stdin: int = subprocess.DEVNULL,
        environment: Mapping[str, str] | None = None,
    ) -> Server:
        """Start a program without waiting for it.

        Args:
            environment: besides this process's.
        """
        log = (self.folder / f"{name.replace(' ', '-')}.log").open("ab")
        self._stack.callback(log.close)
        env = {**os.environ, **(environment or {})}
        process = subprocess.Popen(argv, stdin=stdin, stdout=log, stderr=log, env=env)  # noqa: S603
        server = Server(name, address, admin, process, process.pid)
        self._stack.callback(_stop, process)
        return server

    def empty_handler(self, front_end: str, address: str | None = None) -> Server:
        """Start a front end that gives every request the same answer, without a limiter behind it.

        Args:
            front_end: "h2" or "grpcio".
        """
        address = address or f"{HOST}:{self.ports().grpc}"
        return self.module(
            f"empty {front_end}", "benchmarks.serving.empty_handler", front_end, address, address=address
        )

    def sidecar(self, name: str = "sidecar", **options: Any) -> Server:
        """Start one and wait for its first answer; options as of `start_sidecar`."""
        server = self.start_sidecar(name, **options)
        self._wait(server)
        return server

    def start_sidecar(
        self,
        name: str,
        *,
        peers: Sequence[str] = (),
        ports: RegionPorts | None = None,
        grpc_addresses: Sequence[str] | None = None,
        config: Mapping[str, object] | None = None,
        rules: str = RULES,
        program: Sequence[str] = ("ratelimit_sidecar",),
        build: Build = Build(),
        environment: Mapping[str, str] | None = None,
    ) -> Server:
        """Start a sidecar, and do not wait until it answers.

        Args:
            config: of sidecar.yaml, besides its name, rules, peers and where it listens.
            rules: the text of a rules file; "" for none.
            program: module and first arguments of what runs the sidecar's commands.
            environment: besides this process's.
        """
        ports = ports or self.ports()
        addresses = list(grpc_addresses or [f"{HOST}:{ports.grpc}"])
        rules_file = self.rules_file(name)
        rules_file.write_text(rules)
        file = self.folder / f"{name}.yaml"
        admin = f"{HOST}:{ports.admin}"
        listen = {"grpc": addresses, "admin": admin, "sync": f"{HOST}:{ports.sync}"}
        rules_files = [str(rules_file)] if rules else []
        settings = {"node": {"id": name}, "listen": listen, "rules": rules_files, "sync": {"peers": list(peers)}}
        file.write_text(yaml.safe_dump({**settings, **(config or {})}))
        argv = [build.python, "-m", *program, "serve", "--config", str(file)]
        env = {**build.environment, **(environment or {})}
        return self.run(name, argv, address=addresses[0], admin=admin, environment=env)

    def rules_file(self, name: str) -> Path:
        """Of the sidecar of that name."""
        return self.folder / f"{name}-rules.yaml"

    def mesh(self, count: int, name: str = "sidecar", build: Build = Build(), **options: Any) -> list[Server]:
        """Sidecars that replicate to each other, connected.

        Args:
            name: they are called that and a number, from 0.
            options: of the first one, as for `sidecar`.
        """
        ports = [self.ports() for _ in range(count)]
        addresses = [f"{HOST}:{of.sync}" for of in ports]
        sidecars = []
        for index, of in enumerate(ports):
            peers = [address for address in addresses if address != f"{HOST}:{of.sync}"]
            more = options if index == 0 else {}
            sidecars.append(self.sidecar(f"{name}-{index}", peers=peers, ports=of, build=build, **more))
        wait_until(lambda: all(of.metric("crdt_peer_connected") == [1.0] * (count - 1) for of in sidecars))
        return sidecars

    def _wait(self, server: Server) -> None:
        try:
            first_answer(server.address)
        except grpc.RpcError as error:
            log = self.folder / f"{server.name.replace(' ', '-')}.log"
            raise ServerFailed(f"{server.name} does not answer: {error}\n{log.read_text()[-2_000:]}") from error


def wait_until(condition: Callable[[], bool], within_seconds: float = START_WITHIN_SECONDS) -> None:
    """Ask again and again until it is true.

    Raises:
        ServerFailed: it was not within the time.
    """
    deadline = time.monotonic() + within_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ServerFailed(f"not within {within_seconds:.0f} s")
        time.sleep(POLL_SECONDS)


@contextmanager
def running_servers() -> Iterator[Servers]:
    with tempfile.TemporaryDirectory(prefix="ratelimit-benchmark-") as folder:
        servers = Servers(Path(folder))
        try:
            yield servers
        finally:
            servers.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGCONT)
        process.terminate()
    try:
        process.wait(STOP_WITHIN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
