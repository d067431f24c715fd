"""Rules from an xDS server, over one ADS stream on grpc.aio, which is dialled again for ever.

`subscription` decides what is sent on the stream. When the server is away, or was never there, its last rules stay in
force. Two mishaps of a server take nobody's limits away:

- **A resource that cannot be used.** The others of the response are put in force, and it stays as it was before. The
  response is refused nevertheless, so that the server is told (gRFC A46, "xDS NACK semantics improvement").
- **A server that has begun anew**, and says what it has piece by piece, as Envoy Gateway does Gateway by Gateway. On a
  new stream a resource that is missing stays until the server has said nothing new for `SETTLED_SECONDS`. A sidecar
  that starts then is not ready before (`XdsClient.settled`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError
from tenacity import AsyncRetrying, retry_if_result, wait_random_exponential

from ratelimit_sidecar import __version__
from ratelimit_sidecar.config.errors import ConfigError, Problem
from ratelimit_sidecar.config.proxies import grpc_proxy
from ratelimit_sidecar.config.reclamation import free_in_pieces, pieces_of_data
from ratelimit_sidecar.config.regular_file import read_regular_file
from ratelimit_sidecar.config.sidecar_schema import XdsConfig, XdsTlsConfig
from ratelimit_sidecar.envoy_api.envoy.config.core.v3.base_pb2 import Node
from ratelimit_sidecar.envoy_api.envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.rules_source.reloader import Reloader
from ratelimit_sidecar.rules_source.resources import TYPE_URL, Data, data_of, resources_of
from ratelimit_sidecar.rules_source.subscription import Subscription
from ratelimit_sidecar.rules_source.v3.rls_conf_pb2 import RateLimitConfig
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

SETTLED_SECONDS = 5.0
"""A stream on which nothing new came for so long has said all that there is. What was refused may come again and again.
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


@dataclass(frozen=True, slots=True)
class _Read:
    """What was read of a response.

    Args:
        resources: those that the rules consist of, by name.
        problems: of those that cannot be used.
        has_kept: some are of a former response, since this one lacks them.
    """

    rules: Rules
    resources: Mapping[str, RateLimitConfig]
    problems: Sequence[Problem]
    has_kept: bool


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
        self._in_force: Mapping[str, RateLimitConfig] = {}
        """The resources that the rules in force consist of, by name."""
        self._lacking: DiscoveryResponse | None = None
        """The last response, if it lacks some of these."""
        self.settled = asyncio.Event()
        """Set once a server has said all that there is."""

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
        loop = asyncio.get_running_loop()
        async with await self._channel() as channel:
            call = channel.stream_stream(METHOD)(metadata=tuple(self._config.headers.items()))
            async with asyncio.timeout(NETWORK_SECONDS):
                await call.wait_for_connection()
            await _write(call, self._subscription.begin())
            reloader.degraded_reason = ""
            _log.info("xds_connected", server=self._config.server, version=self._subscription.version)
            reading: asyncio.Future[Any] | None = None
            response: DiscoveryResponse | None = None
            is_settling, keeps_missing = True, bool(self._in_force)
            settled_at, version = 0.0, None
            self._lacking = None
            try:
                while True:
                    reading = reading or asyncio.ensure_future(call.read())
                    if is_settling and response is not None:
                        await asyncio.wait([reading], timeout=max(0, settled_at - loop.time()))
                        is_settling = reading.done() and loop.time() < settled_at
                        if not is_settling:
                            if self._lacking is not None:
                                await self._load(self._lacking, reloader, keeps_missing=False)
                            self.settled.set()
                    raw, reading = await reading, None
                    if raw is grpc.aio.EOF:
                        return "the server hung up"
                    try:
                        response = DiscoveryResponse.FromString(raw)
                    except DecodeError:
                        return "the server sent something else than a DiscoveryResponse"
                    if response.version_info != version:
                        settled_at, version = loop.time() + SETTLED_SECONDS, response.version_info
                    await self._load(response, reloader, keeps_missing=is_settling and keeps_missing)
                    answer = self._answer(response, reloader)
                    await asyncio.sleep(self._subscription.hold_seconds)
                    await _write(call, answer)
            finally:
                if reading is not None:
                    reading.cancel()

    async def _load(self, response: DiscoveryResponse, reloader: Reloader, *, keeps_missing: bool) -> None:
        """Put a response's rules in force.

        Args:
            keeps_missing: also resources in force that it lacks.
        """
        found: list[_Read] = []

        def read() -> Rules:
            found.append(self._read_response(response, keeps_missing=keeps_missing))
            return found[0].rules

        rejected = await reloader.load(read, response.version_info)
        if rejected is not None:
            return
        self._in_force = found[0].resources
        self._lacking = response if found[0].has_kept else None
        if found[0].problems:
            in_force = "all other resources, and these as they were before"
            reloader.note_rejection(response.version_info, found[0].problems, in_force)

    def _answer(self, response: DiscoveryResponse, reloader: Reloader) -> DiscoveryRequest:
        if reloader.rejected is None:
            return self._subscription.accept(response)
        problems = islice(reloader.rejected.problems, _MAX_PROBLEMS_TOLD)
        return self._subscription.reject(response, "\n".join(map(str, problems)))

    def _read_response(self, response: DiscoveryResponse, *, keeps_missing: bool) -> _Read:
        """Read a response, and in place of resources that cannot be used those in force. It runs in a thread.

        Raises:
            ConfigError: nothing of it can be used.
        """
        received = resources_of(response)
        missing = self._in_force.keys() - received.keys() if keeps_missing else set()
        kept = {name: self._in_force[name] for name in missing}
        # What is kept may contradict what is new: the same rules have another name.
        domains = {each.domain for each in received.values()}
        of_others = {name: each for name, each in kept.items() if each.domain not in domains}
        if kept:
            with suppress(ConfigError):
                return self._read_resources(received, kept)
        if of_others and len(of_others) < len(kept):
            with suppress(ConfigError):
                return self._read_resources(received, of_others)
        return self._read_resources(received, {})

    def _read_resources(self, received: Mapping[str, RateLimitConfig], kept: Mapping[str, RateLimitConfig]) -> _Read:
        """Read these together, and in place of those that cannot be used those in force.

        Raises:
            ConfigError: they cannot be used.
        """
        resources = {**received, **kept}
        try:
            return _Read(self._rules_of(resources), resources, (), bool(kept))
        except ConfigError as error:
            bad = {problem.file for problem in error.problems}
            usable = {name: self._in_force.get(name) if name in bad else each for name, each in resources.items()}
            resources = {name: each for name, each in usable.items() if each is not None}
            if bad <= usable.keys() and resources:
                with suppress(ConfigError):
                    return _Read(self._rules_of(resources), resources, error.problems, bool(kept))
            raise

    def _rules_of(self, resources: Mapping[str, RateLimitConfig]) -> Rules:
        """The rules of these resources.

        Raises:
            ConfigError: they cannot be used.
        """
        data = data_of(resources)
        try:
            return self._read(data)
        finally:
            pieces = pieces_of_data(data.values())
            # The frames that an exception keeps refer to `data`.
            data.clear()
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
