"""The real istiod makes of deploy/istio what the real Envoy takes, or runs."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import yaml
from e2e.sidecars import sidecar_command
from envoy_data_plane.envoy.config.cluster.v3 import ClusterDiscoveryType
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import HttpProtocolOptions

from deployment.cache import Unavailable
from deployment.cluster import HOST, Cluster, cluster
from deployment.engine import ROOT
from deployment.istio import DEPLOY, Istiod, bootstrap, filters, install, istiod, node, validate, virtual_hosts
from ratelimit_sidecar.demo.ports import free_ports
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.demo.regions import find_envoy
from ratelimit_sidecar.envoy_api.envoy.config.core.v3.base_pb2 import Node

pytestmark = [pytest.mark.deployment, pytest.mark.asyncio(loop_scope="module")]

WITHIN_S = 120.0
SOCKET = "/var/run/ratelimit/ratelimit.sock"
RATELIMIT, EXT_AUTHZ, ROUTER = (f"envoy.filters.http.{name}" for name in ("ratelimit", "ext_authz", "router"))

GATEWAY_ADDRESS = "192.0.2.1"
"""Nothing is there. By an address that endpoints have, istiod would take the gateway for them."""

SHOP = """
apiVersion: v1
kind: Service
metadata: {name: shop, namespace: shop}
spec:
  selector: {app: shop}
  ports: [{name: http, port: 80, targetPort: 8000}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop, namespace: shop}
spec:
  selector: {matchLabels: {app: shop}}
  template:
    metadata:
      labels: {app: shop, ratelimit-sidecar/mesh: shop}
      annotations: {inject.istio.io/templates: "sidecar,ratelimit"}
    spec:
      containers:
        - name: shop
          image: registry.example.com/shop:1
          ports: [{containerPort: 8000}, {containerPort: 50051}]
"""

INGRESS = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: ingress, namespace: istio-ingress}
spec:
  selector: {istio: ingress}
  servers: [{port: {number: INGRESS, name: http, protocol: HTTP}, hosts: ["*"]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: istio-ingress}
spec:
  hosts: ["*"]
  gateways: [ingress]
  http: [{route: [{destination: {host: shop.example.com, port: {number: 80}}}]}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: shop, namespace: istio-ingress}
spec:
  hosts: [shop.example.com]
  ports: [{number: 80, name: http, protocol: HTTP}]
  resolution: STATIC
  endpoints: [{address: 127.0.0.1, ports: {http: UPSTREAM}}]
"""


@dataclass(frozen=True, slots=True)
class Installed:
    folder: Path
    kubernetes: Cluster
    children: Children
    istiod: Istiod
    pod: dict[str, Any]

    @property
    def workload(self) -> Node:
        labels = self.pod["metadata"]["labels"]
        return node("sidecar", self.pod["status"]["podIP"], self.pod["metadata"]["name"], "shop", labels)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Installed]:
    folder = tmp_path_factory.mktemp("istiod")
    try:
        with cluster(tmp_path_factory.mktemp("kubernetes")) as kubernetes:
            install(kubernetes)
            for namespace in ("shop", "istio-ingress"):
                kubernetes.kubectl("create", "namespace", namespace)
            for name in ("workload", "mesh", "sidecar"):
                kubernetes.kubectl("apply", "--validate=strict", f"--filename={DEPLOY}/{name}.yaml")
            kubernetes.kubectl("apply", "--filename=-", stdin=SHOP)
            kubernetes.kubectl("rollout", "status", "--namespace=shop", "deployment/shop", "--timeout=120s")
            [pod] = kubernetes.get("pods", "--namespace=shop")["items"]
            async with Children(folder) as children, istiod(kubernetes, folder, children) as running:
                yield Installed(folder, kubernetes, children, running, pod)
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))


async def test_istio_proxy_in_a_pod_asks_the_sidecar_over_its_socket(installed: Installed) -> None:
    listeners = await installed.istiod.listeners(installed.workload)
    clusters = await installed.istiod.clusters(installed.workload)
    inbound = next(each for each in listeners if each.name == "virtualInbound")

    names = filters(inbound)
    assert RATELIMIT in names
    assert all(names[at + 1] == ROUTER for at, name in enumerate(names) if name == RATELIMIT)
    assert all(RATELIMIT not in filters(each) for each in listeners if each is not inbound)
    hosts = virtual_hosts(inbound)
    assert "inbound|http|80" in [host.name for host in hosts], "the port of its service"
    for host in hosts:
        [limit] = host.rate_limits
        assert limit.actions[0].request_headers.descriptor_key == "user"
    [sidecar] = [each for each in clusters if each.name == "ratelimit_sidecar"]
    assert sidecar.load_assignment.endpoints[0].lb_endpoints[0].endpoint.address.pipe.path == SOCKET
    validate(installed.folder, listeners, clusters)


async def test_its_mesh_is_led_where_it_dials_without_another_tls(installed: Installed) -> None:
    by_name = {each.name: each for each in await installed.istiod.clusters(installed.workload)}
    abroad = by_name["outbound|50051||eu-west-2.mesh.example.com"]
    assert abroad.type == ClusterDiscoveryType.ORIGINAL_DST
    here = by_name["outbound|50051||ratelimit-mesh.shop.svc.cluster.local"]
    assert here.type == ClusterDiscoveryType.ORIGINAL_DST
    assert not any(each.transport_socket or each.transport_socket_matches for each in (abroad, here))

    listeners = {each.name: each for each in await installed.istiod.listeners(installed.workload)}
    assert "0.0.0.0_50051" in listeners
    [chain] = [
        each
        for each in listeners["virtualInbound"].filter_chains
        if each.filter_chain_match and each.filter_chain_match.destination_port == 50_051
    ]
    assert chain.transport_socket is None, "the sidecar's own TLS"


async def test_authorization_asks_the_sidecar(installed: Installed) -> None:
    installed.kubernetes.kubectl("apply", "--validate=strict", f"--filename={DEPLOY}/ext-authz.yaml")
    async with asyncio.timeout(WITHIN_S):
        while True:
            listeners = await installed.istiod.listeners(installed.workload)
            inbound = next(each for each in listeners if each.name == "virtualInbound")
            clusters = await installed.istiod.clusters(installed.workload)
            asked = [each for each in clusters if each.name == "outbound|8081||ratelimit-sidecar.shop.internal"]
            if EXT_AUTHZ in filters(inbound) and asked:
                break
            await asyncio.sleep(0.2)
    validate(installed.folder, listeners, clusters)
    [options] = [HttpProtocolOptions.parse(each.value) for each in asked[0].typed_extension_protocol_options.values()]
    http2 = options.explicit_http_config.http2_protocol_options
    assert http2.max_outbound_control_frames == 100_000, "so that resets of others end no call to the sidecar"


@pytest.mark.parametrize("native", ["true", "false"])
async def test_the_template_adds_the_sidecar_to_a_pod(installed: Installed, native: str) -> None:
    """istiod says what to patch, and the API server takes the pod."""
    template = next(yaml.safe_load_all(SHOP.partition("---")[2]))["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    pod["metadata"] |= {"name": "injected", "namespace": "shop"}
    pod["metadata"]["annotations"]["sidecar.istio.io/nativeSidecar"] = native
    review = {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {"uid": "1", "namespace": "shop", "operation": "CREATE", "object": pod},
    }
    # Its certificate is from an authority of its own.
    async with httpx.AsyncClient(verify=False, trust_env=False, timeout=60) as api_server:
        answer = await api_server.post(f"https://{HOST}:{installed.istiod.webhooks}/inject", json=review)
    response = answer.json()["response"]
    assert response["allowed"], response
    patch, file = base64.b64decode(response["patch"]).decode(), installed.folder / "pod.json"
    file.write_text(json.dumps(pod))
    local = ("patch", "--local", f"--filename={file}", "--type=json", f"--patch={patch}", "--output=json")
    patched = installed.kubernetes.kubectl(*local)
    created = installed.kubernetes.kubectl(
        "create", "--dry-run=server", "--validate=strict", "--filename=-", "--output=json", stdin=patched
    )
    spec = json.loads(created)["spec"]
    containers = {each["name"]: each for each in (*spec["initContainers"], *spec["containers"])}
    added, proxy = containers["ratelimit-sidecar"], containers["istio-proxy"]
    assert added["restartPolicy"] == "Always", "the application waits until it has started"
    assert added in spec["initContainers"]
    assert (proxy in spec["initContainers"]) == (native == "true")
    assert "exec" in added["startupProbe"], "others Istio leads through istio-proxy, which may wait for this one"
    assert {"name": "ratelimit-socket", "mountPath": "/var/run/ratelimit"} in proxy["volumeMounts"]
    mounted = {each["name"] for each in added["volumeMounts"]}
    assert mounted > {"ratelimit-socket", "ratelimit-config", "ratelimit-mesh"}


async def test_a_gateway_asks_the_sidecar_by_its_port(installed: Installed, tmp_path: Path) -> None:
    """The real Envoy gets all from istiod."""
    ports = free_ports(2)
    own, of_ingress = ports.regions
    ingress = INGRESS.replace("INGRESS", str(of_ingress.envoy)).replace("UPSTREAM", str(ports.upstream))
    text = (DEPLOY / "gateway.yaml").read_text()
    for found, here in (
        ("rl-ratelimit-sidecar.ratelimit.svc.cluster.local", HOST),
        ("port_value: 8081", f"port_value: {own.grpc}"),
        ("timeout: 5s", "timeout: 30s"),
    ):
        assert found in text
        text = text.replace(found, here)
    installed.kubernetes.kubectl("apply", "--validate=strict", "--filename=-", stdin=f"{ingress}---\n{text}")

    config_map = yaml.safe_load((DEPLOY / "sidecar.yaml").read_text())["data"]
    (tmp_path / "shop.yaml").write_text(config_map["shop.yaml"])
    proxy = node("router", GATEWAY_ADDRESS, "ingress", "istio-ingress", {"istio": "ingress"})
    config = tmp_path / "envoy.yaml"
    config.write_text(yaml.safe_dump(bootstrap(proxy, installed.istiod.xds, of_ingress.envoy_admin)))
    start = installed.children.start
    upstream = [sys.executable, str(ROOT / "examples/openclaw/rating_api.py"), "--port", str(ports.upstream)]
    await start(Command("upstream", upstream, f"http://{HOST}:{ports.upstream}/healthz"))
    await start(sidecar_command(tmp_path, own, {"rules": [str(tmp_path / "shop.yaml")]}))
    argv = [find_envoy(), "-c", str(config), "--concurrency", "1", "--disable-hot-restart"]
    await start(Command("envoy", argv, f"http://{HOST}:{of_ingress.envoy_admin}/ready"))

    async with httpx.AsyncClient(base_url=f"http://{HOST}:{of_ingress.envoy}", trust_env=False, timeout=60) as client:

        async def ask(user: str) -> httpx.Response:
            return await client.get("/rate?agent=claw", headers={"x-user-id": user})

        async def is_limited() -> bool:
            try:
                return "x-ratelimit-limit" in (await ask("early")).headers
            except httpx.ConnectError:
                return False

        async with asyncio.timeout(WITHIN_S):
            while not await is_limited():  # noqa: ASYNC110 (other processes)
                await asyncio.sleep(0.2)
        answers = [await ask("eve") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert answers[0].json()["agent"] == "claw"
        assert (await ask("adam")).status_code == 200
