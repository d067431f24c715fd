"""The reference pages and the help text say what the schema says."""

from __future__ import annotations

from pathlib import Path

import pytest
from certificates import Authority
from config.builders import rules_of, sidecar

from ratelimit_sidecar.config.reference import (
    CONFIGURATION_EXAMPLE,
    RULES_EXAMPLE,
    all_options,
    describe_schema,
    pages,
)
from ratelimit_sidecar.config.rules_schema import Descriptor, RulesFile
from ratelimit_sidecar.config.sidecar import SidecarConfig
from ratelimit_sidecar.config.structure import Section, section_of, walk

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", sorted(pages()))
def test_the_page_is_not_stale(name: str) -> None:
    """When it is: python -m ratelimit_sidecar.config.reference"""
    assert (DOCS / name).read_text(encoding="utf-8") == pages()[name]


def test_the_help_lists_every_option_within_80_columns() -> None:
    text = describe_schema()
    for path, field in walk(SidecarConfig):
        if section_of(field) is None and path != ("engine",):
            assert f"\n{'.'.join(path)}" in f"\n{text}"
    assert "\nCRDT_ENGINE\n" in text
    assert "\nnode.region  (or REGION)\n" in text
    assert "\nlisten.grpc  (or GRPC_UDS, GRPC_HOST, GRPC_PORT)\n" in text
    assert "\nxds  (or CONFIG_TYPE)\n" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("section", [SidecarConfig, RulesFile, Descriptor])
def test_every_option_is_described(section: type[Section]) -> None:
    for option in all_options(section):
        assert option.description.endswith(".")
        assert option.takes


def test_the_example_configuration_is_valid(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    Authority().write(tmp_path / "tls", "us-east-1-a.edge.example.com")
    assert sidecar(tmp_path, CONFIGURATION_EXAMPLE).node.id == "us-east-1-a"


def test_the_example_rules_are_valid(tmp_path: Path) -> None:
    assert {rule.name for rule in rules_of(tmp_path, RULES_EXAMPLE)} == {
        "shop.tenant",
        "shop.tenant_acme",
        "shop.tenant_acme.path_/export",
        "shop.tenant_trial-*",
        "shop.tokens_of",
        "shop.campaign_summer",
        "shop.path_/healthz",
    }


def test_the_rules_page_lists_every_key_of_a_descriptor() -> None:
    page = pages()["reference/rules.md"]
    for option in all_options(Descriptor):
        assert f"| `{'.'.join(option.path)}` |" in page or f"| `{option.path[-1]}` |" in page


def test_the_configuration_page_lists_every_option() -> None:
    page = pages()["reference/configuration.md"]
    for option in all_options(SidecarConfig):
        name = option.variables.names if option.variables and option.variables.only else ".".join(option.path)
        assert f"| `{name}` |" in page
