"""Prometheus and Alertmanager beside the demo, with the rules of `deploy`: an alert fires during the traffic, and is
resolved after it.

It is the alert for a nearly exhausted bucket. The demo reads alerts from Alertmanager, which gets them from Prometheus.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import yaml
from pydantic import BaseModel
from rich.console import Console

from ratelimit_sidecar.demo import DemoError
from ratelimit_sidecar.demo.ports import HOST
from ratelimit_sidecar.demo.processes import Children, Command

ALERT: Final = "RateLimitBucketNearExhaustion"

RESOLVED_WITHIN_S: Final = 60.0
"""The bucket is full again after 10 s, and is checked every 5 s."""

_POLL_S: Final = 0.5

_PROMETHEUS: Final = ("prometheus",)
_ALERTMANAGER: Final = ("alertmanager", "prometheus-alertmanager")
"""Debian's name is the second."""


class NotInstalled(DemoError):
    """Prometheus or Alertmanager is not installed."""


class Alert(BaseModel):
    """A firing alert, as Alertmanager shows it."""

    labels: dict[str, str]
    annotations: dict[str, str]


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses of both, `host:port`."""

    prometheus: str
    alertmanager: str


def ensure_installed() -> None:
    """Check that Prometheus and Alertmanager are there.

    Raises:
        NotInstalled: Prometheus or Alertmanager is missing.
    """
    find(*_PROMETHEUS)
    find(*_ALERTMANAGER)


def find(*names: str) -> str:
    """A program beside this interpreter or on the PATH.

    Raises:
        NotInstalled: it is in neither place under any of these names.
    """
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name in names:
        found = shutil.which(name, path=places)
        if found is not None:
            return found
    raise NotInstalled(f"no {names[0]} found; Debian has it, and puts it into .venv/bin: ./dev/system-packages test")


def prometheus_command(folder: Path, deployed: Path, at: Addresses, regions_of_targets: Mapping[str, str]) -> Command:
    """The command that runs Prometheus as deployed, except that it scrapes every second and alerts fire at once.

    Args:
        folder: for its configuration and its data.
        deployed: the folder deploy/prometheus of a checkout.
        regions_of_targets: by `host:port` of sidecars' admin HTTP.

    Raises:
        NotInstalled: there is no Prometheus.
    """
    config = yaml.safe_load((deployed / "static.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [at.alertmanager]}]}]
    (scrape,) = config["scrape_configs"]
    scrape["static_configs"] = [
        {"targets": [target], "labels": {"region": region}} for target, region in regions_of_targets.items()
    ]
    config["rule_files"] = ["alerting-rules/*.yml"]
    (folder / "alerting-rules").mkdir()
    for file in (deployed / "rules").glob("*.yml"):
        rules = yaml.safe_load(file.read_text())
        for group in rules["groups"]:
            for rule in group["rules"]:
                rule.pop("for", None)
        (folder / "alerting-rules" / file.name).write_text(yaml.safe_dump(rules))
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return Command(
        name="prometheus",
        argv=[
            find(*_PROMETHEUS),
            f"--config.file={path}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            f"--web.listen-address={at.prometheus}",
        ],
        ready_url=f"http://{at.prometheus}/-/ready",
    )


def alertmanager_command(folder: Path, config: Path, at: Addresses) -> Command:
    """The command that runs Alertmanager.

    Raises:
        NotInstalled: there is no Alertmanager.
    """
    return Command(
        name="alertmanager",
        argv=[
            find(*_ALERTMANAGER),
            f"--config.file={config}",
            f"--storage.path={folder / 'alertmanager'}",
            f"--web.listen-address={at.alertmanager}",
            "--cluster.listen-address=",
        ],
        ready_url=f"http://{at.alertmanager}/-/ready",
    )


async def start_observers(
    children: Children, folder: Path, deployed: Path, at: Addresses, regions_of_targets: Mapping[str, str]
) -> None:
    """Start both. Alertmanager sends no notifications.

    Raises:
        NotInstalled: one is missing.
        ChildFailed: one did not start.
    """
    config = folder / "alertmanager.yml"
    config.write_text(yaml.safe_dump({"route": {"receiver": "nobody"}, "receivers": [{"name": "nobody"}]}))
    commands = [
        alertmanager_command(folder, config, at),
        prometheus_command(folder, deployed, at, regions_of_targets),
    ]
    for command in commands:
        await children.start(command)


async def show_alert(at: Addresses, console: Console, *, fires: bool) -> None:
    """Wait until `ALERT` fires, or no longer fires, and print that."""
    async with httpx.AsyncClient(base_url=f"http://{at.alertmanager}", trust_env=False, timeout=30) as client:
        while bool(alerts := await _firing(client)) != fires:  # noqa: ASYNC110 (another process)
            await asyncio.sleep(_POLL_S)
    what = f"fires: {alerts[0].annotations['summary']}" if alerts else "is resolved"
    console.print(f"alert {ALERT} {what}", soft_wrap=True)


async def _firing(client: httpx.AsyncClient) -> Sequence[Alert]:
    response = await client.get("/api/v2/alerts", params={"filter": f'alertname="{ALERT}"'})
    return [Alert.model_validate(alert) for alert in response.raise_for_status().json()]


def addresses(base: int) -> Addresses:
    """The addresses after the demo's other ports: Prometheus at base + 51, Alertmanager at base + 52."""
    return Addresses(f"{HOST}:{base + 51}", f"{HOST}:{base + 52}")
