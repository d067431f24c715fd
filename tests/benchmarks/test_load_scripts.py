"""The load scripts for users, each for a moment against three regions of real Envoys, and against none."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import pytest
import pytest_asyncio
from e2e.cluster import Cluster, three_regions

from ratelimit_sidecar.demo.ports import HOST, free_ports

pytestmark = pytest.mark.slow

LOAD = Path(__file__).parents[2] / "benchmarks/load"

RULES = """
domain: openclaw
descriptors:
  - key: agent
    rate_limit: {unit: hour, requests_per_unit: 5}
"""

LOCUST = ["locust", "--locustfile", str(LOAD / "locustfile.py"), "--headless", "--users", "6", "--spawn-rate", "6"]
LOCUST += ["--run-time", "3s", "--only-summary"]
VEGETA = [str(LOAD / "vegeta.sh")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def regions(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with three_regions(tmp_path_factory.mktemp("regions"), RULES) as cluster:
        yield cluster


async def run(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[int | None, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PATH": path, **environment},
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


def urls(cluster: Cluster) -> list[str]:
    return [region.url for region in cluster.regions]


def nowhere() -> list[str]:
    return [f"http://{HOST}:{free_ports(1).upstream}"]


needs_vegeta = pytest.mark.skipif(shutil.which("vegeta") is None, reason="Vegeta is not installed")


@needs_vegeta
@pytest.mark.asyncio(loop_scope="module")
async def test_vegeta_is_answered_by_all_regions_with_200_and_429_alone(regions: Cluster) -> None:
    environment = {"URLS": " ".join(urls(regions)), "RATE": "60", "DURATION": "2s", "AGENTS": "4"}
    code, output = await run(VEGETA, environment)
    assert code == 0, output
    assert "200:" in output
    assert "429:" in output


@needs_vegeta
async def test_vegeta_fails_when_nobody_answers() -> None:
    code, output = await run(VEGETA, {"URLS": " ".join(nowhere()), "RATE": "10", "DURATION": "1s"})
    assert code == 1, output


@pytest.mark.asyncio(loop_scope="module")
async def test_locust_is_answered_by_all_regions_without_a_failure(regions: Cluster) -> None:
    code, output = await run(LOCUST, {"URLS": ",".join(urls(regions)), "AGENTS": "6"})
    assert code == 0, output
    assert all(url in output for url in urls(regions))


async def test_locust_fails_when_nobody_answers() -> None:
    code, output = await run(LOCUST, {"URLS": ",".join(nowhere())})
    assert code == 1, output


K6_STUB = {
    "package.json": json.dumps(
        {"type": "module", "exports": {".": "./k6.js", "./http": "./http.js", "./metrics": "./metrics.js"}}
    ),
    "k6.js": "export const check = (answer, checks) => Object.values(checks).every((holds) => holds(answer));",
    "http.js": "export default {setResponseCallback() {}, expectedStatuses() {}, get: (url) => ({url, status: 429})};",
    "metrics.js": "export class Counter { constructor(name) { this.name = name; } add() { counted.push(this.name); } }",
}
"""k6 itself is under a licence with which it cannot be had here; the script is run on what it uses of it."""

K6_DRIVER = """
globalThis.__ENV = {};
globalThis.counted = [];
const script = await import("./k6.js");
__ENV.URL = "http://one";
script.ask();
console.log(JSON.stringify({options: script.options, counted}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
async def test_the_k6_scenario_is_5000_requests_a_second_over_three_regions_with_95_percent_in_300_ms(
    tmp_path: Path,
) -> None:
    stub = tmp_path / "node_modules/k6"
    stub.mkdir(parents=True)
    for name, text in K6_STUB.items():
        (stub / name).write_text(text)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(LOAD / "k6.js", tmp_path)
    (tmp_path / "driver.js").write_text(K6_DRIVER)
    code, output = await run(["node", str(tmp_path / "driver.js")], {})
    assert code == 0, output
    ran = json.loads(output)
    scenarios = ran["options"]["scenarios"].values()
    assert len({scenario["env"]["URL"] for scenario in scenarios}) == 3
    assert 5_000 <= sum(scenario["rate"] for scenario in scenarios) <= 5_003
    assert ran["options"]["thresholds"]["http_req_duration"] == ["p(95)<300"]
    assert ran["counted"] == ["denied"]
