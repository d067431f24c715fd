"""What setup.py decides, without compiling for minutes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution, Extension

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("mode", "arguments", "is_wanted"),
    [
        ("", ["setup.py", "bdist_wheel"], True),
        ("1", ["setup.py", "bdist_wheel"], True),
        ("unoptimized", ["setup.py", "bdist_wheel"], True),
        ("0", ["setup.py", "bdist_wheel"], False),
        ("", ["setup.py", "editable_wheel"], False),
        ("1", ["setup.py", "editable_wheel"], False),
        ("", ["setup.py", "egg_info"], False),
        ("", ["setup.py", "sdist"], False),
    ],
)
def test_wheels_are_compiled_unless_it_is_turned_off(
    setup_py: ModuleType, mode: str, arguments: list[str], is_wanted: bool
) -> None:
    assert setup_py.is_wanted(mode, arguments) is is_wanted


def test_another_mode_is_an_error(setup_py: ModuleType) -> None:
    with pytest.raises(SystemExit, match="RATELIMIT_SIDECAR_COMPILE is 'yes', expected 0, 1, unoptimized or nothing"):
        setup_py.is_wanted("yes", ["setup.py", "bdist_wheel"])


def test_every_pattern_of_compiled_modules_names_some(setup_py: ModuleType) -> None:
    for pattern in setup_py.COMPILED:
        assert list((ROOT / "ratelimit_sidecar").glob(pattern)), pattern


def built(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The extensions of a build with a compiler that always fails."""
    code = "import setup, sys; sys.argv = ['setup.py', 'bdist_wheel']; print(setup.extensions())"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "CC": "false", "TMPDIR": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_it_is_installed_interpreted_and_says_so(tmp_path: Path) -> None:
    result = built(tmp_path, RATELIMIT_SIDECAR_COMPILE="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    assert "ratelimit-sidecar is installed interpreted, a few times slower: no C compiler" in result.stderr


@pytest.mark.parametrize("mode", ["1", "unoptimized"])
def test_a_missing_compiler_is_an_error_when_it_is_insisted_on(mode: str, tmp_path: Path) -> None:
    result = built(tmp_path, RATELIMIT_SIDECAR_COMPILE=mode)
    assert result.returncode != 0
    assert f"RATELIMIT_SIDECAR_COMPILE={mode}, and it cannot be compiled: no C compiler" in result.stderr


def test_what_breaks_while_it_is_compiled_is_left_out_with_what_was_compiled_before(
    setup_py: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, compiled = tmp_path / "broken.c", tmp_path / "compiled_before.so"
    source.write_text("this is no C\n")
    compiled.touch()
    distribution = Distribution({"name": "broken", "ext_modules": [Extension("broken", [str(source)])]})
    build = setup_py.BuildWhatCanBe(distribution)
    build.build_lib = build.build_temp = str(tmp_path)
    build.ensure_finalized()

    build.run()

    assert not compiled.exists()
    assert not distribution.has_ext_modules()
    assert "ratelimit-sidecar is installed interpreted, a few times slower: " in capsys.readouterr().err
