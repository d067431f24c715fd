"""The image as a real Docker engine builds and runs it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from deployment.engine import Engine
from deployment.images import BASE, SIDECAR
from ratelimit_sidecar import __version__

pytestmark = pytest.mark.deployment

MAX_MB_OVER_BASE = 150
MAX_START_CPU_S = 3.0
"""It takes a fifth of it."""
PATIENCE_S = 60.0

T = TypeVar("T")

HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none")


def test_it_adds_little_to_its_base(docker: Engine) -> None:
    sizes = [int(docker.docker("image", "inspect", "--format", "{{.Size}}", tag)) for tag in (SIDECAR, BASE)]
    megabytes = (sizes[0] - sizes[1]) / 1e6
    print(f"{SIDECAR}: {sizes[0] / 1e6:.0f} MB, {megabytes:.0f} MB over its base")
    assert megabytes < MAX_MB_OVER_BASE


def test_what_it_consists_of_is_listed_in_it(docker: Engine) -> None:
    text = docker.docker("run", "--rm", "--entrypoint", "cat", SIDECAR, "/usr/share/sbom/ratelimit-sidecar.cdx.json")
    parts = {part["name"]: part.get("purl", "") for part in json.loads(text)["components"]}

    assert parts["ratelimit-sidecar"] == f"pkg:pypi/ratelimit-sidecar@{__version__}"
    assert parts["grpcio"].startswith("pkg:pypi/")
    assert parts["libc6"].startswith("pkg:deb/debian/")


def test_its_hot_modules_are_compiled(docker: Engine) -> None:
    code = (
        "from ratelimit_sidecar.limiter import limiter; from ratelimit_sidecar.server.http2_session import IS_NATIVE; "
        "print(limiter.__file__.rpartition('.')[2], IS_NATIVE)"
    )
    assert docker.docker("run", "--rm", "--entrypoint", "python", SIDECAR, "-c", code).strip() == "so True"


def test_it_says_what_it_is(docker: Engine) -> None:
    labels = inspect(docker, "image", SIDECAR)["Config"]["Labels"]

    assert labels["org.opencontainers.image.title"] == "ratelimit-sidecar"
    assert labels["org.opencontainers.image.licenses"]
    assert labels["org.opencontainers.image.revision"] != "unknown"


def test_it_runs_as_nobody_with_a_read_only_root_and_becomes_healthy(docker: Engine) -> None:
    with running(docker) as container:
        cpu_s = until(lambda: ready_after_cpu_s(docker, container))
        print(f"ready after {cpu_s:.2f} s of processor time")
        until(lambda: inspect(docker, "container", container)["State"]["Health"]["Status"] == "healthy")
        assert docker.docker("exec", container, "id", "-u").strip() == "65532"
        docker.docker("stop", "--time", "30", container)
        assert inspect(docker, "container", container)["State"]["ExitCode"] == 0
    assert cpu_s < MAX_START_CPU_S


def test_its_folder_for_snapshots_is_the_one_thing_it_may_write_to(docker: Engine) -> None:
    code = (
        "import os; print([path for path, _, _ in os.walk('/') if os.access(path, os.W_OK)"
        " and not path.startswith(('/proc', '/sys', '/dev', '/tmp', '/var/tmp', '/run/lock'))])"
    )
    found = docker.docker("run", "--rm", "--entrypoint", "python", SIDECAR, "-c", code)
    assert found.strip() == "['/var/lib/ratelimit-sidecar']"


@contextmanager
def running(docker: Engine) -> Iterator[str]:
    container = docker.docker("run", "--detach", *HARDENED, SIDECAR).strip()
    try:
        yield container
    finally:
        docker.docker("rm", "--force", "--volumes", container)


def inspect(docker: Engine, kind: str, name: str) -> dict[str, Any]:
    (found,) = json.loads(docker.docker(kind, "inspect", name))
    told: dict[str, Any] = found
    return told


def ready_after_cpu_s(docker: Engine, container: str) -> float | None:
    """Of the process, as the kernel counts it; None before it is ready."""
    if " ready " not in docker.logs(container):
        return None
    fields = docker.docker("exec", container, "cat", "/proc/1/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def until(ask: Callable[[], T | None]) -> T:
    ends_at = time.monotonic() + PATIENCE_S
    while True:
        found = ask()
        if found:
            return found
        assert time.monotonic() < ends_at
        time.sleep(0.1)
