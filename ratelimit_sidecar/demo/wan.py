"""The network lines between the regions of docker-compose.yml: each is a TCP port that leads to another address, with
delay.

python -m ratelimit_sidecar.demo.wan --delay-ms 40 50051=sidecar-us-east-1:50051 50052=sidecar-eu-west-2:50051
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass

from ratelimit_sidecar.demo.links import Link, Way

ANY = "0.0.0.0"  # noqa: S104


@dataclass(frozen=True, slots=True)
class Line:
    """A TCP port that leads to another address.

    Args:
        port: the port to connect to; 0 for a free one.
        host, to_port: the address that it leads to.
    """

    port: int
    host: str
    to_port: int

    @classmethod
    def parse(cls, text: str) -> Line:
        """Parse `PORT=HOST:PORT`.

        Raises:
            ValueError: not PORT=HOST:PORT.
        """
        found = re.fullmatch(r"(\d+)=(.+):(\d+)", text)
        if found is None:
            raise ValueError(f"{text!r} is not PORT=HOST:PORT")
        return cls(int(found[1]), found[2], int(found[3]))

    async def dial(self) -> socket.socket:
        """Connect to the address that the line leads to.

        Raises:
            OSError: the name is unknown, or nobody answers.
        """
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(self.host, self.to_port, type=socket.SOCK_STREAM)
        family, _, _, _, address = infos[0]
        dialled = socket.socket(family, socket.SOCK_STREAM)
        dialled.setblocking(False)
        try:
            await loop.sock_connect(dialled, address)
        except BaseException:
            dialled.close()
            raise
        return dialled


async def carry(lines: list[Line], delay_s: float, jitter_s: float) -> None:
    """Carry data on all lines until SIGTERM or SIGINT.

    Args:
        delay_s: the delay in each direction.
        jitter_s: a random time up to this is added.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as links:
        for seed, line in enumerate(lines):
            listener = socket.create_server((ANY, line.port))
            ways = (Way(delay_s, jitter_s, 2 * seed), Way(delay_s, jitter_s, 2 * seed + 1))
            await links.enter_async_context(Link(listener, line.dial, *ways))
            print(f"port {listener.getsockname()[1]} leads to {line.host}:{line.to_port}", flush=True)
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Lines between regions: TCP ports that lead elsewhere, late.")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="of each direction")
    parser.add_argument("--jitter-ms", type=float, default=0.0, help="added to it at most")
    parser.add_argument("lines", nargs="+", type=Line.parse, metavar="PORT=HOST:PORT")
    arguments = parser.parse_args()
    asyncio.run(carry(arguments.lines, arguments.delay_ms / 1_000, arguments.jitter_ms / 1_000))


if __name__ == "__main__":
    main()
