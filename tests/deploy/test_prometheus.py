"""deploy/prometheus: what the tools of Prometheus say of it, and what of it names something elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ratelimit_sidecar.telemetry.metrics import METRICS

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
CASES = sorted(Path(__file__).parent.glob("alerts*.yml"))
SCRAPES = ["static", "dns", "kubernetes"]

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def promtool(*arguments: str | Path) -> None:
    ran = subprocess.run(
        ["promtool", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules of a kind, alert or record."""
    groups = [
        group for file in (PROMETHEUS / "rules").glob("*.yml") for group in yaml.safe_load(file.read_text())["groups"]
    ]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


ALERTS = rules("alert")


@needs_promtool
@pytest.mark.parametrize("name", SCRAPES)
def test_a_scrape_configuration_is_one_and_finds_its_rules(name: str, tmp_path: Path) -> None:
    config = yaml.safe_load((PROMETHEUS / f"{name}.yml").read_text())
    # Debian's Prometheus is built without Kubernetes.
    for scrape in config["scrape_configs"]:
        scrape.pop("kubernetes_sd_configs", None)
    config["rule_files"] = [str(PROMETHEUS / pattern) for pattern in config["rule_files"]]
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    promtool("check", "config", file)


@pytest.mark.parametrize("name", SCRAPES)
def test_a_scrape_configuration_is_for_the_job_that_the_alerts_name(name: str) -> None:
    config = yaml.safe_load((PROMETHEUS / f"{name}.yml").read_text())
    assert [scrape["job_name"] for scrape in config["scrape_configs"]] == ["ratelimit-sidecar"]
    assert all(scrape["honor_labels"] for scrape in config["scrape_configs"])


@needs_promtool
@pytest.mark.parametrize(
    "cases",
    # Days take seconds.
    [pytest.param(file, id=file.stem, marks=[pytest.mark.slow] if "by_day" in file.stem else []) for file in CASES],
)
def test_alerts_fire_when_they_should_and_only_then(cases: Path) -> None:
    promtool("test", "rules", cases)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    checked = {
        (alert[1], bool(check["exp_samples"]))
        for file in CASES
        for case in yaml.safe_load(file.read_text())["tests"]
        for check in case["promql_expr_test"]
        if (alert := re.search(r'alertname="(\w+)", alertstate="firing"', check["expr"]))
    }
    assert checked == {(rule["alert"], fires) for rule in ALERTS for fires in (True, False)}


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_an_alert_says_how_urgent_it_is_and_has_a_section_in_the_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    page, anchor = rule["annotations"]["runbook_url"].split("#")
    assert anchor == rule["alert"].lower(), "as GitHub names a heading"
    runbook = (ROOT / page).read_text()
    section = re.search(rf"^## {rule['alert']}\n(.*?)(?=^## |\Z)", runbook, re.MULTILINE | re.DOTALL)
    assert section is not None
    assert "**Look at**" in section[1]
    assert "**Do**" in section[1]


def test_the_runbook_tells_of_no_alert_that_there_is_not() -> None:
    headings = re.findall(r"^## (RateLimit\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in ALERTS)


WHAT_NAMES_METRICS = [
    *(PROMETHEUS / "rules").glob("*.yml"),
    *CASES,
    ROOT / "deploy" / "grafana" / "generate.py",
    ROOT / "README.md",
    *(ROOT / "docs").rglob("*.md"),
]


@pytest.mark.parametrize("file", WHAT_NAMES_METRICS, ids=[file.name for file in WHAT_NAMES_METRICS])
def test_metrics_that_are_named_somewhere_exist(file: Path) -> None:
    exposed = {metric.name for metric in METRICS}
    exposed |= {
        f"{metric.name}{of}" for metric in METRICS if metric.kind == "histogram" for of in ("_sum", "_count", "_bucket")
    }
    named = set(re.findall(r"(?<![\w:.*])(?:ratelimit|crdt|openclaw)_\w+[a-z](?![\w:.(*])", file.read_text()))
    # Names of Python and of groups of rules.
    named -= {"ratelimit_sidecar", *GROUPS}
    assert named - exposed == set()


GROUPS = {
    group["name"]
    for file in (PROMETHEUS / "rules").glob("*.yml")
    for group in yaml.safe_load(file.read_text())["groups"]
}
