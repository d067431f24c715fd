"""What can be told of deploy/istio without istiod; e2e/test_example_configurations.py has Envoy read its filters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from certificates import Authority
from click.testing import CliRunner

from deployment.istio import DEPLOY
from ratelimit_sidecar.cli.check import check


def test_the_sidecar_takes_its_configuration_and_rules(tmp_path: Path) -> None:
    config_map: dict[str, Any] = yaml.safe_load((DEPLOY / "sidecar.yaml").read_text())
    for name, text in config_map["data"].items():
        (tmp_path / name).write_text(text.replace(" /mesh/", f" {tmp_path}/mesh/"))
    Authority().write(tmp_path / "mesh", "us-east-1.mesh.example.com")

    checked = CliRunner().invoke(check, ["--config", str(tmp_path / "sidecar.yaml")])

    assert checked.exit_code == 0, checked.output
    assert "1 domain" in checked.output
