"""deploy/terraform by the real OpenTofu and the real providers: its own tests, and an example that is applied to a real
Kubernetes API, changed behind its back, and removed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deployment import tools
from deployment.cache import Unavailable
from deployment.charts import helm
from deployment.cluster import Cluster, cluster
from deployment.engine import ROOT

pytestmark = pytest.mark.deployment

TERRAFORM = ROOT / "deploy/terraform"
PROVIDERS = {
    "modules/mesh": ["tls"],
    "modules/mesh-aws": ["aws"],
    "modules/region": ["helm", "kubernetes"],
    "modules/region-aws": ["aws"],
    "modules/edge": ["kubernetes"],
    "examples/kubernetes": ["helm", "kubernetes", "tls"],
    "examples/aws": ["aws", "helm", "kubernetes", "tls"],
}

APPLY_S = 900
DRIFTED = 2


class Tofu:
    """A copy of the checkout's files, so that nothing is written there.

    Args:
        providers: the only ones that it finds.
    """

    def __init__(self, folder: Path, providers: Sequence[str]) -> None:
        self.root = folder / "checkout"
        for part in ("deploy/terraform", "deploy/helm", "examples"):
            shutil.copytree(ROOT / part, self.root / part, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
        mirror = folder / "mirror"
        for name in providers:
            binary = tools.path(f"provider-{name}", "registry.opentofu.org")
            shutil.copytree(binary, mirror / binary.name, dirs_exist_ok=True, copy_function=os.symlink)
        config = folder / "tofurc"
        config.write_text(f'provider_installation {{\n  filesystem_mirror {{\n    path = "{mirror}"\n  }}\n}}\n')
        self._environment = {
            **os.environ,
            "TF_CLI_CONFIG_FILE": str(config),
            "TOFU": str(tools.path("opentofu", "tofu")),
            "TF_IN_AUTOMATION": "1",
            "TF_CLI_ARGS_validate": "-no-color",
            "TF_CLI_ARGS_test": "-no-color",
            "TF_CLI_ARGS_plan": "-no-color",
        }

    def verify(self, *arguments: str, expected: int = 0) -> str:
        return self._run([str(self.root / "deploy/terraform/verify"), *arguments], expected)

    def __call__(self, folder: Path, command: str, *options: str) -> str:
        return self._run([self._environment["TOFU"], f"-chdir={folder}", command, "-no-color", *options], 0)

    def _run(self, command: Sequence[str], expected: int) -> str:
        done = subprocess.run(
            command,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=APPLY_S,
        )
        assert done.returncode == expected, done.stdout[-8_000:]
        return done.stdout


def tofu(folder: Path, providers: Sequence[str]) -> Tofu:
    try:
        return Tofu(folder, providers)
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        helm("version")
        with cluster(tmp_path_factory.mktemp("kubernetes")) as running:
            yield running
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))


def test_every_module_and_example_is_known_here() -> None:
    found = {
        str(file.parent.relative_to(TERRAFORM)) for file in TERRAFORM.rglob("main.tf") if ".terraform" not in file.parts
    }
    assert found == set(PROVIDERS)


@pytest.mark.parametrize("name", PROVIDERS)
def test_it_is_formatted_and_valid_and_its_tests_pass(name: str, tmp_path: Path) -> None:
    run = tofu(tmp_path, PROVIDERS[name])
    said = run.verify(str(run.root / "deploy/terraform" / name))
    assert "0 failed" in said
    assert "Success!" in said


def test_three_regions_are_made_without_a_cloud_what_changed_is_told_and_all_is_removed(
    kubernetes: Cluster, tmp_path: Path
) -> None:
    run = tofu(tmp_path, PROVIDERS["examples/kubernetes"])
    example = run.root / "deploy/terraform/examples/kubernetes"
    (example / "terraform.tfvars").write_text(
        f'kubeconfig = "{kubernetes.kubeconfig}"\nedge_token = "0123456789abcdef0123456789abcdef"\n'
    )
    run(example, "init", "-input=false")
    run(example, "apply", "-auto-approve", "-input=false")

    for region in ("us-east-1", "eu-west-2", "ap-southeast-1"):
        assert ready(kubernetes.get("deployment", "rl-ratelimit-sidecar", f"--namespace=ratelimit-{region}")) == 2
        secret = kubernetes.get("secret", "rl-mesh-tls", f"--namespace=ratelimit-{region}")
        assert set(secret["data"]) == {"tls.crt", "tls.key", "ca.crt"}
    assert ready(kubernetes.get("deployment", "ratelimit-edge", "--namespace=ratelimit-ap-southeast-1")) == 2
    assert "No changes." in run.verify("--drift", str(example))

    kubernetes.kubectl("delete", "secret", "rl-mesh-tls", "--namespace=ratelimit-eu-west-2")
    said = run.verify("--drift", str(example), expected=DRIFTED)
    assert 'module.region["eu-west-2"].kubernetes_secret_v1.mesh' in said
    run(example, "apply", "-auto-approve", "-input=false")
    run.verify("--drift", str(example))

    run(example, "destroy", "-auto-approve", "-input=false")
    assert not [of for of in kubernetes.get("namespaces")["items"] if of["metadata"]["name"].startswith("ratelimit-")]


def ready(deployment: dict[str, Any]) -> int:
    replicas: int = deployment["status"].get("readyReplicas", 0)
    return replicas
