"""Writes the Python modules of every .proto in this folder, and of Envoy's API: `python proto/generate.py [TARGET]`.

TARGET is where the packages are rooted: the repository, unless a test asks for another place to compare with.
Needs grpcio-tools (the `dev` extra), whose version decides the oldest protobuf runtime the modules load with.
"""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import Final

import google.rpc
from grpc_tools import protoc

PROTO_ROOT: Final = Path(__file__).resolve().parent
ENVOY_ROOT: Final = PROTO_ROOT.parent / "third_party" / "envoy_api"
ENVOY_PACKAGE: Final = "ratelimit_sidecar.envoy_api"

_WELL_KNOWN: Final = str(files("grpc_tools") / "_proto")
# google/rpc/status.proto is beside its module.
_GOOGLEAPIS: Final = str(Path(google.rpc.__path__[0]).parents[1])

_ENVOY_IMPORT: Final = re.compile(r"^from (?=(?:envoy|udpa|validate|xds)\b)", re.MULTILINE)

# protoc takes a module's constants for those of a class.
_CONSTANT: Final = re.compile(r"^(\w+): _ClassVar\[(\w+)\]$", re.MULTILINE)


def generate(target: Path) -> None:
    """Write `*_pb2.py` and `*_pb2.pyi` under `target`, for services of Envoy's API `*_pb2_grpc.py`, too.

    Raises:
        RuntimeError: protoc refused a file; it has printed why.
    """
    _compile(PROTO_ROOT, [_WELL_KNOWN], target, [])
    envoy = target.joinpath(*ENVOY_PACKAGE.split("."))
    envoy.mkdir(parents=True, exist_ok=True)
    _compile(ENVOY_ROOT, [_WELL_KNOWN, _GOOGLEAPIS], envoy, [f"--grpc_python_out={envoy}"])
    for file in [*envoy.rglob("*_pb2*.py"), *envoy.rglob("*.pyi")]:
        source = file.read_text()
        if file.name.endswith("_pb2_grpc.py") and "class " not in source:
            file.unlink()
            continue
        # protoc takes the path of a .proto for its module, and these are in a package of ours.
        source = _ENVOY_IMPORT.sub(f"from {ENVOY_PACKAGE}.", source)
        file.write_text(_CONSTANT.sub(r"\1: \2", source))
    for folder in [envoy, *(path for path in envoy.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
        (folder / "__init__.py").touch()


def _compile(root: Path, imported: list[str], target: Path, options: list[str]) -> None:
    sources = sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))
    paths = [f"-I{path}" for path in (root, *imported)]
    status = protoc.main(["protoc", *paths, f"--python_out={target}", f"--pyi_out={target}", *options, *sources])
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTO_ROOT.parent)
