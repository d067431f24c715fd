import signal
import socket

import httpx
import pytest
from e2e.commands import command, free_base_port

from ratelimit_sidecar.demo.ports import ensure_free, ports_from


@pytest.mark.slow
async def test_a_demo_with_a_duration_ends_by_itself_and_with_0_when_the_promise_was_kept() -> None:
    base = free_base_port()
    async with command("demo", "--duration", "8", "--base-port", str(base)) as demo:
        code = await demo.ended()

    assert code == 0, demo.output
    assert "Promise kept." in demo.output
    assert all(name in demo.output for name in ("us-east-1", "eu-west-2", "ap-southeast-1", "all together"))
    ensure_free(ports_from(base, 3).all())


@pytest.mark.slow
async def test_a_demo_whose_sidecars_do_not_share_ends_with_1() -> None:
    arguments = ("demo", "--duration", "6", "--base-port", str(free_base_port()))
    async with command(*arguments, environment={"CRDT_ENGINE": "local"}) as demo:
        code = await demo.ended()

    assert code == 1, demo.output
    assert "Promise BROKEN" in demo.output


@pytest.mark.slow
async def test_ctrl_c_during_the_traffic_stops_everything_and_still_judges() -> None:
    base = free_base_port()
    async with command("demo", "--base-port", str(base)) as demo:
        await demo.printed("one global bucket")
        demo.signal(signal.SIGINT)
        code = await demo.ended()

    assert code == 0, demo.output
    assert "Promise kept." in demo.output
    ensure_free(ports_from(base, 3).all())


@pytest.mark.slow
async def test_ctrl_c_during_the_start_stops_everything() -> None:
    base = free_base_port()
    async with command("demo", "--base-port", str(base)) as demo:
        await demo.printed("starting")
        demo.signal(signal.SIGINT)
        code = await demo.ended()

    assert code == 130, demo.output
    assert "Traceback" not in demo.output
    ensure_free(ports_from(base, 3).all())


@pytest.mark.slow
async def test_a_kept_demo_answers_curl_after_the_traffic_until_ctrl_c() -> None:
    base = free_base_port()
    async with (
        command("demo", "--duration", "2", "--keep", "--base-port", str(base)) as demo,
        httpx.AsyncClient(trust_env=False) as client,
    ):
        await demo.printed(f"curl http://127.0.0.1:{base + 31}/metrics")
        response = await client.get(f"http://127.0.0.1:{base + 3}/rate?agent=you")
        demo.signal(signal.SIGINT)
        code = await demo.ended()

    assert response.status_code == 200
    assert code == 0, demo.output
    ensure_free(ports_from(base, 3).all())


@pytest.mark.slow
async def test_a_taken_port_is_named_with_the_way_out() -> None:
    base = free_base_port()
    with socket.create_server(("127.0.0.1", base + 2)):
        async with command("demo", "--duration", "1", "--base-port", str(base)) as demo:
            code = await demo.ended()

    assert code == 1
    assert f"port {base + 2} is taken by" in demo.output
    assert "--base-port" in demo.output
