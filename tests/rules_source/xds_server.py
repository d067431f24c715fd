"""A small xDS server of rate limit configurations, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any

from ratelimit_sidecar.envoy_api.envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse
from ratelimit_sidecar.rules_source.resources import TYPE_URL
from ratelimit_sidecar.rules_source.v3.rls_conf_pb2 import RateLimitConfig
from ratelimit_sidecar.rules_source.xds import METHOD

HEARD_WITHIN_S = 60.0


class XdsServer:
    """It sends its resources to who subscribes, and again whenever they change; it keeps what it is told.

    Args:
        repeats_refused: what a client refuses is sent again at once, as by go-control-plane.
    """

    def __init__(self, *, repeats_refused: bool = False) -> None:
        self._repeats_refused = repeats_refused
        self.address = ""
        self.metadata: dict[str, str] = {}
        """Of the newest stream."""
        self._requests: asyncio.Queue[DiscoveryRequest] = asyncio.Queue()
        self._streams: list[asyncio.Queue[bytes | None]] = []
        self._current: bytes | None = None
        self._sent = 0

    def publish(self, version: str, *configs: RateLimitConfig, type_url: str = TYPE_URL) -> str:
        """Give these to every subscriber of now and later; returns the nonce."""
        resources = []
        for config in configs:
            resource = Any()
            resource.Pack(config)
            resources.append(resource)
        self._sent += 1
        nonce = f"nonce {self._sent}"
        response = DiscoveryResponse(version_info=version, nonce=nonce, type_url=type_url, resources=resources)
        self.publish_bytes(response.SerializeToString())
        return nonce

    def publish_bytes(self, raw: bytes) -> None:
        self._current = raw
        for stream in self._streams:
            stream.put_nowait(raw)

    def hang_up(self) -> None:
        """End every stream, without an error."""
        for stream in self._streams:
            stream.put_nowait(None)

    async def heard(self) -> DiscoveryRequest:
        """The next request of a client."""
        async with asyncio.timeout(HEARD_WITHIN_S):
            return await self._requests.get()

    async def stream(self, requests: AsyncIterator[DiscoveryRequest], context: grpc.aio.ServicerContext) -> None:
        self.metadata = dict(context.invocation_metadata() or ())
        to_send: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def hear() -> None:
            async for request in requests:
                self._requests.put_nowait(request)
                if not request.response_nonce:
                    if self._current is not None:
                        to_send.put_nowait(self._current)
                    self._streams.append(to_send)
                elif self._repeats_refused and request.HasField("error_detail"):
                    to_send.put_nowait(self._current)

        hearing = asyncio.create_task(hear())
        try:
            while (raw := await to_send.get()) is not None:
                await context.write(raw)
        finally:
            hearing.cancel()
            if to_send in self._streams:
                self._streams.remove(to_send)


@contextlib.asynccontextmanager
async def serving(
    server: XdsServer, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[None]:
    """The server listens meanwhile; port 0 takes a free one."""
    listener = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    service, method = METHOD.removeprefix("/").split("/")
    handler = grpc.stream_stream_rpc_method_handler(server.stream, request_deserializer=DiscoveryRequest.FromString)
    listener.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
    add = listener.add_insecure_port
    port = add(address) if credentials is None else listener.add_secure_port(address, credentials)
    server.address = f"{address.rpartition(':')[0]}:{port}"
    await listener.start()
    try:
        yield
    finally:
        await listener.stop(None)


def config(domain: str, *keys: str, unit: str = "MINUTE", requests_per_unit: int = 5) -> RateLimitConfig:
    """A limit of so many for each key."""
    limit = {"unit": unit, "requests_per_unit": requests_per_unit}
    return RateLimitConfig(name=domain, domain=domain, descriptors=[{"key": key, "rate_limit": limit} for key in keys])


def broken(domain: str) -> RateLimitConfig:
    """Something that cannot be used: a limit without a unit."""
    return RateLimitConfig(name=domain, domain=domain, descriptors=[{"key": "user", "rate_limit": {}}])
