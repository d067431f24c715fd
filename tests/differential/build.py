"""Builds envoyproxy/ratelimit and its configuration checker from the Go module, into a folder outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MODULE: Final = "github.com/envoyproxy/ratelimit"
COMMANDS: Final = ("service_cmd", "config_check_cmd")

SOURCE_VARIABLE: Final = "RATELIMIT_SOURCE"
"""Names a checkout of envoyproxy/ratelimit, which is then built in place of the module."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version of envoyproxy/ratelimit.

    Args:
        name: as Go's modules have it; the end is the commit.
        is_complete: False for a version without metadata of rules, with wildcards only at the end of values, and with
            quotas that never deny. Quotas, such wildcards and dynamic metadata are then not compared.
    """

    name: str
    is_complete: bool


VERSIONS: Final = (
    Version("v1.4.1-0.20260706065234-f2fb15770f7f", is_complete=True),
    Version("v1.4.1-0.20260122083618-3fb702589d36", is_complete=False),
)
"""The first that can be had is taken: a module proxy that fetches nothing new may only have the second, which others
depend on."""

BUILD_SECONDS: Final = 900


class Unavailable(Exception):
    """It cannot be had on this machine; the text says why."""


@dataclass(frozen=True, slots=True)
class Reference:
    """envoyproxy/ratelimit, built.

    Args:
        service: the program that answers.
        checker: the program that says whether rules are accepted.
    """

    service: Path
    checker: Path
    version: Version


def build() -> Reference:
    """Build it unless that was done.

    Raises:
        Unavailable: there is no Go, or the module cannot be had.
    """
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    source = os.environ.get(SOURCE_VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ratelimit-sidecar" / "envoyproxy"
    if source is not None:
        version = Version("source", is_complete=True)
        if go is None:
            raise Unavailable("Go is not installed: it builds envoyproxy/ratelimit")
        # Each time, for it may have changed; Go keeps what has not.
        return _built(cache / version.name, version, [go, "build", "-mod=mod"], Path(source), "./src")
    for version in VERSIONS:
        if (cache / version.name / COMMANDS[-1]).exists():
            return _reference(cache / version.name, version)
    if go is None:
        raise Unavailable("Go is not installed: it builds envoyproxy/ratelimit")
    reasons = []
    for version in VERSIONS:
        with tempfile.TemporaryDirectory() as folder:
            module = Path(folder)
            (module / "go.mod").write_text("module differential\n")
            tools = [f"{MODULE}/src/{command}@{version.name}" for command in COMMANDS]
            try:
                _run([go, "get", "-tool", *tools], module)
                return _built(cache / version.name, version, [go, "build"], module, f"{MODULE}/src")
            except Unavailable as unavailable:
                reasons.append(str(unavailable))
    raise Unavailable("; ".join(reasons))


def _built(into: Path, version: Version, command: list[str], folder: Path, packages: str) -> Reference:
    print(f"==> envoyproxy/ratelimit {version.name}, in {into} (minutes, the first time)", flush=True)
    new = into.with_name(f"{into.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    options = ["-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", f"{new}/"]
    _run([*command, *options, *(f"{packages}/{name}" for name in COMMANDS)], folder)
    shutil.rmtree(into, ignore_errors=True)
    new.rename(into)
    return _reference(into, version)


def _reference(folder: Path, version: Version) -> Reference:
    return Reference(folder / COMMANDS[0], folder / COMMANDS[1], version)


def _run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "CGO_ENABLED": "0"}
    try:
        subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no output"]
        raise Unavailable(f"envoyproxy/ratelimit cannot be built: {lines[-1].strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"envoyproxy/ratelimit was not built within {BUILD_SECONDS} s") from error
