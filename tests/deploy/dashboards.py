"""The dashboards of deploy/grafana, as far as tests look at them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
JSONS = sorted((GRAFANA / "dashboards").glob("*.json"))


class Query(NamedTuple):
    dashboard: str
    panel: str
    expression: str
    """As `asked`."""


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_grafana_generate", GRAFANA / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look for their module by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def queries(interval: str = "1m") -> Iterator[Query]:
    """Of all panels.

    Args:
        interval: what Grafana puts in place of `$__rate_interval`: four scrapes, or more.
    """
    for file in JSONS:
        for panel in _panels(json.loads(file.read_text())):
            for target in panel.get("targets", ()):
                yield Query(file.stem, panel["title"], asked(target["expr"], interval))


def asked(expression: str, interval: str) -> str:
    """A query of a panel as Grafana puts it to Prometheus, with everything chosen."""
    expression = expression.replace("$__rate_interval", interval)
    for name in ("region", "domain", "rule"):
        expression = expression.replace(f"${name}", ".*")
    return expression


def _panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", ())
