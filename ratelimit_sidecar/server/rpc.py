"""The interface between front ends and services: messages and headers in, messages or a status out.

A unary handler is synchronous, because it answers from memory; a front end runs it on the event loop, one call at a
time. A few calls are answered later (`crdt.waiting.PendingDecision`). A method with a stream of messages on either side
is an asynchronous generator, in a task of its own. After an unexpected exception in a handler, its caller gets the
status INTERNAL, and other calls go on.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol, TypeVar

import structlog
from google.protobuf.message import DecodeError

from ratelimit_sidecar.crdt.waiting import PendingDecision
from ratelimit_sidecar.server.budget import Places
from ratelimit_sidecar.telemetry.traces import trace_fields

MAX_SMALL_BYTES: Final = 4_096
"""The largest request that has only a name, of some tens of bytes. To read 4 MiB of empty fields takes 50 ms, and an
answer may repeat the request."""

_Request = TypeVar("_Request")


class Metadata(Protocol):
    """The request's headers, names in lower case; it can be iterated more than once."""

    @property
    def may_be_sampled(self) -> bool:
        """False when no header says that the caller traces the request. Nearly all are untraced, and looking at the
        headers costs several times as much as the decision."""

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]: ...


class Headers:
    """Metadata made of a list of headers, for calls that did not come over gRPC."""

    may_be_sampled: Final = True

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self._pairs = tuple(pairs)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self._pairs)


UnaryHandler = Callable[[bytes, Metadata], bytes | PendingDecision]
"""A handler: serialized request and headers to serialized response, or one that comes later. It raises `RpcError` to
answer with a status.
"""

StreamHandler = Callable[[AsyncIterator[bytes], Metadata], AsyncGenerator[bytes, None]]
"""A handler as an asynchronous generator: serialized requests and headers to serialized responses. It raises `RpcError`
to end the call with a status. It is closed when the client cancels, and at a stop.
"""


@dataclass(frozen=True)
class StreamingMethod:
    """A method with a stream of messages in, out or both; a side with a single message is a stream of one.

    Args:
        takes_parts: True to be given messages of any size in parts, as they come. Where one ends and the next begins is
            not said: messages of protobuf can be read one after the other like one. False for whole messages of at most
            `bounds.MAX_STREAMED_BYTES`.
        places: bounds how many of its calls are open at once; None if only their memory is bounded.
    """

    handler: StreamHandler
    takes_parts: bool = False
    places: Places | None = None


Handler = UnaryHandler | StreamingMethod

Handlers = Mapping[str, Handler]
"""Handlers by path, `/package.Service/Method`."""

MAX_KINDS_LOGGED = 256
"""The most kinds of unexpected failures that are logged; further kinds are ignored."""


class Code(IntEnum):
    """The gRPC status codes that servers here answer with (grpc/doc/statuscodes.md)."""

    OK = 0
    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


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


SHUTTING_DOWN: Final = RpcError(Code.UNAVAILABLE, "the server is shutting down")
"""The status that ends streaming calls at a stop, since they might never end by themselves."""

NO_PLACE: Final = RpcError(Code.RESOURCE_EXHAUSTED, "too many calls of this method are open")
"""The status of a call for which `StreamingMethod.places` has none."""


async def first_message(messages: AsyncIterator[bytes]) -> bytes:
    """The only message of a method that takes one message and answers with many.

    Raises:
        RpcError: UNIMPLEMENTED if there is none (grpc/doc/statuscodes.md).
    """
    async for message in messages:
        return message
    raise RpcError(Code.UNIMPLEMENTED, "the call carries no message; the method takes exactly one")


def read_small(parse: Callable[[bytes], _Request], raw: bytes, name: str) -> _Request:
    """Parse a request that is short whenever it is honest.

    Args:
        name: of its message, for the caller.

    Raises:
        RpcError: INVALID_ARGUMENT if it has more than `MAX_SMALL_BYTES`, or is no such message.
    """
    if len(raw) > MAX_SMALL_BYTES:
        raise RpcError(Code.INVALID_ARGUMENT, f"a request of more than {MAX_SMALL_BYTES} bytes")
    try:
        return parse(raw)
    except DecodeError as error:
        raise RpcError(Code.INVALID_ARGUMENT, f"not a {name}") from error


class FailureLog:
    """Turns unexpected exceptions of handlers into a status, and logs each kind of them once.

    Only once, because what fails for one request fails for thousands a second. A kind is an exception's type, raised at
    one line, for one method.
    """

    def __init__(self) -> None:
        self._log = structlog.get_logger()
        self._known: set[tuple[str, type[Exception], str, int]] = set()

    def status_of(self, path: str, error: Exception, metadata: Iterable[tuple[bytes, bytes]] = ()) -> RpcError:
        """The status for the caller, who is not told what went wrong in here.

        Args:
            metadata: of the call; it may name a trace.
        """
        self.log_first(path, error, metadata)
        return RpcError(Code.INTERNAL, "internal error; the server's log has the details")

    def log_first(self, path: str, error: Exception, metadata: Iterable[tuple[bytes, bytes]]) -> None:
        """Log the exception if it is the first of its kind."""
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        file, line = (where.tb_frame.f_code.co_filename, where.tb_lineno) if where is not None else ("", 0)
        kind = (path, type(error), file, line)
        if kind in self._known or len(self._known) >= MAX_KINDS_LOGGED:
            return
        self._known.add(kind)
        self._log.error("rpc_failed", method=path, exc_info=error, **trace_fields(metadata))
