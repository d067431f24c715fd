"""The examples of examples/, run as they are but for their ports."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import MappingProxyType

import httpx

from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.demo.regions import find_envoy

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTHING: Mapping[str, str] = MappingProxyType({})


@asynccontextmanager
async def running(
    folder: Path,
    example: str,
    upstream: str,
    envoys: Sequence[str],
    *,
    with_sidecar: bool = True,
    changed_rules: Mapping[str, str] = NOTHING,
    changed_sidecar: Mapping[str, str] = NOTHING,
) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    """Envoys of one example beside one sidecar and one upstream.

    Args:
        folder: for files and logs.
        example: its folder in examples/; `sidecar.yaml` is in it.
        upstream: a program in examples/.
        envoys: names of their configurations in the example's folder.
        with_sidecar: or without one.
        changed_rules: what is to stand in the rules, in place of what.
        changed_sidecar: the same of sidecar.yaml.

    Yields:
        A client of each Envoy by its name, of the upstream as "upstream", and with a sidecar of its console as
        "console" and its gRPC port as "grpc".
    """
    ports = free_ports(len(envoys) + 1)
    own, *of_envoys = ports.regions
    # Nothing dials the sidecar's Envoy: its port is left for ext_authz over HTTP.
    shared = {8_000: ports.upstream, 8_080: own.admin, 8_081: own.grpc, 8_082: own.envoy}
    async with Children(folder) as children, AsyncExitStack() as clients:
        argv = [sys.executable, str(EXAMPLES / upstream), "--port", str(ports.upstream)]
        starting = [Command("upstream", argv, f"http://{HOST}:{ports.upstream}/healthz")]
        if with_sidecar:
            text = (EXAMPLES / example / "sidecar.yaml").read_text()
            text = text.replace("[rules]", f"[{_copied_rules(EXAMPLES / example / 'rules', folder, changed_rules)}]")
            text = _changed(text, changed_sidecar)
            text = text.replace("listen: {", f'listen: {{admin: "{HOST}:8080", ')
            text = text.replace("listen:\n", f"listen:\n  admin: {HOST}:8080\n")
            config = _written(folder, "sidecar", with_ports(text, shared))
            argv = [sys.executable, "-m", "ratelimit_sidecar", "serve", "--config", config]
            starting.append(Command("sidecar", argv, f"http://{HOST}:{own.admin}/readyz"))
        for name, of_envoy in zip(envoys, of_envoys, strict=True):
            text = (EXAMPLES / example / f"{name}.yaml").read_text()
            # Beside other tests a sidecar may take longer than an example lets it.
            text = text.replace(" timeout: 5s", " timeout: 30s")
            for bound in ("request_timeout: 30s", "stream_flush_timeout: 10s"):
                text = text.replace(bound, f"{bound.partition(':')[0]}: 5s")
            config = _written(
                folder, name, with_ports(text, {**shared, 10_000: of_envoy.envoy, 9_901: of_envoy.envoy_admin})
            )
            argv = [find_envoy(), "-c", config, "--concurrency", "1", "--disable-hot-restart"]
            starting.append(Command(name, argv, f"http://{HOST}:{of_envoy.envoy_admin}/ready"))
        await asyncio.gather(*[children.start(command) for command in starting])
        addresses = {name: of.envoy for name, of in zip(envoys, of_envoys, strict=True)}
        addresses["upstream"] = ports.upstream
        if with_sidecar:
            addresses |= {"console": own.admin, "grpc": own.grpc}
        yield {
            name: await clients.enter_async_context(
                httpx.AsyncClient(base_url=f"http://{HOST}:{port}", trust_env=False, timeout=60)
            )
            for name, port in addresses.items()
        }


def _copied_rules(rules: Path, folder: Path, changed: Mapping[str, str]) -> Path:
    copied = folder / "rules"
    copied.mkdir()
    for file in rules.iterdir():
        (copied / file.name).write_text(_changed(file.read_text(), changed))
    return copied


def _changed(text: str, changed: Mapping[str, str]) -> str:
    for found, replacement in changed.items():
        assert found in text
        text = text.replace(found, replacement)
    return text


def with_ports(text: str, ports: Mapping[int, int]) -> str:
    for port, free in ports.items():
        text = text.replace(f"port_value: {port}}}", f"port_value: {free}}}").replace(
            f"{HOST}:{port}", f"{HOST}:{free}"
        )
    return text


def _written(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)
