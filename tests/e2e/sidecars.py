"""Sidecars without Envoys, for tests that speak to them directly."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from google.protobuf.wrappers_pb2 import UInt64Value

from ratelimit_sidecar.demo.ports import HOST, RegionPorts
from ratelimit_sidecar.demo.processes import Command
from ratelimit_sidecar.envoy_api.envoy.extensions.common.ratelimit.v3.ratelimit_pb2 import RateLimitDescriptor
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub


def sidecar_command(
    folder: Path,
    ports: RegionPorts,
    config: Mapping[str, object],
    *,
    name: str = "sidecar",
    environment: Mapping[str, str] | None = None,
    ready_path: str = "/readyz",
    listen: Mapping[str, object] | None = None,
) -> Command:
    """The command of a sidecar, whose configuration this writes.

    Args:
        config: of sidecar.yaml, besides its name and where it listens.
        ready_path: what answers 200 once it is up.
        listen: of sidecar.yaml, besides the addresses.
    """
    addresses = {"grpc": [f"{HOST}:{ports.grpc}"], "admin": f"{HOST}:{ports.admin}", "sync": f"{HOST}:{ports.sync}"}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"node": {"id": name}, "listen": {**addresses, **(listen or {})}, **config}))
    return Command(
        name=name,
        argv=[sys.executable, "-m", "ratelimit_sidecar", "serve", "--config", str(file)],
        ready_url=f"http://{HOST}:{ports.admin}{ready_path}",
        environment=environment or {},
    )


def ask(domain: str, key: str, value: str, hits: int = 1) -> RateLimitRequest:
    """One descriptor of one entry; with 0 hits it only looks."""
    descriptor = RateLimitDescriptor(
        entries=[RateLimitDescriptor.Entry(key=key, value=value)], hits_addend=UInt64Value(value=hits)
    )
    return RateLimitRequest(domain=domain, descriptors=[descriptor])


async def status(
    stub: RateLimitServiceStub, domain: str, key: str, value: str, hits: int = 1
) -> RateLimitResponse.DescriptorStatus:
    answer = await stub.ShouldRateLimit(ask(domain, key, value, hits), timeout=60)
    return answer.statuses[0]
