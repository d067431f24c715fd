"""An xDS resource says what a rules file says."""

from __future__ import annotations

import pytest
import structlog.testing
from google.protobuf.any_pb2 import Any
from google.protobuf.json_format import ParseDict

from ratelimit_sidecar.config.document import parse
from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.envoy_api.envoy.service.discovery.v3.discovery_pb2 import DiscoveryResponse
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.rules_source.resources import TYPE_URL, data_of, resources_of
from ratelimit_sidecar.rules_source.v3.rls_conf_pb2 import RateLimitConfig, RateLimitPolicy, RateLimitUnit

EVERYTHING = """
domain: shop
descriptors:
  - key: user
    rate_limit: {unit: MINUTE, requests_per_unit: 5, name: users, replaces: [{name: plans}, {name: all}]}
    shadow_mode: true
    descriptors:
      - {key: path, value: /checkout, rate_limit: {unit: WEEK, requests_per_unit: 7}, quota_mode: true}
      - {key: path, detailed_metric: true, rate_limit: {unlimited: true}}
  - key: nobody
    rate_limit: {unit: SECOND, requests_per_unit: 0}
    metadata: {team: payments, tier: 3, tags: [a, b]}
  - key: anybody
"""


def response(*resources: Any, type_url: str = TYPE_URL) -> DiscoveryResponse:
    return DiscoveryResponse(type_url=type_url, resources=resources)


def packed(config: RateLimitConfig) -> Any:
    resource = Any()
    resource.Pack(config)
    return resource


def test_every_field_becomes_the_key_of_a_rules_file() -> None:
    data = parse(EVERYTHING.encode(), "shop.yaml").data
    config = ParseDict(data, RateLimitConfig(name="shop.yaml"))
    assert data_of(resources_of(response(packed(config)))) == {"shop.yaml": data}


def test_the_units_have_the_numbers_of_envoys_answer() -> None:
    assert dict(RateLimitUnit.items()) == dict(RateLimitResponse.RateLimit.Unit.items())


def test_the_type_is_the_one_that_servers_send() -> None:
    assert TYPE_URL == "type.googleapis.com/ratelimit.config.ratelimit.v3.RateLimitConfig"


def test_a_limit_without_numbers_denies_all_and_lacks_its_unit() -> None:
    config = RateLimitConfig(name="it", domain="shop", descriptors=[{"key": "user", "rate_limit": {}}])
    assert data_of(resources_of(response(packed(config))))["it"] == {
        "domain": "shop",
        "descriptors": [{"key": "user", "rate_limit": {"requests_per_unit": 0}}],
    }


def test_what_contradicts_unlimited_and_a_unit_of_the_future_are_there_for_the_check() -> None:
    config = RateLimitConfig(name="it", domain="shop")
    config.descriptors.add(key="a").rate_limit.MergeFrom(
        ParseDict({"unit": "DAY", "unlimited": True, "requests_per_unit": 1}, config.descriptors[0].rate_limit)
    )
    config.descriptors.add(key="b").rate_limit.unit = 99
    descriptors = data_of(resources_of(response(packed(config))))["it"]["descriptors"]
    assert descriptors == [
        {"key": "a", "rate_limit": {"unit": "DAY", "unlimited": True, "requests_per_unit": 1}},
        {"key": "b", "rate_limit": {"unit": "99", "requests_per_unit": 0}},
    ]


def test_resources_with_one_name_or_none_are_told_apart() -> None:
    configs = [RateLimitConfig(name=name, domain=f"d{index}") for index, name in enumerate(("a", "a", "", ""))]
    found = data_of(resources_of(response(*map(packed, configs))))
    assert {name: data["domain"] for name, data in found.items()} == {
        "a": "d0",
        "a (resource 1)": "d1",
        "(resource 2)": "d2",
        "(resource 3)": "d3",
    }


def test_no_resources_are_no_rules() -> None:
    assert data_of(resources_of(response())) == {}


def test_all_that_is_something_else_is_named() -> None:
    good = packed(RateLimitConfig(name="a", domain="shop"))
    cluster = Any(type_url="type.googleapis.com/envoy.config.cluster.v3.Cluster")
    noise = Any(type_url=TYPE_URL, value=b"\xff\xff")
    with pytest.raises(ConfigError) as raised:
        data_of(resources_of(response(cluster, good, noise)))
    assert str(raised.value).splitlines() == [
        f'resource 0: found the type "type.googleapis.com/envoy.config.cluster.v3.Cluster", expected {TYPE_URL}',
        f"resource 2: found bytes that cannot be parsed, expected {TYPE_URL}",
    ]


def test_a_response_about_something_else_does_not_mean_that_there_are_no_rules() -> None:
    with pytest.raises(ConfigError, match=r"Listener"):
        data_of(resources_of(response(type_url="type.googleapis.com/envoy.config.listener.v3.Listener")))


def test_fields_that_only_a_newer_server_knows_are_told_of_and_the_rest_is_used() -> None:
    policy = RateLimitPolicy.FromString(
        RateLimitPolicy(requests_per_unit=5, unit=RateLimitUnit.HOUR).SerializeToString() + b"\xa0\x06\x01"
    )
    config = RateLimitConfig(name="it", domain="shop", descriptors=[{"key": "user", "rate_limit": policy}])
    config.MergeFromString(b"\x98\x06\x01")
    with structlog.testing.capture_logs() as logs:
        data = data_of(resources_of(response(packed(config))))
    assert data["it"]["descriptors"] == [{"key": "user", "rate_limit": {"unit": "HOUR", "requests_per_unit": 5}}]
    assert [(line["event"], line["fields"]) for line in logs] == [
        ("xds_unknown_fields", ["RateLimitConfig 99", "RateLimitPolicy 100"])
    ]


def test_a_limit_and_what_is_below_the_same_key_and_value_are_one_descriptor_and_two_limits_are_two() -> None:
    """Of a network, as Envoy Gateway says it: a limit for all of its addresses, and another for each."""
    network = {"key": "masked_remote_address", "value": "203.0.113.0/24"}
    of_all = {**network, "rate_limit": {"unit": "MINUTE", "requests_per_unit": 1_000}}
    each = {"key": "remote_address", "rate_limit": {"unit": "MINUTE", "requests_per_unit": 10}}
    of_each = {**network, "descriptors": [each]}
    for order in ([of_all, of_each], [of_each, of_all]):
        config = ParseDict({"domain": "shop", "descriptors": order}, RateLimitConfig(name="it"))
        assert data_of({"it": config})["it"]["descriptors"] == [{**of_all, "descriptors": [each]}]
    config = ParseDict({"domain": "shop", "descriptors": [of_all, of_all]}, RateLimitConfig(name="it"))
    assert data_of({"it": config})["it"]["descriptors"] == [of_all, of_all]
