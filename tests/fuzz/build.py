"""Builds `native_http2`, nghttp2 included, with sanitizers and coverage for the fuzzer.

It goes into a folder of its own, outside the virtual environment, where `fuzz.run` finds it before any other.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
REPOSITORY: Final = HERE.parent.parent
CACHE: Final = REPOSITORY / ".fuzz"
"""Made by `make fuzz`, removed by `make clean`."""

PACKAGES: Final = CACHE / "packages"

NATIVE: Final = PACKAGES / "ratelimit_sidecar" / "server"
"""Where `native_http2` is."""

ATHERIS: Final = "atheris==3.0.0"
"""libFuzzer for Python, and the sanitizers' runtime that goes with it."""

_IGNORED: Final = HERE / "sanitizer-ignorelist.txt"

_C_FLAGS: Final = (
    "-fsanitize=address,undefined,fuzzer-no-link",
    f"-fsanitize-ignorelist={_IGNORED}",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
    # Assertions of nghttp2 stay in.
    "-UNDEBUG",
)


def build() -> Path:
    """Build unless that was done; returns the folder."""
    wanted = _inputs()
    made = PACKAGES / "made-from"
    if made.exists() and made.read_text() == wanted:
        return PACKAGES
    print(f"==> native_http2 with sanitizers, in {PACKAGES} (a minute)", flush=True)
    shutil.rmtree(PACKAGES, ignore_errors=True)
    PACKAGES.mkdir(parents=True)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
    subprocess.run([*pip, "--target", str(PACKAGES), ATHERIS], check=True)
    objects = CACHE / "objects"
    subprocess.run(
        [
            *(sys.executable, "setup.py", "--quiet", "build_ext"),
            *("--force", "--build-lib", str(PACKAGES), "--build-temp", str(objects)),
        ],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "RATELIMIT_SIDECAR_COMPILE": "http2",
            "CC": "clang",
            "LDSHARED": "clang -shared",
            "CFLAGS": " ".join(_C_FLAGS),
        },
        check=True,
    )
    shutil.rmtree(objects)
    made.write_text(wanted)
    return PACKAGES


def _inputs() -> str:
    """A digest of what is built, and how."""
    native = REPOSITORY / "ratelimit_sidecar" / "server" / "native_http2.pyx"
    sources = [
        REPOSITORY / "setup.py",
        native,
        _IGNORED,
        *sorted((REPOSITORY / "third_party" / "nghttp2").rglob("*.[ch]")),
    ]
    digest = hashlib.sha256("\n".join((ATHERIS, *_C_FLAGS, sys.version)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()
