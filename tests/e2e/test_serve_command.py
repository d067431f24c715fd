import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from e2e.cluster import three_regions
from e2e.commands import command
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from ratelimit_sidecar.demo.ports import free_ports

RULES = """
domain: openclaw
descriptors:
  - key: agent
    rate_limit: {unit: day, requests_per_unit: 20}
"""


def config(folder: Path, *, grpc: int, admin: int, peers: Sequence[str] = ()) -> str:
    file = folder / "sidecar.yaml"
    file.write_text(
        f"listen: {{grpc: ['127.0.0.1:{grpc}'], admin: '127.0.0.1:{admin}', sync: '127.0.0.1:0'}}\n"
        f"sync: {{peers: {list(peers)}}}\n"
    )
    return str(file)


@pytest.mark.slow
async def test_sigterm_beside_an_envoy_with_open_connections_drains_and_exits_with_0(tmp_path: Path) -> None:
    async with three_regions(tmp_path, RULES) as cluster:
        region = cluster.regions[0]
        assert (await cluster.ask(region, "claw")).status_code == 200

        region.sidecar.signal(signal.SIGTERM)

        assert await region.sidecar.wait() == 0, region.sidecar.log.read_text()


async def test_a_taken_port_is_named_and_ends_it_with_1(tmp_path: Path) -> None:
    ports = free_ports(1).regions[0]
    with socket.create_server(("127.0.0.1", ports.grpc)):
        async with command("serve", "--config", config(tmp_path, grpc=ports.grpc, admin=ports.admin)) as serve:
            code = await serve.ended()

    assert code == 1
    assert str(ports.grpc) in serve.output
    assert "Traceback" not in serve.output


async def test_a_bad_config_is_told_by_line_and_ends_it_with_2(tmp_path: Path) -> None:
    file = tmp_path / "sidecar.yaml"
    file.write_text("listen:\n  grcp: ['127.0.0.1:8081']\n")

    async with command("serve", "--config", str(file)) as serve:
        code = await serve.ended()

    assert code == 2
    assert f"{file}:2:3" in serve.output
    assert "grcp" in serve.output


@pytest.mark.parametrize(
    "level", ["fatal", pytest.param("loud", marks=pytest.mark.slow)], ids=["bad config", "bad level"]
)
async def test_why_it_ends_is_an_event_like_all_others_where_they_are_json(level: str, tmp_path: Path) -> None:
    file = tmp_path / "sidecar.yaml"
    file.write_text("listen:\n  grcp: ['127.0.0.1:8081']\n")

    async with command("serve", "--config", str(file), environment={"LOG_FORMAT": "json", "LOG_LEVEL": level}) as serve:
        code = await serve.ended()

    assert code == 2
    [line] = serve.output.splitlines()
    told = json.loads(line)
    assert (told["event"], told["level"]) == ("failed", "critical")
    assert ("LOG_LEVEL is 'loud'" if level == "loud" else f"{file}:2:3") in told["why"]


async def test_bad_rules_are_told_by_file_and_line_and_end_it_with_2(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(
        "domain: openclaw\ndescriptors:\n  - key: agent\n    rate_limit: {unit: fortnight, requests_per_unit: 20}\n"
    )
    file = tmp_path / "sidecar.yaml"
    file.write_text("rules: [rules.yaml]\n")

    async with command("serve", "--config", str(file)) as serve:
        code = await serve.ended()

    assert code == 2
    assert "rules.yaml:4:" in serve.output
    assert "fortnight" in serve.output


async def test_a_peer_that_accepts_and_says_nothing_does_not_keep_it_from_being_ready(tmp_path: Path) -> None:
    ports = free_ports(1).regions[0]
    with socket.create_server(("127.0.0.1", 0)) as mute:
        peers = [f"127.0.0.1:{mute.getsockname()[1]}"]
        file = config(tmp_path, grpc=ports.grpc, admin=ports.admin, peers=peers)
        async with command("serve", "--config", file) as serve:
            await serve.printed("] ready ")
            # Not before it has waited for it.
            assert serve.output.index("peer_unreachable") < serve.output.index("] ready ")
            serve.signal(signal.SIGTERM)
            assert await serve.ended() == 0


@pytest.mark.slow
async def test_a_peer_that_answers_with_errors_is_told_of_where_it_says_that_it_is_ready(tmp_path: Path) -> None:
    ports = free_ports(1).regions[0]
    # Its own port for Envoys, where no peer answers.
    address = f"127.0.0.1:{ports.grpc}"
    file = config(tmp_path, grpc=ports.grpc, admin=ports.admin, peers=[address])
    async with command("serve", "--config", file) as serve, httpx.AsyncClient() as console:
        await serve.printed("] ready ")
        degraded: list[str] = []
        async with asyncio.timeout(60):
            while not degraded:
                await asyncio.sleep(0.05)
                answer = await console.get(f"http://127.0.0.1:{ports.admin}/readyz")
                assert answer.status_code == 200
                degraded = answer.json()["degraded"]
        [text] = degraded
        # Which of the two is said is a race in gRPC.
        error = re.compile("UNIMPLEMENTED: |INTERNAL: Internal error from Core")
        before, told, after = text.partition(f"limits are not shared with {address}: ")
        assert (before, bool(told), bool(error.match(after))) == ("", True, True)
        async with command("peers", "--admin", f"http://127.0.0.1:{ports.admin}") as peers:
            assert await peers.ended() == 1
            assert error.search(peers.output)


@pytest.mark.parametrize("front_end", ["h2", pytest.param("grpcio", marks=pytest.mark.slow)])
async def test_every_line_it_prints_is_a_log_of_its_own(front_end: str, tmp_path: Path) -> None:
    ports = free_ports(1).regions[0]
    file = config(tmp_path, grpc=ports.grpc, admin=ports.admin)
    arguments = ("serve", "--config", file, "--frontend", front_end)
    async with command(*arguments, environment={"LOG_FORMAT": "json"}) as serve:
        await serve.printed('"event": "ready"')
        reader, writer = await asyncio.open_connection("127.0.0.1", ports.admin)
        writer.write(b"no HTTP\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports.admin}", trust_env=False) as client:
            assert (await client.get("/metrics")).status_code == 200
            assert (
                await client.post("/json", content=b"no JSON", headers={"content-type": "application/json"})
            ).status_code == 400
            serve.signal(signal.SIGTERM)
            assert await serve.ended() == 0

    events = [json.loads(line)["event"] for line in serve.output.splitlines()]
    assert events == ["started", "nothing_is_limited", "ready", "draining", "stopped"]


async def test_it_ends_before_python_finalizes_which_threads_of_grpc_may_abort(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'finalizing', flush=True)\n")
    ports = free_ports(1).regions[0]
    file = config(tmp_path, grpc=ports.grpc, admin=ports.admin)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    async with command("serve", "--config", file, environment={"PYTHONPATH": path}) as serve:
        await serve.printed("] ready ")
        serve.signal(signal.SIGTERM)
        assert await serve.ended() == 0
    assert "stopped" in serve.output
    assert "finalizing" not in serve.output


@pytest.mark.parametrize("front_end", ["h2", "grpcio"])
async def test_who_watches_its_health_is_told_of_the_stop_and_does_not_delay_it(front_end: str, tmp_path: Path) -> None:
    ports = free_ports(1).regions[0]
    file = config(tmp_path, grpc=ports.grpc, admin=ports.admin)
    async with command("serve", "--config", file, "--frontend", front_end) as serve:
        await serve.printed("] ready ")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
            # As probes of envoyproxy/ratelimit call it.
            health = await HealthStub(channel).Check(HealthCheckRequest(service="ratelimit"), timeout=60)
            assert health.status == HealthCheckResponse.SERVING
            watch = HealthStub(channel).Watch(HealthCheckRequest(), timeout=60)
            assert (await watch.read()).status == HealthCheckResponse.SERVING
            serve.signal(signal.SIGTERM)
            assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
            assert await watch.code() == grpc.StatusCode.UNAVAILABLE
        assert await serve.ended() == 0


async def test_who_watches_while_it_joins_its_peers_is_told_when_it_is_ready(tmp_path: Path) -> None:
    ports = free_ports(1).regions[0]
    with socket.create_server(("127.0.0.1", 0)) as mute:
        peers = [f"127.0.0.1:{mute.getsockname()[1]}"]
        file = config(tmp_path, grpc=ports.grpc, admin=ports.admin, peers=peers)
        async with command("serve", "--config", file) as serve:
            await serve.printed("] started ")
            async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
                watch = HealthStub(channel).Watch(HealthCheckRequest(), timeout=60, wait_for_ready=True)
                assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
                assert (await watch.read()).status == HealthCheckResponse.SERVING
                watch.cancel()
