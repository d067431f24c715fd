"""A sidecar leaves nothing behind that only a garbage collection would find: there are practically none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_reloads_connections_and_changing_keys_leave_no_cycles_behind() -> None:
    program = [sys.executable, "-m", "benchmarks.growth", "--rules", "100", "--reloads", "6"]
    path = os.pathsep.join(each or str(Path.cwd()) for each in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "LOG_LEVEL": "error"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-2_000:]
    assert "0 objects of garbage" in done.stdout
