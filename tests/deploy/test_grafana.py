"""deploy/grafana: the JSON is what the code makes, and every query is one. `test_seen_working.py` runs them all."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import promql_parser
import pytest
import yaml
from deploy.dashboards import GRAFANA, JSONS, Query, generator, queries

QUERIES = list(queries())


def test_the_dashboards_are_what_the_code_makes() -> None:
    generate = generator()
    assert {file.stem for file in JSONS} == set(generate.DASHBOARDS)
    for file in JSONS:
        assert file.read_text() == generate.render(file.stem), "run make generate"


@pytest.mark.parametrize("query", QUERIES, ids=[f"{query.dashboard}-{query.panel}" for query in QUERIES])
def test_a_query_parses_and_leaves_no_variable(query: Query) -> None:
    assert "$" not in query.expression
    promql_parser.parse(query.expression)


@pytest.mark.parametrize("file", JSONS, ids=[file.stem for file in JSONS])
def test_panels_do_not_overlap_and_have_a_description(file: Path) -> None:
    panels = json.loads(file.read_text())["panels"]
    assert panels
    assert all(panel["description"] for panel in panels if panel["type"] != "row")
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, file.stem


def test_a_reader_can_choose_regions_domains_and_rules() -> None:
    for file in JSONS:
        variables = [of["name"] for of in json.loads(file.read_text())["templating"]["list"]]
        assert variables == ["datasource", "region", "domain", "rule"]


def test_what_is_provisioned_is_where_the_files_say() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/ratelimit.yml").read_text())["providers"]
    assert source["type"] == "prometheus"
    assert provider["type"] == "file"
    assert Path(provider["options"]["path"]).name == "dashboards"
