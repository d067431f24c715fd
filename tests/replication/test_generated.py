"""The generated protobuf modules say what the .proto files say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_is_up_to_date_with_the_proto_files(tmp_path: Path) -> None:
    generate = ROOT / "proto" / "generate.py"
    done = subprocess.run([sys.executable, str(generate), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*")]
    assert written
    stale = [str(path) for path in written if (tmp_path / path).read_bytes() != (ROOT / path).read_bytes()]
    assert not stale, f"run `python {generate.relative_to(ROOT)}`"
