"""Whatever the process writes to stderr is a line of its log: each way that a library has is tried in a process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from structlog.testing import capture_logs

from ratelimit_sidecar.telemetry import log_writer

WAYS = {
    "a write of a C library": "os.write(2, b'E0000 chttp2_transport.cc:1] broken\\n')",
    "a line without an end": "os.write(2, b'broken')",
    "print": "print('broken', file=sys.stderr)",
    "a warning": "warnings.warn('broken', UserWarning)",
    "a logger": "logging.getLogger('opentelemetry.exporter').warning('broken')",
    "a thread that fails": """
def fail():
    raise RuntimeError('broken')
thread = threading.Thread(target=fail)
thread.start()
thread.join()
""",
    "an exception in a destructor": """
class Bad:
    def __del__(self):
        raise RuntimeError('broken')
Bad()
""",
    "a task that nobody awaits": """
async def fail():
    raise RuntimeError('broken')
async def main():
    task = asyncio.ensure_future(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
    gc.collect()
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
""",
    "a callback of the loop that fails": """
async def main():
    asyncio.get_running_loop().call_soon(lambda: 'broken'.fail())
    await asyncio.sleep(0.01)
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
""",
    "gRPC's core": """
import grpc
with socket.create_server(("127.0.0.1", 0)) as listener:
    def answer():
        connection, _ = listener.accept()
        connection.sendall(b"this is not TLS, it is broken\\n")
        connection.close()
    threading.Thread(target=answer, daemon=True).start()
    channel = grpc.secure_channel(f"127.0.0.1:{listener.getsockname()[1]}", grpc.ssl_channel_credentials())
    try:
        channel.unary_unary("/a/b")(b"", timeout=20)
    except grpc.RpcError as error:
        logging.getLogger("test").warning("broken: %s", error.code())
    channel.close()
""",
    "OpenTelemetry's exporter": """
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["OTEL_EXPORTER_OTLP_TIMEOUT"] = "1"
from ratelimit_sidecar.telemetry.export import start_tracing
tracing = start_tracing("a", "eu")
tracing.tracer._tracer.start_span("broken").end()
asyncio.run(tracing.close(30))
logging.getLogger("test").warning("broken")
""",
}

PROGRAM = """
import asyncio, gc, logging, os, socket, sys, threading, warnings
import uvloop
from ratelimit_sidecar.telemetry.log_writer import LogWriter, TakenStderr
from ratelimit_sidecar.telemetry.logs import configure_logs

stderr = TakenStderr()
configure_logs({"LOG_FORMAT": "json"}, LogWriter(stderr.log))
stderr.start()
%s
stderr.close()
"""


def lines_of(way: str) -> list[dict[str, str]]:
    argv = [sys.executable, "-c", PROGRAM % way]
    ran = subprocess.run(argv, capture_output=True, timeout=120, check=True)
    return [json.loads(line) for line in ran.stderr.splitlines()]


def test_all_of_it_is_lines_of_the_log() -> None:
    told = lines_of("\n".join(way for name, way in WAYS.items() if name != "OpenTelemetry's exporter"))
    assert len(told) >= len(WAYS) - 1
    assert all(line["event"] and line["level"] and line["timestamp"] for line in told)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_it_is_an_event_in_the_format_that_was_asked_for(way: str) -> None:
    told = lines_of(WAYS[way])
    assert any("broken" in json.dumps(line) or "AttributeError" in json.dumps(line) for line in told)
    assert all(line["event"] and line["level"] and line["timestamp"] for line in told)


def test_what_a_library_says_without_end_is_cut_into_lines() -> None:
    told = lines_of("for _ in range(8): os.write(2, b'x' * 8_192)")
    assert "".join(line["line"] for line in told) == "x" * 8 * 8_192


@pytest.mark.parametrize(("letter", "level"), [("I", "info"), ("W", "warning"), ("E", "error"), ("F", "error")])
def test_what_the_core_of_grpc_says_has_the_level_that_it_has_there(letter: str, level: str) -> None:
    with capture_logs() as logs:
        log_writer.log_lines([f"{letter}1128 19:24:17.544196   14603 ssl_transport_security.cc:2563] broken".encode()])
    assert [line["log_level"] for line in logs] == [level]


def test_where_it_crashed_is_told_though_nobody_can_format_it() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM % "os.abort()"], capture_output=True, timeout=120, check=False)
    assert ran.returncode != 0
    assert b"Fatal Python error: Aborted" in ran.stderr


def test_what_is_said_after_the_end_is_seen() -> None:
    argv = [sys.executable, "-c", PROGRAM % "" + "os.write(2, b'the very end')"]
    assert subprocess.run(argv, capture_output=True, timeout=120, check=True).stderr == b"the very end"
