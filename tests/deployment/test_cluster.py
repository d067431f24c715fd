"""The Helm chart on a real Kubernetes API: installed, upgraded, rolled back and removed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployment.cache import Unavailable
from deployment.charts import CHART, FULLNAME, OLD_KUBERNETES, RELEASE, VALUES, helm, render
from deployment.cluster import HOST, REGION, ZONES, Cluster, cluster, crd

pytestmark = pytest.mark.deployment

OPERATORS = {
    "certificates": ("Certificate", "cert-manager.io"),
    "servicemonitors": ("ServiceMonitor", "monitoring.coreos.com"),
    "prometheusrules": ("PrometheusRule", "monitoring.coreos.com"),
}
"""Objects of these are taken as they are: what is in them is not Kubernetes' own."""

APP = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "app"},
    "spec": {
        "replicas": 2,
        "selector": {"matchLabels": {"app": "app"}},
        "template": {
            "metadata": {"labels": {"app": "app"}},
            "spec": {"containers": [{"name": "app", "image": "example.com/app:1", "ports": [{"containerPort": 8080}]}]},
        },
    },
}


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        helm("version")
        with cluster(tmp_path_factory.mktemp("kubernetes")) as running:
            running.kubectl(
                "apply", "--filename=-", stdin=yaml.safe_dump_all(crd(plural, *of) for plural, of in OPERATORS.items())
            )
            for plural, (_, group) in OPERATORS.items():
                running.kubectl("wait", "--for=condition=Established", f"crd/{plural}.{group}", "--timeout=60s")
            yield running
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))


@pytest.fixture
def namespace(kubernetes: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A new one for each test."""
    name = request.node.originalname.replace("_", "-")[:60].strip("-")
    kubernetes.kubectl("create", "namespace", name)
    yield name
    kubernetes.kubectl("delete", "namespace", name, "--wait=false")


def in_cluster(kubernetes: Cluster, namespace: str, *arguments: str) -> str:
    return helm(f"--kubeconfig={kubernetes.kubeconfig}", f"--namespace={namespace}", *arguments)


def pods_of(kubernetes: Cluster, namespace: str) -> list[dict[str, Any]]:
    """Those that stay."""
    pods: list[dict[str, Any]] = kubernetes.get("pods", f"--namespace={namespace}")["items"]
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_the_api_server_accepts_every_object(kubernetes: Cluster, values: Path) -> None:
    text = render(values).text
    created = kubernetes.kubectl("apply", "--dry-run=server", "--validate=strict", "--filename=-", stdin=text)
    assert f"{FULLNAME} created (server dry run)" in created


def test_the_api_server_refuses_what_is_wrong(kubernetes: Cluster) -> None:
    text = render(VALUES[0]).text.replace("containerPort: 8081", "containerPort: 808100")
    with pytest.raises(AssertionError, match="containerPort"):
        kubernetes.kubectl("apply", "--dry-run=server", "--validate=strict", "--filename=-", stdin=text)


def test_it_is_installed_upgraded_rolled_back_and_removed(kubernetes: Cluster, namespace: str) -> None:
    def run(command: str, *options: str) -> None:
        wait = ("--wait", "--timeout=180s")
        in_cluster(kubernetes, namespace, command, RELEASE, *options, *wait)

    common = [str(CHART), "--set=mesh.tls.from=insecure", "--set=replicas=2"]
    run("install", *common, "--set=rules.a\\.yaml=domain: a")
    pods = pods_of(kubernetes, namespace)
    names = {pod["metadata"]["name"] for pod in pods}
    assert {ZONES[pod["spec"]["nodeName"]] for pod in pods} == set(ZONES.values()), "spread over zones"
    assert {pod["metadata"]["labels"]["topology.kubernetes.io/region"] for pod in pods} == {REGION}

    run("upgrade", *common, "--set=rules.a\\.yaml=domain: b")
    assert {pod["metadata"]["name"] for pod in pods_of(kubernetes, namespace)} == names, "rules need no restart"
    rules = kubernetes.get("configmap", f"{FULLNAME}-rules", f"--namespace={namespace}")
    assert rules["data"] == {"a.yaml": "domain: b"}

    run("upgrade", *common, "--set=rules.a\\.yaml=domain: b", "--set=config.max_buckets=7")
    assert not {pod["metadata"]["name"] for pod in pods_of(kubernetes, namespace)} & names

    run("rollback", "1")
    rules = kubernetes.get("configmap", f"{FULLNAME}-rules", f"--namespace={namespace}")
    assert rules["data"] == {"a.yaml": "domain: a"}
    (container,) = pods_of(kubernetes, namespace)[0]["spec"]["containers"]
    assert container["name"] == "ratelimit-sidecar"

    run("uninstall")
    kubernetes.kubectl("wait", "--for=delete", "pod", "--all", f"--namespace={namespace}", "--timeout=180s")
    left = kubernetes.kubectl("get", "all,configmap,networkpolicy,pdb", f"--namespace={namespace}", "--output=name")
    assert left.split() == ["configmap/kube-root-ca.crt"]


def test_the_container_is_added_to_a_workload_as_the_notes_say(kubernetes: Cluster, namespace: str) -> None:
    there = f"--namespace={namespace}"
    kubernetes.kubectl("create", there, "--filename=-", stdin=yaml.safe_dump(APP))
    options = ("--set=kind=Sidecar", "--set=mesh.tls.from=insecure", "--set=ports.admin=18080")
    notes = in_cluster(kubernetes, namespace, "install", RELEASE, str(CHART), *options)
    assert f"get configmap {FULLNAME}-patch -o jsonpath='{{.data.patch\\.yaml}}'" in notes

    patch = kubernetes.kubectl("get", there, "configmap", f"{FULLNAME}-patch", "-o", "jsonpath={.data.patch\\.yaml}")
    kubernetes.kubectl("patch", there, "deployment", "app", f"--patch={patch}")
    kubernetes.kubectl("rollout", there, "status", "deployment/app", "--timeout=120s")

    pods = pods_of(kubernetes, namespace)
    assert [each["name"] for pod in pods for each in pod["spec"]["initContainers"]] == ["ratelimit-sidecar"] * 2
    slices = kubernetes.get("endpointslices", there, f"--selector=kubernetes.io/service-name={FULLNAME}-mesh")
    found = {address for each in slices["items"] for point in each["endpoints"] for address in point["addresses"]}
    assert found == {pod["status"]["podIP"] for pod in pods}


def test_the_init_container_learns_the_region_of_its_node(kubernetes: Cluster, namespace: str, tmp_path: Path) -> None:
    values = {"mesh": {"tls": {"from": "insecure"}}}
    rendered = render(values=values, kubernetes=OLD_KUBERNETES)
    text = rendered.text.replace("namespace: default", f"namespace: {namespace}")
    kubernetes.kubectl("apply", f"--namespace={namespace}", "--filename=-", stdin=text)
    (tmp_path / "token").write_text(kubernetes.kubectl("create", "token", FULLNAME, f"--namespace={namespace}").strip())
    (tmp_path / "ca.crt").write_bytes(kubernetes.authority.read_bytes())
    (tmp_path / "sidecar.yaml").write_text(rendered.sidecar_config)
    data = next(each["data"] for each in rendered.of_kind("ConfigMap") if "region.py" in each["data"])
    (tmp_path / "region.py").write_text(data["region.py"])
    environment = {
        **os.environ,
        "KUBERNETES_SERVICE_HOST": HOST,
        "KUBERNETES_SERVICE_PORT": str(kubernetes.port),
        "SERVICE_ACCOUNT": str(tmp_path),
        "NODE_NAME": "node-1",
    }
    command = [sys.executable, "region.py", "sidecar.yaml", "with-region.yaml"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)

    written = yaml.safe_load((tmp_path / "with-region.yaml").read_text())
    assert written == {**yaml.safe_load(rendered.sidecar_config), "node": {"region": REGION}}
    for forbidden in ("list nodes", "get secrets"):
        account = f"--as=system:serviceaccount:{namespace}:{FULLNAME}"
        with pytest.raises(AssertionError):
            kubernetes.kubectl("auth", "can-i", *forbidden.split(), account)
