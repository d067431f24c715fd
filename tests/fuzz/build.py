"""Builds ngh2, nghttp2 included, from its source distribution, with sanitizers and coverage for the fuzzer.

It goes into a folder of its own, outside the virtual environment, and is found there before the wheel.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
CACHE: Final = HERE.parent.parent / ".fuzz"
"""Made by `make fuzz`, removed by `make clean`."""

PACKAGES: Final = CACHE / "packages"

BUILD_WITH: Final = ("cython==3.3.1", "cython-cmake==0.3.0", "scikit-build-core==1.1.2")

ATHERIS: Final = "atheris==3.0.0"
"""libFuzzer for Python, and the sanitizers' runtime that goes with it."""

_IGNORED: Final = HERE / "sanitizer-ignorelist.txt"

_C_FLAGS: Final = (
    "-fsanitize=address,undefined,fuzzer-no-link",
    f"-fsanitize-ignorelist={_IGNORED}",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g",
)


def build() -> Path:
    """Build unless that was done; returns the folder."""
    ngh2 = f"ngh2=={importlib.metadata.version('ngh2')}"
    inputs = (ngh2, ATHERIS, *BUILD_WITH, *_C_FLAGS, _IGNORED.read_text(), sys.version)
    wanted = hashlib.sha256("\n".join(inputs).encode()).hexdigest()
    made = PACKAGES / "made-from"
    if made.exists() and made.read_text() == wanted:
        return PACKAGES
    print(f"==> {ngh2} with sanitizers, in {PACKAGES} (two minutes)", flush=True)
    shutil.rmtree(PACKAGES, ignore_errors=True)
    CACHE.mkdir(exist_ok=True)
    constraints = CACHE / "constraints.txt"
    constraints.write_text("\n".join(BUILD_WITH))
    compiler = {"CC": "clang", "CXX": "clang++", "CFLAGS": " ".join(_C_FLAGS), "PIP_CONSTRAINT": str(constraints)}
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"),
            *("--target", str(PACKAGES), "--no-binary", "ngh2", "--no-cache-dir"),
            # Assertions of nghttp2 stay in, which a release build leaves out.
            *("-Ccmake.build-type=None", "-Cinstall.strip=false"),
            *(ngh2, ATHERIS),
        ],
        env={**os.environ, **compiler},
        check=True,
    )
    made.write_text(wanted)
    return PACKAGES
