"""What the Helm chart makes of its values. The real Helm renders it, where `make test-deploy` has built one."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from certificates import Authority

from deployment import tools
from deployment.cache import Unavailable
from deployment.charts import CHART, FULLNAME, OLD_KUBERNETES, VALUES, Object, Refused, Rendered, lint, render
from ratelimit_sidecar.config.sidecar import SidecarConfig, load_sidecar_config

CRDS = ("cert-manager.io", "monitoring.coreos.com")
"""Groups of objects that Kubernetes itself knows nothing of."""

by_name = pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)


@pytest.fixture(scope="module", autouse=True)
def _helm() -> None:
    try:
        tools.path("helm")
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))


def values(**more: Any) -> dict[str, Any]:
    """The least that is accepted, and more."""
    return {"region": "us-east-1", "mesh": {"tls": {"from": "insecure"}}, **more}


def pod_of(rendered: Rendered, kind: str = "Deployment") -> Object:
    spec: Object = rendered.one(kind)["spec"]["template"]["spec"]
    return spec


def container_of(rendered: Rendered, kind: str = "Deployment") -> Object:
    (container,) = pod_of(rendered, kind)["containers"]
    found: Object = container
    return found


def read_config(rendered: Rendered, folder: Path) -> SidecarConfig:
    """As the sidecar does in the pod, whose files are in the folder."""
    Authority().write(folder / "tls", "any")
    (folder / "rules").mkdir()
    text = rendered.sidecar_config.replace("/etc/ratelimit-sidecar/rules", str(folder / "rules"))
    text = re.sub("/etc/ratelimit-sidecar/(mesh|grpc)-tls", str(folder / "tls"), text)
    path = folder / "sidecar.yml"
    path.write_text(text)
    return load_sidecar_config(path, {"REGION": "us-east-1"})


@pytest.mark.deployment
@by_name
def test_lint_finds_nothing(values: Path) -> None:
    lint(values)


@by_name
def test_the_sidecar_accepts_the_configuration(values: Path, tmp_path: Path) -> None:
    config = read_config(render(values), tmp_path)

    assert str(config.sync.peers[0]) == f"{FULLNAME}-mesh.default.svc:50051"
    assert config.sync.insecure or config.sync.tls is not None


@pytest.mark.deployment
@by_name
def test_kubernetes_knows_every_field(values: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("PyPI's kubernetes-validate is not installed; `make test-deploy` does it")
    objects = [each for old in (OLD_KUBERNETES, tools.KUBERNETES) for each in render(values, kubernetes=old).objects]
    path = tmp_path / "objects.yaml"
    path.write_text(yaml.safe_dump_all(each for each in objects if not each["apiVersion"].startswith(CRDS)))
    command = [str(Path(sys.executable).with_name("kubernetes-validate")), "--strict", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_how_the_mesh_is_secured_has_to_be_chosen() -> None:
    with pytest.raises(Refused, match="/mesh/tls/from"):
        render()


def test_an_unknown_value_is_refused() -> None:
    with pytest.raises(Refused, match="replica"):
        render(values=values(replica=3))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"mesh": {"tls": {"from": "csi"}}}, "issuerRef.name"),
        ({"mesh": {"tls": {"from": "secret"}}}, "secretName"),
        ({"mesh": {"tls": {"from": "certManager", "issuerRef": {"name": "mesh"}}}, "region": ""}, "set `region`"),
        ({"persistence": {"enabled": True}}, "StatefulSet or DaemonSet"),
        ({"kind": "DaemonSet", "autoscaling": {"enabled": True}}, "as many pods"),
    ],
)
def test_values_that_do_not_fit_together_are_refused_with_what_to_do(more: dict[str, Any], told: str) -> None:
    with pytest.raises(Refused, match=told):
        render(values=values(**more))


def test_a_node_s_region_is_read_from_the_pod_where_kubernetes_copies_it_there() -> None:
    rendered = render(values=values(region=""))

    (region,) = [each for each in container_of(rendered)["env"] if each["name"] == "REGION"]
    assert region["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['topology.kubernetes.io/region']"
    assert not rendered.of_kind("ClusterRole")
    assert pod_of(rendered)["automountServiceAccountToken"] is False


def test_the_container_is_told_where_it_runs_for_its_traces_and_its_own_variables_come_last() -> None:
    own = {"name": "OTEL_RESOURCE_ATTRIBUTES", "value": "k8s.cluster.name=blue"}
    *_, pod, namespace, node, last = container_of(render(values=values(env=[own])))["env"]

    told = {each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"] for each in (pod, namespace, node)}
    assert told == {"POD_NAME": "metadata.name", "POD_NAMESPACE": "metadata.namespace", "NODE_NAME": "spec.nodeName"}
    assert last == own


def test_an_older_kubernetes_is_asked_for_it_by_an_init_container() -> None:
    rendered = render(values=values(region=""), kubernetes=OLD_KUBERNETES)

    (init,) = pod_of(rendered)["initContainers"]
    assert container_of(rendered)["args"][-1] == init["args"][-1]
    assert rendered.one("ClusterRole")["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}]
    assert pod_of(rendered)["automountServiceAccountToken"] is True


def test_pods_are_restarted_for_a_new_configuration_but_not_for_new_rules() -> None:
    def template(**more: Any) -> Object:
        found: Object = render(values=values(**more)).one("Deployment")["spec"]["template"]
        return found

    before = template(rules={"a.yaml": "domain: a"})

    assert template(rules={"a.yaml": "domain: b"}) == before
    assert template(rules={"a.yaml": "domain: a"}, config={"max_buckets": 7})["metadata"] != before["metadata"]


def test_each_pod_has_a_certificate_for_its_own_name(tmp_path: Path) -> None:
    tls = {"from": "csi", "issuerRef": {"name": "mesh"}, "domain": "mesh.example.com"}
    rendered = render(values=values(mesh={"tls": tls}))

    config = read_config(rendered, tmp_path)
    (volume,) = [each["csi"] for each in pod_of(rendered)["volumes"] if "csi" in each]
    assert config.sync.tls is not None
    assert config.sync.tls.peer_names == "{node}.mesh.example.com"
    assert volume["volumeAttributes"]["csi.cert-manager.io/dns-names"] == "${POD_NAME}.mesh.example.com"


def test_one_certificate_of_all_pods_is_for_their_region(tmp_path: Path) -> None:
    tls = {"from": "certManager", "issuerRef": {"name": "mesh"}, "domain": "mesh.example.com"}
    rendered = render(values=values(mesh={"tls": tls}))

    config = read_config(rendered, tmp_path)
    assert config.sync.tls is not None
    names = rendered.one("Certificate")["spec"]["dnsNames"]
    assert names == [config.sync.tls.peer_names.format(region="us-east-1")]


def test_a_sidecar_in_somebody_else_s_pod_answers_there_alone_and_is_found_by_the_others() -> None:
    rendered = render(values=values(kind="Sidecar"))

    (patch,) = [each for each in rendered.of_kind("ConfigMap") if "patch.yaml" in each["data"]]
    template = yaml.safe_load(patch["data"]["patch.yaml"])["spec"]["template"]
    (container,) = template["spec"]["initContainers"]
    service = rendered.one("Service")
    assert container["restartPolicy"] == "Always"
    assert yaml.safe_load(rendered.sidecar_config)["listen"]["grpc"] == ["127.0.0.1:8081"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert not rendered.of_kind("NetworkPolicy"), "it would be for all of the pod"


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "DaemonSet"])
def test_services_policies_and_budgets_are_for_the_pods_of_the_workload(kind: str) -> None:
    rendered = render(values=values(kind=kind, autoscaling={"enabled": kind != "DaemonSet"}))

    labels = rendered.one(kind)["spec"]["template"]["metadata"]["labels"]
    assert rendered.one(kind)["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for service in rendered.of_kind("Service"):
        assert service["spec"]["selector"].items() <= labels.items()
    policy = rendered.one("NetworkPolicy")["spec"]["podSelector"]
    budgets = [each["spec"]["selector"] for each in rendered.of_kind("PodDisruptionBudget")]
    for selector in (policy, *budgets):
        assert selector["matchLabels"].items() <= labels.items()
    for scaler in rendered.of_kind("HorizontalPodAutoscaler"):
        assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": kind, "name": FULLNAME}


@pytest.mark.parametrize(
    ("chosen", "strategy"),
    [
        ({"kind": "Deployment"}, "strategy"),
        ({"kind": "DaemonSet"}, "updateStrategy"),
        ({"kind": "DaemonSet", "persistence": {"enabled": True}}, None),
    ],
    ids=["Deployment", "DaemonSet", "DaemonSet with a file"],
)
def test_a_new_pod_is_ready_before_the_old_one_stops_unless_both_need_one_file(
    chosen: dict[str, object], strategy: str | None
) -> None:
    spec = render(values=values(**chosen)).one(str(chosen["kind"]))["spec"]

    updates = {name: spec[name]["rollingUpdate"] for name in ("strategy", "updateStrategy") if name in spec}
    assert updates == ({strategy: {"maxSurge": 1, "maxUnavailable": 0}} if strategy else {})


def test_new_sidecars_are_found_before_they_are_ready() -> None:
    (mesh,) = [each for each in render(values=values()).of_kind("Service") if each["spec"].get("clusterIP") == "None"]

    assert mesh["spec"]["publishNotReadyAddresses"] is True


def test_the_container_may_do_nothing_but_answer() -> None:
    security = container_of(render(values=values()))["securityContext"]

    assert security["runAsNonRoot"] is True
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_rules_and_dashboards_are_passed_on_as_they_are(tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    files = {"rules/some.yml": "groups: [{name: '{{ $value }}', rules: []}]", "dashboards/rules.json": "{}\n"}
    for name, text in files.items():
        (chart / "files" / name).parent.mkdir(exist_ok=True)
        (chart / "files" / name).write_text(text)
    monitoring = {name: {"enabled": True} for name in ("serviceMonitor", "prometheusRule", "dashboards")}

    rendered = render(values=values(monitoring=monitoring, rules={"a.yaml": "domain: a"}), chart=chart)

    rules = {each["metadata"]["name"]: each["spec"] for each in rendered.of_kind("PrometheusRule")}
    assert rules[f"{FULLNAME}-some"] == {"groups": [{"name": "{{ $value }}", "rules": []}]}
    maps = {each["metadata"]["name"]: each for each in rendered.of_kind("ConfigMap")}
    assert maps[f"{FULLNAME}-rules"]["data"] == {"a.yaml": "domain: a"}
    assert maps[f"{FULLNAME}-dashboard-rules"]["data"] == {"rules.json": "{}\n"}
    assert maps[f"{FULLNAME}-dashboard-rules"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    monitor = rendered.one("ServiceMonitor")["spec"]
    (mesh,) = [each for each in rendered.of_kind("Service") if each["spec"].get("clusterIP") == "None"]
    assert monitor["selector"]["matchLabels"].items() <= mesh["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in mesh["spec"]["ports"]}
