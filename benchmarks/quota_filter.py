"""`python -m benchmarks.quota_filter`: what a request through a real Envoy costs with the quota filter, beside none and
beside the rate limit filter.

The quota filter is measured alone, too: its service is not there, and it lets all pass. So what is left is what the
service has to do with it. One Envoy with one worker has a listener for each; upstream is a listener of the same Envoy
that answers by itself. The limit is wide, so that all is admitted. What counts is the ratio to no filter within a
round: of requests a second on a machine that has nothing else to do, and of Envoy's processor time a request on any.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click
import httpx
import yaml

from benchmarks.serving.h2load import Load, http_load
from benchmarks.serving.requests import DOMAIN
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import Server, Servers, running_servers, wait_until
from benchmarks.through_envoy import PATH, bootstrap
from ratelimit_sidecar.demo.ports import HOST
from ratelimit_sidecar.demo.regions import find_envoy

_V3 = "type.googleapis.com/envoy.extensions.filters.http.rate_limit_quota.v3"

ASSIGNED_WITHIN_S = 30.0


NAMES = ("none", "alone", "quota", "ratelimit")

NOWHERE = f"{HOST}:1"


def quota_filter(cluster: str, without_assignment: str) -> dict[str, Any]:
    """Envoy's rate limit quota filter, as configuration.

    Args:
        without_assignment: what it does then, ALLOW_ALL or DENY_ALL.
    """
    settings = {
        "@type": f"{_V3}.RateLimitQuotaBucketSettings",
        "bucket_id_builder": {"bucket_id_builder": {"agent": {"string_value": "acme"}}},
        "reporting_interval": "5s",
        "no_assignment_behavior": {"fallback_rate_limit": {"blanket_rule": without_assignment}},
    }
    config = {
        "@type": f"{_V3}.RateLimitQuotaFilterConfig",
        "rlqs_server": {"envoy_grpc": {"cluster_name": cluster}},
        "domain": DOMAIN,
        "bucket_matchers": {"on_no_match": {"action": {"name": "quota", "typed_config": settings}}},
    }
    return {"name": "envoy.filters.http.rate_limit_quota", "typed_config": config}


def start_envoy(servers: Servers, sidecar: str) -> tuple[Server, dict[str, str]]:
    """It, and URLs by the filter, of `NAMES`."""
    ports = servers.ports()
    admin = f"{HOST}:{ports.envoy_admin}"
    addresses = {name: f"{HOST}:{servers.ports().envoy}" for name in NAMES}
    called = {"none": None, "alone": NOWHERE, "quota": sidecar, "ratelimit": sidecar}
    listeners = {name: (address, called[name]) for name, address in addresses.items()}
    config = bootstrap(listeners, f"{HOST}:{ports.envoy}", admin)
    # With the service all is let through only once it is assigned.
    for name, without_assignment in (("alone", "ALLOW_ALL"), ("quota", "DENY_ALL")):
        listener = config["static_resources"]["listeners"][NAMES.index(name)]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        manager["http_filters"][0] = quota_filter(f"ratelimit_sidecar_{name}", without_assignment)
    file = servers.folder / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    argv = [find_envoy(), "-c", str(file), "--concurrency", "1", "--disable-hot-restart", "--log-level", "warn"]
    envoy = servers.run("envoy", argv, address=admin)
    urls = {name: f"http://{address}{PATH}" for name, address in addresses.items()}
    for url in urls.values():
        wait_until(partial(_is_admitted, url), ASSIGNED_WITHIN_S)
    return envoy, urls


def _is_admitted(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def measure(envoy: Server, url: str, load: Load, seconds: float) -> Figures:
    before = envoy.cpu_seconds
    measured = http_load(url, load, seconds, (50, 99))
    return {
        "requests/s": measured.per_second,
        "Envoy's processor us a request": (envoy.cpu_seconds - before) * 1e6 / (measured.per_second * seconds),
        "p50 us": measured.percentiles_us[50],
        "p99 us": measured.percentiles_us[99],
    }


@click.command()
@round_options(rounds=15, seconds=1.0)
def main(rounds: int, seconds: float, as_json: bool) -> None:
    """Measure no filter, the quota filter alone and with the sidecar, and the rate limit filter in turn."""
    with running_servers() as servers:
        sidecar = servers.sidecar()
        envoy, urls = start_envoy(servers, sidecar.address)
        results = []
        for load in (Load(1, 1), Load(4, 4)):
            variants: dict[str, Callable[[], Figures]] = {
                name: partial(measure, envoy, url, load, seconds) for name, url in urls.items()
            }
            results += alternate(f"{load} connections x streams", variants, rounds)
        reported = sum(sidecar.metric("ratelimit_quota_requests_total"))
    if not reported:
        raise click.ClickException("Envoy has reported nothing")
    print_results(results, as_json=as_json)


if __name__ == "__main__":
    main()
