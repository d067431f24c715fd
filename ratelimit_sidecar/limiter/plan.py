"""What a request asks for: which buckets it takes from and how much. Made from the request's bytes and the rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ratelimit_sidecar.crdt.bucket import Bucket
from ratelimit_sidecar.crdt.limit import AnyLimit
from ratelimit_sidecar.limiter.counts import RuleCounts
from ratelimit_sidecar.limiter.rules import Rule


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """What is the same for every descriptor that a rule limits.

    Args:
        rule: None for descriptors that no rule limits.
        limit: None when there is none to check.
        ok_head: the beginning of the status of an admitted descriptor (see `encoding`); without a limit all of it.
        over_head: of a denied one.
        is_shadow: a denied descriptor is answered with OK.
        is_replicated: peers are told what it takes.
        is_strict: it takes from this replica's share.
        is_quota: over the limit it does not by itself make the answer OVER_LIMIT.
        near_from: tokens above which hits are near the limit.
        is_decorated: the answer has more in it than codes and levels, or may have.
    """

    rule: Rule | None
    limit: AnyLimit | None
    ok_head: bytes
    over_head: bytes = b""
    is_shadow: bool = False
    is_replicated: bool = False
    is_strict: bool = False
    is_quota: bool = False
    near_from: int = 0
    is_decorated: bool = False


class Step:
    """One descriptor of a request: what to take from which bucket.

    No dataclass: of a compiled one the constructor would stay interpreted, and requests that were not seen before wait
    for it.

    Args:
        hits: tokens; 0 checks and charges nothing.
        gives_back: tokens that an earlier request took and did not need; `hits` is 0 then.
        charges_always: they are charged when they are denied, too, into debt.
        charges_denied: they count when they are denied, be it so or because the algorithm counts them.
    """

    __slots__ = (
        "bucket",
        "bucket_key",
        "charges_always",
        "charges_denied",
        "compiled",
        "counts",
        "evicted",
        "gives_back",
        "hits",
        "limit",
    )

    def __init__(
        self,
        compiled: CompiledRule,
        bucket_key: bytes,
        hits: int,
        counts: RuleCounts,
        *,
        gives_back: int = 0,
        charges_always: bool = False,
        charges_denied: bool = False,
    ) -> None:
        self.compiled = compiled
        self.bucket_key = bucket_key
        self.hits = hits
        self.gives_back = gives_back
        self.counts = counts
        self.charges_always = charges_always
        self.charges_denied = charges_denied
        self.bucket: Bucket | None = None
        """Where it took from last."""
        self.evicted = -1
        """The store's count of dropped buckets then. While it stands, `bucket` is still the one."""
        self.limit: AnyLimit | None = None
        """What the bucket enforced then; a limit in another request may have taken its place."""

    @property
    def rule(self) -> Rule | None:
        return self.compiled.rule


class Plan:
    """All of a request. A plain class, as `Step` is.

    Args:
        quotas: steps in quota mode.
        metadata: what the answer's dynamic metadata says of the request; None when it is not wanted.
        descriptors: their entries, in order.
        gives_back: one of the steps does.
        is_decorated: as that of the compiled rule of one of them.
        all_or_nothing: an answer OVER_LIMIT charges nothing, but for what is charged always.
    """

    __slots__ = ("all_or_nothing", "descriptors", "domain", "gives_back", "is_decorated", "metadata", "quotas", "steps")

    def __init__(
        self,
        domain: str,
        steps: tuple[Step, ...],
        *,
        quotas: int,
        metadata: Mapping[str, object] | None,
        descriptors: tuple[tuple[tuple[str, str], ...], ...],
        gives_back: bool,
        is_decorated: bool,
        all_or_nothing: bool,
    ) -> None:
        self.domain = domain
        self.steps = steps
        self.quotas = quotas
        self.metadata = metadata
        self.descriptors = descriptors
        self.gives_back = gives_back
        self.is_decorated = is_decorated
        self.all_or_nothing = all_or_nothing
