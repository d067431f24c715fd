"""Records what real clients send to the front end, as the corpus that the fuzzer begins with.

python -m fuzz.record

Needs curl, h2load, nghttp and h2spec on the path, and Envoy from the demo's packages. Each client speaks through a
proxy of its own, which keeps what it sends on each connection. TLS is left out: the connection that is fuzzed is within
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio
import httpx

from fuzz.corpus import FOLDER
from ratelimit_sidecar.demo.bootstrap import EnvoySettings, envoy_bootstrap, to_yaml
from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.regions import find_envoy
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.server.grpc_front_end import GrpcFrontEnd
from ratelimit_sidecar.server.rpc import Code, Handler, Metadata, RpcError, StreamingMethod

Client = Callable[[str], Awaitable[None]]
"""Speaks to an address."""

CONNECTIONS = 40
"""Of one client, at most; h2spec opens one for each of its cases."""

MAX_CASES = 200

KEPT_BYTES = 2_048
"""Of one connection. Longer ones are those with frames of the largest size, full of one byte."""

ECHO_PATH = "/test.Echo/Echo"


def _echo(message: bytes, _headers: Metadata) -> bytes:
    if message == b"refuse":
        raise RpcError(Code.NOT_FOUND, "as asked for")
    return message


def _admit(_message: bytes, _headers: Metadata) -> bytes:
    return RateLimitResponse(overall_code=RateLimitResponse.OK).SerializeToString()


async def _echo_stream(requests: AsyncIterator[bytes], _headers: Metadata) -> AsyncGenerator[bytes, None]:
    async for message in requests:
        yield message


HANDLERS: dict[str, Handler] = {
    ECHO_PATH: _echo,
    "/test.Echo/Stream": StreamingMethod(_echo_stream),
    "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit": _admit,
}


class Recorder:
    """A proxy before an address."""

    def __init__(self, upstream: str) -> None:
        self._host, _, self._port = upstream.rpartition(":")
        self.connections: list[bytearray] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = bytearray()
        self.connections.append(sent)
        up_reader, up_writer = await asyncio.open_connection(self._host, int(self._port))
        try:
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._pass_on(reader, up_writer, sent))
                ways.create_task(self._pass_on(up_reader, writer, None))
        except* ConnectionError:
            # h2spec resets what it is done with.
            pass
        finally:
            up_writer.close()
            writer.close()

    @staticmethod
    async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray | None) -> None:
        while data := await reader.read(65_536):
            if kept is not None:
                kept += data
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()


async def _grpcio(address: str) -> None:
    metadata = (("x-request-id", "0123"), ("trace-bin", b"\x00\xff"))
    async with grpc.aio.insecure_channel(address) as channel:
        echo = channel.unary_unary(ECHO_PATH)
        for size in (0, 10, 1_000):
            await echo(b"x" * size, metadata=metadata, timeout=5)
        await asyncio.gather(*(echo(b"%d" % number) for number in range(5)))
        for path, message in ((ECHO_PATH, b"refuse"), ("/test.Echo/Missing", b"")):
            with contextlib.suppress(grpc.aio.AioRpcError):
                await channel.unary_unary(path)(message)
    async with grpc.aio.insecure_channel(address, compression=grpc.Compression.Gzip) as channel:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await channel.unary_unary(ECHO_PATH)(b"x" * 500)
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream("/test.Echo/Stream")()
        for number in range(3):
            await call.write(b"%d" % number)
            await call.read()
        await call.done_writing()
        await call.read()
        cancelled = channel.stream_stream("/test.Echo/Stream")()
        await cancelled.write(b"last words")
        await cancelled.read()
        cancelled.cancel()
        await channel.unary_unary(ECHO_PATH)(b"after a cancellation")


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    await process.wait()


async def _h2load(address: str) -> None:
    with tempfile.NamedTemporaryFile() as body:
        body.write(b"\0\0\0\0\x0chello, world")
        body.flush()
        headers = ("-H", "content-type: application/grpc", "-H", "te: trailers")
        await _run(
            "h2load", "-n", "40", "-c", "2", "-m", "8", "-d", body.name, *headers, f"http://{address}{ECHO_PATH}"
        )


async def _nghttp(address: str) -> None:
    await _run("nghttp", "--no-dep", f"http://{address}/", f"http://{address}/other")
    await _run(
        "nghttp",
        "-m",
        "3",
        "--padding",
        "20",
        "--trailer",
        "a: b",
        "-d",
        __file__,
        f"http://{address}/",
    )


async def _curl(address: str) -> None:
    plain = ("curl", "-s", "--http2-prior-knowledge")
    await _run(*plain, f"http://{address}/", f"http://{address}/again")
    grpc_headers = ("-H", "content-type: application/grpc", "-H", "te: trailers")
    await _run(*plain, *grpc_headers, "--data-binary", "abc", "-o", "/dev/null", f"http://{address}{ECHO_PATH}")
    await _run("curl", "-s", "--http2", "-m", "2", f"http://{address}/")


async def _h2spec(address: str) -> None:
    host, _, port = address.rpartition(":")
    await _run("h2spec", "--strict", "-h", host, "-p", port, "-o", "1", "-P", ECHO_PATH)


async def _envoy(address: str) -> None:
    ports = free_ports(1).regions[0]
    # Nobody is upstream: Envoy asks before it finds that out.
    settings = EnvoySettings(
        "a-region", f"{HOST}:{ports.envoy}", f"{HOST}:{ports.envoy_admin}", f"{HOST}:{ports.sync}", address
    )
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(to_yaml(envoy_bootstrap(settings)))
        file.flush()
        envoy = await asyncio.create_subprocess_exec(
            *(find_envoy(), "-c", file.name, "--use-dynamic-base-id", "--log-level", "error", "--concurrency", "1")
        )
        try:
            async with httpx.AsyncClient(timeout=5) as http:
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        if (await http.get(f"http://{HOST}:{ports.envoy_admin}/ready")).status_code == 200:
                            break
                    await asyncio.sleep(0.1)
                ask = f"http://{HOST}:{ports.envoy}/?agent="
                for number in range(5):
                    await http.get(f"{ask}{number}", headers={"x-request-id": str(number)})
                await asyncio.gather(*(http.get(f"{ask}{number}") for number in range(10)))
        finally:
            envoy.terminate()
            await envoy.wait()


CLIENTS: dict[str, Client] = {
    "grpcio": _grpcio,
    "h2load": _h2load,
    "nghttp": _nghttp,
    "curl": _curl,
    "envoy": _envoy,
    "h2spec": _h2spec,
}


async def _record(name: str, client: Client, upstream: str) -> None:
    recorder = Recorder(upstream)
    proxy = await asyncio.start_server(recorder.serve, HOST, 0)
    async with proxy:
        port = proxy.sockets[0].getsockname()[1]
        await client(f"{HOST}:{port}")
    different = dict.fromkeys(bytes(sent[:KEPT_BYTES]) for sent in recorder.connections if sent)
    kept = list(different)[: MAX_CASES if name == "h2spec" else CONNECTIONS]
    (FOLDER / f"{name}.hex").write_text("".join(f"{sent.hex()}\n" for sent in kept))
    print(f"{name}: {len(kept)} connections, {sum(map(len, kept))} bytes")


async def main() -> None:
    names = sys.argv[1:] or list(CLIENTS)
    FOLDER.mkdir(exist_ok=True)
    front_end = GrpcFrontEnd(HANDLERS, [f"{HOST}:0"])
    await front_end.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(front_end.serve())
        await front_end.ready.wait()
        for name in names:
            await _record(name, CLIENTS[name], front_end.addresses[0])
        await front_end.stop()


if __name__ == "__main__":
    asyncio.run(main())
