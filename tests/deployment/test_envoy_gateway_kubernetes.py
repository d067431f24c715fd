"""Envoy Gateway's own chart with deploy/envoy-gateway/kubernetes on a real Kubernetes API, its real controller, and the
sidecar started as the Deployment that this controller makes says.
"""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
import yaml
from certificates import Authority
from e2e.sidecars import ask

from deployment import tools
from deployment.cache import Unavailable
from deployment.charts import helm
from deployment.cluster import HOST, Cluster, cluster, crd
from deployment.gateways import CERTIFICATES, DEPLOY, PROBE
from deployment.machines import Machines, machines
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

pytestmark = [pytest.mark.deployment, pytest.mark.asyncio(loop_scope="module")]

NAMESPACE = "envoy-gateway-system"
THERE = f"--namespace={NAMESPACE}"
GATEWAY, SIDECAR = "gateway", "sidecar"
IMAGE = "registry.example.com/ratelimit-sidecar:0.1.0"
WITHIN_S = 180.0
"""It takes seconds; the rest is for a busy machine."""

GATEWAYS = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: eg}
spec: {controllerName: gateway.envoyproxy.io/gatewayclass-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: eg, namespace: default}
spec:
  gatewayClassName: eg
  listeners:
    - {name: http, protocol: HTTP, port: 80}
---
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: Backend
metadata: {name: shop, namespace: default}
spec: {endpoints: [{ip: {address: 192.0.2.1, port: 8000}}]}
---
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: Backend
metadata: {name: model, namespace: default}
spec: {endpoints: [{ip: {address: 192.0.2.1, port: 8001}}]}
"""


@dataclass(frozen=True, slots=True)
class Installed:
    """Envoy Gateway as installed in a cluster, and the Deployment that it made.

    Args:
        container: of the Deployment that Envoy Gateway has made.
    """

    folder: Path
    kubernetes: Cluster
    own: Machines
    container: dict[str, Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Installed]:
    folder = tmp_path_factory.mktemp("gateway")
    try:
        program = str(tools.path("envoy-gateway"))
        with cluster(tmp_path_factory.mktemp("kubernetes")) as kubernetes:
            install(kubernetes, folder, program)
            async with machines(folder, [GATEWAY, SIDECAR]) as own:
                await own.led_here(GATEWAY, kubernetes.port)
                await own.start(
                    GATEWAY,
                    "envoy-gateway",
                    [program, "server", f"--config-path={folder}/envoy-gateway.yaml"],
                    PROBE,
                    mounts={CERTIFICATES: folder / "envoy-gateway"},
                    environment={"KUBECONFIG": str(kubernetes.kubeconfig)},
                )
                deployment = await until(lambda: kubernetes.get("deployment", "envoy-ratelimit", THERE))
                [container] = deployment["spec"]["template"]["spec"]["containers"]
                yield Installed(folder, kubernetes, own, container)
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))


async def until(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is found, once it is there. A thread looks: Envoy Gateway's way to the API leads through this one."""
    ends_at = time.monotonic() + WITHIN_S
    while True:
        try:
            return await asyncio.to_thread(look)
        except AssertionError:
            if time.monotonic() > ends_at:
                raise
            await asyncio.sleep(0.2)


def install(kubernetes: Cluster, folder: Path, program: str) -> None:
    """Envoy Gateway's objects by its own chart, with certificates by its own program, and ours."""
    chart = folder / "gateway-helm"
    shutil.copytree(tools.path("envoy-gateway", "charts") / "gateway-helm", chart)
    values = (chart / "values.tmpl.yaml").read_text()
    release = f"docker.io/envoyproxy/gateway:v{tools.TOOLS['envoy-gateway'].version}"
    values = values.replace("${GatewayImage}", release).replace("${GatewayImagePullPolicy}", "IfNotPresent")
    (chart / "values.yaml").write_text(values)
    helm(
        f"--kubeconfig={kubernetes.kubeconfig}",
        THERE,
        "install",
        "eg",
        str(chart),
        "--create-namespace",
        f"--values={DEPLOY}/kubernetes/values.yaml",
        # A webhook that this API server has no way to.
        "--set=topologyInjector.enabled=false",
    )
    environment = {"KUBECONFIG": str(kubernetes.kubeconfig), "PATH": "/usr/bin:/bin"}
    certgen = [program, "certgen", "--disable-topology-injector"]
    subprocess.run(certgen, env=environment, check=True, capture_output=True, timeout=60)
    for name in ("envoy", "envoy-gateway", "envoy-rate-limit"):
        (folder / name).mkdir()
        for file, data in kubernetes.get("secret", name, THERE)["data"].items():
            (folder / name / file).write_bytes(base64.b64decode(data))
    config = kubernetes.get("configmap", "envoy-gateway-config", THERE)["data"]["envoy-gateway.yaml"]
    (folder / "envoy-gateway.yaml").write_text(config)

    kubernetes.kubectl(
        "apply", "--filename=-", stdin=yaml.safe_dump(crd("certificates", "Certificate", "cert-manager.io"))
    )
    kubernetes.kubectl("wait", "--for=condition=Established", "crd/certificates.cert-manager.io", "--timeout=60s")
    files = [f"--filename={DEPLOY}/{name}" for name in ("kubernetes/mesh.yaml", "policies.yaml")]
    kubernetes.kubectl("apply", "--validate=strict", "--filename=-", *files, stdin=GATEWAYS)
    kubernetes.kubectl("create", "secret", "generic", "envoy-ratelimit-mesh", THERE, "--from-literal=tls.crt=")


async def test_its_rate_limit_service_is_the_sidecar(installed: Installed) -> None:
    container, kubernetes = installed.container, installed.kubernetes
    assert container["image"] == IMAGE
    assert container["command"][:2] == ["ratelimit-sidecar", "serve"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert {each["mountPath"] for each in container["volumeMounts"]} == {"/certs", "/etc/ratelimit-sidecar", "/mesh"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"

    def all_ready() -> dict[str, Any]:
        deployment = kubernetes.get("deployment", "envoy-ratelimit", THERE)
        assert deployment["status"].get("readyReplicas") == 2
        return deployment

    await until(all_ready)
    pods = kubernetes.get("pods", THERE, "--selector=app.kubernetes.io/name=envoy-ratelimit")["items"]
    expected = {pod["status"]["podIP"] for pod in pods}
    for service in ("envoy-ratelimit", "envoy-ratelimit-mesh"):
        slices = kubernetes.get("endpointslices", THERE, f"--selector=kubernetes.io/service-name={service}")
        found = {address for each in slices["items"] for point in each["endpoints"] for address in point["addresses"]}
        assert found == expected, service


async def test_envoy_gateway_takes_every_route_and_policy(installed: Installed) -> None:
    kinds = "httproutes,backendtrafficpolicies,clienttrafficpolicies,envoyextensionpolicies"

    def all_taken() -> dict[str, Any]:
        found = installed.kubernetes.get(kinds, "--namespace=default")
        for each in found["items"]:
            status = each.get("status", {})
            [judged] = status.get("parents") or status.get("ancestors") or [{"conditions": []}]
            told = {condition["type"]: condition for condition in judged["conditions"]}
            for wanted in {"Accepted", "ResolvedRefs"} if each["kind"] == "HTTPRoute" else {"Accepted"}:
                assert told.get(wanted, {}).get("status") == "True", (each["metadata"]["name"], wanted, told)
        return found

    taken = await until(all_taken)
    assert len(taken["items"]) == 15


async def test_started_as_its_container_it_has_the_rules_and_answers_envoys_alone(installed: Installed) -> None:
    folder, own = installed.folder, installed.own
    data = installed.kubernetes.get("configmap", "envoy-ratelimit-sidecar", THERE)["data"]
    for name, text in data.items():
        (folder / "config").mkdir(exist_ok=True)
        (folder / "config" / name).write_text(text)
    Authority().write(folder / "mesh", "us-east-1.mesh.example.com")
    program, *arguments = installed.container["command"]
    assert program == "ratelimit-sidecar"
    console = await own.client(SIDECAR, 8_080)
    await own.start(
        SIDECAR,
        "sidecar",
        [sys.executable, "-m", "ratelimit_sidecar", *arguments],
        (8_080, "/readyz"),
        hosts={"envoy-gateway": own.addresses[GATEWAY]},
        mounts={
            CERTIFICATES: folder / "envoy-rate-limit",
            Path("/etc/ratelimit-sidecar"): folder / "config",
            Path("/mesh"): folder / "mesh",
        },
        environment={each["name"]: each["value"] for each in installed.container["env"]},
    )
    async with asyncio.timeout(WITHIN_S):
        while "httproute/default/shop/rule/0" not in (rules := (await console.get("/rlconfig")).text):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert "default/carts-and-checkout" in rules

    port = await own.published(SIDECAR, 8_081)
    route = "httproute/default/shop/rule/0/match/0/*"
    request = ask("default/eg/http", route, route)
    request.descriptors[0].entries.add(key="rule-0-match--1", value="rule-0-match--1")
    authority = (folder / "envoy/ca.crt").read_bytes()
    envoy = [(folder / "envoy" / name).read_bytes() for name in ("tls.key", "tls.crt")]
    options = (("grpc.ssl_target_name_override", f"envoy-ratelimit.{NAMESPACE}"), ("grpc.enable_http_proxy", 0))
    async with (
        grpc.aio.secure_channel(f"{HOST}:{port}", grpc.ssl_channel_credentials(authority, *envoy), options) as channel,
        grpc.aio.secure_channel(f"{HOST}:{port}", grpc.ssl_channel_credentials(authority), options) as stranger,
    ):
        stub = RateLimitServiceStub(channel)
        codes = [(await stub.ShouldRateLimit(request, timeout=60)).overall_code for _ in range(4)]
        assert codes == [RateLimitResponse.OK] * 3 + [RateLimitResponse.OVER_LIMIT]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await RateLimitServiceStub(stranger).ShouldRateLimit(request, timeout=60)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
