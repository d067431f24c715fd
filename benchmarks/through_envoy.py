"""`python -m benchmarks.through_envoy`: what the rate limit filter adds to a request through a real Envoy.

One Envoy with one worker has a listener for each variant: without the filter, asking an empty handler, asking the
sidecar; each of the latter over TCP and over a unix socket. Upstream is a listener of the same Envoy that answers by
itself. What counts is the median with the filter less the median without, measured one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import click
import httpx
import yaml

from benchmarks.serving.h2load import Load, http_load
from benchmarks.serving.requests import DOMAIN
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import Servers, running_servers, wait_until
from ratelimit_sidecar.demo.bootstrap import EnvoySettings, envoy_bootstrap, to_yaml
from ratelimit_sidecar.demo.ports import HOST
from ratelimit_sidecar.demo.regions import find_envoy

PATH = "/?agent=acme"
TIMEOUT_MS = 1_000


def bootstrap(listeners: Mapping[str, tuple[str, str | None]], upstream: str, admin: str) -> dict[str, Any]:
    """The configuration of one Envoy with several listeners, each of which asks another sidecar, or none.

    Args:
        listeners: by name, where it listens and the sidecar it asks; None for no filter.
    """
    merged: dict[str, Any] = {}
    for name, (address, sidecar) in listeners.items():
        settings = EnvoySettings(
            region=name,
            listener=address,
            admin=admin,
            upstream=upstream,
            sidecar=sidecar or f"{HOST}:1",
            domain=DOMAIN,
            timeout_ms=TIMEOUT_MS,
        )
        # Names of listeners and clusters are one namespace in an Envoy.
        text = to_yaml(envoy_bootstrap(settings))
        for former in ("ingress", "ratelimit_sidecar", "rating_api"):
            text = text.replace(former, f"{former}_{name}")
        part = yaml.safe_load(text)
        if sidecar is None:
            filters = _manager(part["static_resources"]["listeners"][0])["http_filters"]
            del filters[0]
        if not merged:
            merged = part
        else:
            for kind in ("listeners", "clusters"):
                merged["static_resources"][kind] += part["static_resources"][kind]
    answering = yaml.safe_load(json.dumps(merged["static_resources"]["listeners"][0]))
    answering["name"] = "upstream"
    host, _, port = upstream.rpartition(":")
    answering["address"] = {"socket_address": {"address": host, "port_value": int(port)}}
    manager = _manager(answering)
    manager["http_filters"] = [manager["http_filters"][-1]]
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "ok"}}}
    manager["route_config"]["virtual_hosts"][0]["routes"] = [route]
    merged["static_resources"]["listeners"].append(answering)
    return merged


def _manager(listener: Mapping[str, Any]) -> dict[str, Any]:
    manager: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


def start_envoy(servers: Servers, asked: Mapping[str, str | None]) -> dict[str, str]:
    """URLs by the names in `asked`."""
    ports = servers.ports()
    addresses = {name: (f"{HOST}:{servers.ports().envoy}", sidecar) for name, sidecar in asked.items()}
    file = servers.folder / "envoy.yaml"
    admin = f"{HOST}:{ports.envoy_admin}"
    file.write_text(yaml.safe_dump(bootstrap(addresses, f"{HOST}:{ports.envoy}", admin)))
    argv = [find_envoy(), "-c", str(file), "--concurrency", "1", "--disable-hot-restart", "--log-level", "warn"]
    servers.run("envoy", argv, address=admin)
    wait_until(partial(_is_ready, admin))
    return {name: f"http://{address}{PATH}" for name, (address, _) in addresses.items()}


def _is_ready(admin: str) -> bool:
    try:
        return httpx.get(f"http://{admin}/ready", trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def measure(url: str, bare_url: str, load: Load, seconds: float) -> Figures:
    bare = http_load(bare_url, load, seconds, (50, 99))
    filtered = http_load(url, load, seconds, (50, 99))
    return {
        "added p50 us": filtered.percentiles_us[50] - bare.percentiles_us[50],
        "p50 us": filtered.percentiles_us[50],
        "p99 us": filtered.percentiles_us[99],
        "requests/s": filtered.per_second,
        "without it": bare.per_second,
    }


@click.command()
@round_options(rounds=9, seconds=1.0)
def main(rounds: int, seconds: float, as_json: bool) -> None:
    """Measure the filter with an empty handler and with the sidecar."""
    with running_servers() as servers:
        sockets = {name: f"unix:{servers.folder}/{name}.sock" for name in ("empty", "sidecar")}
        ports = servers.ports()
        sidecar = servers.sidecar(ports=ports, grpc_addresses=[f"{HOST}:{ports.grpc}", sockets["sidecar"]])
        asked: dict[str, str | None] = {
            "empty_unix": servers.empty_handler("h2", sockets["empty"]).address,
            "sidecar_unix": sockets["sidecar"],
            "empty_tcp": servers.empty_handler("h2").address,
            "sidecar_tcp": sidecar.address,
        }
        urls = start_envoy(servers, {**asked, "none": None})
        bare_url = urls.pop("none")
        results = []
        for load in (Load(1, 1), Load(4, 4)):
            variants: dict[str, Callable[[], Figures]] = {
                name: partial(measure, url, bare_url, load, seconds) for name, url in urls.items()
            }
            results += alternate(f"{load} connections x streams", variants, rounds)
        decided = sidecar.metric("ratelimit_hits_total")
    if not sum(decided):
        raise click.ClickException("Envoy has not asked the sidecar")
    print_results(results, as_json=as_json)


if __name__ == "__main__":
    main()
