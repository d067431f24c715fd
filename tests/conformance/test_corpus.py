"""Every case of the corpus, asked of the decision itself, over both front ends on TCP, unix sockets and TLS,
by an independent client and as JSON. `make test` takes one front end and transport, `make test-slow` all.

Time is the test's own. A front end lives as long as the module; each case gives it a limiter of its own.
"""

from __future__ import annotations

import asyncio
import functools
import tempfile
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import grpclib.client
import httpx
import pytest
import pytest_asyncio
import yaml
from conformance.answers import Answer, Refusal, answer_of, check, message_of
from conformance.corpus import FILES, Case, cases_of
from google.protobuf.json_format import MessageToJson, ParseDict
from prometheus_client import CollectorRegistry
from server.front_ends import KINDS, Tls, channel_to, independent_channel_to, running

from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.config.sidecar import load_sidecar_config
from ratelimit_sidecar.console.app import ConsoleSources, create_app
from ratelimit_sidecar.console.server import HttpServer
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.request import InvalidRequest
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.limiter.settings import AnswerSettings
from ratelimit_sidecar.rules_source.reloader import Reloader
from ratelimit_sidecar.server.rpc import Metadata
from ratelimit_sidecar.services.ratelimit import SERVICE_NAME, RateLimitService
from ratelimit_sidecar.telemetry.latency import LatencyHistogram

with warnings.catch_warnings():
    # It uses what pydantic will remove in its next major version.
    warnings.simplefilter("ignore")
    from envoy_data_plane.envoy.service.ratelimit import v3 as typed_rls

on_the_loop_of_the_module = pytest.mark.asyncio(loop_scope="module")

in_each_file = pytest.mark.parametrize("file", [pytest.param(file, id=file.stem) for file in FILES])
"""A test has all cases of a file, as to set up and report each by itself takes longer than to play it."""

START_US = 15_330 * 86_400 * 1_000_000
"""Windows of seven, of thirty and of 365 days begin here: 15,330 is their least common multiple."""

FIRST = "h2-tcp"
WHERE = [
    pytest.param(where, marks=[] if where == FIRST else [pytest.mark.thorough])
    for where in (f"{kind}-{transport}" for kind in KINDS for transport in ("tcp", "unix", "tls"))
]

Ask = Callable[[RateLimitRequest], Awaitable[Answer | Refusal]]


class NoTelemetry:
    def sampled(self, metadata: object) -> None: ...

    def record(self, *_: object) -> None: ...


@dataclass
class Subject:
    """The limiter that a case is about, behind a handler that stays the same."""

    limiter: Limiter
    now_us: int = START_US

    def __post_init__(self) -> None:
        self._service = RateLimitService(self.limiter, lambda: self.now_us, LatencyHistogram(), NoTelemetry())

    def should_rate_limit(self, request: bytes, metadata: Metadata) -> bytes:
        return self._service.should_rate_limit(request, metadata)


class Stage:
    """Where the subject of the current case stands."""

    subject: Subject

    def should_rate_limit(self, request: bytes, metadata: Metadata) -> bytes:
        return self.subject.should_rate_limit(request, metadata)


@functools.cache
def loaded(case: Case) -> tuple[Rules, AnswerSettings]:
    """Read what the case says as the sidecar does.

    Raises:
        ConfigError: the rules are broken.
    """
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        rules_folder = folder / "rules"
        rules_folder.mkdir()
        for name, text in case.all_files.items():
            (rules_folder / name).write_text(text)
        (folder / "sidecar.yaml").write_text(yaml.safe_dump({"rules": ["rules"], **case.config}))
        config = load_sidecar_config(folder / "sidecar.yaml", case.environment)
        rules = load_rules(
            config.rules, default_rule=config.bucket, defaults=config.rule_defaults, merge_domains=config.merge_domains
        )
        return rules, config.settings


def subject_of(case: Case) -> Subject:
    """A limiter of its own, with nothing taken."""
    rules, settings = loaded(case)
    return Subject(Limiter(rules, Origin("node", 1), settings))


def answered(file: Path) -> list[Case]:
    return [case for case in cases_of(file) if case.requests]


async def play(case: Case, subject: Subject, ask: Ask) -> None:
    for request in case.requests:
        if request.at is not None:
            subject.now_us = START_US + round(request.at * 1_000_000)
        for _ in range(request.times):
            check(request, await ask(message_of(request, case.domain)))


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=WHERE)
async def front_end(
    request: pytest.FixtureRequest, stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[str, Tls | None]]:
    """The address of a running one, and what its clients need for TLS."""
    handlers = {f"/{SERVICE_NAME}/ShouldRateLimit": stage.should_rate_limit}
    kind, _, transport = request.param.partition("-")
    folder = tmp_path_factory.mktemp("front_end")
    tls = Tls(folder / "tls") if transport == "tls" else None
    addresses = [f"unix:{folder}/rls.sock" if transport == "unix" else "127.0.0.1:0"]
    async with running(kind, handlers, addresses, certificate=tls and tls.certificate) as started:
        yield started.addresses[0], tls


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def official_client(front_end: tuple[str, Tls | None]) -> AsyncIterator[Ask]:
    async with channel_to(*front_end) as channel:
        stub = RateLimitServiceStub(channel)

        async def ask(request: RateLimitRequest) -> Answer | Refusal:
            try:
                return answer_of(await stub.ShouldRateLimit(request, timeout=5))
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.INVALID_ARGUMENT:
                    raise
                return Refusal(error.details())

        yield ask


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def independent_client(front_end: tuple[str, Tls | None]) -> AsyncIterator[Ask]:
    """One with another HTTP/2, another gRPC and other message types: grpclib and envoy-data-plane."""
    async with independent_channel_to(*front_end) as channel:
        stub = typed_rls.RateLimitServiceAsyncStub(channel, timeout=5)

        async def ask(request: RateLimitRequest) -> Answer | Refusal:
            typed = typed_rls.RateLimitRequest.parse(request.SerializeToString())
            try:
                answer = await stub.should_rate_limit(typed)
            except grpclib.GRPCError as error:
                if error.status != grpclib.const.Status.INVALID_ARGUMENT:
                    raise
                return Refusal(error.message or "")
            return answer_of(RateLimitResponse.FromString(bytes(answer)))

        yield ask


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def json_client(stage: Stage) -> AsyncIterator[Ask]:
    """One of the console's POST /json."""
    limiter = Limiter(Rules(), Origin("node", 1))
    console = HttpServer(
        create_app(
            ConsoleSources(
                node="node",
                region="local",
                limiter=limiter,
                registry=CollectorRegistry(),
                peers=list,
                membership=lambda: None,
                missing=list,
                degraded=list,
                now_us=lambda: START_US,
                reloader=Reloader(limiter.use_rules, lambda: START_US, "files", limiter.rules),
                should_rate_limit=stage.should_rate_limit,
            )
        ),
        "127.0.0.1:0",
    )
    await console.start()
    async with (
        asyncio.TaskGroup() as tasks,
        httpx.AsyncClient(base_url=f"http://{console.address}", trust_env=False) as client,
    ):
        tasks.create_task(console.serve())

        async def ask(request: RateLimitRequest) -> Answer | Refusal:
            response = await client.post(
                "/json", content=MessageToJson(request), headers={"content-type": "application/json"}
            )
            if response.status_code == httpx.codes.BAD_REQUEST:
                return Refusal(response.json()["error"])
            answer = answer_of(ParseDict(response.json(), RateLimitResponse()))
            assert response.status_code == {"OK": 200, "OVER_LIMIT": 429}[answer.code]
            return answer

        try:
            yield ask
        finally:
            await console.stop()


@on_the_loop_of_the_module
@in_each_file
async def test_the_decision_is_as_the_case_says(file: Path, subtests: pytest.Subtests) -> None:
    for case in answered(file):
        subject = subject_of(case)

        async def ask(request: RateLimitRequest, subject: Subject = subject) -> Answer | Refusal:
            try:
                raw = subject.limiter.decide(request.SerializeToString(), subject.now_us)
            except InvalidRequest as error:
                return Refusal(str(error))
            return answer_of(RateLimitResponse.FromString(raw))

        with subtests.test(case.case):
            await play(case, subject, ask)

            found = {name: counts for (domain, name), counts in subject.limiter.counts.items() if domain == case.domain}
            for name, expected in case.counts.items():
                mentioned = expected.model_dump(exclude_none=True)
                attributes = {count: count if count == "total_hits" else f"{count}_hits" for count in mentioned}
                assert {count: getattr(found[name], attribute) for count, attribute in attributes.items()} == mentioned
            assert not set(case.not_counted) & set(found)


async def assert_answers(file: Path, ask: Ask, stage: Stage, subtests: pytest.Subtests) -> None:
    for case in answered(file):
        with subtests.test(case.case):
            stage.subject = subject_of(case)
            await play(case, stage.subject, ask)


@on_the_loop_of_the_module
@in_each_file
async def test_a_front_end_answers_as_the_case_says(
    file: Path, official_client: Ask, stage: Stage, subtests: pytest.Subtests
) -> None:
    await assert_answers(file, official_client, stage, subtests)


@on_the_loop_of_the_module
@in_each_file
async def test_an_independent_client_is_answered_as_the_case_says(
    file: Path, independent_client: Ask, stage: Stage, subtests: pytest.Subtests
) -> None:
    await assert_answers(file, independent_client, stage, subtests)


@on_the_loop_of_the_module
@in_each_file
async def test_the_answer_in_json_is_as_the_case_says(
    file: Path, json_client: Ask, stage: Stage, subtests: pytest.Subtests
) -> None:
    await assert_answers(file, json_client, stage, subtests)


@in_each_file
def test_what_is_wrong_with_rules_is_said_where_it_stands(file: Path, subtests: pytest.Subtests) -> None:
    for case in cases_of(file):
        if not case.problems:
            continue
        with subtests.test(case.case):
            with pytest.raises(ConfigError) as caught:
                loaded(case)
            found = [
                (Path(problem.file).name, f"{problem.line}:{problem.column}", problem.key)
                for problem in caught.value.problems
            ]
            assert found == [(problem.file, problem.at, problem.key) for problem in case.problems], str(caught.value)
            for expected, problem in zip(case.problems, caught.value.problems, strict=True):
                assert all(part in problem.message for part in expected.says), problem.message


def test_the_corpus_has_every_case_once_and_is_as_large_as_it_should_be() -> None:
    names = Counter(case.case for file in FILES for case in cases_of(file))
    assert [name for name, times in names.items() if times > 1] == []
    assert names.total() >= 120
