"""What pyproject.toml cannot say: with RATELIMIT_SIDECAR_COMPILE=1 the modules that every request and every replicated
bucket passes through are compiled to machine code by mypyc, which needs a C compiler and Python's headers.

They are ordinary Python and do the same without it, a few times slower. `make compile` compiles for the benchmarks and
for the tests that are run again on the result; the image has it as well.
"""

import os
from pathlib import Path

from setuptools import Extension, setup

COMPILED = (
    "clock.py",
    "crdt/*.py",
    "limiter/*.py",
    "replication/anti_entropy.py",
    "replication/deltas.py",
    "replication/key_numbers.py",
    "replication/key_queue.py",
    "replication/lending.py",
    "replication/loans.py",
    "replication/outbox.py",
    "replication/pace.py",
    "replication/peer.py",
    "replication/recent.py",
    "replication/relay.py",
    "replication/replicator.py",
    "replication/session.py",
    "replication/status.py",
    "replication/wire.py",
    "server/framing.py",
    "server/grpc_protocol.py",
    "server/http2.py",
    "server/messages.py",
    "server/rpc.py",
    "services/ratelimit.py",
    "telemetry/latency.py",
    "telemetry/traces.py",
)

NGHTTP2 = Path("third_party/nghttp2/lib")

NATIVE_HTTP2 = Extension(
    "ratelimit_sidecar.server.native_http2",
    ["ratelimit_sidecar/server/native_http2.pyx", *sorted(map(str, NGHTTP2.glob("*.c")))],
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
"""HTTP/2 for the front end, with nghttp2 in it; `ratelimit_sidecar/server/portable_http2.py` stands in for it. It alone
is compiled with RATELIMIT_SIDECAR_COMPILE=http2, as the fuzzer does."""

compiled = os.environ.get("RATELIMIT_SIDECAR_COMPILE")
extensions = []
if compiled == "1":
    from mypyc.build import mypycify

    sources = [file for pattern in COMPILED for file in sorted(map(str, Path("ratelimit_sidecar").glob(pattern)))]
    # `make lint` checks the types, with all stubs and plugins at hand; here they may be missing.
    extensions += mypycify(["--config-file=", "--ignore-missing-imports", *sources], opt_level="3", debug_level="0")
if compiled in ("1", "http2"):
    from Cython.Build import cythonize

    extensions += cythonize([NATIVE_HTTP2], build_dir="build")

setup(ext_modules=extensions)
