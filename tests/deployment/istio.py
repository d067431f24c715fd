"""istiod beside a real Kubernetes API, and what it tells proxies."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc.aio
from envoy_data_plane.envoy.config.bootstrap.v3 import Bootstrap, BootstrapStaticResources
from envoy_data_plane.envoy.config.cluster.v3 import Cluster as EnvoyCluster
from envoy_data_plane.envoy.config.listener.v3 import Listener
from envoy_data_plane.envoy.config.route.v3 import VirtualHost
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpConnectionManager
from google.protobuf.json_format import MessageToDict, ParseDict

from deployment import tools
from deployment.charts import helm
from deployment.cluster import HOST, Cluster, free_port
from deployment.engine import ROOT
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.demo.regions import find_envoy
from ratelimit_sidecar.envoy_api.envoy.config.core.v3.base_pb2 import Node
from ratelimit_sidecar.envoy_api.envoy.service.discovery.v3.ads_pb2_grpc import AggregatedDiscoveryServiceStub
from ratelimit_sidecar.envoy_api.envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest

DEPLOY: Final = ROOT / "deploy/istio"
SYSTEM: Final = "istio-system"

_LISTENER: Final = "type.googleapis.com/envoy.config.listener.v3.Listener"
_CLUSTER: Final = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
_MANAGER: Final = "envoy.filters.network.http_connection_manager"

# Where to find it: Envoy's own name for who serves secrets in a pod, and ours for istiod.
_SECRETS, _ISTIOD = "sds-grpc", "istiod"


@dataclass(frozen=True, slots=True)
class Istiod:
    """A running istiod, which is asked what it would tell a proxy.

    Args:
        xds: where proxies call, without TLS.
        webhooks: where the API server would call.
    """

    xds: int
    webhooks: int

    async def listeners(self, node: Node) -> list[Listener]:
        return [Listener.parse(found.value) for found in await self._ask(node, _LISTENER)]

    async def clusters(self, node: Node) -> list[EnvoyCluster]:
        return [EnvoyCluster.parse(found.value) for found in await self._ask(node, _CLUSTER)]

    async def _ask(self, node: Node, type_url: str) -> Sequence[Any]:
        options = (("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0))
        async with grpc.aio.insecure_channel(f"{HOST}:{self.xds}", options) as channel:
            stream = AggregatedDiscoveryServiceStub(channel).StreamAggregatedResources(timeout=60)
            await stream.write(DiscoveryRequest(node=node, type_url=type_url))
            return (await stream.read()).resources


def install(kubernetes: Cluster) -> None:
    """Istio's kinds of objects, and what its chart makes of values.yaml for istiod."""
    crds = tools.path("istio", "crds.yaml")
    kubernetes.kubectl("apply", "--server-side", f"--filename={crds}")
    kubernetes.kubectl("wait", "--for=condition=Established", "--all", "crd", "--timeout=120s")
    kubernetes.kubectl("create", "namespace", SYSTEM)
    shown = [f"--show-only=templates/{name}.yaml" for name in ("configmap", "istiod-injector-configmap")]
    # Without statistics, for which it takes a filter that only Istio's build of Envoy has.
    options = [f"--namespace={SYSTEM}", f"--values={DEPLOY}/values.yaml", "--set=telemetry.enabled=false", *shown]
    text = helm("template", "istiod", str(tools.path("istio", "istiod")), *options)
    kubernetes.kubectl("apply", "--filename=-", stdin=text)


@asynccontextmanager
async def istiod(kubernetes: Cluster, folder: Path, children: Children) -> AsyncIterator[Istiod]:
    """A running istiod for as long as the context lasts.

    Raises:
        Unavailable: it was not built.
    """
    http, xds, webhooks = free_port(), free_port(), free_port()
    argv = [
        str(tools.path("istio", "pilot-discovery")),
        "discovery",
        f"--kubeconfig={kubernetes.kubeconfig}",
        f"--httpAddr={HOST}:{http}",
        f"--grpcAddr={HOST}:{xds}",
        f"--httpsAddr={HOST}:{webhooks}",
        f"--secureGRPCAddr={HOST}:{free_port()}",
        f"--monitoringAddr={HOST}:{free_port()}",
        "--ctrlz_port=0",
    ]
    # It writes into the folder that it runs in.
    argv = ["sh", "-ec", 'cd "$1"; shift; exec "$@"', "sh", str(folder), *argv]
    environment = {
        "POD_NAME": "istiod",
        "POD_NAMESPACE": SYSTEM,
        # Only Istio's build of Envoy has these two filters.
        "PILOT_ENABLE_ALPN_FILTER": "false",
        "PILOT_ENABLE_METADATA_EXCHANGE": "false",
        # A gateway gets what its routes lead to, and not all services, to which it would need Istio's certificates.
        "PILOT_FILTER_GATEWAY_CLUSTER_CONFIG": "true",
    }
    await children.start(Command("istiod", argv, f"http://{HOST}:{http}/ready", environment))
    yield Istiod(xds, webhooks)


def node(kind: str, address: str, name: str, namespace: str, labels: dict[str, str]) -> Node:
    """A proxy, as istio-agent introduces it.

    Args:
        kind: sidecar or router.
    """
    return ParseDict(
        {
            "id": f"{kind}~{address}~{name}.{namespace}~{namespace}.svc.cluster.local",
            "cluster": f"{name}.{namespace}",
            "metadata": {
                "NAMESPACE": namespace,
                "LABELS": labels,
                "CLUSTER_ID": "Kubernetes",
                "INSTANCE_IPS": address,
                "ISTIO_VERSION": "1.30.0",
            },
        },
        Node(),
    )


def filters(listener: Listener) -> list[str]:
    """Names of the HTTP filters of all its filter chains."""
    return [each.name for manager in _managers(listener) for each in manager.http_filters]


def virtual_hosts(listener: Listener) -> list[VirtualHost]:
    routes = [manager.route_config for manager in _managers(listener)]
    return [host for each in routes if each is not None for host in each.virtual_hosts]


def validate(folder: Path, listeners: Sequence[Listener], clusters: Sequence[EnvoyCluster]) -> None:
    """Have the real Envoy read it all.

    Raises:
        AssertionError: it refuses them; with what it said.
    """
    told = Bootstrap(static_resources=BootstrapStaticResources(listeners=[*listeners], clusters=[*clusters]))
    path = folder / "validated.pb"
    path.write_bytes(bytes(told))
    config = bootstrap(Node(id="validated", cluster="validated"), 1, 1)
    for asked in ("lds_config", "cds_config"):
        del config["dynamic_resources"][asked]
    command = [find_envoy(), "--mode", "validate", "--config-path", str(path), "--config-yaml", json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def bootstrap(of: Node, xds: int, admin: int) -> dict[str, Any]:
    """Of an Envoy that gets all from istiod."""
    ads = {"ads": {}, "resource_api_version": "V3"}
    return {
        "node": MessageToDict(of, preserving_proto_field_name=True),
        "admin": {"address": {"socket_address": {"address": HOST, "port_value": admin}}},
        "dynamic_resources": {
            "lds_config": ads,
            "cds_config": ads,
            "ads_config": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": _ISTIOD}}],
            },
        },
        "static_resources": {"clusters": [_grpc_cluster(_ISTIOD, xds), _grpc_cluster(_SECRETS, xds)]},
    }


def _grpc_cluster(name: str, port: int) -> dict[str, Any]:
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    http2 = {"explicit_http_config": {"http2_protocol_options": {}}}
    endpoint = {"address": {"socket_address": {"address": HOST, "port_value": port}}}
    return {
        "name": name,
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}]},
        "typed_extension_protocol_options": {options: {"@type": f"type.googleapis.com/{options}", **http2}},
    }


def _managers(listener: Listener) -> list[HttpConnectionManager]:
    found = [each for chain in listener.filter_chains for each in chain.filters if each.name == _MANAGER]
    return [HttpConnectionManager.parse(each.typed_config.value) for each in found if each.typed_config is not None]
