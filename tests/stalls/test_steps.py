"""Nothing that is done to a large sidecar holds its event loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stalls.crowded_sidecar import LONG_MS

pytestmark = pytest.mark.slow


def test_nothing_holds_the_loop_of_a_sidecar_with_20_000_rules_and_a_million_buckets(tmp_path: Path) -> None:
    path = os.pathsep.join(each or str(Path.cwd()) for each in sys.path)
    program = [sys.executable, "-m", "stalls.crowded_sidecar", str(tmp_path)]
    done = subprocess.run(
        program, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-4_000:]
    longest = json.loads((tmp_path / "longest.json").read_text())
    assert "reload" in longest
    too_long = {
        done: {callback: took for callback, took in callbacks.items() if took > LONG_MS}
        for done, callbacks in longest.items()
    }
    assert not any(too_long.values()), too_long
