"""deploy/alertmanager: what its tools say of it, and what the real one sends, and to whom."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from deploy.channels import PAGERDUTY_KEY, SMTP_PASSWORD, TELEGRAM_TOKEN, Channels, serving

from ratelimit_sidecar.demo.observe import Addresses, alertmanager_command
from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.processes import Children

DEPLOYED = Path(__file__).parents[2] / "deploy" / "alertmanager"
# Debian has given it another name, and its templates a place of their own.
HAS_TEMPLATES = Path("/usr/share/prometheus/alertmanager/default.tmpl").exists()
HAS_ALERTMANAGER = shutil.which("alertmanager") or (shutil.which("prometheus-alertmanager") and HAS_TEMPLATES)

pytestmark = pytest.mark.skipif(
    not HAS_ALERTMANAGER or shutil.which("amtool") is None, reason="Alertmanager is not installed"
)

SECRETS = {
    "smtp-password": SMTP_PASSWORD,
    "pagerduty-routing-key": PAGERDUTY_KEY,
    "telegram-bot-token": TELEGRAM_TOKEN,
    "slack-webhook-url": "http://{http}/services/T0/B0/slack-secret",
    "webhook-url": "http://{http}/webhook",
}


def configured(folder: Path, channels: Channels) -> Path:
    """The configuration as deployed, but for where the channels are and how long it waits for more alerts."""
    http = f"{HOST}:{channels.http_port}"
    (folder / "secrets").mkdir()
    for name, secret in SECRETS.items():
        (folder / "secrets" / name).write_text(secret.format(http=http))
    shutil.copytree(DEPLOYED / "templates", folder / "templates")
    config = yaml.safe_load((DEPLOYED / "alertmanager.yml").read_text().replace("/etc/alertmanager", str(folder)))
    config["global"] |= {
        "smtp_smarthost": f"{HOST}:{channels.smtp_port}",
        "smtp_require_tls": False,
        "pagerduty_url": f"http://{http}/v2/enqueue",
        "telegram_api_url": f"http://{http}",
    }
    config["route"] |= {"group_wait": "100ms", "group_interval": "1s"}
    if is_old():
        read_here(config, "bot_token_file", "bot_token")
        read_here(config, "url_file", "url")
    file = folder / "alertmanager.yml"
    file.write_text(yaml.safe_dump(config))
    return file


def is_old() -> bool:
    """True before 0.26."""
    ran = subprocess.run(["amtool", "check-config", DEPLOYED / "alertmanager.yml"], capture_output=True, check=False)
    return b"field bot_token_file not found" in ran.stdout + ran.stderr


def read_here(config: dict[str, Any], of_file: str, of_text: str) -> None:
    """Put what the file says in place of its name."""
    for receiver in config["receivers"]:
        for kind in receiver:
            for channel in receiver[kind] if kind != "name" else ():
                if of_file in channel:
                    channel[of_text] = Path(channel.pop(of_file)).read_text().strip()


def amtool(*arguments: str) -> str:
    ran = subprocess.run(
        ["amtool", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return configured(tmp_path, Channels(1, 2))


def test_the_configuration_is_one(config: Path) -> None:
    assert "7 receivers" in amtool("check-config", str(config))


@pytest.mark.parametrize(
    ("severity", "region", "receivers"),
    [
        ("critical", "us-east-1", "archive,on-call,us-east-1"),
        ("warning", "us-east-1", "archive,mail,us-east-1"),
        ("critical", "eu-west-2", "archive,on-call,eu-west-2"),
        ("warning", "ap-southeast-1", "archive,mail,ap-southeast-1"),
        ("warning", "af-south-1", "archive,mail,other-regions"),
    ],
)
def test_an_alert_is_routed_by_severity_and_region(config: Path, severity: str, region: str, receivers: str) -> None:
    labels = (f"severity={severity}", f"region={region}", "alertname=RateLimitSyncLag")
    amtool("config", "routes", "test", f"--config.file={config}", f"--verify.receivers={receivers}", *labels)


def test_every_channel_is_told_when_an_alert_is_resolved() -> None:
    for receiver in yaml.safe_load((DEPLOYED / "alertmanager.yml").read_text())["receivers"]:
        for channels in (channels for kind, channels in receiver.items() if kind != "name"):
            assert all(channel["send_resolved"] for channel in channels), receiver["name"]


@asynccontextmanager
async def alertmanager(folder: Path, config: Path) -> AsyncIterator[httpx.AsyncClient]:
    port = free_ports(1).upstream
    command = alertmanager_command(folder, config, Addresses("", f"{HOST}:{port}"))
    async with (
        Children(folder) as children,
        httpx.AsyncClient(base_url=f"http://{HOST}:{port}", trust_env=False, timeout=30) as client,
    ):
        await children.start(command)
        yield client


def alert(name: str, severity: str, region: str, **labels: str) -> dict[str, Any]:
    return {
        "labels": {"alertname": name, "severity": severity, "region": region, **labels},
        "annotations": {
            "summary": f"{name} summary",
            "description": f"{name} description",
            "runbook_url": f"docs/runbook.md#{name.lower()}",
        },
    }


REGIONS = ["us-east-1", "eu-west-2", "ap-southeast-1", "elsewhere"]
CHANNELS_OF = {"critical": ["webhook", "pagerduty", "telegram"], "warning": ["webhook", "mail"]}


@pytest.mark.filterwarnings("ignore:Session.login_data is deprecated:DeprecationWarning")
async def test_an_alert_of_each_severity_and_region_arrives_where_it_should_and_so_does_its_end(tmp_path: Path) -> None:
    alerts = [alert("RateLimitTried", severity, region) for region in REGIONS for severity in CHANNELS_OF]
    for of in alerts:
        of["labels"]["alertname"] += of["labels"]["severity"].title()
    expected = {
        (channel, f"{of['labels']['alertname']} {of['labels']['region']}")
        for of in alerts
        for channel in (*CHANNELS_OF[of["labels"]["severity"]], slack_channel(of["labels"]["region"]))
    }

    def arrived(channels: Channels, *, resolved: bool) -> set[tuple[str, str]]:
        title = re.compile(r"RateLimitTried\w+ [\w-]+")
        found = [(of.channel, title.search(of.text)) for of in channels.messages if of.is_resolved == resolved]
        return {(channel, match[0]) for channel, match in found if match is not None}

    async with serving() as channels, alertmanager(tmp_path, configured(tmp_path, channels)) as client:
        (await client.post("/api/v2/alerts", json=alerts)).raise_for_status()
        await channels.wait(lambda _: arrived(channels, resolved=False) >= expected)
        assert arrived(channels, resolved=False) == expected
        assert all("summary" in message.text for message in channels.messages)
        to_people = [message for message in channels.messages if message.channel != "webhook"]
        assert all("docs/runbook.md#ratelimittried" in message.text for message in to_people)

        for of in alerts:
            of["endsAt"] = datetime.now(UTC).isoformat()
        (await client.post("/api/v2/alerts", json=alerts)).raise_for_status()
        await channels.wait(lambda _: arrived(channels, resolved=True) >= expected)
        assert arrived(channels, resolved=True) == expected


def slack_channel(region: str) -> str:
    return "#ratelimit" if region == "elsewhere" else f"#ratelimit-{region}"


async def test_a_region_that_is_down_silences_its_alerts_and_those_of_others_about_streams_to_it(
    tmp_path: Path,
) -> None:
    down = alert("RateLimitRegionDown", "critical", "eu-west-2", peer_region="eu-west-2")
    silenced = [
        alert("RateLimitSidecarDown", "critical", "eu-west-2", instance="eu:8080"),
        alert("RateLimitSyncLag", "warning", "us-east-1", peer="eu-1", peer_region="eu-west-2"),
        alert("RateLimitPeerDisconnected", "warning", "us-east-1", peer="eu-1", peer_region="eu-west-2"),
    ]
    others = [
        alert("RateLimitSyncLag", "warning", "us-east-1", peer="ap-1", peer_region="ap-southeast-1"),
        alert("RateLimitClockSkew", "warning", "us-east-1", peer="eu-1"),
        alert("SomethingElse", "warning", "eu-west-2"),
    ]
    async with alertmanager(tmp_path, configured(tmp_path, Channels(1, 2))) as client:
        (await client.post("/api/v2/alerts", json=[down, *silenced, *others])).raise_for_status()
        # Alertmanager takes alerts before it asks itself which of them others silence.
        inhibited: list[dict[str, str]] = []
        async with asyncio.timeout(30):
            while len(inhibited) < len(silenced):
                found = (await client.get("/api/v2/alerts")).raise_for_status().json()
                inhibited = [of["labels"] for of in found if of["status"]["inhibitedBy"]]
    assert len(found) == 7
    assert sorted(inhibited, key=str) == sorted((of["labels"] for of in silenced), key=str)
