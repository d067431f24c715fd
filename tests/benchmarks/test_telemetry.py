"""What telemetry costs is measured against a sidecar that has none, and decides all the same."""

from __future__ import annotations

import pytest

from benchmarks.serving.requests import RULES
from benchmarks.serving.servers import running_servers

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("program", "timed"), [("ratelimit_sidecar", 1), ("benchmarks.serving.unobserved_sidecar", 0)])
def test_a_call_is_timed_unless_telemetry_is_off(program: str, timed: int) -> None:
    with running_servers() as servers:
        sidecar = servers.sidecar(rules=RULES, program=[program])
        # The call by which it was waited for.
        assert sidecar.metric("openclaw_request_latency_seconds_count") == [timed]
        assert sum(sidecar.metric("ratelimit_decisions_total")) == 1
