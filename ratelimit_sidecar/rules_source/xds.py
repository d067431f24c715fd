"""Rules from an xDS server, over one ADS stream on grpc.aio, which is dialled again for ever.

`subscription` decides what is sent on the stream. When the server is away, or was never there, its last rules stay in
force.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from itertools import islice
from urllib.parse import urlsplit

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError
from tenacity import AsyncRetrying, retry_if_result, wait_random_exponential

from ratelimit_sidecar import __version__
from ratelimit_sidecar.config.proxies import grpc_proxy
from ratelimit_sidecar.config.reclamation import free_in_pieces, pieces_of_data
from ratelimit_sidecar.config.regular_file import read_regular_file
from ratelimit_sidecar.config.sidecar_schema import XdsConfig, XdsTlsConfig
from ratelimit_sidecar.envoy_api.envoy.config.core.v3.base_pb2 import Node
from ratelimit_sidecar.envoy_api.envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.rules_source.reloader import Reloader
from ratelimit_sidecar.rules_source.resources import TYPE_URL, Data, data_of
from ratelimit_sidecar.rules_source.subscription import Subscription
from ratelimit_sidecar.threads import in_daemon_thread

METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"

NETWORK_SECONDS = 5.0
"""The time for a TCP and a TLS handshake, and for one request to be sent."""

FIRST_REDIAL_SECONDS = 0.2
"""Waits are random up to a bound that doubles from this one to `retry_seconds` ("full jitter")."""

LASTING_SECONDS = 10.0
"""A stream that lasted this long was fine: the server is dialled again at once, and the waits start from the
beginning.
"""

MAX_RESPONSE_BYTES = 32 * 1024 * 1024
"""The largest response: several 100,000 rules. A larger one ends the stream."""

_MAX_PROBLEMS_TOLD = 50

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    # A stream may be silent for days: this notices a server that has vanished. No sooner, because servers in Go hang up
    # on clients that ask more often than every 5 minutes (keepalive.EnforcementPolicy).
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Each dial is a connection of its own: a shared one would bring its own back-off along.
    ("grpc.use_local_subchannel_pool", 1),
)

_log = structlog.stdlib.get_logger(__name__)


class XdsClient:
    """Gets rules from an xDS server while `run` runs.

    Args:
        config: the server to ask, and this node's identity.
        read: checks the resources by name; raises ConfigError if they cannot be used.
    """

    def __init__(self, config: XdsConfig, read: Callable[[Mapping[str, Data]], Rules]) -> None:
        self._config = config
        self._read = read
        node = Node(id=config.node_id, user_agent_name="ratelimit-sidecar", user_agent_version=__version__)
        node.metadata.update(config.node_metadata)
        self._subscription = Subscription(TYPE_URL, node)

    async def run(self, reloader: Reloader) -> None:
        """Put the server's rules in force, until cancelled."""
        reloader.degraded_reason = "not connected yet"
        proxy = grpc_proxy(urlsplit(f"//{self._config.server}").hostname or "", os.environ)
        if proxy is not None:
            _log.warning("through_proxy", server=self._config.server, proxy=proxy)
        redial = AsyncRetrying(
            wait=wait_random_exponential(multiplier=FIRST_REDIAL_SECONDS, max=self._config.retry_seconds),
            retry=retry_if_result(lambda lasted: not lasted),
        )
        while True:
            await redial(self._dial, reloader)

    async def _dial(self, reloader: Reloader) -> bool:
        """Dial once, and follow the stream until it is lost.

        Returns:
            True when it lasted.
        """
        loop = asyncio.get_running_loop()
        dialled_at = loop.time()
        try:
            why = await self._follow(reloader)
        except TimeoutError:
            why = f"no progress within {NETWORK_SECONDS:g} s"
        except grpc.aio.AioRpcError as error:
            why = f"{error.code().name}: {error.details()}"
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            # Writing to a stream that the other end, or the connection, has ended.
            why = str(error)
        except OSError as error:
            why = str(error)
        except Exception:
            _log.exception("xds_stream_failed", server=self._config.server)
            why = "an internal error; the log has the details"
        if why != reloader.degraded_reason:
            _log.warning("xds_disconnected", server=self._config.server, why=why)
        reloader.degraded_reason = why
        return loop.time() - dialled_at >= LASTING_SECONDS

    async def _follow(self, reloader: Reloader) -> str:
        """Follow the stream; returns why it has ended."""
        async with await self._channel() as channel:
            call = channel.stream_stream(METHOD)(metadata=tuple(self._config.headers.items()))
            async with asyncio.timeout(NETWORK_SECONDS):
                await call.wait_for_connection()
            await _write(call, self._subscription.begin())
            reloader.degraded_reason = ""
            _log.info("xds_connected", server=self._config.server, version=self._subscription.version)
            while True:
                raw = await call.read()
                if raw is grpc.aio.EOF:
                    return "the server hung up"
                try:
                    response = DiscoveryResponse.FromString(raw)
                except DecodeError:
                    return "the server sent something else than a DiscoveryResponse"
                answer = await self._answer(response, reloader)
                await asyncio.sleep(self._subscription.hold_seconds)
                await _write(call, answer)

    async def _answer(self, response: DiscoveryResponse, reloader: Reloader) -> DiscoveryRequest:
        rejected = await reloader.load(lambda: self._rules_of(response), response.version_info)
        if rejected is None:
            return self._subscription.accept(response)
        return self._subscription.reject(response, "\n".join(map(str, islice(rejected.problems, _MAX_PROBLEMS_TOLD))))

    def _rules_of(self, response: DiscoveryResponse) -> Rules:
        """The rules in a response. It runs in a thread.

        Raises:
            ConfigError: they cannot be used.
        """
        resources = data_of(response)
        try:
            return self._read(resources)
        finally:
            pieces = pieces_of_data(resources.values())
            # The frames that an exception keeps refer to `resources`.
            resources.clear()
            free_in_pieces(pieces)

    async def _channel(self) -> grpc.aio.Channel:
        tls = self._config.tls
        if tls is None:
            return grpc.aio.insecure_channel(self._config.server, options=_OPTIONS)
        credentials = await in_daemon_thread("xds credentials", lambda: _credentials(tls))
        options = (*_OPTIONS, ("grpc.ssl_target_name_override", tls.server_name)) if tls.server_name else _OPTIONS
        return grpc.aio.secure_channel(self._config.server, credentials, options=options)


async def _write(call: grpc.aio.StreamStreamCall[bytes, bytes], request: DiscoveryRequest) -> None:
    async with asyncio.timeout(NETWORK_SECONDS):
        await call.write(request.SerializeToString())


def _credentials(tls: XdsTlsConfig) -> grpc.ChannelCredentials:
    """Credentials, read at each dial, so that rotated files are used."""
    ca, key, certificate = (
        None if file is None else read_regular_file(file) for file in (tls.ca, tls.key, tls.certificate)
    )
    return grpc.ssl_channel_credentials(ca, key, certificate)
