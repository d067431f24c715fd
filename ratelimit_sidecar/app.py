"""The composition root: the only place that knows every part, and the one owner that opens and closes them.

Opened in this order: console, mesh, front end, so that a probe sees a starting sidecar, and requests come last. Envoy
is answered at once, from whatever is known; ready it is said to be once the peers that can be reached have told what
they know. While an xDS server has yet to send the first rules, mesh and readiness wait for them. At a stop the order is
the other way round: no new requests, answers to those in flight, then what was admitted is told to the peers, then the
spans are flushed.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from enum import Enum
from functools import partial
from math import ceil, inf

import structlog

from ratelimit_sidecar import __version__
from ratelimit_sidecar import limiter as limiter_package
from ratelimit_sidecar.clock import JUMP_US, Clock
from ratelimit_sidecar.config.rules_file import load_rules, rules_of_resources
from ratelimit_sidecar.config.sidecar import SidecarConfig
from ratelimit_sidecar.config.sidecar_schema import ListenConfig
from ratelimit_sidecar.console import app as console
from ratelimit_sidecar.console.server import ConsoleServer
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import MAX_FIRST_NUMBER, Ledger
from ratelimit_sidecar.crdt.shares import Shares
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.key import rule_key
from ratelimit_sidecar.limiter.limiter import Limiter, Retired
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.replication.lending import Lending
from ratelimit_sidecar.replication.mesh import Mesh
from ratelimit_sidecar.replication.tls import NodeCertificate
from ratelimit_sidecar.rules_source.files import RulesFiles
from ratelimit_sidecar.rules_source.reloader import Reloader
from ratelimit_sidecar.rules_source.xds import XdsClient
from ratelimit_sidecar.server.front_end import FrontEnd
from ratelimit_sidecar.server.grpcio import GrpcioFrontEnd
from ratelimit_sidecar.server.h2 import H2FrontEnd
from ratelimit_sidecar.server.limits import DEFAULT_LIMITS, Limits
from ratelimit_sidecar.server.listeners import ListenError
from ratelimit_sidecar.server.tls import ServerCertificate
from ratelimit_sidecar.services.health import SERVICE_NAME as HEALTH_SERVICE_NAME
from ratelimit_sidecar.services.health import HealthService
from ratelimit_sidecar.services.ratelimit import SERVICE_NAME, RateLimitService
from ratelimit_sidecar.services.reflection import ReflectionService
from ratelimit_sidecar.telemetry import metrics
from ratelimit_sidecar.telemetry.export import start_tracing
from ratelimit_sidecar.telemetry.latency import LatencyHistogram
from ratelimit_sidecar.telemetry.stalls import StallMonitor

JOIN_SECONDS = 10.0
"""What reachable peers get to tell what they know before the sidecar says it is ready."""

SWEEP_BUCKETS = 167
SWEEP_PASS_SECONDS = 60.0
SWEEP_LEAST_SECONDS, SWEEP_MOST_SECONDS = 0.01, 1.0
"""So many buckets are looked at in a step, half a millisecond, and steps follow each other so that all buckets have
been within a minute: every 10 ms with a million of them. An idle sidecar hardly wakes up for it."""

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

    Raises:
        ConfigError: the rules are broken.
        TracingError: the OTEL_* variables are.
    """

    def __init__(self, config: SidecarConfig, front_end: FrontEndKind) -> None:
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
        self._tracing = start_tracing(node, region)
        origin = Origin(node, secrets.randbelow(2**64 - 1) + 1)
        ledger = _ledger(config, rules, origin, self._clock.now_us())
        self._limiter = Limiter(rules, origin, config.settings, ledger, max_buckets=config.max_buckets)
        self._reloader = Reloader(
            self._use_rules, self._clock.now_us, source, loaded=rules if config.xds is None else None
        )
        self._mesh = Mesh(
            origin=origin,
            region=region,
            version=__version__,
            store=self._limiter.store,
            now_us=self._clock.now_us,
            peers=config.sync.peers,
            listen=config.listen.sync,
            certificate=None if config.sync.tls is None else NodeCertificate(config.sync.tls),
            tracer=self._tracing.tracer,
            lending=None if ledger is None else Lending(ledger, self._strict_us),
        )
        self._mesh.use_rules(rules.digest)
        latency = LatencyHistogram()
        self._stalls = StallMonitor()
        service = RateLimitService(self._limiter, self._clock.now_us, latency, self._tracing.tracer)
        self._health = HealthService(lambda: not self.missing(), [SERVICE_NAME])
        reflection = ReflectionService([SERVICE_NAME, HEALTH_SERVICE_NAME])
        handlers = {**service.handlers(), **self._health.handlers(), **reflection.handlers()}
        certificate = None if config.listen.tls is None else ServerCertificate(config.listen.tls)
        limits = _limits(config.listen)
        self._front_end: FrontEnd
        self._h2: H2FrontEnd | None = None
        if front_end is FrontEndKind.H2:
            self._front_end = self._h2 = H2FrontEnd(
                handlers, config.listen.grpc, limits=limits, certificate=certificate
            )
        else:
            self._front_end = GrpcioFrontEnd(handlers, config.listen.grpc, limits=limits, certificate=certificate)
        registry = metrics.create_registry(
            metrics.Sources(
                node=node,
                region=region,
                limiter=self._limiter,
                latency=latency,
                peers=self._mesh.status,
                request_errors=service.errors,
                replication=self._mesh,
                rules=self._reloader,
                membership=self._mesh.membership_status,
                loop=self._stalls,
                front_end=self._h2,
                listener_certificate=certificate,
            )
        )
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
            )
        )
        self._console = ConsoleServer(console_app, config.listen.admin)
        self._config = config

    def missing(self) -> list[str]:
        """What the sidecar still waits for before it answers as well as it can, in words; empty when it does. Where
        that changes the health service is told.

        Rules that an xDS server has yet to send are not among it: only the console's /readyz waits for them, so that
        nobody restarts a sidecar because there are none.
        """
        if self._stop.is_set():
            return ["the sidecar is shutting down"]
        missing = []
        if not self._front_end.ready.is_set():
            missing.append("the gRPC front end is starting")
        if self._reloader.has_rules.is_set() and not self._joined:
            missing.append("peers have not yet told all they know")
        return missing

    def degraded(self) -> list[str]:
        """What the sidecar does worse than it could, in words; it is ready all the same."""
        if self._h2 is not None and self._h2.is_shedding:
            return ["calls or connections were refused in the last minute, since others take too much room"]
        return []

    async def run(self) -> None:
        """Answer until SIGTERM or SIGINT, then drain.

        Raises:
            ListenError: an address cannot be listened on.
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
                chores = [tasks.create_task(chore) for chore in self._chores()]
                await self._stop.wait()
                _log.info("draining")
                await self._front_end.stop()
                self._mesh.stop()
                if not self._reloader.has_rules.is_set():
                    replicating.cancel()
                await asyncio.wait([replicating])
                await self._console.stop()
                for chore in chores:
                    chore.cancel()
        finally:
            await self._tracing.close()
        _log.info("stopped")

    def _chores(self) -> Iterator[Coroutine[None, None, None]]:
        """What is done beside answering, until the stop."""
        yield self._source.run(self._reloader)
        yield self._join()
        yield self._slew()
        yield self._stalls.run()
        yield self._sweep(self._limiter.store, self._clock.now_us)
        if self._limiter.ledger is not None:
            yield self._sweep(self._limiter.ledger, self._strict_us)

    async def _open(self) -> None:
        async with AsyncExitStack() as opened:
            await self._console.start()
            opened.push_async_callback(self._console.stop)
            if self._reloader.has_rules.is_set():
                await self._start_mesh()
            opened.push_async_callback(self._mesh.close)
            await self._front_end.start()
            opened.pop_all()

    async def _start_mesh(self) -> None:
        try:
            await self._mesh.start()
        except OSError as error:
            raise ListenError(str(self._config.listen.sync), str(error)) from error

    async def _replicate(self) -> None:
        if not self._reloader.has_rules.is_set():
            # Peers tell all they know at once, and of that a node keeps what it has rules for.
            await self._reloader.has_rules.wait()
            await self._start_mesh()
        await self._mesh.run()

    async def _join(self) -> None:
        await self._front_end.ready.wait()
        self._health.changed()
        await self._reloader.has_rules.wait()
        self._health.changed()
        if not await self._mesh.joined(JOIN_SECONDS):
            _log.warning("not_joined", waited_seconds=JOIN_SECONDS, peers=self._config.sync.peers)
        self._joined = True
        self._health.changed()
        _log.info("ready")

    def _begin_stop(self) -> None:
        self._stop.set()
        self._health.changed()

    def _use_rules(self, rules: Rules) -> Retired:
        retired = self._limiter.use_rules(rules)
        self._mesh.use_rules(rules.digest)
        return retired

    def _reload(self) -> None:
        """What SIGHUP asks for."""
        if isinstance(self._source, RulesFiles):
            self._source.ask()
        else:
            _log.info("nothing_to_reload", reason="the xDS server sends rules by itself")

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
            gap_us = self._clock.slew()
            if gap_us >= JUMP_US:
                self._limiter.jumped_us += gap_us

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
            sync=self._mesh.bound_address,
            peers=list(self._config.sync.peers),
            rules=len(list(rules)),
        )
        if self._config.xds is None and not rules.domains and rules.unruled is None:
            _log.warning("nothing_is_limited", reason="neither rules nor bucket are configured")
        members = self._config.sync.members
        if members is not None and self._config.node.id not in members:
            reason = "this node is not among sync.members: of strict limits it can only borrow"
            _log.warning("no_home_share", node=self._config.node.id, members=list(members), reason=reason)


def _ledger(config: SidecarConfig, rules: Rules, origin: Origin, now_us: int) -> Ledger | None:
    """None when no limit can be strict."""
    if config.membership is None:
        return None
    shares = Shares(config.membership, origin.node, now_us)
    return Ledger(
        shares,
        origin,
        rules.strict_limit_of_key,
        secrets.randbelow(MAX_FIRST_NUMBER),
        max_buckets=config.max_buckets,
        rule_key=rule_key,
    )


def _limits(listen: ListenConfig) -> Limits:
    """With those that are configured; 0 is never there."""
    age_s, grace_s = listen.max_connection_age_seconds, listen.max_connection_age_grace_seconds
    return replace(DEFAULT_LIMITS, age=age_s or None, age_grace=grace_s or inf)


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
