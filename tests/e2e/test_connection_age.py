"""Sidecars, as processes, whose clients' connections get old."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from e2e.sidecars import sidecar_command
from server.raw_http2 import connected

from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.server.framing import frame
from ratelimit_sidecar.server.rpc import Code

WITHIN_S = 60


@pytest.mark.parametrize("front_end", ["h2", pytest.param("grpcio", marks=pytest.mark.slow)])
async def test_an_old_connection_is_told_to_go_and_closed(tmp_path: Path, front_end: str) -> None:
    [region] = free_ports(1).regions
    command = sidecar_command(tmp_path, region, {}, environment={"GRPC_MAX_CONNECTION_AGE": "500ms"})
    command = Command(command.name, [*command.argv, "--frontend", front_end], command.ready_url, command.environment)
    async with Children(tmp_path) as children:
        await children.start(command)
        async with connected(f"{HOST}:{region.grpc}") as client:
            assert (await client.call("/grpc.health.v1.Health/Check", frame(b""))).code == Code.OK
            await asyncio.wait_for(client.told_to_go.wait(), WITHIN_S)
            await asyncio.wait_for(client.gone.wait(), WITHIN_S)
