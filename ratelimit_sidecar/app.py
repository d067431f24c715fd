"""The composition root: the only place that knows every part, and the one owner that opens and closes them.

The order of opening is console, mesh, front end, so that probes see a starting sidecar, and requests come last. Envoy
is answered at once, with the state known so far. The sidecar is ready once the peers that can be reached have sent
their state. While an xDS server has not sent the first rules, mesh and readiness wait for them, and calls are refused
if so configured. At a stop the order is reversed: no new requests, answers to those in flight, then the last takes are
sent to the peers, then the spans are flushed.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from enum import Enum
from functools import partial
from math import inf
from typing import TYPE_CHECKING

import structlog
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from ratelimit_sidecar import __version__
from ratelimit_sidecar import limiter as limiter_package
from ratelimit_sidecar.clock import FAR_US, Clock
from ratelimit_sidecar.config.rules_file import load_rules, rules_of_resources
from ratelimit_sidecar.config.sidecar import SidecarConfig
from ratelimit_sidecar.config.sidecar_schema import FabricConfig, ListenConfig, PersistenceConfig
from ratelimit_sidecar.console import app as console
from ratelimit_sidecar.console.bounds import DEFAULT_BOUNDS as HTTP_BOUNDS
from ratelimit_sidecar.console.proxies import MAX_CONNECTIONS as MAX_PROXY_CONNECTIONS
from ratelimit_sidecar.console.proxies import MAX_UNREAD_BYTES, ProxyPlaces
from ratelimit_sidecar.console.server import HttpServer
from ratelimit_sidecar.crdt.bucket import SET_BACK_US, Origin
from ratelimit_sidecar.crdt.granted import GrantLedger
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import AnyLimit
from ratelimit_sidecar.crdt.shares import Shares
from ratelimit_sidecar.crdt.store import LimitOfKey, Store
from ratelimit_sidecar.limiter.fullest import FullestBuckets
from ratelimit_sidecar.limiter.key import rule_key
from ratelimit_sidecar.limiter.limiter import Limiter, Retired
from ratelimit_sidecar.limiter.plan_cache import MAX_PLANS_BYTES
from ratelimit_sidecar.limiter.quota import (
    BUCKET_BYTES,
    GROUP_BYTES,
    MAX_ENVOY_BUCKETS,
    MAX_PEER_GROUPS,
    MAX_POOLS,
    Quotas,
)
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.memory_limit import (
    CALLS_SHARE,
    bytes_a_bucket,
    fewer_in_little_memory,
    less_in_little_memory,
    max_buckets,
    max_received_bytes,
    memory_limit_bytes,
    memory_to_fill,
    sliding_places,
)
from ratelimit_sidecar.mesh_status import MembershipStatus, PeerStatus
from ratelimit_sidecar.persistence.purse_file import PurseFile
from ratelimit_sidecar.persistence.snapshot_file import SnapshotFile
from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS as MESH_BOUNDS
from ratelimit_sidecar.replication.bounds import MeshBounds
from ratelimit_sidecar.replication.demands import QuotaDemands
from ratelimit_sidecar.replication.mesh import Mesh
from ratelimit_sidecar.replication.payments import PaymentExchange
from ratelimit_sidecar.replication.stream_io import MAX_RECEIVED_BYTES
from ratelimit_sidecar.replication.tls import NodeCertificate
from ratelimit_sidecar.rules_source.files import RulesFiles
from ratelimit_sidecar.rules_source.reloader import Reloader
from ratelimit_sidecar.rules_source.xds import XdsClient
from ratelimit_sidecar.server.bounds import DEFAULT_BOUNDS, ServerBounds
from ratelimit_sidecar.server.deferred import HttpWaits
from ratelimit_sidecar.server.file_limit import FileLimits, raise_file_limit
from ratelimit_sidecar.server.front_end import FrontEnd
from ratelimit_sidecar.server.grpc_front_end import GrpcFrontEnd
from ratelimit_sidecar.server.grpcio import GrpcioFrontEnd
from ratelimit_sidecar.server.listeners import ListenError
from ratelimit_sidecar.server.rpc import Handlers
from ratelimit_sidecar.server.tls import ServerCertificate
from ratelimit_sidecar.server.turns import Turns
from ratelimit_sidecar.services.ext_authz import SERVICE_NAME as EXT_AUTHZ_SERVICE_NAME
from ratelimit_sidecar.services.ext_authz import ExtAuthzService
from ratelimit_sidecar.services.ext_authz_http import ext_authz_app
from ratelimit_sidecar.services.health import RATELIMIT_NAME, HealthService
from ratelimit_sidecar.services.health import SERVICE_NAME as HEALTH_SERVICE_NAME
from ratelimit_sidecar.services.quota import MAX_STREAMS, STREAM_BYTES, QuotaService
from ratelimit_sidecar.services.quota import SERVICE_NAME as QUOTA_SERVICE_NAME
from ratelimit_sidecar.services.ratelimit import SERVICE_NAME, RateLimitService
from ratelimit_sidecar.services.reflection import ReflectionService
from ratelimit_sidecar.services.waits import Waits
from ratelimit_sidecar.supervision import Supervisor
from ratelimit_sidecar.telemetry.export import start_tracing
from ratelimit_sidecar.telemetry.latency import LatencyHistogram
from ratelimit_sidecar.telemetry.log_writer import LogWriter
from ratelimit_sidecar.telemetry.metric_registry import create_registry
from ratelimit_sidecar.telemetry.metric_sources import MetricSources
from ratelimit_sidecar.telemetry.push import start_push
from ratelimit_sidecar.telemetry.stalls import StallMonitor
from ratelimit_sidecar.telemetry.traces import NoTracer, RequestTracer
from ratelimit_sidecar.upkeep import look_for_fullest, sweep

if TYPE_CHECKING:
    from ratelimit_sidecar.fabric.fabric import Fabric
    from ratelimit_sidecar.persistence.redis_store import RedisState

SNAPSHOT_SECONDS = 10.0
REDIS_SECONDS = 1.0
"""The interval of snapshots, and of writing to Redis, unless configured."""

RESTORE_SECONDS = 2.0
"""How long Envoy's first requests wait for the snapshot to be read. A large one is read on while requests are
answered.
"""

ALL_RULES_SECONDS = 30.0
"""How long an xDS server may go on to say what it has before the sidecar is ready."""

JOIN_SECONDS = 10.0
MAX_JOIN_SECONDS = 120.0
"""How long reachable peers may take to begin to send their state, and to send all of it, before the sidecar says it is
ready. A million buckets take half a minute.
"""

FAILED_DIALS = 3
"""So many in a row that the peer has answered, and the sidecar says that it shares nothing with it."""

STOP_SECONDS = 20.0
"""The longest stop: front end, mesh and console take 5, 3 and 3 s at most, traces 5. Then the process ends, even if
something hangs.
"""

SNAPSHOT_BUCKET_SECONDS = 0.000_1
"""The longest time of a bucket in the last snapshot, besides `STOP_SECONDS`: it takes 12 to 21 us of a core, of which a
container may have a fifth. A million have 100 s; `terminationGracePeriodSeconds` has to leave as much.
"""

SLEW_SECONDS = 1.0

GC_THRESHOLDS = (1_000, 1, 2**31 - 1)
"""The oldest generation is practically never collected, though invented keys of strict limits have the young ones
collected hundreds of times a second: with 100,000 buckets that stops the loop for over 100 ms, and Envoy lets requests
pass without an answer after 20 ms. Buckets and plans are in no cycle, so reference counts free them. The middle
generation is collected with at most 3,000 objects: with 70,000 it took 4 to 12 ms, at 10,000 new buckets a second.
"""

SWITCH_SECONDS = 0.000_2
"""How long another thread may keep Python's lock while the loop wants it, which it does several times to get through a
request. While one reads 20,000 rules and 2,000 requests come a second, the p99 of a few seconds is 12.7 ms with
Python's 5 ms, 3.6 with 0.5 ms and 3.3 with this, and the p99.9 is 15.9, 8.2 and 6.6 ms; the reading takes 1.9, 2.1 and
2.4 s (`benchmarks/reload.py`).
"""

_log = structlog.stdlib.get_logger(__name__)


class FrontEndKind(Enum):
    """The front end that carries Envoy's calls."""

    H2 = "h2"
    GRPCIO = "grpcio"


class Sidecar:
    """One sidecar process: make it from a configuration, then `run` it once.

    Args:
        log: the writer of its log.

    Raises:
        ConfigError: the rules are broken.
        TracingError: an OTEL_* variable is not valid.
    """

    _gateway: Mesh | None = None
    """The mesh of the region, made for each term as its gateway."""

    def __init__(self, config: SidecarConfig, front_end: FrontEndKind, log: LogWriter) -> None:
        self._config = config
        self._log = log
        self._source, rules, source_name = _rules_source(config)
        self.clock = Clock()
        self._stop = asyncio.Event()
        self._last: threading.Timer | None = None
        """Ends the process when a stop takes too long."""
        self._has_all_rules = self._joined = False
        self._restoring: asyncio.Task[None] | None = None
        self._supervisor = Supervisor()
        self._stalls = StallMonitor()
        self._latency = LatencyHistogram()
        file_limits = _raise_file_limit(config.listen)
        self._memory_bytes = memory_limit_bytes()
        to_fill_bytes = memory_to_fill(self._memory_bytes)
        mesh_bounds = replace(
            MESH_BOUNDS,
            connections=file_limits.mesh,
            streams=fewer_in_little_memory(MESH_BOUNDS.streams, MAX_RECEIVED_BYTES, to_fill_bytes),
            key_id_bytes=less_in_little_memory(MESH_BOUNDS.key_id_bytes, to_fill_bytes),
        )
        self._tracing = start_tracing(config.node.id, config.node.region)
        self.limiter = _make_limiter(config, rules, self.clock.now_us(), to_fill_bytes)
        self._fullest = FullestBuckets(self.limiter.store)
        self.reloader = Reloader(
            self._use_rules, self.clock.now_us, source_name, loaded=rules if config.xds is None else None
        )
        waits_for_rules = config.xds is not None and config.xds.before_rules == "error"
        quotas = Quotas(
            self.limiter,
            self._strict_us(),
            self.clock.now_us,
            max_pools=fewer_in_little_memory(MAX_POOLS, BUCKET_BYTES, to_fill_bytes),
            max_envoy_buckets=fewer_in_little_memory(MAX_ENVOY_BUCKETS, BUCKET_BYTES, to_fill_bytes),
            max_peer_groups=fewer_in_little_memory(MAX_PEER_GROUPS, GROUP_BYTES, to_fill_bytes),
        )
        self._turns = Turns()
        self._quotas = QuotaService(
            quotas,
            self._strict_us,
            waits_for_rules=waits_for_rules,
            turns=self._turns,
            max_streams=fewer_in_little_memory(MAX_STREAMS, STREAM_BYTES, to_fill_bytes),
        )
        self._mesh = self._make_mesh(mesh_bounds)
        self._mesh.use_rules(rules.digest)
        self._snapshots, self._redis = _make_persistence(
            config.persistence,
            self.limiter.store,
            self.clock.now_us,
            self._local_limit_of_key,
            self._tracing.tracer,
        )
        if self._redis is not None:
            self._mesh.subscribe_changes(self._redis.note)
        self._purses: PurseFile | None = None
        if config.persistence is not None and config.persistence.file is not None:
            self._purses = PurseFile(config.persistence.file, self.limiter.ledger)
        self._fabric = None if config.fabric is None else self._make_fabric(config.fabric, mesh_bounds)
        self._service = self._make_service(waits_for_rules=waits_for_rules)
        ext_authz = ExtAuthzService(self._service, lambda: self.limiter.rules)
        self._health, handlers = self._make_handlers(ext_authz)
        certificate = None if config.listen.tls is None else ServerCertificate(config.listen.tls)
        self._h2: GrpcFrontEnd | None = None
        self._front_end = self._make_front_end(
            front_end, handlers, _front_end_bounds(config.listen, file_limits, self._memory_bytes), certificate
        )
        proxies: ProxyPlaces | None = None
        if config.listen.ext_authz_http is not None:
            unread_bytes = less_in_little_memory(MAX_UNREAD_BYTES, to_fill_bytes)
            proxies = ProxyPlaces(file_limits.proxies, self._turns, unread_bytes)
        registry = self._make_registry(ext_authz, certificate, proxies)
        self._push = start_push(config.node.id, config.node.region, registry)
        self._console = HttpServer(self._make_console_app(registry), config.listen.admin)
        self._ext_authz: HttpServer | None = None
        if config.listen.ext_authz_http is not None:
            self._ext_authz = HttpServer(
                ext_authz_app(ext_authz, HttpWaits(HTTP_BOUNDS.requests // 2)),
                config.listen.ext_authz_http,
                bounds=replace(HTTP_BOUNDS, idle=round(DEFAULT_BOUNDS.idle)),
                proxies=proxies,
            )

    def _make_service(self, *, waits_for_rules: bool) -> RateLimitService:
        return RateLimitService(
            self.limiter,
            self.clock.now_us,
            self._latency,
            self._tracing.tracer,
            waits_for_rules=waits_for_rules,
            waits=None if self.limiter.ledger is None else Waits(self.limiter.ledger.queues, self._strict_us),
        )

    def _make_handlers(self, ext_authz: ExtAuthzService) -> tuple[HealthService, Handlers]:
        """The handlers of all gRPC services, with the service that says whether they answer."""
        services = [SERVICE_NAME, EXT_AUTHZ_SERVICE_NAME]
        quotas: Handlers = {}
        if self._config.fabric is None:
            # On a fabric nobody knows all demands: each sidecar would hand out the whole of a limit.
            services.append(QUOTA_SERVICE_NAME)
            quotas = self._quotas.handlers()
        health = HealthService(lambda: not self.missing(), [*services, RATELIMIT_NAME], self._turns)
        return health, {
            **self._service.handlers(),
            **quotas,
            **ext_authz.handlers(),
            **health.handlers(),
            **ReflectionService([*services, HEALTH_SERVICE_NAME]).handlers(),
        }

    def _make_mesh(self, bounds: MeshBounds) -> Mesh:
        config, ledger = self._config, self.limiter.ledger
        # On a fabric the gateway alone has streams, of a mesh of its own.
        has_streams = config.fabric is None
        return Mesh(
            origin=self.limiter.store.origin,
            region=config.node.region,
            version=__version__,
            store=self.limiter.store,
            now_us=self.clock.now_us,
            strict_us=self._strict_us,
            peers=config.sync.peers if has_streams else (),
            listen=config.listen.sync if has_streams else None,
            certificate=None if config.sync.tls is None else NodeCertificate(config.sync.tls),
            tracer=self._tracing.tracer,
            payments=PaymentExchange(ledger, self._strict_us) if ledger is not None and has_streams else None,
            demands=QuotaDemands(self._quotas.quotas, self._strict_us),
            supervisor=self._supervisor,
            bounds=bounds,
        )

    def _make_fabric(self, config: FabricConfig, bounds: MeshBounds) -> Fabric:
        # Imported only when configured.
        from ratelimit_sidecar.fabric.fabric import Fabric  # noqa: PLC0415
        from ratelimit_sidecar.fabric.scripts import FabricKeys  # noqa: PLC0415
        from ratelimit_sidecar.persistence.redis_client import Connector, shard_tags  # noqa: PLC0415

        fabric = Fabric(
            Connector(config),
            FabricKeys(config.prefix, shard_tags()) if config.cluster else FabricKeys(config.prefix),
            self.limiter.store,
            self.clock.now_us,
            region=self._config.node.region,
            mesh_of=partial(self._make_gateway, bounds=bounds),
            ledger=self.limiter.ledger if isinstance(self.limiter.ledger, GrantLedger) else None,
            strict_us=self._strict_us,
        )
        self._mesh.subscribe_changes(fabric.note)
        return fabric

    def _make_gateway(self, store: Store, payments: PaymentExchange | None, bounds: MeshBounds) -> Mesh:
        sync = self._config.sync
        self._gateway = mesh = Mesh(
            origin=store.origin,
            region=self._config.node.region,
            version=__version__,
            store=store,
            now_us=self.clock.now_us,
            strict_us=self._strict_us,
            peers=sync.peers,
            listen=self._config.listen.sync,
            certificate=None if sync.tls is None else NodeCertificate(sync.tls),
            payments=payments,
            is_gateway=True,
            supervisor=self._supervisor,
            bounds=bounds,
        )
        mesh.use_rules(self.limiter.rules.digest)
        return mesh

    def _peers(self) -> list[PeerStatus]:
        return (self._gateway or self._mesh).status()

    def _membership_status(self) -> MembershipStatus | None:
        if self._fabric is None:
            return self._mesh.membership_status()
        # The membership is the region's; only the gateway knows its status.
        if self._gateway is None or not self._fabric.status.token:
            return None
        return self._gateway.membership_status()

    def _make_registry(
        self, ext_authz: ExtAuthzService, certificate: ServerCertificate | None, proxies: ProxyPlaces | None
    ) -> CollectorRegistry:
        drawing = None if self._fabric is None else self._fabric.drawing
        return create_registry(
            MetricSources(
                node=self._config.node.id,
                region=self._config.node.region,
                limiter=self.limiter,
                latency=self._latency,
                peers=self._peers,
                request_errors=self._service.errors,
                ext_authz_unlimited=ext_authz.unlimited,
                proxies=proxies,
                replication=self._mesh,
                rules=self.reloader,
                membership=self._membership_status,
                loop=self._stalls,
                clock=self.clock,
                front_end=self._h2,
                listener_certificate=certificate,
                state=None if self._snapshots is None else self._snapshots.status,
                redis=None if self._redis is None else self._redis.status,
                fabric=None if self._fabric is None else self._fabric.status,
                drawing=None if drawing is None else drawing.status,
                supervision=self._supervisor,
                log=self._log,
                fullest=self._fullest,
                spans=self._tracing.counts,
                quotas=self._quotas.quotas,
                quota_places=self._quotas.places,
                waits=None if self.limiter.ledger is None else self.limiter.ledger.queues,
            )
        )

    def _make_console_app(self, registry: CollectorRegistry) -> ASGIApp:
        listen = self._config.listen
        return console.create_app(
            console.ConsoleSources(
                node=self._config.node.id,
                region=self._config.node.region,
                limiter=self.limiter,
                registry=registry,
                peers=self._peers,
                membership=self._membership_status,
                missing=self.missing,
                degraded=self.degraded,
                now_us=self.clock.now_us,
                reloader=self.reloader,
                should_rate_limit=self._service.should_rate_limit,
                shows_values=listen.admin_shows_values,
                names=listen.admin_names,
                token_file=listen.admin_token_file,
            )
        )

    def missing(self) -> list[str]:
        """What the sidecar still waits for before it is ready, as texts; empty when it is ready. Whenever that changes,
        the health service must be told (`HealthService.changed`).

        Rules that an xDS server has not sent yet do not count, unless configured so. Only the console's /readyz waits
        for them, so that nobody restarts a sidecar because there are none.
        """
        if self._stop.is_set():
            return ["the sidecar is shutting down"]
        missing = []
        if not self._front_end.ready.is_set():
            missing.append("the gRPC front end is starting")
        if self.reloader.has_rules.is_set():
            if self._restoring is not None and not self._restoring.done():
                missing.append("the state is being read")
            if not self._has_all_rules:
                missing.append("the xDS server may not have said all yet")
            if not self._joined:
                missing.append(
                    "peers have not yet told all they know"
                    if self._fabric is None
                    else "the fabric's Redis has not yet answered"
                )
        if self._config.listen.healthy_with_rules_only and not self.limiter.rules.domains:
            missing.append("there are no rules of any domain yet")
        return missing

    def degraded(self) -> list[str]:
        """What does not work as it should, as texts. The sidecar is ready all the same."""
        degraded = list(self._supervisor.failing())
        if self._h2 is not None and self._h2.is_shedding:
            degraded.append("calls or connections were refused in the last minute, since others take too much room")
        if self._snapshots is not None and self._snapshots.status.degraded_reason:
            degraded.append(f"the state is not kept: {self._snapshots.status.degraded_reason}")
        if self._purses is not None and self._purses.degraded_reason:
            why = f"what was kept of them cannot be deleted: {self._purses.degraded_reason}"
            degraded.append(f"strict limits have only what peers lend: {why}")
        if self._redis is not None and self._redis.status.degraded_reason:
            degraded.append(f"the state is not kept in Redis: {self._redis.status.degraded_reason}")
        if self._fabric is not None and self._fabric.status.degraded_reason:
            degraded.append(f"limits are not shared on the fabric: {self._fabric.status.degraded_reason}")
        drawing = None if self._fabric is None else self._fabric.drawing
        if drawing is not None and drawing.status.degraded_reason:
            degraded.append(f"strict limits admit no more than is held here: {drawing.status.degraded_reason}")
        if self._fabric is not None and self._fabric.status.gateway_reason:
            why = f"it cannot listen on {self._config.listen.sync}: {self._fabric.status.gateway_reason}"
            degraded.append(f"this sidecar cannot speak for its region: {why}")
        if self._mesh.is_id_taken:
            why = f"another sidecar has the node id {self._config.node.id}"
            degraded.append(f"limits are not shared with all, and this node has no share of strict ones: {why}")
        gap_us = self.clock.gap_us
        if abs(gap_us) >= FAR_US:
            degraded.append(f"the system clock was set and is not believed yet: it is {_ahead(gap_us)}")
        for peer in self._peers():
            ahead_us = round((peer.clock_offset_seconds or 0) * 1e6)
            if abs(ahead_us) >= SET_BACK_US:
                degraded.append(f"most limits are not shared with {peer.node}: its clock is {_ahead(ahead_us)}")
            if peer.failed_dials >= FAILED_DIALS and not peer.connected:
                degraded.append(f"limits are not shared with {peer.node or peer.address}: {peer.last_error}")
        return degraded

    def _make_front_end(
        self, kind: FrontEndKind, handlers: Handlers, bounds: ServerBounds, certificate: ServerCertificate | None
    ) -> FrontEnd:
        addresses = self._config.listen.grpc
        if kind is FrontEndKind.H2:
            self._h2 = GrpcFrontEnd(handlers, addresses, bounds=bounds, certificate=certificate, turns=self._turns)
            return self._h2
        return GrpcioFrontEnd(handlers, addresses, bounds=bounds, certificate=certificate, supervisor=self._supervisor)

    async def run(self) -> None:
        """Answer until SIGTERM or SIGINT, then drain.

        Raises:
            ListenError: an address cannot be listened on.
            StateError: the file of the state cannot be this process's.
            ExceptionGroup: a part has failed; the others are closed.
        """
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, self._begin_stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        await self._open()
        # Code and rules stay alive: keep garbage collections from looking at them while requests wait.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        sys.setswitchinterval(SWITCH_SECONDS)
        self._log_start()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._console.serve())
                replicating = tasks.create_task(self._replicate())
                tasks.create_task(self._front_end.serve())
                if self._ext_authz is not None:
                    tasks.create_task(self._ext_authz.serve())
                chores = [tasks.create_task(self._supervisor.keep(name, run)) for name, run in self._chores()]
                await self._stop.wait()
                await self._drain(replicating, chores)
        finally:
            if self._redis is not None:
                await self._redis.close()
            await self._tracing.close()
        _log.info("stopped")

    async def _drain(self, replicating: asyncio.Task[None], chores: Sequence[asyncio.Task[None]]) -> None:
        """End what `run` has begun: the front end, the mesh, the console and the chores; then keep the state."""
        _log.info("draining")
        if self.limiter.ledger is not None:
            self.limiter.ledger.queues.close()
        async with asyncio.TaskGroup() as stopping:
            stopping.create_task(self._front_end.stop())
            if self._ext_authz is not None:
                stopping.create_task(self._ext_authz.stop())
        self._quotas.quotas.charge_all()
        self._mesh.stop()
        if not self.reloader.has_rules.is_set():
            replicating.cancel()
        await asyncio.wait([replicating])
        await self._console.stop()
        for chore in chores:
            chore.cancel()
        # They are small, and may not be had from the last snapshot.
        await self._keep_purses()
        if self._snapshots is not None and self.reloader.has_rules.is_set():
            if self._restoring is not None:
                # The next snapshot replaces all that is in the file.
                await asyncio.wait([self._restoring])
            self._end_after(STOP_SECONDS + SNAPSHOT_BUCKET_SECONDS * len(self.limiter.store))
            await self._snapshots.save(at_once=True)
        if self._fabric is not None:
            await asyncio.wait(chores)
            await self._fabric.save()
        if self._redis is not None:
            # Redis joins, so it does no harm if not everything was read yet.
            await asyncio.wait(chores)
            await self._redis.save()

    def _chores(self) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        """Background tasks, by name; they run until the stop."""
        yield "rules", lambda: self._source.run(self.reloader)
        yield "join", self._join
        snapshots = self._snapshots
        if snapshots is not None:
            yield "snapshots", lambda: self._when_restored(snapshots.run)
            yield "put_off", lambda: self._when_restored(snapshots.join_put_off)
        if self._purses is not None:
            yield "purses", self._purses.run
        yield "quotas", self._quotas.run
        if self._redis is not None:
            yield "redis", self._redis.run
        if self._fabric is not None:
            yield "fabric", self._fabric.run
        yield "slew", self._slew
        yield "stalls", self._stalls.run
        yield "sweep", lambda: sweep(self.limiter.store, self.clock.now_us, self.limiter)
        yield "fullest", lambda: look_for_fullest(self._fullest, self.clock.now_us, self.limiter)
        if self._push is not None:
            yield "push_metrics", self._push.run
        ledger = self.limiter.ledger
        if ledger is not None:
            yield "sweep_strict", lambda: sweep(ledger, self._strict_us, self.limiter)

    async def _open(self) -> None:
        if self._snapshots is not None:
            self._snapshots.lock()
        if self._purses is not None:
            await self._purses.restore()
        async with AsyncExitStack() as opened:
            # They are not in the file any more.
            opened.push_async_callback(self._keep_purses)
            await self._console.start()
            opened.push_async_callback(self._console.stop)
            if self.reloader.has_rules.is_set():
                await self._start_mesh()
            opened.push_async_callback(self._mesh.close)
            persistence = self._snapshots or self._redis
            if self._redis is not None:
                opened.push_async_callback(self._redis.close)
            if persistence is not None:
                self._restoring = asyncio.create_task(self._restore(persistence))
                if self.reloader.has_rules.is_set():
                    await asyncio.wait([self._restoring], timeout=RESTORE_SECONDS)
            await self._front_end.start()
            if self._ext_authz is not None:
                opened.push_async_callback(self._front_end.stop)
                await self._ext_authz.start()
            opened.pop_all()

    async def _keep_purses(self) -> None:
        if self._purses is not None:
            await self._purses.keep(self._strict_us(), has_rules=self.reloader.has_rules.is_set())

    async def _start_mesh(self) -> None:
        try:
            await self._mesh.start()
        except OSError as error:
            raise ListenError(str(self._config.listen.sync), str(error)) from error

    async def _replicate(self) -> None:
        if not self.reloader.has_rules.is_set():
            # Peers send their whole state at the start of a stream, and a node keeps only state for which it has rules.
            await self._mesh.flush_until(self.reloader.has_rules)
            await self._start_mesh()
        await self._mesh.run()

    async def _restore(self, persistence: SnapshotFile | RedisState) -> None:
        # State without a rule would be dropped.
        await self.reloader.has_rules.wait()
        await persistence.load()

    async def _when_restored(self, run: Callable[[], Awaitable[None]]) -> None:
        if self._restoring is not None:
            # A snapshot now would replace the whole state by the part that was read so far. A stop must not end that.
            await asyncio.wait([self._restoring])
        await run()

    async def _join(self) -> None:
        await self._front_end.ready.wait()
        self._health.changed()
        await self.reloader.has_rules.wait()
        self._health.changed()
        if isinstance(self._source, XdsClient):
            with suppress(TimeoutError):
                async with asyncio.timeout(ALL_RULES_SECONDS):
                    await self._source.settled.wait()
        self._has_all_rules = True
        self._health.changed()
        if self._restoring is not None:
            await asyncio.wait([self._restoring])
            self._health.changed()
        begun_s = time.monotonic()
        if not await self._mesh.wait_joined(JOIN_SECONDS, MAX_JOIN_SECONDS):
            waited_s = round(time.monotonic() - begun_s, 1)
            _log.warning("not_joined", waited_seconds=waited_s, peers=self._config.sync.peers)
        if self._fabric is not None:
            # A roll-out goes on once this one is ready, and those that it stops may have told Redis nothing.
            with suppress(TimeoutError):
                async with asyncio.timeout(JOIN_SECONDS):
                    await self._fabric.has_answered.wait()
        self._joined, self.limiter.store.is_starting = True, False
        self._health.changed()
        _log.info("ready")

    def _begin_stop(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        self._health.changed()
        self._end_after(STOP_SECONDS)

    def _end_after(self, seconds: float) -> None:
        """Let the stop take so long from now on, and no longer."""
        if self._last is not None:
            self._last.cancel()
        self._last = threading.Timer(seconds, self._end_at_once, [seconds])
        self._last.daemon = True
        self._last.start()

    def _end_at_once(self, seconds: float) -> None:
        """End the process. It runs in a thread, since the loop hangs."""
        _log.error("stop_took_too_long", after_seconds=seconds)
        self._log.flush()
        os._exit(1)

    def _use_rules(self, rules: Rules) -> Retired:
        retired = self.limiter.use_rules(rules)
        self._mesh.use_rules(rules.digest)
        if self._gateway is not None:
            self._gateway.use_rules(rules.digest)
        if self._fabric is not None:
            self._fabric.use_rules()
        persistence = self._snapshots or self._redis
        if persistence is not None:
            persistence.use_rules()
        self._service.rules_loaded()
        self._quotas.rules_loaded()
        self._health.changed()
        return retired

    def _reload(self) -> None:
        """Reload the rules, on SIGHUP."""
        if isinstance(self._source, RulesFiles):
            self._source.ask()
        else:
            _log.info("nothing_to_reload", reason="the xDS server sends rules by itself")

    def _local_limit_of_key(self, key: bytes) -> AnyLimit | None:
        return self.limiter.rules.local_limit_of_key(key)

    def _strict_us(self) -> int:
        """The clock of strict limits, which never steps."""
        return self.clock.now_us() - self.limiter.clock_steps_us

    async def _slew(self) -> None:
        while True:
            await asyncio.sleep(SLEW_SECONDS)
            stepped_us = self.clock.discipline(self._mesh.clocks_ahead_us())
            if stepped_us:
                self._note_step(stepped_us)

    def _note_step(self, stepped_us: int) -> None:
        """Pass on a step of the clock. After a step back the node writes under a new origin, so that its former counts
        cannot fall.
        """
        store = self.limiter.store
        self.limiter.clock_steps_us = self.clock.stepped_us
        if stepped_us < 0:
            store.go_back(_new_origin(store.origin.node))
        self._mesh.set_clock(store.origin)
        if self._fabric is not None:
            self._fabric.give_up()
        _log.warning("clock_set", by_seconds=stepped_us / 1e6)

    def _log_start(self) -> None:
        rules = self.limiter.rules
        _log.info(
            "started",
            version=__version__,
            compiled=str(limiter_package.__file__).endswith(".so"),
            node=self._config.node.id,
            region=self._config.node.region,
            grpc=list(self._front_end.addresses),
            admin=self._console.address,
            ext_authz_http=None if self._ext_authz is None else self._ext_authz.address,
            sync=self._mesh.bound_address,
            peers=list(self._config.sync.peers),
            rules=len(list(rules)),
            max_buckets=self.limiter.store.places.max_buckets,
        )
        needed_bytes = self.limiter.store.places.max_buckets * bytes_a_bucket(self._config, rules)
        if needed_bytes > self._memory_bytes:
            _log.warning(
                "memory_may_run_out",
                max_buckets=self.limiter.store.places.max_buckets,
                needed_bytes=needed_bytes,
                memory_bytes=self._memory_bytes,
                reason="who invents keys can have the kernel kill this process",
                fix="a smaller max_buckets, none, or more memory",
            )
        if self._config.xds is None and not rules.domains and rules.default_rule is None:
            reason = "no rules files are there yet" if self._config.rules else "neither rules nor bucket are configured"
            _log.warning("nothing_is_limited", reason=reason)
        members = self._config.sync.members
        if members is not None and self._config.member not in members:
            reason = "this node is not among sync.members: of strict limits it admits nothing"
            _log.warning("no_home_share", node=self._config.member, members=list(members), reason=reason)


def _new_origin(node: str) -> Origin:
    return Origin(node, secrets.randbelow(2**64 - 1) + 1)


def _make_persistence(
    kept: PersistenceConfig | None,
    store: Store,
    now_us: Callable[[], int],
    local_limit_of_key: LimitOfKey,
    tracer: RequestTracer | NoTracer,
) -> tuple[SnapshotFile | None, RedisState | None]:
    """The persistence of buckets: a file, Redis, or neither."""
    if kept is None:
        return None, None
    if kept.file is not None:
        return SnapshotFile(kept.file, store, now_us, local_limit_of_key, kept.every_seconds or SNAPSHOT_SECONDS), None
    # Imported only when configured.
    from ratelimit_sidecar.persistence.redis_client import Connector, keys  # noqa: PLC0415
    from ratelimit_sidecar.persistence.redis_store import RedisState  # noqa: PLC0415

    every_seconds = kept.every_seconds or REDIS_SECONDS
    return None, RedisState(Connector(kept), keys(kept), store, now_us, every_seconds, tracer=tracer)


def _ahead(offset_us: int) -> str:
    return f"{abs(offset_us) / 1e6:.1f} s {'ahead' if offset_us > 0 else 'behind'}"


def _make_limiter(config: SidecarConfig, rules: Rules, now_us: int, to_fill_bytes: int) -> Limiter:
    origin = _new_origin(config.node.id)
    most = max_buckets(config, rules, to_fill_bytes)
    ledger: Ledger | None = None
    if config.membership is not None:
        kind = Ledger if config.fabric is None else GrantLedger
        shares = Shares(config.membership, config.member, now_us, has_never_lent=config.fabric is not None)
        ledger = kind(shares, origin, rules.strict_limit_of_key, max_buckets=most, rule_key=rule_key)
    limiter = Limiter(
        rules,
        origin,
        config.settings,
        ledger,
        max_buckets=most,
        max_received_bytes=max_received_bytes(config, most, to_fill_bytes),
        sliding_places=sliding_places(config, rules),
        max_plan_bytes=less_in_little_memory(MAX_PLANS_BYTES, to_fill_bytes),
    )
    limiter.store.is_starting = True
    return limiter


def _front_end_bounds(listen: ListenConfig, file_limits: FileLimits, memory_bytes: int) -> ServerBounds:
    """The front end's bounds, with those that are configured; 0 is not allowed there."""
    age_s, grace_s = listen.max_connection_age_seconds, listen.max_connection_age_grace_seconds
    return replace(
        DEFAULT_BOUNDS,
        connections=file_limits.clients,
        held_bytes=less_in_little_memory(DEFAULT_BOUNDS.held_bytes, memory_bytes, CALLS_SHARE),
        age=age_s or None,
        age_grace=grace_s or inf,
    )


def _raise_file_limit(listen: ListenConfig) -> FileLimits:
    """Raise the limit on file descriptors, and log it if it stays too low."""
    proxies = 0 if listen.ext_authz_http is None else MAX_PROXY_CONNECTIONS
    wanted = FileLimits(clients=DEFAULT_BOUNDS.connections, mesh=MESH_BOUNDS.connections, proxies=proxies)
    given = raise_file_limit(wanted)
    if given != wanted:
        _log.warning(
            "few_file_descriptors",
            client_connections=given.clients,
            mesh_connections=given.mesh,
            ext_authz_http_connections=given.proxies,
            fix=f"let the hard limit (ulimit -Hn) be {wanted.total}",
        )
    return given


def _rules_source(config: SidecarConfig) -> tuple[RulesFiles | XdsClient, Rules, str]:
    """The source of rules, the first rules from it, and its name for people.

    Raises:
        ConfigError: the rules are broken.
    """
    if config.xds is not None:
        read_resources = partial(
            rules_of_resources,
            default_rule=config.bucket,
            defaults=config.rule_defaults,
            merge_domains=config.merge_domains,
        )
        return XdsClient(config.xds, read_resources), read_resources({}), f"xDS server {config.xds.server}"
    read_files = partial(
        load_rules,
        config.rules,
        default_rule=config.bucket,
        defaults=config.rule_defaults,
        merge_domains=config.merge_domains,
    )
    files = RulesFiles(config.rules, read_files)
    return files, files.read_first(), f"files {', '.join(map(str, config.rules)) or '(none)'}"
