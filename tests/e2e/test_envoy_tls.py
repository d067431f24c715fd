"""A real Envoy that calls its sidecar over TLS, each showing the other a certificate, as Envoy Gateway sets it up."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import yaml
from certificates import Authority
from e2e.sidecars import sidecar_command
from prometheus_client.parser import text_string_to_metric_families

from ratelimit_sidecar.demo.bootstrap import EnvoySettings, envoy_bootstrap, to_yaml
from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.demo.regions import find_envoy

ROOT = Path(__file__).parents[2]
SIDECAR, ENVOY = "ratelimit.example", "envoy.example"

RULES = {
    "domain": "openclaw",
    "descriptors": [{"key": "agent", "rate_limit": {"unit": "year", "requests_per_unit": 2}}],
}


def sidecar(folder: Path, authority: Authority, ports: RegionPorts, front_end: str) -> Command:
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
    files = authority.write_listener(folder / "sidecar", SIDECAR, clients=authority)
    environment = {
        "GRPC_SERVER_USE_TLS": "true",
        "GRPC_SERVER_TLS_CERT": str(files.certificate),
        "GRPC_SERVER_TLS_KEY": str(files.key),
        "GRPC_CLIENT_TLS_CACERT": str(files.ca),
        "GRPC_CLIENT_TLS_SAN": ENVOY,
    }
    command = sidecar_command(folder, ports, {"rules": [str(folder / "rules.yaml")]}, environment=environment)
    return Command(command.name, [*command.argv, "--frontend", front_end], command.ready_url, command.environment)


def envoy(folder: Path, authority: Authority, ports: RegionPorts, upstream: int, name: str) -> Command:
    """
    Args:
        name: that Envoy's certificate is for.
    """
    files = authority.write(folder / f"tls-{name}", name)
    settings = EnvoySettings(
        region="local",
        listener=f"{HOST}:{ports.envoy}",
        admin=f"{HOST}:{ports.envoy_admin}",
        upstream=f"{HOST}:{upstream}",
        sidecar=f"{HOST}:{ports.grpc}",
        timeout_ms=1_000,
        failure_mode_deny=True,
    )
    bootstrap = yaml.safe_load(to_yaml(envoy_bootstrap(settings)))
    [cluster] = [each for each in bootstrap["static_resources"]["clusters"] if each["name"] == "ratelimit_sidecar"]
    cluster["transport_socket"] = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": {
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": str(files.certificate)},
                        "private_key": {"filename": str(files.key)},
                    }
                ],
                "validation_context": {
                    "trusted_ca": {"filename": str(files.ca)},
                    "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": SIDECAR}}],
                },
            },
        },
    }
    config = folder / f"envoy-{name}.yaml"
    config.write_text(yaml.safe_dump(bootstrap))
    argv = [find_envoy(), "-c", str(config), "--concurrency", "1", "--log-level", "warning", "--disable-hot-restart"]
    return Command(f"envoy-{name}", argv, f"http://{HOST}:{ports.envoy_admin}/ready")


@pytest.mark.parametrize("front_end", ["h2", pytest.param("grpcio", marks=pytest.mark.slow)])
async def test_an_envoy_with_the_right_certificate_is_answered_and_another_is_not(
    tmp_path: Path, front_end: str
) -> None:
    ports, authority = free_ports(2), Authority()
    region, of_stranger = ports.regions
    async with Children(tmp_path) as children, httpx.AsyncClient(trust_env=False) as client:
        upstream = [sys.executable, str(ROOT / "examples/openclaw/rating_api.py"), "--port", str(ports.upstream)]
        await children.start(Command("upstream", upstream, f"http://{HOST}:{ports.upstream}/healthz"))
        await children.start(sidecar(tmp_path, authority, region, front_end))
        await children.start(envoy(tmp_path, authority, region, ports.upstream, ENVOY))

        async def ask(port: int) -> int:
            return (await client.get(f"http://{HOST}:{port}/rate", params={"agent": "ada"})).status_code

        assert [await ask(region.envoy) for _ in range(3)] == [200, 200, 429]
        stranger = replace(region, envoy=of_stranger.envoy, envoy_admin=of_stranger.envoy_admin)
        await children.start(envoy(tmp_path, authority, stranger, ports.upstream, "stranger.example"))
        # It denies what it cannot ask about.
        assert await ask(stranger.envoy) == 503
        families = text_string_to_metric_families((await client.get(f"http://{HOST}:{region.admin}/metrics")).text)
        samples = {
            (sample.name, sample.labels.get("reason")): sample.value for family in families for sample in family.samples
        }
        assert samples["ratelimit_listener_certificate_not_after_timestamp_seconds", None] > time.time()
        if front_end == "h2":
            assert samples["ratelimit_connections_closed_total", "certificate"] >= 1
