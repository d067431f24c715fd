"""The resources of an xDS server as the data that a rules file of the same content holds, to be checked as one.

A field that proto3 does not send is a key that the file does not have, with one exception: 0 requests per unit is a
limit, and proto3 does not send zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import structlog
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ratelimit_sidecar.config.errors import ConfigError, Problem, quoted
from ratelimit_sidecar.envoy_api.envoy.service.discovery.v3.discovery_pb2 import DiscoveryResponse
from ratelimit_sidecar.rules_source.v3.rls_conf_pb2 import (
    RateLimitConfig,
    RateLimitDescriptor,
    RateLimitPolicy,
    RateLimitUnit,
)

TYPE_URL = f"type.googleapis.com/{RateLimitConfig.DESCRIPTOR.full_name}"

Data = dict[str, object]

_log = structlog.stdlib.get_logger(__name__)


def resources_of(response: DiscoveryResponse) -> dict[str, RateLimitConfig]:
    """The resources of a response, by name. Errors quote it as they quote a file's name.

    Raises:
        ConfigError: some are not `RateLimitConfig`s, or the response is about something else.
    """
    if response.type_url != TYPE_URL:
        # Without resources it would read as: there are no rules any more.
        raise ConfigError([Problem("response", None, None, "", f"the type {quoted(response.type_url)}", TYPE_URL)])
    found: dict[str, RateLimitConfig] = {}
    problems: list[Problem] = []
    for index, resource in enumerate(response.resources):
        config = RateLimitConfig()
        place = f"resource {index}"
        if resource.type_url != TYPE_URL:
            problems.append(Problem(place, None, None, "", f"the type {quoted(resource.type_url)}", TYPE_URL))
            continue
        try:
            config.ParseFromString(resource.value)
        except DecodeError:
            problems.append(Problem(place, None, None, "", "bytes that cannot be parsed", TYPE_URL))
            continue
        # Names should be there and be unique; nothing depends on it here but who is blamed.
        name = config.name if config.name and config.name not in found else f"{config.name} ({place})".lstrip()
        found[name] = config
        unknown = sorted(set(_unknown_fields(config)))
        if unknown:
            # Refused, they would keep a newer server's rules from being used at all.
            _log.warning("xds_unknown_fields", resource=name, fields=unknown, fix="update the sidecar")
    if problems:
        raise ConfigError(problems)
    return found


def _unknown_fields(message: Message) -> Iterator[str]:
    """What a newer server says and nobody here understands: message types and numbers."""
    unknown = UnknownFieldSet(message)
    for index in range(len(unknown)):
        yield f"{message.DESCRIPTOR.name} {unknown[index].field_number}"
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.file is message.DESCRIPTOR.file:
            for below in value if field.is_repeated else (value,):
                yield from _unknown_fields(below)


def data_of(resources: Mapping[str, RateLimitConfig]) -> dict[str, Data]:
    """The data of each resource, by its name."""
    return {
        name: {"domain": config.domain, "descriptors": _descriptors(config.descriptors)}
        for name, config in resources.items()
    }


def _descriptors(descriptors: Sequence[RateLimitDescriptor]) -> list[Data]:
    """Those of one level. Where one has the limit of a key and value, and another what is below, they are one:
    Envoy Gateway says so of a network with a limit for all of its addresses and another for each.
    """
    found: list[Data] = []
    first: dict[tuple[str, str], Data] = {}
    for descriptor in descriptors:
        data = _descriptor(descriptor)
        same = first.setdefault((descriptor.key, descriptor.value), data)
        if same is data or same.keys() & data.keys() - {"key", "value"}:
            found.append(data)
        else:
            same.update(data)
    return found


def _descriptor(descriptor: RateLimitDescriptor) -> Data:
    data: Data = {"key": descriptor.key}
    if descriptor.value:
        data["value"] = descriptor.value
    if descriptor.HasField("rate_limit"):
        data["rate_limit"] = _policy(descriptor.rate_limit)
    for flag in ("shadow_mode", "quota_mode", "detailed_metric"):
        if getattr(descriptor, flag):
            data[flag] = True
    if descriptor.HasField("metadata"):
        data["metadata"] = MessageToDict(descriptor.metadata)
    if descriptor.descriptors:
        data["descriptors"] = _descriptors(descriptor.descriptors)
    return data


def _policy(policy: RateLimitPolicy) -> Data:
    data: Data = {}
    if policy.unit != RateLimitUnit.UNKNOWN:
        names = RateLimitUnit.DESCRIPTOR.values_by_number
        data["unit"] = names[policy.unit].name if policy.unit in names else str(policy.unit)
    if policy.unlimited:
        data["unlimited"] = True
    if policy.requests_per_unit or not policy.unlimited:
        data["requests_per_unit"] = policy.requests_per_unit
    if policy.name:
        data["name"] = policy.name
    if policy.replaces:
        data["replaces"] = [{"name": replaced.name} for replaced in policy.replaces]
    return data
