"""Quotas with real Envoys and sidecars: the configuration is that of examples/quotas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from e2e.quotas import Load, Rate, admitted_within, envoy_command, metric, running, sidecar_command

from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import Children
from ratelimit_sidecar.limiter.fair_shares import fair_level, grouped

WAIT_S = 60


async def until_assigned(client: httpx.AsyncClient, region: RegionPorts, assignments: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while await metric(client, region, "ratelimit_quota_assignments_total") < assignments:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@asynccontextmanager
async def one_envoy(folder: Path) -> AsyncIterator[tuple[RegionPorts, httpx.AsyncClient]]:
    """An Envoy with its sidecar, and a client for the sidecar's console."""
    ports = free_ports(1)
    (region,) = ports.regions
    async with Children(folder) as children, httpx.AsyncClient(trust_env=False, timeout=WAIT_S) as client:
        await children.start(sidecar_command(folder, "sidecar", region))
        await children.start(envoy_command(folder, "envoy", region, region.grpc, ports.upstream))
        yield region, client


async def test_an_envoy_is_told_its_quota_and_what_it_admits_is_charged_to_the_rule(tmp_path: Path) -> None:
    async with one_envoy(tmp_path) as (region, client):
        load = Load(region.envoy, 1)
        assert await load.ask() == 200
        load.close()
        await until_assigned(client, region, 1)
        rule = {"domain": "shop", "rule": "shop.service_checkout.tenant"}
        assert await metric(client, region, "ratelimit_decisions_total", code="OK", **rule) == 1
        (bucket,) = (await client.get(f"http://{HOST}:{region.admin}/buckets")).json()["buckets"]
        assert bucket["rule"] == rule["rule"]


async def test_whatever_clients_invent_shares_a_bucket_that_is_limited(tmp_path: Path) -> None:
    async with one_envoy(tmp_path) as (region, client):
        for tenant in ("m\xff", "m" * 2_000, "", "invented", "others", "acme\r\nx-tenant: second"):
            load = Load(region.envoy, 1, tenant)
            # Denied when an earlier one has used up what is assigned first.
            assert await load.ask() in (200, 429)
            load.close()
        await until_assigned(client, region, 1)
        (bucket,) = (await client.get(f"http://{HOST}:{region.admin}/buckets")).json()["buckets"]
        assert bucket["rule"] == "shop.service_checkout.tenant_others"
        assert await metric(client, region, "ratelimit_quota_report_errors_total") == 0


@pytest.mark.long
@pytest.mark.parametrize("front_end", ["h2", "grpcio"])
async def test_three_envoys_get_fair_shares_that_follow_the_demand_and_outlive_the_sidecar(
    tmp_path: Path, front_end: str
) -> None:
    ports = free_ports(3)
    region = ports.regions[0]
    async with Children(tmp_path) as children, httpx.AsyncClient(trust_env=False, timeout=WAIT_S) as client:
        command = sidecar_command(tmp_path, "sidecar", region, front_end=front_end)
        sidecar = await children.start(command)
        upstreams = [free_ports(1).upstream for _ in range(3)]
        for number, (envoy, upstream) in enumerate(zip(ports.regions, upstreams, strict=True)):
            await children.start(envoy_command(tmp_path, f"envoy{number}", envoy, region.grpc, upstream))
        loads = [Load(envoy.envoy, rate) for envoy, rate in zip(ports.regions, (400, 40, 40), strict=True)]
        async with running(*loads):
            await until_assigned(client, region, 3)
            await asyncio.sleep(SETTLES_S)
            check(await admitted_within(10, loads), [220, 40, 40])
            loads[0].per_second, loads[1].per_second = 40, 400
            await asyncio.sleep(SETTLES_S)
            check(await admitted_within(10, loads), [40, 220, 40])
            await children.kill(sidecar)
            check(await admitted_within(5, loads), [40, 220, 40])
            await children.start(command)
            check(await admitted_within(10, loads), [40, 220, 40])
            await asyncio.sleep(SETTLES_S)
            check(await admitted_within(10, loads), [40, 220, 40])


@pytest.mark.long
async def test_two_regions_give_shares_whose_sum_is_the_limit(tmp_path: Path) -> None:
    ports = free_ports(2)
    async with Children(tmp_path) as children, httpx.AsyncClient(trust_env=False, timeout=WAIT_S) as client:
        for number, region in enumerate(ports.regions):
            await children.start(sidecar_command(tmp_path, f"sidecar{number}", region, ports.regions))
            await children.start(envoy_command(tmp_path, f"envoy{number}", region, region.grpc, free_ports(1).upstream))
        loads = [Load(region.envoy, rate) for region, rate in zip(ports.regions, (400, 60), strict=True)]
        async with running(*loads):
            for region in ports.regions:
                await until_assigned(client, region, 1)
            await asyncio.sleep(SETTLES_S)
            check(await admitted_within(10, loads), [240, 60])
            loads[1].per_second = 300
            await asyncio.sleep(SETTLES_S)
            check(await admitted_within(10, loads), [150, 150])


SETTLES_S = 10.5
"""Two reports."""


def check(rates: Sequence[Rate], fair: Sequence[float]) -> None:
    """Check that what Envoys admitted is the limit, and divided fairly.

    Args:
        fair: of what is sent when all of it can be sent when it is due.
    """
    # A machine that is busy sends less than it ought to.
    level = fair_level(300, grouped(round(rate.asked) for rate in rates))
    due = [min(share, rate.asked, level.share(round(rate.asked))) for rate, share in zip(rates, fair, strict=True)]
    assert sum(rate.admitted for rate in rates) <= 1.05 * 300, rates
    assert sum(rate.admitted for rate in rates) >= 0.95 * sum(due), rates
    for rate, share in zip(rates, due, strict=True):
        assert rate.admitted >= 0.93 * share, rates
