"""Large structures, given back piece by piece."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from config.builders import rules, write

from ratelimit_sidecar.config import document, rules_file
from ratelimit_sidecar.config.document import parse
from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.reclamation import free_in_pieces, pieces_of_data, pieces_of_rules
from ratelimit_sidecar.config.rules_file import load_rules, rules_of_resources
from ratelimit_sidecar.config.yaml_data import YamlMap
from ratelimit_sidecar.limiter.rules import RuleNode

RULES = 1_000

AT_ONCE = 100
"""Blocks of memory; a descriptor, or a rule, is made of some 40."""

DESCRIPTOR = "value: {value}, rate_limit: {{unit: day, requests_per_unit: 1000}}"


def wide(key: str = "key: user") -> str:
    """All rules on one level, at the place of the file where the most stands: below another descriptor."""
    items = "".join(f"      - {{{key}, {DESCRIPTOR.format(value=f'u{number}')}}}\n" for number in range(RULES))
    return f"domain: shop\ndescriptors:\n  - key: plan\n    descriptors:\n{items}"


class Watched(list):
    """Remembers how much memory was in use at each step of its emptying."""

    def __init__(self, pieces: list) -> None:
        super().__init__(pieces)
        pieces.clear()
        self.blocks: list[int] = []

    def pop(self) -> object:
        self.blocks.append(sys.getallocatedblocks())
        return super().pop()

    @property
    def freed(self) -> list[int]:
        return [before - after for before, after in zip(self.blocks, self.blocks[1:], strict=False)]


def pieces_of_file(_: Path) -> list[object]:
    return pieces_of_data([parse(wide().encode(), "a.yaml").data])


def pieces_of_tree(folder: Path) -> list[object]:
    return pieces_of_rules(load_rules([write(folder / "a.yaml", wide())]).domains.values())


def pieces_of_tree_by_key(folder: Path) -> list[object]:
    text = "".join(f"  - {{key: k{n}, rate_limit: {{unit: day, requests_per_unit: 1}}}}\n" for n in range(RULES))
    file = write(folder / "a.yaml", f"domain: shop\ndescriptors:\n{text}")
    return pieces_of_rules(load_rules([file]).domains.values())


def pieces_of_resource(_: Path) -> list[object]:
    limit = {"unit": "DAY", "requests_per_unit": 1_000}
    items = [{"key": "user", "value": f"u{number}", "rate_limit": {**limit}} for number in range(RULES)]
    return pieces_of_data([{"domain": "shop", "descriptors": [{"key": "plan", "descriptors": items}]}])


@pytest.mark.parametrize("make", [pieces_of_file, pieces_of_tree, pieces_of_tree_by_key, pieces_of_resource])
def test_no_step_frees_more_than_one_piece(make: Callable[[Path], list[object]], tmp_path: Path) -> None:
    pieces = Watched(make(tmp_path))
    free_in_pieces(pieces)
    assert not pieces
    assert sum(pieces.freed) > 3 * RULES
    assert max(pieces.freed) < AT_ONCE


@pytest.mark.parametrize("text", [wide(), wide("kay: user"), wide() + "      - {", wide() + "---\na: b\n"])
def test_a_file_that_was_read_is_given_back_in_such_steps(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[int] = []

    def watched(pieces: list[object]) -> None:
        steps = Watched(pieces)
        free_in_pieces(steps)
        freed.extend(steps.freed)

    for module in (document, rules_file):
        monkeypatch.setattr(module, "free_in_pieces", watched)
    file = write(tmp_path / "a.yaml", text)
    with suppress(ConfigError):
        rules(file)
    assert sum(freed) > 10 * RULES
    assert max(freed) < AT_ONCE


def test_what_somebody_else_refers_to_stays_as_it_is() -> None:
    data = parse(wide().encode(), "a.yaml").data
    free_in_pieces(pieces_of_data([data]))
    assert data == parse(wide().encode(), "a.yaml").data


def alive(kind: type) -> int:
    return sum(isinstance(found, kind) for found in gc.get_objects())


@pytest.mark.parametrize("key", ["key: user", "kay: user"])
def test_nothing_is_left_of_a_file_that_was_read_be_it_good_or_not(key: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", wide(key))
    nodes = alive(RuleNode)
    read: object
    try:
        read = rules(file)
    except ConfigError as error:
        read = error
        assert alive(RuleNode) == nodes
    assert alive(YamlMap) == 0
    assert isinstance(read, ConfigError) == key.startswith("kay")


def test_nothing_is_left_of_two_files_of_one_domain(tmp_path: Path) -> None:
    files = [write(tmp_path / name, wide()) for name in ("a.yaml", "b.yaml")]
    nodes = alive(RuleNode)
    with pytest.raises(ConfigError) as caught:
        rules(*files)
    assert (alive(RuleNode), alive(YamlMap)) == (nodes, 0)
    assert len(caught.value.problems) == 1


def test_resources_stay_with_who_gave_them() -> None:
    resources = {"r": {"domain": "shop", "descriptors": [{"key": "user"}]}}
    rules_of_resources(resources)
    assert resources == {"r": {"domain": "shop", "descriptors": [{"key": "user"}]}}
