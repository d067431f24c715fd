"""Nodes, keys and limits for the tests of the mesh."""

from __future__ import annotations

from ratelimit_sidecar.crdt.bucket import Bucket, Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.shares import OLD_LOAN_US, Membership, Shares, ShownMembership
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.rules import Consistency, Match, Rules
from ratelimit_sidecar.replication.deltas import Applied, DeltasReader
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.session import LocalNode
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from simulation.steps import done
from simulation.workload import rules_of

NOW_US = 1_790_000_000_000_000
SECOND_US = 1_000_000

PER_USER = TokenBucketLimit(10, SECOND_US, 1_000)
"""Slots of 2 s, a horizon of 134 s: nothing is sealed during a test."""

PER_TEAM = TokenBucketLimit(1_000, SECOND_US, 200)
"""The narrowest slots and the shortest horizon, 10 s."""


PER_PLAN = TokenBucketLimit(100, SECOND_US, 100)

PAIR = Membership(1, {"a": 1, "b": 1})

SIT_OUT_US = OLD_LOAN_US
"""How long after its start a replica has no home, when it hears of nobody."""


def rules_with(
    *, user: TokenBucketLimit = PER_USER, team: TokenBucketLimit = PER_TEAM, plan: TokenBucketLimit = PER_PLAN
) -> Rules:
    """A limit for each value of `user` and of `team`, a strict one of `plan`, and for each `pod` one of its own."""
    return rules_of({"user": user, "team": team, "plan": plan, "pod": PER_USER})


RULES = rules_with()

ELSEWHERE = rules_of({"nobody": PER_USER})
"""What only other nodes have a rule for."""


def key_of(value: str, key: str = "user", rules: Rules = RULES) -> bytes:
    return _match(value, key, rules).bucket_key


def _match(value: str, key: str, rules: Rules) -> Match:
    found = rules.match("api", [(key, value)])
    assert found is not None
    return found


def node(name: str, incarnation: int = 1, *, region: str = "", membership: ShownMembership | None = None) -> LocalNode:
    return LocalNode(Origin(name, incarnation), region or f"region of {name}", "0", membership)


def store_of(local: LocalNode, rules: Rules = RULES) -> Store:
    return Store(local.origin, rules.replicated_limit_of_key)


def ledger_of(name: str, membership: Membership, started_us: int, rules: Rules = RULES) -> Ledger:
    return Ledger(Shares(membership, name, started_us), Origin(name, 1), rules.strict_limit_of_key)


def bucket_of(store: Store, value: str, now_us: int, key: str = "user", rules: Rules = RULES) -> Bucket:
    found = _match(value, key, rules)
    assert found.rule.limit is not None
    is_replicated = found.rule.consistency is not Consistency.LOCAL
    return store.bucket(found.bucket_key, found.rule.limit, now_us, replicated=is_replicated)


def take(store: Store, value: str, hits: int, now_us: int, key: str = "user") -> Bucket:
    """Take from the bucket of that value, which must hold as much."""
    bucket = bucket_of(store, value, now_us, key)
    assert bucket.take(hits, now_us)
    return bucket


def flush(replicator: Replicator, now_us: int) -> None:
    """Let a node's peers be told what it has changed, and compare."""
    done(replicator.flush_steps(now_us))
    done(replicator.compare_steps(now_us))


def apply_deltas(store: Store, deltas: pb.Deltas, sender: Origin, now_us: int) -> Applied:
    """Hear these as the first of a stream."""
    return apply_all(DeltasReader(sender), store, deltas, now_us)


def apply_all(reader: DeltasReader, store: Store, deltas: pb.Deltas, now_us: int) -> Applied:
    """Returns what all steps amount to."""
    steps = list(reader.apply_steps(deltas, store, now_us))
    return Applied(sum(step.entries for step in steps), sum(step.unknown_keys for step in steps), is_last=True)


def frame(**kind: object) -> bytes:
    """A frame as a peer would send it: `frame(ack=pb.Ack(sequence=1))`."""
    return pb.Frame(**kind).SerializeToString()


def kind_of(raw: bytes | None) -> str | None:
    return None if raw is None else pb.Frame.FromString(raw).WhichOneof("kind")
