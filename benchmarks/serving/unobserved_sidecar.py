"""A sidecar without telemetry, to compare with: `python -m benchmarks.serving.unobserved_sidecar serve --config FILE`.

It is the sidecar's own command and build. The front end calls the limiter, not the service's method, which notes how
long a call takes and looks for a trace in the headers. The loop's stalls are not measured, and nothing looks for the
fullest buckets. Rules count what they decide all the same: that is part of the decision.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from ratelimit_sidecar import app
from ratelimit_sidecar.cli import main as sidecar_command
from ratelimit_sidecar.server.grpc_front_end import GrpcFrontEnd
from ratelimit_sidecar.server.rpc import Handlers, Metadata
from ratelimit_sidecar.services.ratelimit import SERVICE_NAME
from ratelimit_sidecar.telemetry.stalls import StallMonitor

_PATH = f"/{SERVICE_NAME}/ShouldRateLimit"


class _Idle(StallMonitor):
    async def run(self) -> None:
        await asyncio.Event().wait()


async def _look_for_nothing(*_arguments: object) -> None:
    await asyncio.Event().wait()


def _bare(handlers: Handlers, *arguments: Any, **options: Any) -> GrpcFrontEnd:
    service: Any = handlers[_PATH].__self__  # type: ignore[union-attr]
    decide, now_us = service._limiter.decide, service._now_us

    def should_rate_limit(request: bytes, _metadata: Metadata) -> bytes:
        response: bytes = decide(request, now_us())
        return response

    return GrpcFrontEnd({**handlers, _PATH: should_rate_limit}, *arguments, **options)


def main() -> None:
    with ExitStack() as changed:
        changed.enter_context(patch.object(app, "GrpcFrontEnd", _bare))
        changed.enter_context(patch.object(app, "StallMonitor", _Idle))
        changed.enter_context(patch.object(app, "look_for_fullest", _look_for_nothing))
        sidecar_command()


if __name__ == "__main__":
    main()
