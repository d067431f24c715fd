"""Builds `native_http2`, nghttp2 included, with sanitizers and coverage for the fuzzer.

It goes into a folder of its own, outside the virtual environment, where `fuzz.run` finds it before any other.
"""

from __future__ import annotations

import hashlib
import runpy
import shutil
import subprocess
import sys
import sysconfig
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
    "-O1",
    "-g",
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
    NATIVE.mkdir(parents=True)
    _compile(NATIVE)
    made.write_text(wanted)
    return PACKAGES


def _compile(folder: Path) -> None:
    extension = runpy.run_path(str(REPOSITORY / "setup.py"))["NATIVE_HTTP2"]
    generated = folder / "native_http2.c"
    binding, *nghttp2 = extension.sources
    subprocess.run([sys.executable, "-m", "cython", binding, "-o", str(generated)], cwd=REPOSITORY, check=True)
    subprocess.run(
        [
            *("clang", "-shared", "-fPIC", "-o", str(folder / f"native_http2{sysconfig.get_config_var('EXT_SUFFIX')}")),
            *_C_FLAGS,
            *(f"-D{name}={value or 1}" for name, value in extension.define_macros),
            *(f"-I{place}" for place in (*extension.include_dirs, sysconfig.get_path("include"))),
            *(str(generated), *nghttp2),
        ],
        cwd=REPOSITORY,
        check=True,
    )


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
