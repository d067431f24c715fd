"""YAML into plain data with positions."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from ratelimit_sidecar.config import document as document_module
from ratelimit_sidecar.config.document import MAX_DEPTH, MAX_NODES, Document, load, parse
from ratelimit_sidecar.config.errors import ConfigError


@pytest.fixture(params=[yaml.CSafeLoader, yaml.SafeLoader], ids=["libyaml", "pure"], autouse=True)
def _either_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML is not always built with libyaml; both parsers must do."""
    monkeypatch.setattr(document_module, "_Loader", request.param)


def parsed(text: str | bytes) -> Document:
    return parse(text if isinstance(text, bytes) else text.encode(), "f.yaml")


def errors(text: str | bytes) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parsed(text)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        ("~", None),
        ("", None),
        ("true", True),
        ("Yes", True),
        ("OFF", False),
        ("12", 12),
        ("-1_000", -1000),
        ("0.1", Decimal("0.1")),
        (".5", Decimal("0.5")),
        ("1e3", Decimal(1000)),
        ("'12'", "12"),
        ('"true"', "true"),
        ("y", True),
        ("Y", True),
        ("n", False),
        ("N", False),
        ("tRUE", "tRUE"),
        ("! 12", "12"),
        ("!!str 12", "12"),
        ("!!str true", "true"),
        ("!!int 12", 12),
        ("!!int '0x10'", 16),
        ("!!bool y", True),
        ("!!float 3", 3),
        ("!!float 1.5", Decimal("1.5")),
        ("!!null ''", None),
        ("!!timestamp 2026-01-01", "2026-01-01"),
        # Octal, as in YAML 1.1.
        ("010", 8),
        ("00", 0),
        ("0o17", 15),
        ("0O17", 15),
        ("0x1F", 31),
        ("-0X10", -16),
        ("+0b1_1", 3),
        ("0_10", 8),
        ("1_", 1),
        ("08", "08"),
        ("0x", "0x"),
        ("0o8", "0o8"),
        ("0b2", "0b2"),
        ("_1", "_1"),
        # Sexagesimal in YAML 1.1.
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        (".inf", ".inf"),
        ("9" * 65, "9" * 65),
        ("1e9999", "1e9999"),
        ("-", "-"),
    ],
)
def test_a_scalar_is_read_exactly(text: str, value: object) -> None:
    data = parsed(f"a: {text}" if text != "-" else "a: '-'").data
    assert data == {"a": value}
    assert type(data["a"]) is type(value)


def test_every_value_knows_where_it_stands() -> None:
    document = parsed("a: 1\nb:\n  - x\n  - {c: 2}\n")
    assert document.position(()) == (1, 1)
    assert document.position(("b",)) == (2, 1)
    assert document.position(("b", 0)) == (3, 5)
    assert document.position(("b", 1, "c")) == (4, 6)


def test_a_missing_value_stands_where_the_mapping_that_lacks_it_stands() -> None:
    document = parsed("a:\n  - b: 1\n")
    assert document.position(("a", 0, "c", "d")) == (2, 5)
    assert document.position(("a", 7)) == (1, 1)


def test_columns_count_characters_behind_a_byte_order_mark_and_wide_characters() -> None:
    assert parsed("\ufeff{ß: 1, 🦞: 2, c: 3}").position(("c",)) == (1, 14)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_is_read_by_its_byte_order_mark(encoding: str) -> None:
    document = parsed("\ufeffa: ß\nb: {ü: 🦞}\n".encode(encoding))
    assert document.data == {"a": "ß", "b": {"ü": "🦞"}}
    assert document.position(("b", "ü")) == (2, 5)


@pytest.mark.parametrize("rest", [b"a", b"\x00\xd8a\x00"])
def test_what_only_begins_as_utf_16_is_refused(rest: bytes) -> None:
    [line] = errors(b"\xff\xfe" + rest)
    assert line.startswith("f.yaml:1:1: found a byte order mark of UTF-16 before what is not")
    assert line.endswith("expected UTF-8 text; save the file as UTF-8")


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\n---\n",
        "a: 1\n...\n",
        "a: 1\n---\n# nothing\n---\n~\n",
        "---\n---\na: 1\n",
        "# of a template\n---\na: 1\n...\n---\n...\n",
    ],
)
def test_documents_that_hold_nothing_are_passed_over(text: str) -> None:
    document = parsed(text)
    assert document.data == {"a": 1}
    assert document.problems == ()


@pytest.mark.parametrize("second", ["b", "5", "[]", "{a: 1, a: 2}", "&a x"])
def test_a_second_document_is_named_where_it_begins(second: str) -> None:
    assert errors(f"a: 1\n---\n~\n---\n\n{second}\n") == [
        "f.yaml:4:1: found a second document, expected one YAML document; put it into a file of its own"
    ]


def test_an_empty_document_holds_nothing() -> None:
    assert parsed("# only a comment\n").data is None


def test_an_alias_stands_for_its_anchor_and_a_merge_key_fills_in_what_is_missing() -> None:
    document = parsed("a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc: {<<: [*a, *b], x: 9}\nd: *a\n")
    assert document.data == {
        "a": {"x": 1, "y": 2},
        "b": {"y": 3, "z": 4},
        "c": {"x": 9, "y": 2, "z": 4},
        "d": {"x": 1, "y": 2},
    }
    assert document.position(("c", "z")) == (2, 14)


def test_a_scalar_can_be_asked_for_as_it_is_written() -> None:
    document = parsed("a: 1.50\nb: &b yes\nc: {d: *b}\n")
    assert [document.describe(path) for path in (("a",), ("b",), ("c", "d"), ("c",), ("x",))] == [
        "1.50",
        "yes",
        "yes",
        "a mapping",
        "nothing",
    ]


def test_a_key_is_text_as_it_is_written() -> None:
    assert parsed("{1: a, 010: b, y: c, 1.50: d, !!int 2: e, <<: {3: f}}").data == {
        "1": "a",
        "010": "b",
        "y": "c",
        "1.50": "d",
        "2": "e",
        "3": "f",
    }


def test_duplicate_keys_and_keys_that_are_no_text_are_all_reported() -> None:
    document = parsed("a: 1\nb: {c: 1, d: 2, c: 3}\na: 2\n3: x\n'3': y\nx:\n  - ? [y]\n    : z\n")
    once = "expected each key once; it already stands in line"
    assert [str(problem) for problem in document.problems] == [
        f'f.yaml:2:17: b.c: found the key "c" again, {once} 2: remove one of them',
        f'f.yaml:3:1: a: found the key "a" again, {once} 1: remove one of them',
        f'f.yaml:5:1: 3: found the key "3" again, {once} 4: remove one of them',
        "f.yaml:7:7: x[0]: found a key that is empty, a mapping or a list, expected text as a key; give the value a"
        " name",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "a: *b",
            "f.yaml:1:4: found the alias *b, expected an anchor before it; define &b further up",
        ),
        (
            "a: &a\n  - *a\n",
            "f.yaml:2:5: a: found the alias *a inside what it stands for, expected no such circle",
        ),
        (
            "a: 1\n---\nb: 2\n",
            "f.yaml:2:1: found a second document, expected one YAML document; put it into a file of its own",
        ),
        (
            "a: !python/object:os.system ls",
            'f.yaml:1:4: found the tag "!python/object:os.system", expected one of YAML\'s own tags, or none; remove'
            " the tag",
        ),
        (
            "- - !!set {a}",
            'f.yaml:1:5: [0]: found the tag "tag:yaml.org,2002:set", expected one of YAML\'s own tags, or none; remove'
            " the tag",
        ),
        (
            "a: !!int 1.0",
            'f.yaml:1:4: found "1.0" with the tag "tag:yaml.org,2002:int", expected a value of that kind; remove the'
            " tag",
        ),
        (
            "a: !!bool 1",
            'f.yaml:1:4: found "1" with the tag "tag:yaml.org,2002:bool", expected a value of that kind; remove the'
            " tag",
        ),
        (
            b"a: 1\nb: \xc3\xa4\xff\n",
            "f.yaml:2:5: found the byte 0xff, which is not UTF-8, expected UTF-8 text; save the file as UTF-8",
        ),
        (
            "a: ä\x07",
            "f.yaml:1:5: found the control character U+0007, expected printable text; remove it",
        ),
        (
            "a:\n\t- b\n",
            "f.yaml:2:1: found a tab where YAML allows only spaces, expected one YAML document; indent with spaces",
        ),
        (
            "[" * (MAX_DEPTH + 1),
            f"f.yaml:1:{MAX_DEPTH + 1}: {'[0]' * (MAX_DEPTH - 1)}: found more than {MAX_DEPTH} mappings and lists"
            " inside each other, expected fewer",
        ),
    ],
)
def test_what_is_no_single_plain_document_is_refused(text: str | bytes, line: str) -> None:
    assert errors(text) == [line]


def test_broken_yaml_names_its_place_and_where_the_cause_may_be() -> None:
    [line] = errors("a:\n  b: [1,\n  c: 2\nd: 3\n")
    assert line.startswith("f.yaml:4:2: found broken YAML: ")
    assert line.endswith("the cause may be earlier, while parsing a flow sequence from line 2 on")


def test_a_syntax_error_keeps_what_was_found_before_it() -> None:
    found = errors("a: 1\na: 2\nb: 'open")
    assert len(found) == 2
    assert found[0].startswith('f.yaml:2:1: a: found the key "a" again')
    assert "found unexpected end of stream" in found[1]


def test_half_a_surrogate_pair_is_refused() -> None:
    [line] = errors('a: "\\ud800"')
    assert line.startswith("f.yaml:1:")


def test_a_hundred_levels_of_nested_aliases_are_refused_and_not_expanded() -> None:
    """The "billion laughs"."""
    text = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 100))
    [line] = errors(text)
    assert f"found more than {MAX_NODES} values, expected fewer; split the file" in line


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_depth_without_end_does_not_exhaust_the_stack(opening: str) -> None:
    [line] = errors(opening * 200_000)
    # libyaml looks ahead in flow style, and has a bound of its own.
    assert f"more than {MAX_DEPTH} mappings and lists" in line or "exceeded maximum nesting depth" in line


def test_a_file_that_is_not_there_is_a_clean_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "absent.yaml")
    assert str(error.value) == (
        f"{tmp_path}/absent.yaml: found no such file, expected a readable YAML file; check its path"
    )


def test_a_folder_in_place_of_a_file_is_a_clean_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: found that it cannot be read (Is a directory), expected a readable YAML file"
    )


def test_a_file_without_end_is_read_up_to_the_bound() -> None:
    with pytest.raises(ConfigError) as error:
        load(Path("/dev/zero"))
    assert str(error.value) == "/dev/zero: found more than 16 MiB, expected less; split the file"


def test_what_a_problem_quotes_stays_on_one_printable_line() -> None:
    document = parsed('a: "\\e[31mred\\n' + "x" * 100 + '"')
    assert document.describe(("a",)) == '"\\u001b[31mred\\n' + "x" * 51 + '\\u2026"'


@pytest.mark.parametrize("place", [0, 65_535, 65_536, 200_000])
def test_a_control_character_is_found_wherever_it_stands(place: int) -> None:
    text = "a" * place + "\x07" + "b" * 70_000
    with pytest.raises(ConfigError) as error:
        parse(text.encode(), "f.yaml")
    [problem] = error.value.problems
    assert (problem.line, problem.column) == (1, place + 1)
