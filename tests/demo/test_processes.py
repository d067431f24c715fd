import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.processes import Child, ChildFailed, Children, Command, first_failure


def http_server(before: str = "") -> Command:
    """A child that runs `before` and then answers every GET with 200."""
    port = free_ports(1).upstream
    program = f"""
import http.server, os, signal, subprocess, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
{before}
http.server.HTTPServer(("{HOST}", {port}), Handler).serve_forever()
"""
    return Command("server", [sys.executable, "-c", program], f"http://{HOST}:{port}/")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def has_ended(pid: int) -> bool:
    """Also of a process that whoever inherited it has not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def test_a_child_is_ready_once_started_and_gone_afterwards(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        child = await children.start(http_server())
        assert is_running(child.pid)

    assert not is_running(child.pid)
    assert child.returncode == -signal.SIGTERM


async def test_a_child_is_gone_when_its_owner_fails(tmp_path: Path) -> None:
    started: list[Child] = []

    async def own() -> None:
        async with Children(tmp_path) as children:
            started.append(await children.start(http_server()))
            raise LookupError

    with pytest.raises(LookupError):
        await own()

    assert not is_running(started[0].pid)


async def test_a_child_is_gone_when_its_owner_is_cancelled_while_it_waits_for_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    before = f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    async def own() -> None:
        async with Children(tmp_path) as children:
            await children.start(http_server(before))

    owner = asyncio.create_task(own())
    await until(lambda: pid_file.exists() and pid_file.read_text() != "")
    owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner

    assert not is_running(int(pid_file.read_text()))


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    async with Children(tmp_path, stop_within_s=0.5) as children:
        child = await children.start(http_server("signal.signal(signal.SIGTERM, signal.SIG_IGN)"))

    assert child.returncode == -signal.SIGKILL


async def test_what_a_child_has_started_goes_with_it(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        spawn = "grandchild = subprocess.Popen(['sleep', '60']); print(grandchild.pid, flush=True)"
        child = await children.start(http_server(spawn))
        grandchild = int(child.log.read_text().split()[0])
        assert is_running(grandchild)
        await children.kill(child)

    await until(lambda: has_ended(grandchild))


async def test_a_child_that_dies_before_it_is_ready_is_reported_with_its_last_output(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        with pytest.raises(ChildFailed, match=r"(?s)server ended with exit code 3 before.*no such flag"):
            await children.start(http_server("print('no such flag', flush=True); sys.exit(3)"))


async def test_a_child_that_is_not_ready_in_time_is_reported_and_stopped(tmp_path: Path) -> None:
    async with Children(tmp_path, ready_within_s=0.5) as children:
        with pytest.raises(ChildFailed, match=r"server was not ready within 0\.5 s"):
            await children.start(http_server("time.sleep(60)"))
    # Leaving the block would have raised had the child not ended.


async def test_watching_ends_with_the_first_child_that_ends(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        child = await children.start(http_server())
        watching = asyncio.create_task(children.watch())
        child.signal(signal.SIGKILL)

        with pytest.raises(ChildFailed, match="server ended with exit code -9"), first_failure():
            await watching


async def test_a_killed_child_can_be_started_again_on_the_same_log(tmp_path: Path) -> None:
    command = http_server("print('hello', flush=True)")
    async with Children(tmp_path) as children:
        first = await children.start(command)
        await children.kill(first)
        second = await children.start(command)

        assert second.pid != first.pid
        assert second.log.read_text().count("hello") == 2


async def test_a_child_is_told_what_its_command_adds_to_the_environment(tmp_path: Path) -> None:
    command = http_server("print(os.environ['REGION'], flush=True)")
    command = Command(command.name, command.argv, command.ready_url, {"REGION": "eu-west-2"})
    async with Children(tmp_path) as children:
        child = await children.start(command)

        assert child.log.read_text().startswith("eu-west-2")
