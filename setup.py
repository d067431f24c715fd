"""What pyproject.toml cannot say: the modules that every request and every replicated bucket passes through are
compiled to machine code, by mypyc, and so is the HTTP/2 of the front end, by Cython.

They are compiled when a wheel is built and a C compiler and Python's headers are at hand; otherwise, or when it fails,
the same modules run interpreted, a few times slower, with `portable_http2` in the place of `native_http2`.
RATELIMIT_SIDECAR_COMPILE=0 leaves it, and =1 makes it an error when it cannot be done; =unoptimized does, too, in about
half the time, for what is only to be tested. An editable install is never compiled: what is compiled would be found
before the sources that somebody edits.
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

COMPILED = (
    "clock.py",
    "crdt/*.py",
    "limiter/*.py",
    "mesh_status.py",
    "replication/acks.py",
    "replication/anti_entropy.py",
    "replication/changes.py",
    "replication/deltas.py",
    "replication/demands.py",
    "replication/key_ids.py",
    "replication/pings.py",
    "replication/payments.py",
    "replication/lag.py",
    "replication/outbox.py",
    "replication/pace.py",
    "replication/parts.py",
    "replication/peer.py",
    "replication/peers.py",
    "replication/relay.py",
    "replication/replicator.py",
    "replication/rounds.py",
    "replication/session.py",
    "replication/side_log.py",
    "replication/snapshots.py",
    "replication/stream.py",
    "replication/sync_requests.py",
    "replication/wire.py",
    "server/budget.py",
    "server/events.py",
    "server/framing.py",
    "server/front_end_counts.py",
    "server/grpc_connection.py",
    "server/grpc_protocol.py",
    "server/messages.py",
    "server/rpc.py",
    "server/tls_session.py",
    "server/turns.py",
    "services/ext_authz.py",
    "services/ratelimit.py",
    "telemetry/latency.py",
    "telemetry/traces.py",
)

NGHTTP2 = Path("third_party/nghttp2/lib")

NATIVE_HTTP2 = Extension(
    "ratelimit_sidecar.server.native_http2",
    ["ratelimit_sidecar/server/native_http2.pyx", *sorted(map(str, NGHTTP2.glob("*.c")))],
    depends=sorted(map(str, NGHTTP2.rglob("*.h"))),
    include_dirs=[str(NGHTTP2), str(NGHTTP2 / "includes")],
    define_macros=[
        ("NGHTTP2_STATICLIB", None),
        ("HAVE_ARPA_INET_H", None),
        ("HAVE_NETINET_IN_H", None),
        ("HAVE_CLOCK_GETTIME", None),
        ("HAVE_DECL_CLOCK_MONOTONIC", "1"),
    ],
    extra_compile_args=["-O3", "-fvisibility=hidden"],
)
"""HTTP/2 for the front end, with nghttp2 in it; `ratelimit_sidecar/server/portable_http2.py` stands in for it."""

MODE = os.environ.get("RATELIMIT_SIDECAR_COMPILE", "")
MODES = ("", "0", "1", "unoptimized")
IS_REQUIRED = MODE in ("1", "unoptimized")
BUILDING = ("bdist_wheel", "build", "build_ext", "install")


def is_wanted(mode: str, arguments: list[str]) -> bool:
    """Whether the modules are to be compiled in this run.

    Args:
        mode: of RATELIMIT_SIDECAR_COMPILE.
        arguments: of setup.py; those that only read metadata need not wait for it.

    Raises:
        SystemExit: there is no such mode.
    """
    if mode not in MODES:
        raise SystemExit(f"RATELIMIT_SIDECAR_COMPILE is {mode!r}, expected 0, 1, unoptimized or nothing")
    return mode != "0" and any(command in arguments for command in BUILDING)


def why_not() -> str:
    """Why nothing can be compiled here; "" when it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\nint main(void) { return 0; }\n")
        probe = build_ext(Distribution({"name": "probe", "ext_modules": [Extension("probe", [str(source)])]}))
        probe.build_lib = probe.build_temp = folder
        try:
            probe.ensure_finalized()
            probe.run()
        except Exception as error:
            return str(error) or type(error).__name__
    return ""


def give_up(reason: str) -> None:
    if IS_REQUIRED:
        raise SystemExit(f"RATELIMIT_SIDECAR_COMPILE={MODE}, and it cannot be compiled: {reason}")
    print(f"ratelimit-sidecar is installed interpreted, a few times slower: {reason}", file=sys.stderr)


def extensions() -> list[Extension]:
    if not is_wanted(MODE, sys.argv):
        return []
    reason = why_not()
    if reason:
        give_up(f"no C compiler with Python's headers ({reason})")
        return []
    try:
        from Cython.Build import cythonize
        from mypyc.build import mypycify

        sources = [file for pattern in COMPILED for file in sorted(map(str, Path("ratelimit_sidecar").glob(pattern)))]
        # `make lint` checks the types, with all stubs and plugins at hand; here they may be missing.
        options = ["--config-file=", "--ignore-missing-imports"]
        # One C file of all modules, with -O3, takes twice the time and 700 MB instead of 300 MB; a decision in it takes
        # a few percent less.
        modules = mypycify([*options, *sources], opt_level="2", debug_level="0", multi_file=True)
        for module in modules:
            # mypyc adds -Werror: a warning that its authors' compilers have not would cost the speed.
            module.extra_compile_args = [*module.extra_compile_args, "-Wno-error"]
        found = [*modules, *cythonize([NATIVE_HTTP2], build_dir="build")]
        if MODE == "unoptimized":
            for extension in found:
                # Of several the compiler takes the last.
                extension.extra_compile_args = [*extension.extra_compile_args, "-O0"]
        return found
    except (Exception, SystemExit) as error:
        give_up(str(error))
        return []


class BuildWhatCanBe(build_ext):
    """Leaves out all that is compiled when a part cannot be: its modules rely on each other."""

    def run(self) -> None:
        self._remove(keep={self.get_ext_fullpath(extension.name) for extension in self.extensions})
        try:
            super().run()
        except Exception as error:
            give_up(str(error))
            self._remove(keep=set())
            self.extensions = self.distribution.ext_modules = []
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.root_is_pure = True

    def build_extensions(self) -> None:
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources: list[str], **options: object) -> list[str]:
            # Several processors, of which each wants up to 300 MB.
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
                compiled = threads.map(lambda source: compile_in_turn([source], **options), sources)
                return [name for names in compiled for name in names]

        self.compiler.compile = compile_at_once
        super().build_extensions()

    def _remove(self, keep: set[str]) -> None:
        """An earlier build's leftovers: Python would find them before the sources of modules not compiled any more."""
        for file in Path(self.build_lib).rglob("*.so"):
            if str(file) not in keep:
                file.unlink()


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildWhatCanBe})
