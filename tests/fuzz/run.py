"""The fuzzer's own process: takes libFuzzer's options, and runs in the environment that `python -m fuzz` makes."""

from __future__ import annotations

import sys

import atheris

import ratelimit_sidecar.server
from fuzz.build import NATIVE

# Before one that was compiled without sanitizers.
ratelimit_sidecar.server.__path__.insert(0, str(NATIVE))

with atheris.instrument_imports(
    include=["ratelimit_sidecar.server.grpc_connection", "ratelimit_sidecar.server.framing"]
):
    from fuzz import mutator, target


def _mutate(data: bytes, max_size: int, seed: int) -> bytes:
    return mutator.mutate(data, max_size, seed, atheris.Mutate)


def _play(data: bytes) -> None:
    target.play(data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, _play, custom_mutator=_mutate, custom_crossover=mutator.cross)
    atheris.Fuzz()
