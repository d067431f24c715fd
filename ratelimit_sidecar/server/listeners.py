"""Listening sockets for addresses as configured: `host:port`, `[IPv6]:port` or `unix:PATH`.

Either all are bound or none. A socket file that a crash left behind is replaced; if a process still answers on it, the
address is in use. `[::]:port` also takes IPv4 if the system allows it, as in gRPC and Go. A name is bound at every
address it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ratelimit_sidecar.config.tls_files import CertificateInForce

BACKLOG = 1_024

UNIX_PREFIX = "unix:"

UNAVAILABLE = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""Errors that are ignored for single addresses of a name: `localhost` often has an IPv6 address without IPv6."""

SOCKET_FILE_MODE = 0o666
"""Envoy usually runs as another user, and connecting needs write permission. The permissions of the folder decide who
may reach the file; over TCP there is no such check at all.
"""


class ListenError(Exception):
    """An address that cannot be listened on; the text names it and says why."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"cannot listen on {address}: {reason}")
        self.address = address
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SocketFile:
    """A unix socket's file, identified by its inode, so that the file of a later process at the same path is left
    alone."""

    path: Path
    device: int
    inode: int

    @classmethod
    def at(cls, path: Path) -> SocketFile:
        found = path.lstat()
        return cls(path, found.st_dev, found.st_ino)

    def remove(self) -> None:
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            return
        if (found.st_dev, found.st_ino) == (self.device, self.inode):
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound and listening socket, not blocking.

    Args:
        address: as configured, with the port that the system chose when it was 0.
        file: for a unix socket.
    """

    socket: socket.socket
    address: str
    file: SocketFile | None = None

    def close(self) -> None:
        """Refuse clients from now on, also where the socket has other descriptors, and remove the socket's file."""
        # A listening socket is shut down on Linux; elsewhere that is an error, and closing has to do.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        if self.file is not None:
            self.file.remove()


async def load_certificate(certificate: CertificateInForce, addresses: Sequence[str]) -> None:
    """Load the certificate of a listener on these addresses.

    Raises:
        ListenError: its files cannot be used.
    """
    try:
        await asyncio.to_thread(certificate.load)
    except OSError as error:
        raise ListenError(", ".join(addresses), str(error)) from error


def listen(addresses: Sequence[str]) -> list[Listener]:
    """Listen on every address.

    Raises:
        ListenError: one of them is malformed, taken, not ours or not permitted; the others are closed again.
    """
    listeners: list[Listener] = []
    try:
        for address in addresses:
            if address.startswith(UNIX_PREFIX):
                listeners.append(_listen_unix(address))
            else:
                listeners += _listen_tcp(address)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def unix_path(address: str) -> Path:
    """The file of a `unix:PATH` address.

    Raises:
        ListenError: it names none.
    """
    path = Path(address.removeprefix(UNIX_PREFIX))
    if not path.name:
        raise ListenError(address, "expected unix:PATH")
    return path


def numeric_addresses(address: str) -> list[str]:
    """The IP addresses with port behind a TCP address, each once.

    Raises:
        ListenError: it is malformed, or its name has none.
    """
    hosts = dict.fromkeys(str(where[0]) for _, where in _look_up(address))
    port = _parse_tcp(address)[1]
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]


def publish_socket_file(address: str, bound: Path) -> SocketFile:
    """Move the file of a listening unix socket to where clients look for it, unless somebody answers there.

    Args:
        address: `unix:PATH`.
        bound: the file now, in the same folder.

    Raises:
        ListenError: the address is in use, or the file cannot be there.
    """
    path = unix_path(address)
    try:
        bound.chmod(SOCKET_FILE_MODE)
        _remove_stale(address, path)
        # Hard-link, not rename: a rename would replace a socket created in the meantime.
        path.hardlink_to(bound)
        return SocketFile.at(path)
    except FileExistsError as error:
        raise ListenError(address, os.strerror(errno.EADDRINUSE)) from error
    except OSError as error:
        raise ListenError(address, _reason(error)) from error
    finally:
        bound.unlink(missing_ok=True)


def _look_up(address: str) -> list[tuple[int, tuple[object, ...]]]:
    """Family and socket address of every address that a TCP address has; a name can be listed twice in /etc/hosts."""
    host, port = _parse_tcp(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ListenError(address, error.strerror or str(error)) from error
    return list(dict.fromkeys((family, where) for family, _, _, _, where in found))


def _listen_tcp(address: str) -> list[Listener]:
    port = _parse_tcp(address)[1]
    found = _look_up(address)
    listeners: list[Listener] = []
    unavailable: OSError | None = None
    try:
        for family, where in found:
            if listeners:
                # Port 0 means the same free port at every address of the name.
                port = listeners[0].socket.getsockname()[1]
            try:
                opened = _open_tcp(family, (where[0], port, *where[2:]))
            except OSError as error:
                if error.errno not in UNAVAILABLE:
                    raise
                unavailable = error
                continue
            listeners.append(Listener(opened, f"{address.rpartition(':')[0]}:{opened.getsockname()[1]}"))
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise ListenError(address, _reason(error)) from error
    if not listeners and unavailable is not None:
        raise ListenError(address, _reason(unavailable)) from unavailable
    return listeners


def _parse_tcp(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ListenError(address, "an IPv6 address needs brackets, as in [::1]:8081")
    if not (colon and host and port.isascii() and port.isdecimal() and int(port) <= 0xFFFF):
        raise ListenError(address, "expected host:port, [IPv6]:port or unix:PATH")
    return host, int(port)


def _open_tcp(family: int, where: tuple[object, ...]) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        # So a restart need not wait for the old process's closed connections; a second listener is still
        # refused.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setblocking(False)
        opened.bind(where)
        opened.listen(BACKLOG)
    except BaseException:
        opened.close()
        raise
    return opened


def _listen_unix(address: str) -> Listener:
    path = unix_path(address)
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(address, path)
        opened.setblocking(False)
        opened.bind(str(path))
        path.chmod(SOCKET_FILE_MODE)
        opened.listen(BACKLOG)
        return Listener(opened, address, SocketFile.at(path))
    except OSError as error:
        opened.close()
        raise ListenError(address, _reason(error)) from error
    except BaseException:
        opened.close()
        raise


def _remove_stale(address: str, path: Path) -> None:
    """Remove a socket's file that nobody answers on."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(address, "the file exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # Not blocking: a live server with a full backlog says so at once.
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass
    raise ListenError(address, _reason(OSError(errno.EADDRINUSE, "")))


def _reason(error: OSError) -> str:
    if error.errno is None:
        return str(error)
    return os.strerror(error.errno)
