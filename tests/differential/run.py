"""A round: some rules files, requests to each, and every answer of the two services compared.

Services count by the wall clock, and each looks at it itself. Limits are per hour and longer, so windows rarely begin
anew. When an hour ends while a request is answered, one service may count it in the old window: the rest of that file
is left out.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import grpc
import yaml
from google.protobuf.json_format import MessageToJson

from differential.build import Reference
from differential.compare import Answer, Asked, Disagreement, Failure, disagreements
from differential.deliberate import Case, reason
from differential.generate import Generator
from differential.services import both
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

FILES: Final = 50
"""Of a round."""

REQUESTS: Final = 20
"""To a file."""

_HOUR: Final = 3_600
_CALL_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Undeclared:
    """A disagreement that is in no table; its text says how to see it again."""

    seed: int
    number: int
    case: Case
    disagreements: list[Disagreement]

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, file {self.number}, request {len(self.case.asked)}:"]
        lines += [f"  {disagreement}" for disagreement in self.disagreements]
        lines.append(f"Again: PYTHONPATH=tests python -m differential --seed {self.seed} --file {self.number}")
        lines.append(yaml.safe_dump(self.case.file, sort_keys=False, allow_unicode=True))
        lines += [
            MessageToJson(asked.message, indent=None, preserving_proto_field_name=True, ensure_ascii=False)
            for asked in self.case.asked
        ]
        return "\n".join(lines)


@dataclass(slots=True)
class Outcome:
    """What became of the requests that both services were asked.

    Args:
        deliberate: disagreements by the row of the table that explains them.
        undeclared: at most one a file: what follows the first may only follow from it.
    """

    requests: int = 0
    deliberate: Counter[str] = field(default_factory=Counter)
    undeclared: list[Undeclared] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.requests += other.requests
        self.deliberate += other.deliberate
        self.undeclared += other.undeclared


@dataclass(frozen=True, slots=True)
class Script:
    """A file and the requests to it.

    Args:
        joined: see `Generator`.
    """

    number: int
    file: dict[str, Any]
    joined: bool
    requests: list[RateLimitRequest]


def play_round(reference: Reference, seed: int, only: int | None = None) -> Outcome:
    """Ask both services the requests of a seed, and compare their answers.

    Args:
        only: the number of a file; None for all.
    """
    return asyncio.run(_play(reference, seed, only))


async def _play(reference: Reference, seed: int, only: int | None) -> Outcome:
    is_complete = reference.version.is_complete
    played = [script for script in scripts(seed, is_complete=is_complete) if only is None or script.number == only]
    files = {
        f"{script.number:03}.yaml": yaml.safe_dump(script.file, sort_keys=False, allow_unicode=True)
        for script in played
    }
    outcome = Outcome()
    # In /tmp: a pytest folder's name can be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="differential-") as folder:
        async with both(reference, Path(folder), files, _environment(seed, is_complete)) as (there, here):
            for script in played:
                await _play_file(outcome, there, here, script, seed)
    return outcome


async def _play_file(
    outcome: Outcome,
    there: RateLimitServiceStub,
    here: RateLimitServiceStub,
    script: Script,
    seed: int,
) -> None:
    asked: list[Asked] = []
    for message in script.requests:
        before = int(time.time())
        theirs, ours = await asyncio.gather(_answer(there, message), _answer(here, message))
        asked.append(Asked(message, before, int(time.time())))
        if before // _HOUR != asked[-1].after // _HOUR:
            return
        outcome.requests += 1
        case = Case(script.file, script.joined, asked)
        unexplained = []
        for disagreement in disagreements(asked[-1], theirs, ours):
            name = reason(case, disagreement)
            if name is None:
                unexplained.append(disagreement)
            else:
                outcome.deliberate[name] += 1
        if unexplained:
            outcome.undeclared.append(Undeclared(seed, script.number, case, unexplained))
            return


def scripts(seed: int, *, is_complete: bool) -> Iterator[Script]:
    """Those of a round: the seed says all."""
    for number in range(FILES):
        random = Random(f"{seed}/{number}")
        joined, mixed = number % 10 == 0, number % 5 == 1
        generator = Generator(random, is_complete=is_complete, joined=joined, mixed=mixed)
        file = generator.rules_file(f"domain-{number}")
        # Those that come again find counts of their own.
        few = [generator.request(file) for _ in range(REQUESTS // 2)]
        yield Script(number, file, joined, [random.choice(few) for _ in range(REQUESTS)])


def _environment(seed: int, is_complete: bool) -> dict[str, str]:
    return {
        "LIMIT_RESPONSE_HEADERS_ENABLED": "true",
        "RESPONSE_DYNAMIC_METADATA": "true" if is_complete else "false",
        "SHADOW_MODE": "true" if seed % 7 == 3 else "false",
        "QUOTA_MODE": "true" if seed % 7 == 5 and is_complete else "false",
    }


async def _answer(stub: RateLimitServiceStub, message: RateLimitRequest) -> Answer:
    try:
        return await stub.ShouldRateLimit(message, timeout=_CALL_SECONDS)
    except grpc.aio.AioRpcError as error:
        return Failure(error.code().name, error.details() or "")
