"""Breaks the package in one line at a time, and says which test finds it: the tests have the power that they seem to.

    python dev/mutations            all of breaks.yaml, some minutes
    python dev/mutations wildcard   those of files with that in their name

It ends with 1 when a break is found by no test, or no longer fits the code.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGE = "ratelimit_sidecar"
BESIDE = ("deploy", "docs", "envoy", "examples")
"""What the package looks for beside itself in a checkout: without it tests of the demo fail, and seem to find all."""
NO_TESTS = (4, 5)
"""Pytest's exit codes when there is no such file, and when none of its tests is selected."""
SECONDS = 600
"""A break may keep a test waiting for ever: that finds it, too."""


@dataclass(frozen=True, slots=True)
class Break:
    """A break of one line of the code, and the tests that should find it.

    Args:
        tests: paths below `tests/`.
    """

    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.file}: {' '.join(self.after.split())[:80]}"


def read_breaks(part: str) -> list[Break]:
    """Those of files with `part` in their name."""
    found = yaml.safe_load((HERE / "breaks.yaml").read_text())
    breaks = [Break(each["file"], each["from"], each["to"], tuple(each["tests"].split())) for each in found]
    return [each for each in breaks if part in each.file]


def who_finds(broken: Break, folder: Path) -> str:
    """The test that fails; "" when none does.

    Args:
        folder: with a copy of the package, which is as it was afterwards.

    Raises:
        ValueError: the line that is to be broken is not there, or not once; or `make test` has none of the tests.
        SyntaxError: what takes its place is no Python, which any test would find.
    """
    file = folder / PACKAGE / broken.file
    text = file.read_text()
    if text.count(broken.before) != 1:
        raise ValueError(f"stands {text.count(broken.before)} times in {broken.file}: {broken.before}")
    changed = text.replace(broken.before, broken.after)
    compile(changed, broken.file, "exec")
    file.write_text(changed)
    try:
        pytest = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
            + [f"tests/{path}" for path in broken.tests],
            cwd=ROOT,
            env={
                **os.environ,
                "HYPOTHESIS_PROFILE": "unshrunk",
                "PYTHONSAFEPATH": "1",
                "PYTHONPATH": f"{folder}:{ROOT}",
            },
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS} s"
    finally:
        file.write_text(text)
    if pytest.returncode in NO_TESTS:
        raise ValueError(f"`make test` has none of {' '.join(broken.tests)}")
    if pytest.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", pytest.stdout, re.MULTILINE)
    return failed[1] if failed else pytest.stdout[-500:]


def main(part: str = "") -> int:
    not_found = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        for name in BESIDE:
            (folder / name).symlink_to(ROOT / name)
        breaks = read_breaks(part)
        for number, broken in enumerate(breaks, start=1):
            try:
                found_by = who_finds(broken, folder)
            except (ValueError, SyntaxError) as error:
                found_by = ""
                print(error)
            not_found += not found_by
            print(f"{number}/{len(breaks)} {broken.title}\n      {found_by or 'FOUND BY NO TEST'}", flush=True)
    print(f"{not_found} of {len(breaks)} found by no test")
    return 1 if not_found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
