"""The page about moving from envoyproxy/ratelimit says of its variables what the schema does with them."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from config.builders import sidecar

from ratelimit_sidecar.config.environment import variables_of
from ratelimit_sidecar.config.migration import VARIABLES, Same, SameElsewhere, Verdict
from ratelimit_sidecar.config.reference import pages
from ratelimit_sidecar.config.sidecar import SidecarConfig
from ratelimit_sidecar.crdt.limit import Window
from ratelimit_sidecar.telemetry.logs import configure_logs

NAME = "migration-from-envoyproxy-ratelimit.md"
PAGE = pages()[NAME]
OURS = {"REGION", "CRDT_ENGINE"}
"""Variables that envoyproxy/ratelimit has not."""

VERDICTS: list[tuple[str, Verdict]] = [entry for variables in VARIABLES.values() for entry in variables.items()]
READ = dict(variables_of(SidecarConfig))


def of_kind(*kinds: type[Verdict]) -> set[str]:
    return {variable for variable, verdict in VERDICTS if isinstance(verdict, kinds)}


def test_what_the_schema_reads_is_called_the_same_and_nothing_else_is() -> None:
    assert of_kind(Same) == READ.keys() - OURS


def test_logs_are_set_by_the_same_variables() -> None:
    assert of_kind(SameElsewhere) == {"LOG_LEVEL", "LOG_FORMAT"}
    for variable in of_kind(SameElsewhere):
        with pytest.raises(ValueError, match=variable):
            configure_logs({variable: "neither"}, logging.NullHandler())


def test_every_variable_has_one_row() -> None:
    named = re.findall(r"`([A-Z][A-Z0-9_]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)))
    assert sorted(named) == sorted(variable for variable, _ in VERDICTS)
    assert len(set(named)) == len(named)


def test_a_row_names_the_key_that_a_variable_sets() -> None:
    assert "| `GRPC_HOST`, `GRPC_PORT` | same: `listen.grpc` |\n" in PAGE
    assert "| `SHADOW_MODE` | same: `answers.shadow_mode` |\n" in PAGE


def test_what_the_page_tells_to_write_makes_fixed_windows(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n +(algorithm: .*)\n", PAGE)
    assert sidecar(tmp_path, text).rule_defaults.window is Window.FIXED


def test_the_pages_it_leads_to_are_there() -> None:
    docs = Path(__file__).parents[2] / "docs"
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", PAGE)
    assert links
    for path, anchor in links:
        page = (docs / path).read_text()
        headings = [re.sub(r"[^a-z0-9 -]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", page, re.M)]
        assert not anchor or anchor in {heading.replace(" ", "-") for heading in headings}
