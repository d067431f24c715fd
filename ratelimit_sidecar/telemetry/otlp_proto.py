"""Makes `opentelemetry.proto` whole again where xds-protos has written over it.

Both xds-protos and opentelemetry-proto install files under `opentelemetry/proto/`. pip installs xds-protos last, and
its copy is years old: OpenTelemetry's exporters cannot even be imported then (grpc/grpc#42926,
open-telemetry/opentelemetry-python#4843). So the message modules of opentelemetry-proto 1.45.2 come with this package,
unchanged, and are found before installed ones that are too old. To be removed when xds-protos leaves them out
(grpc/grpc#42429).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import opentelemetry.proto

VENDORED = Path(__file__).with_name("vendor") / "opentelemetry_proto"

_SIGNALS = ("trace", "metrics", "logs")
_PACKAGES = tuple(
    f"opentelemetry.proto.{name}.v1"
    for name in ("common", "resource", *_SIGNALS, *(f"collector.{signal}" for signal in _SIGNALS))
)

_RENAMED_MESSAGE = b"InstrumentationScope"
"""The exporters need it; xds-protos has it under its old name, InstrumentationLibrary."""


def repair_otlp_proto() -> None:
    """To be called before a message of `opentelemetry.proto` is imported; a second call does nothing."""
    if is_whole(Path(opentelemetry.proto.__path__[0])):
        return
    for name in _PACKAGES:
        package = import_module(name)
        if str(VENDORED) not in package.__path__:
            package.__path__ = [str(VENDORED), *package.__path__]


def is_whole(folder: Path) -> bool:
    """Whether the files of an `opentelemetry/proto` are those of opentelemetry-proto."""
    return _RENAMED_MESSAGE in (folder / "common" / "v1" / "common_pb2.py").read_bytes()
