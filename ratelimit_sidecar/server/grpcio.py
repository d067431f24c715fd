"""The second front end: the same handlers on grpc.aio, whose C core does HTTP/2 and gRPC; messages stay bytes.

It is several times slower than the default front end (`grpc_front_end.py`), but well known: to compare with, and to
fall back on. Unlike the default, it accepts compressed requests.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing

import grpc
import grpc.aio

from ratelimit_sidecar.crdt.waiting import PendingDecision
from ratelimit_sidecar.server.bounds import DEFAULT_BOUNDS, MAX_HEADER_BYTES, MAX_MESSAGE_BYTES, ServerBounds
from ratelimit_sidecar.server.budget import Budget
from ratelimit_sidecar.server.deferred import answer_of
from ratelimit_sidecar.server.grpc_connection import CALL_BYTES
from ratelimit_sidecar.server.listeners import (
    UNAVAILABLE,
    UNIX_PREFIX,
    ListenError,
    SocketFile,
    listen,
    load_certificate,
    numeric_addresses,
    publish_socket_file,
    unix_path,
)
from ratelimit_sidecar.server.rpc import (
    NO_PLACE,
    SHUTTING_DOWN,
    Code,
    FailureLog,
    Handlers,
    RpcError,
    StreamingMethod,
    UnaryHandler,
)
from ratelimit_sidecar.server.tls import ServerCertificate
from ratelimit_sidecar.supervision import Supervisor

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}

_NAMES = ("peer_dns", "peer_uri", "peer_ip")
"""Subject alternative names of a client's certificate, as gRPC's library calls them."""

MAX_CALLS = 8_192
"""The most concurrent calls. A longer queue helps nobody: Envoy's default timeout of 20 ms would be over before its
end.
"""

FAILED_CHECK_SECONDS = 0.1
"""How often it is checked whether the server still takes calls."""

LISTENER = "grpc_listener"
"""The task's name in metrics and `/readyz`."""

MAX_MS = 2**31 - 1
"""The largest integer of the C core, which stands for never."""


class GrpcioFrontEnd:
    """A `FrontEnd` on grpc.aio (see `server.front_end`).

    Theory of operation. The library's accept loop ends with an exception when a client sends a path that is not UTF-8,
    and there is no hook to refuse such a call. So whenever that happens, a new server is made on the same addresses.
    The calls in flight are lost.

    Args:
        addresses: as `server.listeners.listen` takes them.
        bounds: only those that the C core can keep apply.
        certificate: for TCP addresses; None for plain text.
        supervisor: makes the new server, and counts that.
    """

    def __init__(
        self,
        handlers: Handlers,
        addresses: Sequence[str],
        *,
        bounds: ServerBounds = DEFAULT_BOUNDS,
        certificate: ServerCertificate | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        self.ready = asyncio.Event()
        self.addresses: Sequence[str] = []
        self._configured = addresses
        self._certificate = certificate
        self._supervisor = Supervisor() if supervisor is None else supervisor
        self._drain_seconds = bounds.drain
        self._options = _options(bounds)
        self._stopping = asyncio.Event()
        self._handlers = _generic_handlers(handlers, self._stopping, certificate, Budget(bounds.held_bytes))
        self._server: grpc.aio.Server | None = None
        self._files: list[SocketFile] = []

    async def start(self) -> None:
        if self._certificate is not None:
            await load_certificate(self._certificate, self._configured)
        self.addresses = await self._listen(self._configured)

    async def serve(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                renewing = None if self._certificate is None else tasks.create_task(self._certificate.keep_read())
                await self._supervisor.keep(LISTENER, self._serve)
                if renewing is not None:
                    renewing.cancel()
        finally:
            await self.stop()

    async def stop(self) -> None:
        self.ready.clear()
        self._stopping.set()
        await self._close()

    async def _serve(self) -> None:
        """Answer until `stop`, or raise the exception that has ended the library's loop."""
        if self._server is None and not self._stopping.is_set():
            # With the ports that were chosen.
            await self._listen(list(dict.fromkeys(self.addresses)))
        server = self._server
        if server is None:
            return
        try:
            # Only with a timeout does it raise the failure while calls are open.
            while await server.wait_for_termination(FAILED_CHECK_SECONDS):
                pass
        except Exception:
            self.ready.clear()
            await self._close()
            raise

    async def _listen(self, addresses: Sequence[str]) -> list[str]:
        """Listen; returns the addresses, with their ports."""
        self._server = server = grpc.aio.server(options=self._options, maximum_concurrent_rpcs=MAX_CALLS)
        server.add_generic_rpc_handlers(self._handlers)
        try:
            bound = [each for address in addresses for each in self._bind(server, address)]
            await server.start()
        except BaseException:
            await self._close()
            raise
        self.ready.set()
        return bound

    async def _close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(self._drain_seconds if self._stopping.is_set() else None)
        while self._files:
            self._files.pop().remove()

    def _bind(self, server: grpc.aio.Server, address: str) -> list[str]:
        """Bind one address. Returns it with the chosen port, once for each IP address that it has."""
        if address.startswith(UNIX_PREFIX):
            # The C core takes a socket's file away from a live server, so it is given a new one.
            path = unix_path(address)
            bound = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                server.add_insecure_port(f"{UNIX_PREFIX}{bound}")
            except RuntimeError as error:
                why = _why_not(address, error)
                raise ListenError(address, why.strerror or str(why)) from error
            self._files.append(publish_socket_file(address, bound))
            return [address]
        name, _, port = address.rpartition(":")
        bound_at: list[str] = []
        unavailable: ListenError | None = None
        for numeric in numeric_addresses(address):
            # Port 0 means the same free port at every address of a name.
            where = f"{numeric.rpartition(':')[0]}:{port}"
            try:
                port = str(self._add_port(server, where))
            except RuntimeError as error:
                why = _why_not(where, error)
                unavailable = ListenError(address, why.strerror or str(why))
                if why.errno not in UNAVAILABLE:
                    raise unavailable from error
            else:
                bound_at.append(f"{name}:{port}")
        if unavailable is not None and not bound_at:
            raise unavailable
        return bound_at

    def _add_port(self, server: grpc.aio.Server, where: str) -> int:
        port: int
        if self._certificate is None:
            port = server.add_insecure_port(where)
        else:
            port = server.add_secure_port(where, self._certificate.grpc_server_credentials())
        return port


def _why_not(address: str, refused: RuntimeError) -> OSError:
    """Find out why the C core cannot listen on an address, since its exception does not say it."""
    try:
        for listener in listen([address]):
            listener.close()
    except ListenError as error:
        if isinstance(error.__cause__, OSError):
            return error.__cause__
        return OSError(error.reason)
    return OSError(str(refused))


class _Metadata:
    """A call's metadata as headers, converted only when a handler reads them; binary values are decoded already."""

    __slots__ = ("_context",)

    may_be_sampled = True

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        self._context = context

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        remaining_s = self._context.time_remaining()
        if remaining_s is not None:
            # The library removes this header from the metadata.
            yield b"grpc-timeout", b"%dm" % max(0, remaining_s * 1_000)
        for name, value in self._context.invocation_metadata() or ():
            yield name.encode("ascii"), value if isinstance(value, bytes) else value.encode("utf-8")


def _options(bounds: ServerBounds) -> list[tuple[str, int]]:
    options = [
        # Without this a later process could share the port, and neither would know.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_allowed_incoming_connections", bounds.connections),
        ("grpc.server_handshake_timeout_ms", int(bounds.handshake * 1_000)),
        ("grpc.max_concurrent_streams", bounds.streams),
        ("grpc.max_metadata_size", MAX_HEADER_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_HEADER_BYTES),
        ("grpc.max_connection_idle_ms", int(bounds.idle * 1_000)),
        # While there are calls; without bounds on how often, which are there for clients.
        ("grpc.keepalive_time_ms", int(bounds.ping_after * 1_000)),
        ("grpc.keepalive_timeout_ms", int(bounds.ping_after * 1_000)),
        ("grpc.http2.ping_timeout_ms", int(bounds.ping_after * 1_000)),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if bounds.age is not None:
        options.append(("grpc.max_connection_age_ms", min(int(bounds.age * 1_000), MAX_MS)))
        options.append(("grpc.max_connection_age_grace_ms", int(min(bounds.age_grace * 1_000, MAX_MS))))
    return options


def _generic_handlers(
    handlers: Handlers, stopping: asyncio.Event, certificate: ServerCertificate | None, budget: Budget
) -> list[grpc.GenericRpcHandler]:
    failures = FailureLog()
    named = certificate if certificate is not None and certificate.wants_name else None
    services: dict[str, dict[str, grpc.RpcMethodHandler]] = defaultdict(dict)
    for path, handler in handlers.items():
        service, _, method = path.removeprefix("/").partition("/")
        # No (de)serializers: the behavior is given the bytes.
        if isinstance(handler, StreamingMethod):
            behavior = _streaming(path, handler, failures, stopping, named)
            services[service][method] = grpc.stream_stream_rpc_method_handler(behavior)
        else:
            services[service][method] = grpc.unary_unary_rpc_method_handler(
                _unary(path, handler, failures, named, budget)
            )
    return [grpc.method_handlers_generic_handler(service, methods) for service, methods in services.items()]


def _unary(
    path: str, handler: UnaryHandler, failures: FailureLog, named: ServerCertificate | None, budget: Budget
) -> Callable[[bytes, grpc.aio.ServicerContext[bytes, bytes]], Awaitable[bytes]]:
    async def call(message: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            if named is not None:
                _check_client(context, named)
            response = handler(message, _Metadata(context))
            return (
                await _late(response, message, context, budget) if isinstance(response, PendingDecision) else response
            )
        except RpcError as error:
            status = error
        except Exception as error:
            status = failures.status_of(path, error, _Metadata(context))
        await _abort(context, status)
        raise AssertionError("abort returned")

    return call


def _streaming(
    path: str, method: StreamingMethod, failures: FailureLog, stopping: asyncio.Event, named: ServerCertificate | None
) -> Callable[[AsyncIterator[bytes], grpc.aio.ServicerContext[bytes, bytes]], Awaitable[None]]:
    async def respond(
        messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes], stop: asyncio.Task[bool]
    ) -> RpcError | None:
        try:
            if named is not None:
                _check_client(context, named)
            async with aclosing(method.handler(messages, _Metadata(context))) as responses:
                while (response := await _next_response(responses, stop)) is not None:
                    # Never cancelled: the library would then send the headers again with the status, which fails, and
                    # the call would stay.
                    try:
                        await context.write(response)
                    except grpc.aio.InternalError:
                        # The client is gone.
                        return None
        except RpcError as error:
            return error
        except Exception as error:
            return failures.status_of(path, error, _Metadata(context))
        return SHUTTING_DOWN if stop.done() else None

    async def call(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        # Over unix sockets the library does not distinguish connections: all together have the part of one.
        connection = context.peer()
        address, _, _ = connection.rpartition(":")
        places = method.places
        if places is not None and not places.enter(connection, address):
            await _abort(context, NO_PLACE)
        stop = asyncio.ensure_future(stopping.wait())
        try:
            status = await respond(messages, context, stop)
        finally:
            stop.cancel()
            if places is not None:
                places.leave(connection, address)
        if status is not None:
            await _abort(context, status)

    return call


async def _late(
    waiting: PendingDecision, message: bytes, context: grpc.aio.ServicerContext[bytes, bytes], budget: Budget
) -> bytes:
    """An answer that comes later; at once if those that wait hold too much memory."""
    held = CALL_BYTES + len(message) + sum(len(name) + len(value) for name, value in _Metadata(context))
    if not budget.allows(budget.held + held, held):
        waiting.end_now()
        return waiting.result()
    budget.count(held)
    try:
        return await answer_of(waiting)
    finally:
        budget.count(-held)


async def _next_response(responses: AsyncGenerator[bytes, None], stop: asyncio.Task[bool]) -> bytes | None:
    """The next response, until a stop. One that is ready at the stop is still returned.

    Returns:
        None at the end, or at a stop.
    """
    response = asyncio.ensure_future(anext(responses, None))
    try:
        await asyncio.wait((response, stop), return_when=asyncio.FIRST_COMPLETED)
        return response.result() if response.done() else None
    finally:
        response.cancel()
        await asyncio.gather(response, return_exceptions=True)


def _check_client(context: grpc.aio.ServicerContext[bytes, bytes], certificate: ServerCertificate) -> None:
    """Check the name in a client's certificate. gRPC's library allows that only once there is a call.

    Raises:
        RpcError: the certificate is not for the configured name.
    """
    shown = context.auth_context()
    # Over a unix socket there is no TLS.
    if shown.get("transport_security_type") != [b"ssl"]:
        return
    names = (name.decode("utf-8", "replace") for kind in _NAMES for name in shown.get(kind, ()))
    if not certificate.may_call(names):
        raise RpcError(Code.PERMISSION_DENIED, "the client's certificate is not for the name in listen.tls.client_name")


async def _abort(context: grpc.aio.ServicerContext[bytes, bytes], status: RpcError) -> None:
    # This raises; it is called outside of except blocks so that what it raises has no context to be logged with.
    await context.abort(_STATUS_CODES[status.code], status.message)
