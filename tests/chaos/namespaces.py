"""Machines of their own on one switch, made of network namespaces: a region each, veth pairs and a bridge.

Nothing is added to the namespace that the tests run in, so neither addresses nor firewall rules of this machine can be
in the way; a process is put into a region by `Network.inside`, a socket by `Network.socket`. What is cut vanishes on
arrival, as on a broken line: the sender is not told.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

_CLONE_NEWNET = 0x40000000
"""From sched.h."""

_PROGRAMS = ("ip", "iptables")
_numbers = count(1)
_libc = ctypes.CDLL(None, use_errno=True)


def why_impossible() -> str | None:
    """Why this process can make no namespaces; None when it can."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"network namespaces need {' and '.join(missing)} (Debian: iproute2, iptables)"
    name = f"chaos-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces can be made here (root or CAP_SYS_ADMIN is needed): {error.stderr.strip()}"
    try:
        _run("ip", "netns", "exec", name, "iptables", "--wait", "--list")
    except subprocess.CalledProcessError as error:
        return f"no links can be cut here: iptables in a network namespace says {error.stderr.strip()}"
    finally:
        _run("ip", "netns", "delete", name)
    return None


class Network:
    """A switch and the machines at it; `network` makes it.

    Args:
        machines: namespaces, by the names of the machines.
        threads: one a machine, each inside its namespace: a socket belongs where it was made.
    """

    def __init__(self, switch: str, machines: dict[str, str], threads: dict[str, ThreadPoolExecutor]) -> None:
        self._switch = switch
        self._machines = machines
        self._threads = threads
        self.addresses = {name: f"10.0.0.{number}" for number, name in enumerate(machines, start=1)}

    def inside(self, machine: str, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on that machine, as the same process."""
        return ["ip", "netns", "exec", self._machines[machine], *argv]

    def socket(self, machine: str) -> socket.socket:
        """A TCP socket of that machine, not blocking."""
        made = self._threads[machine].submit(socket.socket).result()
        made.setblocking(False)
        return made

    async def dial(self, machine: str, address: tuple[str, int]) -> socket.socket:
        """A connection from that machine."""
        dialled = self.socket(machine)
        try:
            await asyncio.get_running_loop().sock_connect(dialled, address)
        except BaseException:
            dialled.close()
            raise
        return dialled

    def cut(self, one: str, other: str) -> None:
        """Nothing gets from either to the other any more."""
        self._filter("--append", one, other)

    def heal(self, one: str, other: str) -> None:
        """Undo `cut`."""
        self._filter("--delete", one, other)

    def unplug(self, machine: str) -> None:
        """Take its cable out of the switch."""
        _run("ip", "-n", self._switch, "link", "set", machine, "down")

    def plug_in(self, machine: str) -> None:
        """Undo `unplug`."""
        _run("ip", "-n", self._switch, "link", "set", machine, "up")

    def _filter(self, action: str, one: str, other: str) -> None:
        for listener, sender in ((one, other), (other, one)):
            rule = [action, "INPUT", "--source", self.addresses[sender], "--jump", "DROP"]
            _run(*self.inside(listener, ["iptables", "--wait", *rule]))


@contextmanager
def network(machines: Sequence[str]) -> Iterator[Network]:
    """A network of these machines, and nothing of it left behind.

    Raises:
        subprocess.CalledProcessError: see `why_impossible`.
    """
    prefix = f"chaos-{os.getpid()}-{next(_numbers)}"
    switch = f"{prefix}-switch"
    namespaces = {machine: f"{prefix}-{machine}" for machine in machines}
    with ExitStack() as stack:
        for namespace in (switch, *namespaces.values()):
            _run("ip", "netns", "add", namespace)
            stack.callback(_run, "ip", "netns", "delete", namespace)
        _ip(switch, "link add bridge type bridge", "link set bridge up")
        threads = {
            machine: stack.enter_context(ThreadPoolExecutor(1, initializer=_enter(namespace)))
            for machine, namespace in namespaces.items()
        }
        made = Network(switch, namespaces, threads)
        for machine, namespace in namespaces.items():
            _ip(
                namespace,
                f"link add eth0 type veth peer name {machine} netns {switch}",
                f"address add {made.addresses[machine]}/24 dev eth0",
                "link set lo up",
                "link set eth0 up",
            )
            _ip(switch, f"link set {machine} master bridge", f"link set {machine} up")
        yield made


def _enter(namespace: str) -> Callable[[], None]:
    """What moves the thread that calls it, and no other, into a namespace (setns(2))."""

    def enter() -> None:
        with Path("/run/netns", namespace).open() as handle:
            if _libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)

    return enter


def _ip(namespace: str, *lines: str) -> None:
    _run("ip", "-n", namespace, "-batch", "-", text="\n".join(lines))


def _run(*argv: str, text: str = "") -> None:
    try:
        subprocess.run(argv, input=text, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        error.add_note(error.stderr)
        raise
