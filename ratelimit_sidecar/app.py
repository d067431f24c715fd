"""The composition root: the only place that knows every part, and the one owner that opens and closes them.

Opened in this order: console, mesh, front end, so that a probe sees a starting sidecar, and requests come last. Envoy
is answered at once, from whatever is known; ready it is said to be once the peers that can be reached have told what
they know. While an xDS server has yet to send the first rules, mesh and readiness wait for them, and calls are refused
if so configured. At a stop the order is the other way round: no new requests, answers to those in flight, then what was
admitted is told to the peers, then the spans are flushed.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from enum import Enum
from functools import partial
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from ratelimit_sidecar import __version__
from ratelimit_sidecar import limiter as limiter_package
from ratelimit_sidecar.clock import FAR_US, Clock
from ratelimit_sidecar.config.rules_file import load_rules, rules_of_resources
from ratelimit_sidecar.config.sidecar import SidecarConfig
from ratelimit_sidecar.config.sidecar_schema import ListenConfig, PersistenceConfig
from ratelimit_sidecar.console import app as console
from ratelimit_sidecar.console.server import ConsoleServer
from ratelimit_sidecar.crdt.bucket import SET_BACK_US, Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import AnyLimit
from ratelimit_sidecar.crdt.shares import Shares
from ratelimit_sidecar.crdt.store import LimitOfKey, Store
from ratelimit_sidecar.limiter.fullest import FullestBuckets
from ratelimit_sidecar.limiter.key import rule_key
from ratelimit_sidecar.limiter.limiter import Limiter, Retired
from ratelimit_sidecar.limiter.quota import Quotas
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.persistence.purses import ENDING, BadPurses, holder_of, take_purses, write_purses
from ratelimit_sidecar.persistence.snapshots import Snapshots
from ratelimit_sidecar.replication.demands import Demands
from ratelimit_sidecar.replication.listener import MAX_CONNECTIONS
from ratelimit_sidecar.replication.mesh import Mesh
from ratelimit_sidecar.replication.purses import Purses
from ratelimit_sidecar.replication.tls import NodeCertificate
from ratelimit_sidecar.rules_source.files import RulesFiles
from ratelimit_sidecar.rules_source.reloader import Reloader
from ratelimit_sidecar.rules_source.xds import XdsClient
from ratelimit_sidecar.server.file_limit import Descriptors, allot
from ratelimit_sidecar.server.front_end import FrontEnd
from ratelimit_sidecar.server.grpcio import GrpcioFrontEnd
from ratelimit_sidecar.server.h2 import H2FrontEnd
from ratelimit_sidecar.server.limits import DEFAULT_LIMITS, Limits
from ratelimit_sidecar.server.listeners import ListenError
from ratelimit_sidecar.server.rpc import Handlers
from ratelimit_sidecar.server.tls import ServerCertificate
from ratelimit_sidecar.services.ext_authz import SERVICE_NAME as EXT_AUTHZ_SERVICE_NAME
from ratelimit_sidecar.services.ext_authz import ExtAuthzService
from ratelimit_sidecar.services.ext_authz_http import ext_authz_app
from ratelimit_sidecar.services.health import RATELIMIT_NAME, HealthService
from ratelimit_sidecar.services.health import SERVICE_NAME as HEALTH_SERVICE_NAME
from ratelimit_sidecar.services.quota import SERVICE_NAME as QUOTA_SERVICE_NAME
from ratelimit_sidecar.services.quota import QuotaService
from ratelimit_sidecar.services.ratelimit import SERVICE_NAME, RateLimitService
from ratelimit_sidecar.services.reflection import ReflectionService
from ratelimit_sidecar.supervision import Supervisor
from ratelimit_sidecar.telemetry import metrics
from ratelimit_sidecar.telemetry.export import start_tracing
from ratelimit_sidecar.telemetry.latency import LatencyHistogram
from ratelimit_sidecar.telemetry.log_writer import LogWriter
from ratelimit_sidecar.telemetry.push import start_push
from ratelimit_sidecar.telemetry.stalls import StallMonitor

if TYPE_CHECKING:
    from ratelimit_sidecar.persistence.redis_store import RedisState

SNAPSHOT_SECONDS = 10.0
REDIS_SECONDS = 1.0
"""Between two snapshots, or two rounds of writing to Redis, unless configured."""

RESTORE_SECONDS = 2.0
"""What reading the snapshot gets before Envoy is answered; a large one is read on while it is."""

JOIN_SECONDS = 10.0
"""What reachable peers get to tell what they know before the sidecar says it is ready."""

STOP_SECONDS = 20.0
"""What a stop may take: front end, mesh and console get 5, 3 and 3 s at most, traces 5. Then the process ends, whatever
hangs; Kubernetes kills it after 30."""

SWEEP_BUCKETS = 167
SWEEP_PASS_SECONDS = 60.0
SWEEP_LEAST_SECONDS, SWEEP_MOST_SECONDS = 0.01, 1.0
"""So many buckets are looked at in a step, half a millisecond, and steps follow each other so that all buckets have
been within a minute: every 10 ms with a million of them. An idle sidecar hardly wakes up for it."""

FULLEST_BUCKETS = 100
FULLEST_PASS_SECONDS = 10.0
FULLEST_LEAST_SECONDS, FULLEST_MOST_SECONDS = 0.02, 5.0
"""So many buckets are looked at in a step for how full they are (0.1 ms; 0.8 us each, measured with 200,000), and all
within 10 s where there are up to 50,000. With a million a pass takes over three minutes, in half a hundredth of the
loop's time.
"""

SLEW_SECONDS = 1.0

GC_THRESHOLDS = (1_000, 1, 1_000_000)
"""Practically no collection of the oldest generation: with 100,000 buckets it stops the loop for over 100 ms, and Envoy
lets pass what is not answered in 20 ms. Buckets and plans are in no cycle, so counting references frees them. The
middle one is collected with at most 3,000 objects: with 70,000 it took 4 to 12 ms while 10,000 buckets a second came
in and went out.
"""

SWITCH_SECONDS = 0.000_2
"""How long another thread may keep Python's lock while the loop wants it, which it does several times to get through a
request. While one reads 20,000 rules and 2,000 requests come a second, the p99 of a few seconds is 12.7 ms with
Python's 5 ms, 3.6 with 0.5 ms and 3.3 with this, and the p99.9 is 15.9, 8.2 and 6.6 ms; the reading takes 1.9, 2.1 and
2.4 s (`benchmarks/reload.py`).
"""

_log = structlog.stdlib.get_logger(__name__)


class FrontEndKind(Enum):
    """What carries Envoy's calls."""

    H2 = "h2"
    GRPCIO = "grpcio"


class Sidecar:
    """One process: built from its configuration, then `run` once.

    Args:
        log: where its log goes.

    Raises:
        ConfigError: the rules are broken.
        TracingError: the OTEL_* variables are.
    """

    def __init__(self, config: SidecarConfig, front_end: FrontEndKind, log: LogWriter) -> None:
        self._config = config
        node, region = config.node.id, config.node.region
        self._source: RulesFiles | XdsClient
        if config.xds is None:
            self._source = _rules_files(config)
            rules, source = self._source.read_first(), f"files {', '.join(map(str, config.rules)) or '(none)'}"
        else:
            read = _reader_of_resources(config)
            self._source = XdsClient(config.xds, read)
            rules, source = read({}), f"xDS server {config.xds.server}"
        self._clock = Clock()
        self._stop = asyncio.Event()
        self._joined = False
        self._restoring: asyncio.Task[None] | None = None
        self._supervisor = Supervisor()
        descriptors = _descriptors()
        self._tracing = start_tracing(node, region)
        origin = _new_origin(node)
        ledger = _ledger(config, rules, origin, self._clock.now_us())
        self._limiter = Limiter(rules, origin, config.settings, ledger, max_buckets=config.max_buckets)
        waits_for_rules = config.xds is not None and config.xds.before_rules == "error"
        self._quotas = QuotaService(
            Quotas(self._limiter, self._strict_us(), self._clock.now_us),
            self._strict_us,
            waits_for_rules=waits_for_rules,
        )
        self._reloader = Reloader(
            self._use_rules, self._clock.now_us, source, loaded=rules if config.xds is None else None
        )
        self._mesh = Mesh(
            origin=origin,
            region=region,
            version=__version__,
            store=self._limiter.store,
            now_us=self._clock.now_us,
            steady_us=self._strict_us,
            peers=config.sync.peers,
            listen=config.listen.sync,
            certificate=None if config.sync.tls is None else NodeCertificate(config.sync.tls),
            tracer=self._tracing.tracer,
            purses=None if ledger is None else Purses(ledger, self._strict_us),
            demands=Demands(self._quotas.quotas, self._strict_us),
            supervisor=self._supervisor,
            max_connections=descriptors.mesh,
        )
        self._mesh.use_rules(rules.digest)
        self._snapshots, self._redis = _state(
            config.persistence, self._limiter.store, self._clock.now_us, self._local_limit_of_key
        )
        if self._redis is not None:
            self._mesh.read_changes(self._redis.note)
        self._fullest = FullestBuckets(self._limiter.store)
        latency = LatencyHistogram()
        self._stalls = StallMonitor()
        self._service = service = RateLimitService(
            self._limiter,
            self._clock.now_us,
            latency,
            self._tracing.tracer,
            waits_for_rules=waits_for_rules,
        )
        ext_authz = ExtAuthzService(service, lambda: self._limiter.rules)
        services = [SERVICE_NAME, QUOTA_SERVICE_NAME, EXT_AUTHZ_SERVICE_NAME]
        self._health = HealthService(lambda: not self.missing(), [*services, RATELIMIT_NAME])
        handlers = {
            **service.handlers(),
            **self._quotas.handlers(),
            **ext_authz.handlers(),
            **self._health.handlers(),
            **ReflectionService([*services, HEALTH_SERVICE_NAME]).handlers(),
        }
        certificate = None if config.listen.tls is None else ServerCertificate(config.listen.tls)
        limits = _limits(config.listen, descriptors)
        self._h2: H2FrontEnd | None = None
        self._front_end = self._make_front_end(front_end, handlers, limits, certificate)
        registry = metrics.create_registry(
            metrics.Sources(
                node=node,
                region=region,
                limiter=self._limiter,
                latency=latency,
                peers=self._mesh.status,
                request_errors=service.errors,
                ext_authz_unlimited=ext_authz.unlimited,
                replication=self._mesh,
                rules=self._reloader,
                membership=self._mesh.membership_status,
                loop=self._stalls,
                clock=self._clock,
                front_end=self._h2,
                listener_certificate=certificate,
                state=None if self._snapshots is None else self._snapshots.status,
                redis=None if self._redis is None else self._redis.status,
                supervision=self._supervisor,
                log=log,
                fullest=self._fullest,
                spans=self._tracing.counts,
                quotas=self._quotas.quotas,
            )
        )
        self._push = start_push(node, region, registry)
        console_app = console.create_app(
            console.Sources(
                node=node,
                region=region,
                limiter=self._limiter,
                registry=registry,
                peers=self._mesh.status,
                membership=self._mesh.membership_status,
                missing=self.missing,
                degraded=self.degraded,
                now_us=self._clock.now_us,
                reloader=self._reloader,
                should_rate_limit=service.should_rate_limit,
                shows_values=config.listen.admin_shows_values,
                names=config.listen.admin_names,
                token_file=config.listen.admin_token_file,
            )
        )
        self._console = ConsoleServer(console_app, config.listen.admin)
        self._ext_authz: ConsoleServer | None = None
        if config.listen.ext_authz_http is not None:
            self._ext_authz = ConsoleServer(
                ext_authz_app(ext_authz),
                config.listen.ext_authz_http,
                keep_alive_seconds=round(DEFAULT_LIMITS.idle),
            )
        self._log = log

    def missing(self) -> list[str]:
        """What the sidecar still waits for before it answers as well as it can, in words; empty when it does. Where
        that changes the health service is told.

        Rules that an xDS server has yet to send are not among it, unless it is so configured: only the console's
        /readyz waits for them, so that nobody restarts a sidecar because there are none.
        """
        if self._stop.is_set():
            return ["the sidecar is shutting down"]
        missing = []
        if not self._front_end.ready.is_set():
            missing.append("the gRPC front end is starting")
        if self._reloader.has_rules.is_set():
            if self._restoring is not None and not self._restoring.done():
                missing.append("the state is being read")
            if not self._joined:
                missing.append("peers have not yet told all they know")
        if self._config.listen.healthy_with_rules_only and not self._limiter.rules.domains:
            missing.append("there are no rules of any domain yet")
        return missing

    def degraded(self) -> list[str]:
        """What the sidecar does worse than it could, in words; it is ready all the same."""
        degraded = list(self._supervisor.failing())
        if self._h2 is not None and self._h2.is_shedding:
            degraded.append("calls or connections were refused in the last minute, since others take too much room")
        if self._snapshots is not None and self._snapshots.status.degraded_reason:
            degraded.append(f"the state is not kept: {self._snapshots.status.degraded_reason}")
        if self._redis is not None and self._redis.status.degraded_reason:
            degraded.append(f"the state is not kept in Redis: {self._redis.status.degraded_reason}")
        if self._mesh.is_id_taken:
            degraded.append(f"limits are not shared with all: another sidecar has the node id {self._config.node.id}")
        gap_us = self._clock.gap_us
        if abs(gap_us) >= FAR_US:
            degraded.append(f"the system clock was set and is not believed yet: it is {_ahead(gap_us)}")
        for peer in self._mesh.status():
            ahead_us = round((peer.clock_offset_seconds or 0) * 1e6)
            if abs(ahead_us) >= SET_BACK_US:
                degraded.append(f"most limits are not shared with {peer.node}: its clock is {_ahead(ahead_us)}")
        return degraded

    def _make_front_end(
        self, kind: FrontEndKind, handlers: Handlers, limits: Limits, certificate: ServerCertificate | None
    ) -> FrontEnd:
        addresses = self._config.listen.grpc
        if kind is FrontEndKind.H2:
            self._h2 = H2FrontEnd(handlers, addresses, limits=limits, certificate=certificate)
            return self._h2
        return GrpcioFrontEnd(handlers, addresses, limits=limits, certificate=certificate, supervisor=self._supervisor)

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
        # What is there now stays: no garbage collection has to look at code and rules again while requests wait.
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
                _log.info("draining")
                async with asyncio.TaskGroup() as stopping:
                    stopping.create_task(self._front_end.stop())
                    if self._ext_authz is not None:
                        stopping.create_task(self._ext_authz.stop())
                self._quotas.quotas.charge_all()
                self._mesh.stop()
                if not self._reloader.has_rules.is_set():
                    replicating.cancel()
                await asyncio.wait([replicating])
                await self._console.stop()
                is_restored = self._restoring is None or self._restoring.done()
                for chore in chores:
                    chore.cancel()
                if self._snapshots is not None and is_restored:
                    await self._snapshots.save(at_once=True)
                await self._keep_purses()
                if self._redis is not None:
                    # Joined there, so it does no harm that not all has been read.
                    await asyncio.wait(chores)
                    await self._redis.save()
        finally:
            if self._redis is not None:
                await self._redis.close()
            await self._tracing.close()
        _log.info("stopped")

    @property
    def _purses_file(self) -> Path | None:
        kept = self._config.persistence
        if kept is None or kept.file is None or self._limiter.ledger is None:
            return None
        return kept.file.with_name(kept.file.name + ENDING)

    async def _take_purses(self) -> None:
        file, ledger = self._purses_file, self._limiter.ledger
        if file is None or ledger is None:
            return
        try:
            holder = holder_of(ledger.shares.node, ledger.shares.membership)
            ledger.put_back(await asyncio.to_thread(take_purses, file, holder))
        except (OSError, BadPurses) as error:
            _log.error("purses_not_restored", file=str(file), reason=str(error))

    async def _keep_purses(self) -> None:
        """At the end: nothing is admitted or paid any more."""
        file, ledger = self._purses_file, self._limiter.ledger
        if file is None or ledger is None:
            return
        try:
            holder = holder_of(ledger.shares.node, ledger.shares.membership)
            await asyncio.to_thread(write_purses, file, holder, ledger.keep())
        except OSError as error:
            _log.error("purses_not_kept", file=str(file), reason=error.strerror or str(error))

    def _chores(self) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        """What is done beside answering, until the stop, by name."""
        yield "rules", lambda: self._source.run(self._reloader)
        yield "join", self._join
        snapshots = self._snapshots
        if snapshots is not None:
            yield "snapshots", lambda: self._keep(snapshots)
        yield "quotas", self._quotas.run
        if self._redis is not None:
            yield "redis", self._redis.run
        yield "slew", self._slew
        yield "stalls", self._stalls.run
        yield "sweep", lambda: self._sweep(self._limiter.store, self._clock.now_us)
        yield "fullest", self._look_for_fullest
        if self._push is not None:
            yield "push_metrics", self._push.run
        ledger = self._limiter.ledger
        if ledger is not None:
            yield "sweep_strict", lambda: self._sweep(ledger, self._strict_us)

    async def _open(self) -> None:
        if self._snapshots is not None:
            self._snapshots.lock()
            await self._take_purses()
        async with AsyncExitStack() as opened:
            await self._console.start()
            opened.push_async_callback(self._console.stop)
            if self._reloader.has_rules.is_set():
                await self._start_mesh()
            opened.push_async_callback(self._mesh.close)
            keeper = self._snapshots or self._redis
            if self._redis is not None:
                opened.push_async_callback(self._redis.close)
            if keeper is not None:
                self._restoring = asyncio.create_task(self._restore(keeper))
                if self._reloader.has_rules.is_set():
                    await asyncio.wait([self._restoring], timeout=RESTORE_SECONDS)
            await self._front_end.start()
            if self._ext_authz is not None:
                opened.push_async_callback(self._front_end.stop)
                await self._ext_authz.start()
            opened.pop_all()

    async def _start_mesh(self) -> None:
        try:
            await self._mesh.start()
        except OSError as error:
            raise ListenError(str(self._config.listen.sync), str(error)) from error

    async def _replicate(self) -> None:
        if not self._reloader.has_rules.is_set():
            # Peers tell all they know at once, and of that a node keeps what it has rules for.
            await self._mesh.wait(self._reloader.has_rules)
            await self._start_mesh()
        await self._mesh.run()

    async def _restore(self, keeper: Snapshots | RedisState) -> None:
        # Of what has no rule nothing is kept.
        await self._reloader.has_rules.wait()
        await keeper.load()

    async def _keep(self, snapshots: Snapshots) -> None:
        if self._restoring is not None:
            await self._restoring
        # Not before: a snapshot of half of the state would take the place of all of it.
        await snapshots.run()

    async def _join(self) -> None:
        await self._front_end.ready.wait()
        self._health.changed()
        await self._reloader.has_rules.wait()
        self._health.changed()
        if self._restoring is not None:
            await asyncio.wait([self._restoring])
            self._health.changed()
        if not await self._mesh.joined(JOIN_SECONDS):
            _log.warning("not_joined", waited_seconds=JOIN_SECONDS, peers=self._config.sync.peers)
        self._joined = True
        self._health.changed()
        _log.info("ready")

    def _begin_stop(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        self._health.changed()
        last = threading.Timer(STOP_SECONDS, self._end_at_once)
        last.daemon = True
        last.start()

    def _end_at_once(self) -> None:
        """In a thread: the loop, or one that it waits for, hangs."""
        _log.error("stop_took_too_long", after_seconds=STOP_SECONDS)
        self._log.flush()
        os._exit(1)

    def _use_rules(self, rules: Rules) -> Retired:
        retired = self._limiter.use_rules(rules)
        self._mesh.use_rules(rules.digest)
        self._service.begin()
        self._quotas.begin()
        self._health.changed()
        return retired

    def _reload(self) -> None:
        """What SIGHUP asks for."""
        if isinstance(self._source, RulesFiles):
            self._source.ask()
        else:
            _log.info("nothing_to_reload", reason="the xDS server sends rules by itself")

    def _local_limit_of_key(self, key: bytes) -> AnyLimit | None:
        return self._limiter.rules.local_limit_of_key(key)

    def _strict_us(self) -> int:
        """The clock of strict limits, which never steps."""
        return self._clock.now_us() - self._limiter.jumped_us

    async def _sweep(self, buckets: Store | Ledger, now_us: Callable[[], int]) -> None:
        left = 0
        seconds = SWEEP_LEAST_SECONDS
        step = SWEEP_BUCKETS
        while True:
            await asyncio.sleep(seconds)
            if left <= 0:
                left = len(buckets)
                pace = SWEEP_PASS_SECONDS * SWEEP_BUCKETS / max(left, 1)
                seconds = min(SWEEP_MOST_SECONDS, max(SWEEP_LEAST_SECONDS, pace))
                step = max(SWEEP_BUCKETS, ceil(left * seconds / SWEEP_PASS_SECONDS))
                self._warn_when_full(buckets)
            left -= step
            buckets.sweep(now_us(), step)

    async def _look_for_fullest(self) -> None:
        while True:
            pace = FULLEST_PASS_SECONDS * FULLEST_BUCKETS / max(len(self._limiter.store), 1)
            await asyncio.sleep(min(FULLEST_MOST_SECONDS, max(FULLEST_LEAST_SECONDS, pace)))
            self._fullest.look(self._limiter.rules, self._clock.now_us(), FULLEST_BUCKETS)

    def _warn_when_full(self, buckets: Store | Ledger) -> None:
        """Once a pass: what overflows is counted, and shown in the metrics."""
        if not buckets.room.is_ample:
            overflowed = sum(self._limiter.overflow_decisions.values())
            _log.warning(
                "buckets_full", buckets=len(buckets), max_buckets=buckets.room.most, overflow_decisions=overflowed
            )

    async def _slew(self) -> None:
        while True:
            await asyncio.sleep(SLEW_SECONDS)
            stepped_us = self._clock.slew(self._mesh.clocks_ahead_us())
            if stepped_us:
                self._note_step(stepped_us)

    def _note_step(self, stepped_us: int) -> None:
        """The clock was set. Of what replicates nothing is written again that was written before, by this life of the
        node, at the same time."""
        store = self._limiter.store
        self._limiter.jumped_us = self._clock.stepped_us
        if stepped_us < 0:
            store.go_back(_new_origin(store.origin.node))
        self._mesh.set_clock(store.origin)
        _log.warning("clock_set", by_seconds=stepped_us / 1e6)

    def _log_start(self) -> None:
        rules = self._limiter.rules
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
        )
        if self._config.xds is None and not rules.domains and rules.unruled is None:
            reason = "no rules files are there yet" if self._config.rules else "neither rules nor bucket are configured"
            _log.warning("nothing_is_limited", reason=reason)
        members = self._config.sync.members
        if members is not None and self._config.node.id not in members:
            reason = "this node is not among sync.members: of strict limits it admits nothing"
            _log.warning("no_home_share", node=self._config.node.id, members=list(members), reason=reason)


def _new_origin(node: str) -> Origin:
    return Origin(node, secrets.randbelow(2**64 - 1) + 1)


def _state(
    kept: PersistenceConfig | None, store: Store, now_us: Callable[[], int], local_limit_of_key: LimitOfKey
) -> tuple[Snapshots | None, RedisState | None]:
    """What keeps the buckets across restarts: a file, Redis, or neither."""
    if kept is None:
        return None, None
    if kept.file is not None:
        return Snapshots(kept.file, store, now_us, local_limit_of_key, kept.every_seconds or SNAPSHOT_SECONDS), None
    # Who does not configure it pays nothing for it.
    from ratelimit_sidecar.persistence.redis_client import connect, keys  # noqa: PLC0415
    from ratelimit_sidecar.persistence.redis_store import RedisState  # noqa: PLC0415

    return None, RedisState(partial(connect, kept), keys(kept), store, now_us, kept.every_seconds or REDIS_SECONDS)


def _ahead(offset_us: int) -> str:
    return f"{abs(offset_us) / 1e6:.1f} s {'ahead' if offset_us > 0 else 'behind'}"


def _ledger(config: SidecarConfig, rules: Rules, origin: Origin, now_us: int) -> Ledger | None:
    """None when no limit can be strict."""
    if config.membership is None:
        return None
    shares = Shares(config.membership, origin.node, now_us)
    return Ledger(
        shares,
        origin,
        rules.strict_limit_of_key,
        max_buckets=config.max_buckets,
        rule_key=rule_key,
    )


def _limits(listen: ListenConfig, descriptors: Descriptors) -> Limits:
    """With those that are configured; 0 is never there."""
    age_s, grace_s = listen.max_connection_age_seconds, listen.max_connection_age_grace_seconds
    return replace(DEFAULT_LIMITS, connections=descriptors.clients, age=age_s or None, age_grace=grace_s or inf)


def _descriptors() -> Descriptors:
    """What connections may take of the process's file descriptors."""
    wanted = Descriptors(clients=DEFAULT_LIMITS.connections, mesh=MAX_CONNECTIONS)
    given = allot(wanted)
    if given != wanted:
        fix = f"let the hard limit (ulimit -Hn) be {wanted.total}"
        _log.warning("few_file_descriptors", client_connections=given.clients, mesh_connections=given.mesh, fix=fix)
    return given


def _rules_files(config: SidecarConfig) -> RulesFiles:
    read = partial(
        load_rules,
        config.rules,
        unruled=config.bucket,
        defaults=config.rule_defaults,
        merge_domains=config.merge_domains,
    )
    return RulesFiles(config.rules, read)


def _reader_of_resources(config: SidecarConfig) -> Callable[[Mapping[str, Mapping[str, object]]], Rules]:
    return partial(
        rules_of_resources,
        unruled=config.bucket,
        defaults=config.rule_defaults,
        merge_domains=config.merge_domains,
    )
