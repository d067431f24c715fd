"""Files of the Helm chart that others decide on."""

from __future__ import annotations

import runpy

import yaml

from deployment.charts import CHART
from ratelimit_sidecar import __version__


def test_the_chart_is_of_the_package_s_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert chart["version"] == chart["appVersion"] == __version__


def test_its_alert_rules_and_dashboards_are_those_of_deploy() -> None:
    generate = runpy.run_path(str(CHART.parent / "generate.py"))

    assert {path: path.read_bytes() for path in generate["found"]()} == generate["copies"](), "make generate"
