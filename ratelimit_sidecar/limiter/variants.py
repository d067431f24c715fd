"""Copies of the rules with every rule changed in one way, for `explain` and replays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from ratelimit_sidecar.limiter.rules import Consistency, Rule, RuleNode, Rules
from ratelimit_sidecar.limiter.wildcard import WildcardSet

_K = TypeVar("_K")


def made_local(rules: Rules) -> Rules:
    """Make every rule local, for one replica that decides everything by itself."""
    changed = changed_rules(rules, lambda rule: replace(rule, consistency=Consistency.LOCAL))
    return replace(changed, override_consistency=Consistency.LOCAL)


def without_shadow_mode(rules: Rules) -> Rules:
    """Take every rule out of shadow mode."""
    return changed_rules(rules, lambda rule: replace(rule, shadow_mode=False))


def changed_rules(rules: Rules, change: Callable[[Rule], Rule]) -> Rules:
    """A copy of the rules with `change` applied to each rule, the default rule included."""
    return replace(
        rules,
        domains=_changed_nodes(rules.domains, change),
        default_rule=None if rules.default_rule is None else change(rules.default_rule),
    )


def _changed_nodes(nodes: Mapping[_K, RuleNode], change: Callable[[Rule], Rule]) -> dict[_K, RuleNode]:
    return {key: _changed_node(node, change) for key, node in nodes.items()}


def _changed_node(node: RuleNode, change: Callable[[Rule], Rule]) -> RuleNode:
    return replace(
        node,
        rule=None if node.rule is None else change(node.rule),
        exact=_changed_nodes(node.exact, change),
        wildcards={
            key: WildcardSet([(pattern, _changed_node(below, change)) for pattern, below in wildcards.patterns])
            for key, wildcards in node.wildcards.items()
        },
        key_only=_changed_nodes(node.key_only, change),
    )
