"""A plan: which buckets a request takes from and how much. It is made from the request's bytes and the rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ratelimit_sidecar.crdt.bucket import Bucket
from ratelimit_sidecar.crdt.limit import AnyLimit
from ratelimit_sidecar.limiter.counts import RuleCounts
from ratelimit_sidecar.limiter.rules import Rule


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule, prepared for decisions: everything that is the same for every descriptor it limits.

    Args:
        rule: None for descriptors that no rule limits.
        limit: None when there is none to check.
        ok_head: the beginning of the status of an admitted descriptor (see `encoding`); without a limit the whole
            status.
        over_head: the beginning of the status of a denied one.
        is_shadow: True if a denied descriptor is answered with OK.
        is_replicated: True if takes are sent to peers.
        is_strict: True if it takes from this replica's purse only.
        in_quota_mode: True if this rule alone, over its limit, does not make the answer OVER_LIMIT.
        near_from: hits above this number of tokens are near the limit.
        is_decorated: True if the answer may have headers, a body or metadata.
        wait_us: how long a request may wait for tokens.
    """

    rule: Rule | None
    limit: AnyLimit | None
    ok_head: bytes
    over_head: bytes = b""
    is_shadow: bool = False
    is_replicated: bool = False
    is_strict: bool = False
    in_quota_mode: bool = False
    near_from: int = 0
    is_decorated: bool = False
    wait_us: int = 0


class PlannedTake:
    """One descriptor of a request: what to take from which bucket.

    It is no dataclass, because mypyc leaves the constructor of one interpreted, and every new request makes takes.

    Args:
        hits: tokens to take; 0 checks and charges nothing.
        gives_back: tokens to give back, which an earlier request took and did not need; then `hits` is 0.
        charges_always: True if denied hits are charged, too, as debt.
        charges_denied: True if denied hits count against the limit, by the rule's `charge` or because it is a fixed
            window.
    """

    __slots__ = (
        "bucket",
        "bucket_key",
        "charges_always",
        "charges_denied",
        "compiled",
        "counts",
        "gives_back",
        "hits",
        "limit",
        "store_version",
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
        """The bucket it last took from."""
        self.store_version = -1
        """The store's `removals` at that time. As long as it is unchanged, `bucket` is still in the store."""
        self.limit: AnyLimit | None = None
        """The limit that the bucket enforced then. An override of another request may have replaced it."""

    @property
    def rule(self) -> Rule | None:
        return self.compiled.rule

    @property
    def may_wait(self) -> bool:
        """True if its request may wait for tokens: it is denied without them, and takes them when they come."""
        compiled = self.compiled
        is_denying = not compiled.is_shadow and not compiled.in_quota_mode
        return compiled.wait_us > 0 and is_denying and self.hits > 0 and not self.charges_always


class Plan:
    """Everything needed to decide one request. No dataclass, for the same reason as `PlannedTake`.

    Args:
        quota_mode_takes: the number of takes in quota mode.
        metadata: the answer's dynamic metadata about the request; None when it is not wanted.
        descriptors: the entries of each descriptor, in order.
        gives_back: True if a take gives tokens back.
        is_decorated: True if one of the takes' rules is.
        all_or_nothing: True if a denied request is charged nothing, except takes that are always charged.
        may_wait: True if one of the takes may wait.
    """

    __slots__ = (
        "all_or_nothing",
        "descriptors",
        "domain",
        "gives_back",
        "is_decorated",
        "may_wait",
        "metadata",
        "quota_mode_takes",
        "takes",
    )

    def __init__(
        self,
        domain: str,
        takes: tuple[PlannedTake, ...],
        *,
        quota_mode_takes: int,
        metadata: Mapping[str, Any] | None,
        descriptors: tuple[tuple[tuple[str, str], ...], ...],
        gives_back: bool,
        is_decorated: bool,
        all_or_nothing: bool,
        may_wait: bool,
    ) -> None:
        self.domain = domain
        self.takes = takes
        self.quota_mode_takes = quota_mode_takes
        self.metadata = metadata
        self.descriptors = descriptors
        self.gives_back = gives_back
        self.is_decorated = is_decorated
        self.all_or_nothing = all_or_nothing
        self.may_wait = may_wait
