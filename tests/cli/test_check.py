"""`ratelimit-sidecar check`"""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import pytest
from click.testing import CliRunner, Result

from ratelimit_sidecar.cli import main
from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.sidecar import load_sidecar_config

GOOD = "domain: {domain}\ndescriptors: [{{key: a, rate_limit: {{unit: day, requests_per_unit: 1}}}}, {{key: b}}]\n"
BROKEN = """\
domain: d
descriptors:
  - key: a
    rate_limit: {unit: fortnight, requests_per_unit: -1}
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder_without_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.environ", {})


def write(name: str, text: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text))


def check(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["check", *arguments])


def test_good_rules_are_counted_and_exit_with_0() -> None:
    write("rules/a.yaml", GOOD.format(domain="a"))
    write("rules/b.yml", GOOD.format(domain="b"))
    write("c.yaml", GOOD.format(domain="c"))
    result = check("rules", "c.yaml")
    assert (result.exit_code, result.output) == (0, "3 files, 3 domains, 3 rules: no problems\n")


def test_a_folder_is_judged_as_serve_judges_it() -> None:
    write("config/a.yaml", GOOD.format(domain="a"))
    write("config/b.txt", GOOD.format(domain="b"))
    told = (
        'config/b.txt: found the name "b.txt", expected a name that ends in .yaml or .yml in a folder of rules; rename'
        " it, or move it away\n"
    )
    result = check("config")
    assert (result.exit_code, result.output) == (1, f"{told}1 problem; 1 file of rules read\n")
    with pytest.raises(ConfigError) as error:
        load_sidecar_config(None, {"RUNTIME_ROOT": "."})
    assert f"{error.value}\n" == told


def test_an_empty_folder_has_no_problems_as_serve_starts_with_it() -> None:
    Path("rules").mkdir()
    result = check("rules")
    assert (result.exit_code, result.output) == (0, "0 files, 0 domains, 0 rules: no problems\n")


def test_one_of_each_is_in_the_singular() -> None:
    write("a.yaml", GOOD.format(domain="a"))
    assert check("a.yaml").output == "1 file, 1 domain, 1 rule: no problems\n"


def test_all_problems_of_all_files_are_told_and_exit_with_1() -> None:
    write("rules/a.yaml", BROKEN)
    write("rules/b.yaml", "domain: d")
    result = check("rules")
    assert result.exit_code == 1
    assert [line.split(": ")[:2] for line in result.output.splitlines()] == [
        ["rules/a.yaml:4:18", "descriptors[0].rate_limit.unit"],
        ["rules/a.yaml:4:35", "descriptors[0].rate_limit.requests_per_unit"],
        ["rules/b.yaml:1:1", "domain"],
        ["3 problems; 2 files of rules read"],
    ]


@pytest.mark.parametrize(
    "arguments", [[], ["absent.yaml"], ["--config", "absent.yaml"], ["--config", "."], ["--format", "xml", "."]]
)
def test_a_wrong_call_exits_with_2(arguments: list[str]) -> None:
    result = check(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith("Usage: ")


def test_json_says_what_was_read() -> None:
    write("a.yaml", GOOD.format(domain="a"))
    result = check("--format", "json", "a.yaml")
    assert result.exit_code == 0
    assert json.loads(result.output) == {
        "ok": True,
        "files": 1,
        "domains": 1,
        "rules": 1,
        "problems": [],
        "warnings": [],
    }


def test_json_has_every_part_of_a_problem() -> None:
    write("a.yaml", "domain: d\ndescriptor: []\n")
    result = check("--format", "json", "a.yaml")
    assert result.exit_code == 1
    assert json.loads(result.output) == {
        "ok": False,
        "files": 1,
        "domains": None,
        "rules": None,
        "problems": [
            {
                "file": "a.yaml",
                "line": 2,
                "column": 1,
                "key": "descriptor",
                "found": 'the unknown key "descriptor"',
                "expected": "one of domain, charge, charging, ext_authz, descriptors",
                "fix": 'did you mean "descriptors"?',
                "message": 'found the unknown key "descriptor", expected one of domain, charge, charging, ext_authz,'
                ' descriptors; did you mean "descriptors"?',
            }
        ],
        "warnings": [],
    }


def test_github_gets_annotations_with_what_would_end_them_escaped() -> None:
    write("100%,a.yaml", "domain: d\n'k:1': 5\ndescriptors: [{key: a, share_threshold: true, value: '100%'}]\n")
    result = check("--format", "github", "100%,a.yaml")
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        '::error file=100%25%2Ca.yaml,line=2,col=1,title="k%3A1"::found the unknown key "k:1", expected one of domain,'
        " charge, charging, ext_authz, descriptors; remove it, or correct its name",
        "::error file=100%25%2Ca.yaml,line=3,col=24,title=descriptors[0].share_threshold::found share_threshold of the"
        ' value "100%25", expected a value with *; end the value in *, or remove share_threshold',
        "2 problems; 1 file of rules read",
    ]


def test_github_gets_no_file_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"SHADOW_MODE": "x"})
    write("a.yaml", GOOD.format(domain="a"))
    assert check("--format", "github", "a.yaml").output.splitlines()[0] == (
        '::error title=SHADOW_MODE::found "x", expected true or false'
    )


def test_a_configuration_is_checked_with_the_rules_it_names() -> None:
    write("conf/sidecar.yaml", "rules: [rules]\nalgorithm: fixed_window\n")
    write("conf/rules/a.yaml", GOOD.format(domain="a"))
    assert check("--config", "conf/sidecar.yaml").output == "1 file, 1 domain, 1 rule: no problems\n"
    write(
        "conf/rules/b.yaml",
        "domain: b\ndescriptors: [{key: a, burst: 2, rate_limit: {unit: day, requests_per_unit: 1}}]",
    )
    result = check("--config", "conf/sidecar.yaml")
    assert result.exit_code == 1
    assert "burst with the algorithm fixed_window" in result.output


def test_rules_beside_a_configuration_are_checked_as_it_says() -> None:
    write("sidecar.yaml", "merge_domains: true")
    write("a.yaml", "domain: d\ndescriptors: [{key: a}]")
    write("b.yaml", "domain: d\ndescriptors: [{key: b}]")
    assert check("--config", "sidecar.yaml", "a.yaml", "b.yaml").exit_code == 0
    assert check("a.yaml", "b.yaml").exit_code == 1


def test_merge_domain_config_holds_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"MERGE_DOMAIN_CONFIG": "true"})
    write("a.yaml", "domain: d\ndescriptors: [{key: a}]")
    write("b.yaml", "domain: d\ndescriptors: [{key: b}]")
    assert check("a.yaml", "b.yaml").exit_code == 0


def test_a_broken_configuration_does_not_hide_what_is_wrong_with_rules() -> None:
    write("sidecar.yaml", "merge_domain: true")
    write("a.yaml", BROKEN)
    write("b.yaml", "domain: d")
    lines = check("--config", "sidecar.yaml", "a.yaml", "b.yaml").output.splitlines()
    # That the domain is there twice is no problem: the configuration may have meant to allow it.
    assert [line.split(":")[0] for line in lines] == [
        "sidecar.yaml",
        "a.yaml",
        "a.yaml",
        "3 problems; 2 files of rules read",
    ]


def test_without_a_configuration_rules_of_the_environment_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    write("data/config/a.yaml", "domain: a")
    write("b.yaml", GOOD.format(domain="b"))
    monkeypatch.setattr("os.environ", {"RUNTIME_ROOT": "data"})
    assert check("b.yaml").output == "1 file, 1 domain, 1 rule: no problems\n"


STRICT = """\
domain: d
descriptors: [{key: a, consistency: strict, rate_limit: {unit: day, requests_per_unit: 1}}]
"""


def test_strict_rules_are_only_blamed_for_missing_members_where_a_configuration_could_have_them() -> None:
    write("rules.yaml", STRICT)
    write("sidecar.yaml", "node: {id: a}")
    write("strict.yaml", "sync: {members: {a: 1}}")
    assert check("rules.yaml").exit_code == check("rules.yaml", "--config", "strict.yaml").exit_code == 0
    blamed = check("rules.yaml", "--config", "sidecar.yaml")
    assert blamed.exit_code == 1
    assert "sync.members" in blamed.output


REPLACES = """\
domain: shop
descriptors:
  - {key: a, rate_limit: {unit: day, requests_per_unit: 1, name: one, replaces: [{name: two}]}}
  - {key: b, rate_limit: {unit: day, requests_per_unit: 1, name: two, replaces: [{name: one}, {name: three}]}}
  - {key: c, rate_limit: {unlimited: true, name: open, replaces: [{name: tow}]}}
  - {key: d, rate_limit: {unit: day, requests_per_unit: 1, replaces: [{name: open}, {name: watched}, {name: one}]}}
  - {key: e, shadow_mode: true, rate_limit: {unit: day, requests_per_unit: 1, name: watched}}
  - key: f
    descriptors:
      - {key: g, shadow_mode: true, rate_limit: {unit: day, requests_per_unit: 1, replaces: [{name: one}]}}
"""
REPLACED = "descriptors[0].rate_limit.replaces[0].name"
THREE = "domain: shop\ndescriptors: [{key: h, rate_limit: {unit: day, requests_per_unit: 1, name: three}}]\n"


def test_what_replaces_says_and_probably_does_not_mean_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_DOMAIN_CONFIG", "true")
    write("a.yaml", REPLACES)
    write("b.yaml", THREE)
    result = check("--format", "json", "a.yaml", "b.yaml")
    answer = json.loads(result.output)
    assert (result.exit_code, answer["ok"], answer["problems"]) == (0, True, [])
    assert [
        (warning["file"], warning["line"], warning["column"], warning["key"], warning["found"])
        for warning in answer["warnings"]
    ] == [
        ("a.yaml", 3, 83, REPLACED, '"two", which replaces "one"'),
        ("a.yaml", 4, 83, "descriptors[1].rate_limit.replaces[0].name", '"one", which replaces "two"'),
        ("a.yaml", 5, 68, "descriptors[2].rate_limit.replaces[0].name", '"tow", which no limit has'),
        ("a.yaml", 6, 72, "descriptors[3].rate_limit.replaces[0].name", '"open", which is unlimited'),
        ("a.yaml", 6, 86, "descriptors[3].rate_limit.replaces[1].name", '"watched", in shadow_mode'),
        ("a.yaml", 10, 95, f"descriptors[5].{REPLACED}", '"one", in a rule in shadow_mode'),
    ]


def test_a_longer_circle_is_one_too_and_who_only_replaces_a_part_of_it_is_none() -> None:
    rules = [(1, 2), (2, 3), (3, 1), (4, 1)]
    limit = "{{key: k{0}, rate_limit: {{unit: day, requests_per_unit: 1, name: n{0}, replaces: [{{name: n{1}}}]}}}}"
    write("a.yaml", f"domain: d\ndescriptors: [{', '.join(limit.format(*each) for each in rules)}]\n")
    warnings = json.loads(check("--format", "json", "a.yaml").output)["warnings"]
    assert [warning["found"] for warning in warnings] == [
        f'"n{replaced}", which replaces "n{own}"' for own, replaced in rules[:3]
    ]


def test_names_hold_within_a_domain() -> None:
    write("a.yaml", REPLACES.partition("  - {key: b")[0])
    write("b.yaml", THREE.replace("shop", "other").replace("three", "two"))
    result = check("a.yaml", "b.yaml")
    assert (result.exit_code, result.output) == (
        0,
        f'warning: a.yaml:3:83: {REPLACED}: found "two", which no limit has, expected the'
        " name of a limit of the domain; correct it, or remove the entry\n"
        "2 files, 2 domains, 2 rules: no problems, 1 warning\n",
    )
    assert check("--format", "github", "a.yaml", "b.yaml").output.startswith("::warning file=a.yaml,line=3,col=83,")
