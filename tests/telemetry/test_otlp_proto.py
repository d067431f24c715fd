"""OpenTelemetry's exporters work although xds-protos has written over the messages they need."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from ratelimit_sidecar.telemetry.otlp_proto import VENDORED, is_whole, repair_otlp_proto


def test_the_vendored_modules_are_those_that_the_installed_version_should_have() -> None:
    """RECORD still has the hashes of the files that were written over.

    To update them: `pip download --no-deps opentelemetry-proto`, unzip, copy the *_pb2.py of the same names.
    """
    recorded = {
        file.name: file.hash.value for file in metadata.files("opentelemetry-proto") or () if file.hash is not None
    }
    for module in VENDORED.glob("*.py"):
        digest = hashlib.sha256(module.read_bytes()).digest()
        assert base64.urlsafe_b64encode(digest).decode().rstrip("=") == recorded[module.name], module.name


def test_files_of_xds_protos_are_told_from_those_of_opentelemetry(tmp_path: Path) -> None:
    messages = tmp_path / "common" / "v1" / "common_pb2.py"
    messages.parent.mkdir(parents=True)
    messages.write_bytes(b"InstrumentationLibrary")
    assert not is_whole(tmp_path)
    messages.write_bytes((VENDORED / "common_pb2.py").read_bytes())
    assert is_whole(tmp_path)


def test_the_exporters_can_be_imported_after_the_repair() -> None:
    repair_otlp_proto()
    repair_otlp_proto()
    from opentelemetry.exporter.otlp.proto.grpc import trace_exporter
    from opentelemetry.proto.common.v1 import common_pb2

    assert trace_exporter.OTLPSpanExporter
    assert common_pb2.InstrumentationScope


def test_the_vendored_modules_work_together_with_envoys_messages() -> None:
    """In a process of its own, and with the installed ones out of the way whichever they are."""
    program = """
from envoy.service.ratelimit.v3 import rls_pb2
from ratelimit_sidecar.telemetry import otlp_proto
otlp_proto.is_whole = lambda _: False
otlp_proto.repair_otlp_proto()
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from envoy.extensions.access_loggers.open_telemetry.v3 import logs_service_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2
assert "vendor" in metrics_pb2.__file__
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
