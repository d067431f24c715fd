"""Mappings from HTTP requests to descriptors, for ext_authz: what `rate_limits` of a route is for Envoy's rate limit
filter.

As in Envoy, a descriptor is left out when the request lacks the part that one of its entries is made from, and a
request without descriptors is not limited. Everything in a request is bytes, since callers can send anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ratelimit_sidecar.limiter.request import InvalidRequest
from ratelimit_sidecar.limiter.v1.request_pb2 import Request

MAX_VALUES_BYTES: Final = 4 * 1_024 * 1_024
"""The most bytes of the values in all descriptors of a request: Envoy's rate limit filter could send no more. A mapping
may have the same header in each of its descriptors.
"""


class Part(Enum):
    """The part of a request that an entry's value is made from."""

    HEADER = "header"
    CONTEXT_EXTENSION = "context_extension"
    PATH = "path"
    METHOD = "method"
    SOURCE_ADDRESS = "source_address"
    PRINCIPAL = "principal"


NAMED = frozenset((Part.HEADER, Part.CONTEXT_EXTENSION))
"""Parts of which a request has several, by name."""


@dataclass(frozen=True, slots=True)
class EntrySource:
    """Where an entry of a descriptor comes from.

    Args:
        part: None for a constant value.
        text: the name of the header, in lower case, or of the context extension; or the constant value.
    """

    key: bytes
    part: Part | None
    text: bytes = b""


HttpMapping = tuple[tuple[EntrySource, ...], ...]
"""The descriptors of a domain: for each, the sources of its entries."""


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """The parts of a client's request that a mapping can make descriptors from.

    Args:
        headers: by name in lower case; the first of several with one name.
        context_extensions: set for the route in the proxy's configuration.
        path: with its query.
        source_address: the client's address, without port; empty if it has none.
        principal: the client's name in its certificate; empty without one.
    """

    headers: Mapping[bytes, bytes]
    context_extensions: Mapping[bytes, bytes]
    path: bytes
    method: bytes
    source_address: bytes = b""
    principal: bytes = b""

    def value_of(self, source: EntrySource) -> bytes | None:
        """The value for an entry; None when the request lacks it. A header may be present and empty."""
        match source.part:
            case None:
                return source.text
            case Part.HEADER:
                return self.headers.get(source.text)
            case Part.CONTEXT_EXTENSION:
                return self.context_extensions.get(source.text)
            case Part.PATH:
                # Without the query, since callers could get new buckets by inventing queries.
                value = self.path.partition(b"#")[0].partition(b"?")[0]
            case Part.METHOD:
                value = self.method
            case Part.SOURCE_ADDRESS:
                value = self.source_address
            case Part.PRINCIPAL:
                value = self.principal
        return value or None


def rate_limit_request(domain: str, mapping: HttpMapping, http: HttpRequest) -> bytes | None:
    """The RateLimitRequest that Envoy's filter would send; None when it would send none.

    Raises:
        InvalidRequest: the values have more than `MAX_VALUES_BYTES`.
    """
    request = Request(domain=domain.encode())
    size = 0
    for sources in mapping:
        entries: list[tuple[bytes, bytes]] = []
        for source in sources:
            value = http.value_of(source)
            if value is None:
                break
            size += len(value)
            if size > MAX_VALUES_BYTES:
                raise InvalidRequest(f"descriptors with more than {MAX_VALUES_BYTES} bytes of values")
            entries.append((source.key, value))
        else:
            descriptor = request.descriptors.add()
            for key, value in entries:
                descriptor.entries.add(key=key, value=value)
    if not request.descriptors:
        return None
    raw: bytes = request.SerializeToString()
    return raw
