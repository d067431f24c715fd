"""The descriptors of an HTTP request: what `rate_limits` of a route is to Envoy's rate limit filter, a domain's mapping
is to requests that come whole, over ext_authz.

As there, a descriptor is left out when the request lacks what one of its entries is made from, and a request without
descriptors is not limited. Everything of a request is bytes, since callers send what they like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ratelimit_sidecar.limiter.v1.request_pb2 import Request


class Part(Enum):
    """What of a request an entry's value is made from."""

    HEADER = "header"
    CONTEXT_EXTENSION = "context_extension"
    PATH = "path"
    METHOD = "method"
    SOURCE_ADDRESS = "source_address"
    PRINCIPAL = "principal"


NAMED = frozenset((Part.HEADER, Part.CONTEXT_EXTENSION))
"""Of which a request has several, by name."""


@dataclass(frozen=True, slots=True)
class EntrySource:
    """Where an entry of a descriptor comes from.

    Args:
        part: None for a value that is always the same.
        text: the name of the header, in lower case, or of the context extension; or the value.
    """

    key: bytes
    part: Part | None
    text: bytes = b""


HttpMapping = tuple[tuple[EntrySource, ...], ...]
"""The descriptors of a domain, each the sources of its entries."""


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """What ext_authz is told of a client's request: the parts that a mapping can make descriptors of.

    Args:
        headers: by name in lower case; the values of one that came several times joined by commas (RFC 9110, 5.3).
        context_extensions: what the proxy's configuration says of the route.
        path: with its query.
        source_address: of the client, without port; empty when it has none.
        principal: who the client is by its certificate; empty without one.
    """

    headers: Mapping[bytes, bytes]
    context_extensions: Mapping[bytes, bytes]
    path: bytes
    method: bytes
    source_address: bytes = b""
    principal: bytes = b""

    def value_of(self, source: EntrySource) -> bytes | None:
        """None when the request lacks it. A header may be there and empty."""
        match source.part:
            case None:
                return source.text
            case Part.HEADER:
                return self.headers.get(source.text)
            case Part.CONTEXT_EXTENSION:
                return self.context_extensions.get(source.text)
            case Part.PATH:
                # Else a query made up by the caller would begin a bucket of its own.
                value = self.path.partition(b"#")[0].partition(b"?")[0]
            case Part.METHOD:
                value = self.method
            case Part.SOURCE_ADDRESS:
                value = self.source_address
            case Part.PRINCIPAL:
                value = self.principal
        return value or None


def rate_limit_request(domain: str, mapping: HttpMapping, http: HttpRequest) -> bytes | None:
    """The RateLimitRequest that Envoy's filter would send; None when it would send none."""
    request = Request(domain=domain.encode())
    for sources in mapping:
        entries: list[tuple[bytes, bytes]] = []
        for source in sources:
            value = http.value_of(source)
            if value is None:
                break
            entries.append((source.key, value))
        else:
            descriptor = request.descriptors.add()
            for key, value in entries:
                descriptor.entries.add(key=key, value=value)
    if not request.descriptors:
        return None
    raw: bytes = request.SerializeToString()
    return raw
