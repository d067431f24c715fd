"""Checks of a config by the real program that will read it."""

import subprocess
from pathlib import Path

from ratelimit_sidecar.demo.regions import find_envoy


def assert_envoy_accepts(file: Path) -> None:
    done = subprocess.run(
        [find_envoy(), "--mode", "validate", "-c", str(file)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
