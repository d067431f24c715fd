"""What is said on an ADS stream."""

from __future__ import annotations

from ratelimit_sidecar.envoy_api.envoy.config.core.v3.base_pb2 import Node
from ratelimit_sidecar.envoy_api.envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse
from ratelimit_sidecar.rules_source.subscription import MAX_ERROR_CHARS, MAX_HOLD_SECONDS, Subscription

TYPE_URL = "type.googleapis.com/some.Type"
NODE = Node(id="sidecar-1")


def response(version: str, nonce: str) -> DiscoveryResponse:
    return DiscoveryResponse(version_info=version, nonce=nonce, type_url=TYPE_URL)


def test_a_stream_begins_with_a_request_for_all_resources_of_the_type() -> None:
    assert Subscription(TYPE_URL, NODE).begin() == DiscoveryRequest(node=NODE, type_url=TYPE_URL)


def test_accepted_is_said_with_the_version_and_the_nonce() -> None:
    said = Subscription(TYPE_URL, NODE).accept(response("7", "n1"))
    assert said == DiscoveryRequest(version_info="7", node=NODE, type_url=TYPE_URL, response_nonce="n1")


def test_rejected_is_said_with_the_version_accepted_last_and_the_error() -> None:
    subscription = Subscription(TYPE_URL, NODE)
    subscription.accept(response("7", "n1"))
    said = subscription.reject(response("8", "n2"), "no such unit")
    assert (said.version_info, said.response_nonce) == ("7", "n2")
    assert (said.error_detail.code, said.error_detail.message) == (3, "no such unit")
    again = subscription.reject(response("9", "n3"), "still none")
    assert (again.version_info, again.response_nonce) == ("7", "n3")


def test_rejected_before_anything_was_accepted_has_no_version() -> None:
    said = Subscription(TYPE_URL, NODE).reject(response("1", "n1"), "bad")
    assert (said.version_info, said.response_nonce, said.error_detail.message) == ("", "n1", "bad")


def test_a_new_stream_asks_for_everything_again() -> None:
    """The server may be another one, whose version 7 is not the one that was accepted."""
    subscription = Subscription(TYPE_URL, NODE)
    subscription.accept(response("7", "n1"))
    assert subscription.begin() == DiscoveryRequest(node=NODE, type_url=TYPE_URL)
    assert subscription.reject(response("7", "m1"), "bad").version_info == "7"


def test_what_is_rejected_again_and_again_is_answered_ever_more_slowly() -> None:
    subscription = Subscription(TYPE_URL, NODE)

    def held(version: str) -> float:
        subscription.reject(response(version, "n"), "bad")
        return subscription.hold_seconds

    assert [held("8") for _ in range(4)] == [0, 0.1, 0.2, 0.4]
    assert [held("8") for _ in range(9)][-1] == MAX_HOLD_SECONDS
    assert [held("9"), held("9")] == [0, 0.1]
    subscription.accept(response("10", "n"))
    assert subscription.hold_seconds == 0
    assert [held("9"), held("9")] == [0, 0.1]
    subscription.begin()
    assert [held("9"), held("9")] == [0, 0.1]


def test_a_very_long_error_is_cut() -> None:
    said = Subscription(TYPE_URL, NODE).reject(response("1", "n1"), "x" * 100_000)
    assert len(said.error_detail.message) == MAX_ERROR_CHARS
    assert said.error_detail.message.endswith("x…")
