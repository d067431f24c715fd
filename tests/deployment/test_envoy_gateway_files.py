"""What can be told of deploy/envoy-gateway without Envoy Gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from certificates import Authority

from deployment.gateways import DEPLOY, STANDALONE, with_folders
from ratelimit_sidecar.config.sidecar import load_sidecar_config

# As Envoy Gateway 1.9.1 sets it for its rate limit service.
ENVIRONMENT = """
RUNTIME_ROOT=/data RUNTIME_SUBDIRECTORY=ratelimit RUNTIME_IGNOREDOTFILES=true RUNTIME_WATCH_ROOT=false LOG_LEVEL=info
USE_STATSD=false CONFIG_TYPE=GRPC_XDS_SOTW CONFIG_GRPC_XDS_SERVER_URL=envoy-gateway:18001
CONFIG_GRPC_XDS_NODE_ID=envoy-ratelimit GRPC_SERVER_USE_TLS=true GRPC_SERVER_TLS_CERT=/certs/tls.crt
GRPC_SERVER_TLS_KEY=/certs/tls.key GRPC_SERVER_TLS_CA_CERT=/certs/ca.crt CONFIG_GRPC_XDS_SERVER_USE_TLS=true
CONFIG_GRPC_XDS_CLIENT_TLS_CERT=/certs/tls.crt CONFIG_GRPC_XDS_CLIENT_TLS_KEY=/certs/tls.key
CONFIG_GRPC_XDS_SERVER_TLS_CACERT=/certs/ca.crt FORCE_START_WITHOUT_INITIAL_CONFIG=true REDIS_SOCKET_TYPE=tcp
REDIS_URL=redis://unused:6379
"""


def test_the_standalone_sidecar_takes_envoy_gateway_for_its_rules(tmp_path: Path) -> None:
    (tmp_path / "etc/certs").mkdir(parents=True)
    for folder in ("mesh", "etc/certs/envoy-rate-limit"):
        Authority().write(tmp_path / folder, "sidecar.example")
    path = tmp_path / "sidecar.yaml"
    path.write_text(with_folders((STANDALONE / "sidecar.yaml").read_text(), tmp_path))

    config = load_sidecar_config(path, {})

    assert config.xds is not None
    assert (config.xds.server, config.xds.node_id) == ("envoy-gateway:18001", "envoy-ratelimit")
    assert config.xds.tls is not None
    assert config.listen.tls is not None


def test_in_kubernetes_the_sidecar_has_the_environment_of_the_service_that_it_replaces(tmp_path: Path) -> None:
    values = yaml.safe_load((DEPLOY / "kubernetes/values.yaml").read_text())
    container = values["config"]["envoyGateway"]["provider"]["kubernetes"]["rateLimitDeployment"]["container"]
    environment = dict(each.split("=", 1) for each in ENVIRONMENT.split())
    environment |= {each["name"]: each["value"] for each in container["env"]}
    for folder in ("certs", "mesh"):
        Authority().write(tmp_path / folder, "sidecar.example")
    path = tmp_path / "sidecar.yaml"
    path.write_text(_config_map()["data"]["sidecar.yaml"].replace(" /mesh/", f" {tmp_path}/mesh/"))

    config = load_sidecar_config(
        path, {name: value.replace("/certs/", f"{tmp_path}/certs/") for name, value in environment.items()}
    )

    assert config.xds is not None
    assert config.xds.node_id == "envoy-ratelimit"
    assert config.listen.tls is not None
    assert config.listen.tls.ca is not None, "an Envoy has to show its certificate"
    assert config.listen.admin == "0.0.0.0:8080", "the kubelet probes it"
    assert config.sync.peers == ("envoy-ratelimit-mesh:50051", "eu-west-2.mesh.example.com:50051")


def _config_map() -> dict[str, Any]:
    objects = yaml.safe_load_all((DEPLOY / "kubernetes/mesh.yaml").read_text())
    found: dict[str, Any] = next(each for each in objects if each["kind"] == "ConfigMap")
    return found
