"""Earlier versions of this repository, to be run beside this one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def environment_of(commit: str, folder: Path) -> dict[str, str]:
    """What a sidecar of that version is started with; skips the test when it cannot be had.

    Args:
        folder: where it is unpacked; not there yet.
    """
    folder.mkdir()
    root = Path(__file__).parents[2]
    git = subprocess.run(
        ["git", "-C", str(root), "archive", commit, "ratelimit_sidecar"], capture_output=True, check=False
    )
    if git.returncode:
        pytest.skip(f"{commit} is not there: {git.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=git.stdout, check=True)
    # What is installed and what the folder holds that tests run in come after it.
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
