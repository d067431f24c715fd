"""The second front end: the same handlers on grpc.aio, whose C core speaks HTTP/2 and gRPC; messages stay bytes.

It is several times slower than h2, but an implementation of gRPC that everybody knows: to compare with, and
to fall back on. Compressed requests, which h2 refuses, the C core decompresses.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing

import grpc
import grpc.aio

from ratelimit_sidecar.server.limits import DEFAULT_LIMITS, MAX_HEADER_BYTES, MAX_MESSAGE_BYTES, Limits
from ratelimit_sidecar.server.listeners import (
    SOCKET_FILE_MODE,
    UNIX_PREFIX,
    ListenError,
    listen,
    unix_path,
)
from ratelimit_sidecar.server.rpc import (
    SHUTTING_DOWN,
    Code,
    FailureLog,
    Handlers,
    RpcError,
    StreamHandler,
    Streaming,
    UnaryHandler,
)
from ratelimit_sidecar.server.tls import ServerCertificate

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}

_NAMES = ("peer_dns", "peer_uri", "peer_ip")
"""Subject alternative names of a client's certificate, as gRPC's library calls them."""

MAX_CALLS = 8_192
"""Concurrent calls in all: a queue that long is answered after Envoy's default timeout of 20 ms, so a longer one helps
nobody."""


MAX_MS = 2**31 - 1
"""The C core's integers end there, and mean never."""


class GrpcioFrontEnd:
    """A `FrontEnd` (see `server.front_end`).

    Args:
        addresses: as `server.listeners.listen` takes them.
        limits: of them those hold that the C core can keep.
        certificate: of TCP addresses; None for plain text.
    """

    def __init__(
        self,
        handlers: Handlers,
        addresses: Sequence[str],
        *,
        limits: Limits = DEFAULT_LIMITS,
        certificate: ServerCertificate | None = None,
    ) -> None:
        self.ready = asyncio.Event()
        self.addresses: Sequence[str] = []
        self._configured = addresses
        self._certificate = certificate
        self._drain_seconds = limits.drain
        self._stopping = asyncio.Event()
        self._server = grpc.aio.server(options=_options(limits), maximum_concurrent_rpcs=MAX_CALLS)
        self._server.add_generic_rpc_handlers(_generic_handlers(handlers, self._stopping, certificate))

    async def start(self) -> None:
        if self._certificate is not None:
            try:
                await asyncio.to_thread(self._certificate.load)
            except OSError as error:
                raise ListenError(", ".join(self._configured), str(error)) from error
        # The C core doesn't tell why it cannot bind, and would take a unix socket away from a live server. So
        # bind here first, for the checks and their messages, and make room again.
        for listener in listen(self._configured):
            listener.close()
        try:
            self.addresses = [self._bind(address) for address in self._configured]
            await self._server.start()
        except BaseException:
            await self._server.stop(None)
            raise
        self.ready.set()

    async def serve(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                renewing = None if self._certificate is None else tasks.create_task(self._certificate.keep_read())
                await self._server.wait_for_termination()
                if renewing is not None:
                    renewing.cancel()
        finally:
            await self.stop()

    async def stop(self) -> None:
        self.ready.clear()
        self._stopping.set()
        await self._server.stop(self._drain_seconds)

    def _bind(self, address: str) -> str:
        certificate = None if address.startswith(UNIX_PREFIX) else self._certificate
        try:
            if certificate is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, certificate.grpc_server_credentials())
        except RuntimeError as error:
            raise ListenError(address, str(error)) from error
        if not address.startswith(UNIX_PREFIX):
            return f"{address.rpartition(':')[0]}:{port}"
        # The C core removes the file itself at the stop.
        unix_path(address).chmod(SOCKET_FILE_MODE)
        return address


class _Metadata:
    """A call's metadata as headers, converted only when a handler looks; binary values are decoded already."""

    __slots__ = ("_context",)

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        self._context = context

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        for name, value in self._context.invocation_metadata() or ():
            yield name.encode("ascii"), value if isinstance(value, bytes) else value.encode("utf-8")


def _options(limits: Limits) -> list[tuple[str, int]]:
    options = [
        # Without this a later process could share the port, and neither would know.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.max_metadata_size", MAX_HEADER_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_HEADER_BYTES),
        ("grpc.max_connection_idle_ms", int(limits.idle * 1_000)),
        # While there are calls; without bounds on how often, which are there for clients.
        ("grpc.keepalive_time_ms", int(limits.ping_after * 1_000)),
        ("grpc.keepalive_timeout_ms", int(limits.ping_after * 1_000)),
        ("grpc.http2.ping_timeout_ms", int(limits.ping_after * 1_000)),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if limits.age is not None:
        options.append(("grpc.max_connection_age_ms", min(int(limits.age * 1_000), MAX_MS)))
        options.append(("grpc.max_connection_age_grace_ms", int(min(limits.age_grace * 1_000, MAX_MS))))
    return options


def _generic_handlers(
    handlers: Handlers, stopping: asyncio.Event, certificate: ServerCertificate | None
) -> list[grpc.GenericRpcHandler]:
    failures = FailureLog()
    named = certificate if certificate is not None and certificate.wants_name else None
    services: dict[str, dict[str, grpc.RpcMethodHandler]] = defaultdict(dict)
    for path, handler in handlers.items():
        service, _, method = path.removeprefix("/").partition("/")
        # No (de)serializers: the behavior is given the bytes.
        if isinstance(handler, Streaming):
            behavior = _streaming(path, handler.handler, failures, stopping, named)
            services[service][method] = grpc.stream_stream_rpc_method_handler(behavior)
        else:
            services[service][method] = grpc.unary_unary_rpc_method_handler(_unary(path, handler, failures, named))
    return [grpc.method_handlers_generic_handler(service, methods) for service, methods in services.items()]


def _unary(
    path: str, handler: UnaryHandler, failures: FailureLog, named: ServerCertificate | None
) -> Callable[[bytes, grpc.aio.ServicerContext[bytes, bytes]], Awaitable[bytes]]:
    async def call(message: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            if named is not None:
                _check_client(context, named)
            return handler(message, _Metadata(context))
        except RpcError as error:
            status = error
        except Exception as error:
            status = failures.status_of(path, error)
        await _abort(context, status)
        raise AssertionError("abort returned")

    return call


def _streaming(
    path: str, handler: StreamHandler, failures: FailureLog, stopping: asyncio.Event, named: ServerCertificate | None
) -> Callable[[AsyncIterator[bytes], grpc.aio.ServicerContext[bytes, bytes]], Awaitable[None]]:
    async def respond(
        messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> RpcError | None:
        try:
            if named is not None:
                _check_client(context, named)
            async with aclosing(handler(messages, _Metadata(context))) as responses:
                async for response in responses:
                    try:
                        await context.write(response)
                    except grpc.aio.InternalError:
                        # The client is gone.
                        return None
        except RpcError as error:
            return error
        except Exception as error:
            return failures.status_of(path, error)
        return None

    async def call(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        responding = asyncio.ensure_future(respond(messages, context))
        stop = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait((responding, stop), return_when=asyncio.FIRST_COMPLETED)
            status = responding.result() if responding.done() else SHUTTING_DOWN
        finally:
            for task in (responding, stop):
                task.cancel()
            await asyncio.gather(responding, stop, return_exceptions=True)
        if status is not None:
            await _abort(context, status)

    return call


def _check_client(context: grpc.aio.ServicerContext[bytes, bytes], certificate: ServerCertificate) -> None:
    """
    Raises:
        RpcError: a client over TCP, whose certificate is not for the name that is wanted. gRPC's library lets nobody
            look before there is a call.
    """
    shown = context.auth_context()
    # Over a unix socket there is no TLS.
    if shown.get("transport_security_type") != [b"ssl"]:
        return
    names = (name.decode("utf-8", "replace") for kind in _NAMES for name in shown.get(kind, ()))
    if not certificate.is_for_client(names):
        raise RpcError(Code.PERMISSION_DENIED, "the client's certificate is not for the name in listen.tls.client_name")


async def _abort(context: grpc.aio.ServicerContext[bytes, bytes], status: RpcError) -> None:
    # This raises; it is called outside of except blocks so that what it raises has no context to be logged with.
    await context.abort(_STATUS_CODES[status.code], status.message)
