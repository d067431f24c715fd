"""What front ends and services agree on: a unary call is a message and headers in, a message or a status out.

A handler is synchronous, because it answers from memory; a front end runs it on the event loop, one call at a
time. An exception that a handler did not mean to raise costs its caller a status INTERNAL, and everybody else
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum

import structlog

Metadata = Iterable[tuple[bytes, bytes]]
"""The request's headers, names in lower case; it can be iterated more than once."""

UnaryHandler = Callable[[bytes, Metadata], bytes]
"""Serialized request and headers to serialized response; raises `RpcError` to answer with a status."""

Handlers = Mapping[str, UnaryHandler]
"""By path, `/package.Service/Method`."""

MAX_KINDS_LOGGED = 256
"""Kinds of unexpected failure that are told apart; more of them are counted as known."""


class Code(IntEnum):
    """The gRPC status codes a server here answers with (grpc/doc/statuscodes.md)."""

    OK = 0
    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13


class RpcError(Exception):
    """Ends a call with a status.

    Args:
        code: any gRPC status code but OK.
        message: for the caller; text of any kind.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class FailureLog:
    """Turns exceptions that no handler meant to raise into a status, and logs each kind of them once.

    Once, because what fails for one request fails for thousands a second. A kind is an exception's type,
    raised at one line, for one method.
    """

    def __init__(self) -> None:
        self._log = structlog.get_logger()
        self._known: set[tuple[str, type[Exception], str, int]] = set()

    def status_of(self, path: str, error: Exception) -> RpcError:
        """The status for the caller, who is not told what went wrong in here."""
        self._log_first(path, error)
        return RpcError(Code.INTERNAL, "internal error; the server's log has the details")

    def _log_first(self, path: str, error: Exception) -> None:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        file, line = (where.tb_frame.f_code.co_filename, where.tb_lineno) if where is not None else ("", 0)
        kind = (path, type(error), file, line)
        if kind in self._known or len(self._known) >= MAX_KINDS_LOGGED:
            return
        self._known.add(kind)
        self._log.error("rpc_failed", method=path, exc_info=error)
