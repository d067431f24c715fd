"""Writes the Python modules of every .proto in this folder: `python proto/generate.py [TARGET]`.

TARGET is where the packages are rooted: the repository, unless a test asks for another place to compare with.
Needs grpcio-tools (the `dev` extra), whose version decides the oldest protobuf runtime the modules load with.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parent


def generate(target: Path) -> None:
    """Write `*_pb2.py` and `*_pb2.pyi` under `target`.

    Raises:
        RuntimeError: protoc refused a file; it has printed why.
    """
    sources = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.rglob("*.proto"))
    well_known = files("grpc_tools") / "_proto"
    status = protoc.main(
        ["protoc", f"-I{PROTO_ROOT}", f"-I{well_known}", f"--python_out={target}", f"--pyi_out={target}", *sources]
    )
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTO_ROOT.parent)
