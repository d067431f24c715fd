"""A client's requests on an ADS stream, state of the world, about resources of one type. No I/O.

The protocol (Envoy's documentation, "xDS REST and gRPC protocol"): a stream begins with a request that names the node
and the type. Before the next response is read, every response is answered by a request with its nonce: with its version
if it was accepted (ACK), or with the last accepted version and the error (NACK). No resource names means all: each
response has every resource there is, and a missing one is gone.
"""

from __future__ import annotations

from ratelimit_sidecar.envoy_api.envoy.config.core.v3.base_pb2 import Node
from ratelimit_sidecar.envoy_api.envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse

MAX_ERROR_CHARS = 4_096
"""The longest error of a NACK, which is for a server's log."""

FIRST_HOLD_SECONDS = 0.1
MAX_HOLD_SECONDS = 10.0

_INVALID_ARGUMENT = 3


class Subscription:
    """The requests of a client for resources of one type: the first of a stream, and an answer to each response.

    Args:
        node: who asks.
    """

    def __init__(self, type_url: str, node: Node) -> None:
        self.version = ""
        """The version that was last accepted; "" before the first."""
        self.hold_seconds = 0.0
        """For how long to hold back the last answer. A server that answers each request whose version is not its own,
        as go-control-plane does, sends what was rejected again at once; so from the second time on the answer waits,
        each time twice as long, up to `MAX_HOLD_SECONDS`."""
        self._rejected_version: str | None = None
        """The version of the last response on this stream, if that was rejected."""
        self._type_url = type_url
        self._node = node

    def begin(self) -> DiscoveryRequest:
        """The first request of a new stream.

        It asks for everything, even if something was accepted on a former stream. With a version the server might not
        need to answer; but some (Envoy Gateway) count their versions from their own start, and would take their third
        version for that of their former life.
        """
        self._rejected_version, self.hold_seconds = None, 0.0
        return self._request("", "")

    def accept(self, response: DiscoveryResponse) -> DiscoveryRequest:
        """The answer to resources that are in force now."""
        self.version = response.version_info
        self._rejected_version, self.hold_seconds = None, 0.0
        return self._request(self.version, response.nonce)

    def reject(self, response: DiscoveryResponse, why: str) -> DiscoveryRequest:
        """The answer to resources that cannot be used."""
        is_again = response.version_info == self._rejected_version
        hold_seconds = max(FIRST_HOLD_SECONDS, 2 * self.hold_seconds) if is_again else 0.0
        self._rejected_version, self.hold_seconds = response.version_info, min(hold_seconds, MAX_HOLD_SECONDS)
        request = self._request(self.version, response.nonce)
        request.error_detail.code = _INVALID_ARGUMENT
        request.error_detail.message = why if len(why) <= MAX_ERROR_CHARS else f"{why[: MAX_ERROR_CHARS - 1]}…"
        return request

    def _request(self, version: str, nonce: str) -> DiscoveryRequest:
        # Servers may need the node in the first request only; there are some that look for it in each.
        return DiscoveryRequest(version_info=version, node=self._node, type_url=self._type_url, response_nonce=nonce)
