"""Envoy itself reads the examples."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ratelimit_sidecar.demo.regions import find_envoy

EXAMPLES = Path(__file__).parents[2] / "examples"


def read(name: str) -> Any:
    return yaml.safe_load((EXAMPLES / name).read_text())


def envoy_config(name: str) -> Any:
    """The Envoy configuration of an example; of an EnvoyFilter with its values where Istio puts them."""
    config = read(name)
    return with_patches(read("filters/envoy-ratelimit.yaml"), config) if config.get("kind") == "EnvoyFilter" else config


def with_patches(bootstrap: Any, envoy_filter: Any) -> Any:
    patches = {patch["applyTo"]: patch["patch"] for patch in envoy_filter["spec"]["configPatches"]}
    resources = bootstrap["static_resources"]
    (network_filter,) = resources["listeners"][0]["filter_chains"][0]["filters"]
    manager = network_filter["typed_config"]
    (host,) = manager["route_config"]["virtual_hosts"]
    router = manager["http_filters"][-1]
    manager["http_filters"] = [patches["HTTP_FILTER"]["value"], router]
    host.update(patches["VIRTUAL_HOST"]["value"])
    resources["clusters"] = [resources["clusters"][0], patches["CLUSTER"]["value"]]
    return bootstrap


ASKS_THE_SIDECAR = [
    *("filters/envoy-ratelimit.yaml", "filters/envoy-ext-authz.yaml", "filters/envoy-ext-authz-http.yaml"),
    *("edge/envoy.yaml", "edge/failover.yaml", "llm-tokens/envoy.yaml", "llm-tokens/envoy-afterwards.yaml"),
    *("../deploy/istio/workload.yaml", "../deploy/istio/gateway.yaml"),
    *(f"../envoy/{region}.yaml" for region in ("us-east-1", "eu-west-2", "ap-southeast-1")),
]


@pytest.mark.parametrize("name", ASKS_THE_SIDECAR)
def test_thousands_of_requests_at_once_wait_for_the_sidecar(name: str) -> None:
    """Those that a circuit breaker refuses pass, and so do all on a connection that Envoy ends (docs/tuning.md)."""
    clusters = [each for each in envoy_config(name)["static_resources"]["clusters"] if "sidecar" in each["name"]]
    assert clusters
    for cluster in clusters:
        (threshold,) = cluster["circuit_breakers"]["thresholds"]
        assert (threshold["max_requests"], threshold["max_pending_requests"]) == (100_000, 100_000)
        for options in cluster.get("typed_extension_protocol_options", {}).values():
            http2 = options["explicit_http_config"].get("http2_protocol_options")
            if http2 is not None:
                assert (http2["max_outbound_frames"], http2["max_outbound_control_frames"]) == (1_000_000, 100_000)


@pytest.mark.parametrize("name", [*ASKS_THE_SIDECAR, "quotas/envoy.yaml"])
def test_a_connection_to_a_sidecar_whose_node_vanished_is_ended_soon(name: str) -> None:
    """Until then calls pass, and a health check takes out a host, not a connection (docs/tuning.md)."""
    found = 0
    for cluster in envoy_config(name)["static_resources"]["clusters"]:
        for options in cluster.get("typed_extension_protocol_options", {}).values():
            http2 = options["explicit_http_config"].get("http2_protocol_options")
            if "sidecar" in cluster["name"] and "pipe" not in str(cluster) and http2 is not None:
                assert http2["connection_keepalive"] == {"interval": "5s", "timeout": "5s"}
                found += 1
    assert found or name in ("filters/envoy-ext-authz-http.yaml", "../deploy/istio/workload.yaml")


def retry_policies(config: Any) -> Iterator[Any]:
    """Of services that are asked, wherever they are."""
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from retry_policies(value)
    if isinstance(config, dict) and "retry_back_off" in config:
        yield config


@pytest.mark.parametrize("name", ASKS_THE_SIDECAR)
def test_a_try_has_as_much_time_as_the_call(name: str) -> None:
    """Envoy takes the longest back-off as the time for one try."""
    config = envoy_config(name)
    policies = list(retry_policies(config))
    assert {policy["retry_back_off"]["max_interval"] for policy in policies} <= {"5s"}
    grpc = [set(policy["retry_on"].split(",")) for policy in policies if "unavailable" in policy["retry_on"]]
    assert all("resource-exhausted" in asked for asked in grpc), "else what is refused for want of room passes"
    if policies:
        (retries,) = {
            cluster["circuit_breakers"]["thresholds"][0].get("max_retries")
            for cluster in config["static_resources"]["clusters"]
            if "sidecar" in cluster["name"]
        }
        assert retries == 100_000


@pytest.mark.parametrize("name", [*ASKS_THE_SIDECAR, "quotas/envoy.yaml"])
def test_envoy_takes_an_example(tmp_path: Path, name: str) -> None:
    file = tmp_path / "envoy.yaml"
    file.write_text(yaml.safe_dump(envoy_config(name)))
    argv = [find_envoy(), "--mode", "validate", "-c", str(file)]
    ran = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
