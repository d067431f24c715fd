"""The lines between compose's regions, as the process that its container runs."""

from __future__ import annotations

import asyncio
import re
import sys

import pytest

from ratelimit_sidecar.demo.wan import Line

DELAY_S = 0.1


@pytest.mark.parametrize("text", ["", "50051", "50051=host", "50051=:50051", "x=host:1", "1=host:x"])
def test_a_line_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not PORT=HOST:PORT"):
        Line.parse(text)


async def test_a_port_leads_to_its_address_and_every_answer_is_late() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(100))
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        arguments = ("--delay-ms", str(DELAY_S * 1_000), f"0=localhost:{port}")
        wan = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ratelimit_sidecar.demo.wan", *arguments, stdout=asyncio.subprocess.PIPE
        )
        try:
            async with asyncio.timeout(60):
                assert wan.stdout is not None
                told = re.match(rb"port (\d+) leads to localhost:", await wan.stdout.readline())
                assert told is not None
                reader, writer = await asyncio.open_connection("127.0.0.1", int(told[1]))
                began = asyncio.get_running_loop().time()
                writer.write(b"there and back")
                answer = await reader.read()
                took_s = asyncio.get_running_loop().time() - began
                writer.close()
        finally:
            wan.terminate()
            assert await wan.wait() == 0
    assert answer == b"there and back"
    assert took_s >= 2 * DELAY_S
