"""Both modes of the sidecar: whole sidecars on virtual time, from the bytes of requests to those of frames.

Every pair of regions has one connection, dialled by the first of the two.
"""

from __future__ import annotations

from functools import partial

from benchmarks.admission.policies.policy import Answer, Policy, Setup
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.limiter.rules import Consistency, Rule, RuleNode, Rules
from simulation.cluster import Cluster
from simulation.node import Node
from simulation.oracles import held
from simulation.workload import DOMAIN, request

KEY = "limit"


class Sidecars(Policy):
    """The sidecar's policy: a whole simulated sidecar in each region, with one rule for all requests.

    Args:
        wait_us: how long a request may wait for tokens of other regions.
    """

    def __init__(self, setup: Setup, consistency: Consistency, wait_us: int = 0) -> None:
        super().__init__(setup)
        self.never_exceeds = consistency is Consistency.STRICT
        rules = Rules(
            {
                DOMAIN: RuleNode(
                    key_only={KEY: RuleNode(Rule(KEY, setup.limit, consistency=consistency, wait_us=wait_us))}
                )
            }
        )
        self._request = request(rules, 1, (KEY, "all"))
        names = setup.names
        dials = {name: names[number + 1 :] for number, name in enumerate(names)}
        self.cluster = Cluster("", names, rules, network=setup.network, dials=dials)

    def request(self, region: int, answer: Answer) -> None:
        node = self.cluster[self.setup.names[region]]
        node.decide(self._request.raw, partial(self._answered, node, answer))

    def _answered(self, node: Node, answer: Answer, raw: bytes) -> None:
        admitted = RateLimitResponse.FromString(raw).overall_code == RateLimitResponse.OK
        self.note(node, admitted)
        answer(admitted, self.setup.loop.now_us)

    def note(self, node: Node, admitted: bool) -> None:
        """A region has decided."""


class Eventual(Sidecars):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, Consistency.EVENTUAL)
        self._undelivered = 0
        self._unheard: dict[Node, dict[tuple[Origin, int], tuple[int, int]]] = {node: {} for node in self.cluster}
        """By region, what others admitted in a slot, and how much of it the region has heard at most."""

    @property
    def undelivered(self) -> int:
        return self._undelivered

    def note(self, node: Node, admitted: bool) -> None:
        bucket = node.bucket("all", KEY)
        unheard = self._unheard[node]
        for place, (tokens, before) in list(unheard.items()):
            # When the slot is sealed it is held no more.
            heard = max(before, held(bucket, *place))
            unheard[place] = tokens, heard
            if heard >= tokens:
                del unheard[place]
        if admitted:
            self._undelivered = max(self._undelivered, sum(tokens - heard for tokens, heard in unheard.values()))
            place = (bucket.origin, bucket._own_slot)
            for other, others in self._unheard.items():
                if other is not node:
                    others[place] = bucket._own_tokens, others.get(place, (0, 0))[1]
