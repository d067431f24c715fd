"""A small limiter, requests to it, and peers: what the tests of telemetry and console look at."""

from __future__ import annotations

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Consistency, Rule, RuleNode, Rules
from ratelimit_sidecar.mesh_status import MembershipStatus, PeerStatus

NOW_US = 1_795_000_000_000_000

TWO_A_MINUTE = TokenBucketLimit(tokens=2, period_us=60_000_000, capacity=2)


class NoTelemetry:
    """A tracer for services of which nobody looks at it."""

    def sampled(self, metadata: object) -> None: ...

    def record(self, *_: object) -> None: ...


def small_rules() -> Rules:
    """In domain `edge`: two a minute by `tenant`, the same by `ip` but local, and no limit for `plan=gold`."""
    return Rules(
        {
            "edge": RuleNode(
                exact={("plan", "gold"): RuleNode(Rule("edge.plan_gold", None))},
                key_only={
                    "tenant": RuleNode(Rule("edge.tenant", TWO_A_MINUTE)),
                    "ip": RuleNode(Rule("edge.ip", TWO_A_MINUTE, consistency=Consistency.LOCAL)),
                },
            )
        }
    )


def small_limiter(rules: Rules | None = None) -> Limiter:
    return Limiter(rules or small_rules(), Origin("here", 1))


def strict_limiter() -> Limiter:
    """In domain `edge` two a minute by `tenant`, strict; of that a half is this node's own, for long."""
    rules = Rules(
        {
            "edge": RuleNode(
                key_only={"tenant": RuleNode(Rule("edge.tenant", TWO_A_MINUTE, consistency=Consistency.STRICT))}
            )
        }
    )
    shares = Shares(Membership(1, {"here": 1, "there": 1}), "here", NOW_US - 10 * TWO_A_MINUTE.period_us)
    origin = Origin("here", 1)
    return Limiter(rules, origin, ledger=Ledger(shares, origin, rules.strict_limit_of_key))


def membership(*, conflicts: tuple[str, ...] = ("eu-1",), settled: bool = True) -> MembershipStatus:
    return MembershipStatus(
        epoch=3,
        home_share=0.25,
        settled=settled,
        conflicts=conflicts,
        buckets=7,
        payments_sent=11,
        payments_received=13,
    )


def request(*descriptors: tuple[str, str], domain: str = "edge", hits: int = 1) -> bytes:
    """A serialized RateLimitRequest; each descriptor has one entry, (key, value)."""
    message = RateLimitRequest(domain=domain, hits_addend=hits)
    for key, value in descriptors:
        message.descriptors.add().entries.add(key=key, value=value)
    return message.SerializeToString()


def check_only(descriptor: tuple[str, str]) -> bytes:
    """A request that asks and takes nothing."""
    message = RateLimitRequest.FromString(request(descriptor))
    message.descriptors[0].hits_addend.value = 0
    return message.SerializeToString()


def peer(
    node: str = "eu-1",
    address: str = "eu.example.com:50051",
    *,
    lag_seconds: float = 0.08,
    clock_offset_seconds: float | None = 0.002,
) -> PeerStatus:
    return PeerStatus(
        node=node,
        region="eu-west-2" if node else "",
        address=address,
        version="1.2.3",
        protocol=3,
        connected=bool(node),
        lag_seconds=lag_seconds,
        pending_buckets=3,
        batches_sent=40,
        batches_received=50,
        entries_sent=400,
        entries_received=500,
        bytes_sent=6_000,
        bytes_received=7_000,
        resyncs=4,
        rules_match=True,
        reconnects=2,
        clock_offset_seconds=clock_offset_seconds,
        last_error="",
        protocol_errors={"malformed": 1},
        refused={"ahead": 9},
    )
