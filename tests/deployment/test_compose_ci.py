"""The compose demo in CI: where it cannot run it says why and succeeds; what is broken fails."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from deployment import compose, images
from deployment.cache import Unavailable
from deployment.compose import Broken

Programs = Callable[..., None]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Makes these shell scripts all that is found of a Docker engine, for root."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("deployment.engine.CACHE", tmp_path / "cache")

    def install(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return install


def test_without_a_docker_client_it_is_left_out(programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    assert compose.main(["--ci"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line == "The compose demo is left out: there is no docker client (Debian: docker.io)"


def test_who_is_not_root_needs_an_engine_that_answers(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(docker="exit 1")
    monkeypatch.setattr(os, "geteuid", lambda: 1_000)
    assert compose.main(["--ci"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line == "The compose demo is left out: no Docker engine answers, and only root can start one"


def test_an_engine_that_may_not_mount_is_a_reason(programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    rules = {"iptables": "echo -P FORWARD ACCEPT", "iptables-save": "", "iptables-restore": ""}
    programs(docker="exit 1", dockerd="echo cannot mount cgroups >&2; exit 1", **rules)
    assert compose.main(["--ci"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line == "The compose demo is left out: dockerd did not start: cannot mount cgroups"


def test_rules_that_may_not_be_read_are_a_reason(programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    programs(docker="exit 1", dockerd="", **{"iptables-save": "echo Permission denied >&2; exit 4"})
    assert compose.main(["--ci"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line == "The compose demo is left out: iptables-save: Permission denied"


def test_a_container_that_cannot_run_is_a_reason(programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    programs(docker='case "$1" in run) exit 125;; images) echo an id;; esac')
    assert compose.main(["--ci"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("The compose demo is left out: this engine cannot run containers")


def test_images_that_take_too_long_are_a_reason(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(docker='case "$1" in run) exec /bin/sleep 60;; images) echo an id;; esac')
    monkeypatch.setattr(compose, "CI_IMAGES_S", 1)
    assert compose.main(["--ci"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line == "The compose demo is left out: its images were not made within 1 s"


def test_what_takes_too_long_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "held")
    said: list[bytes] = []

    def read() -> None:
        with (tmp_path / "held").open("rb", buffering=0) as held:
            said.append(held.read(1))
            os.kill(os.getpid(), signal.SIGALRM)
            # To its end, which comes when nobody has it open.
            said.append(held.read())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with pytest.raises(Unavailable, match="too slow within 60 s"), compose.within(60, "too slow"):
        images.run(["sh", "-c", f"(exec >{tmp_path}/held; echo; sleep 600) & wait"])
    reader.join(30)
    assert said == [b"\n", b""]


def test_a_dockerfile_that_cannot_be_built_is_a_failure(programs: Programs) -> None:
    """What others make has been built just before, so it is not the machine."""
    programs(docker='case "$*" in *ratelimit-sidecar:local*) exit 1;; images*) echo an id;; esac', git="echo 1")
    assert compose.main(["--ci"]) == 1


def test_a_broken_promise_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise Broken("too many were admitted")

    monkeypatch.setattr(compose, "_run", run)
    assert compose.main(["--ci"]) == 1


def test_who_asks_for_it_is_told_by_the_exit_code_that_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise Unavailable("no engine")

    monkeypatch.setattr(compose, "_run", run)
    assert compose.main([]) == 1
