"""Rules that an xDS server sends are read and checked as those in files are."""

from __future__ import annotations

from pathlib import Path

import pytest
from config.builders import rules_of

from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.rules_file import rules_of_resources
from ratelimit_sidecar.config.rules_tree import RuleDefaults
from ratelimit_sidecar.crdt.limit import Window, WindowLimit

DAILY = {"unit": "DAY", "requests_per_unit": 1}


def errors(*resources: dict[str, object]) -> list[str]:
    """Of resources called r0, r1, ..."""
    with pytest.raises(ConfigError) as error:
        rules_of_resources({f"r{index}": data for index, data in enumerate(resources)})
    return str(error.value).splitlines()


def test_a_resource_gives_the_rules_of_a_file_of_the_same_content(tmp_path: Path) -> None:
    data = {
        "domain": "d",
        "descriptors": [
            {
                "key": "a",
                "value": "x",
                "rate_limit": {"unit": "WEEK", "requests_per_unit": 3, "name": "n", "replaces": [{"name": "m"}]},
                "quota_mode": True,
                "metadata": {"tier": "gold", "weight": 0.5},
                "descriptors": [{"key": "b", "rate_limit": {"unlimited": True}}],
            }
        ],
    }
    [by_resource, by_file] = [
        {rule.name: rule for rule in tree}
        for tree in (rules_of_resources({"r": data}), rules_of(tmp_path, str(data).replace("'", '"')))
    ]
    assert by_resource == by_file


def test_no_resources_are_no_rules() -> None:
    assert not rules_of_resources({}).domains


def test_defaults_and_merging_are_those_of_files() -> None:
    resources = {
        name: {"domain": "d", "descriptors": [{"key": name, "rate_limit": DAILY}]} for name in ("one", "another")
    }
    tree = rules_of_resources(resources, defaults=RuleDefaults(window=Window.FIXED), merge_domains=True)
    assert [rule.limit for rule in tree] == [WindowLimit(1, 86_400_000_000, Window.FIXED)] * 2


def test_all_problems_of_all_resources_are_told_by_resource_and_key() -> None:
    assert errors(
        {"domain": "", "descriptors": [{"key": "a", "rate_limit": {"requests_per_unit": 1}}]},
        {"domain": "d", "descriptors": [{"key": "a"}, {"key": "a"}]},
        {"domain": "d"},
    ) == [
        'r0: domain: found "", expected text that is not empty; write the domain of Envoy\'s rate limit filter, as in'
        " domain: shop",
        "r0: descriptors[0].rate_limit.unit: found nothing, expected one of second, minute, hour, day, week, month,"
        " year; add unit, or unlimited: true for no limit",
        "r1: descriptors[1]: found the key and value of descriptors[0] in r1 again, expected each pair of key and value"
        " once a level; merge the two, or give one another value",
        'r2: domain: found "d", which r1 has already, expected another domain; put all descriptors of a domain into one'
        " file, or turn merge_domains on",
    ]
