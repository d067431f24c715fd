"""Frees large structures object by object, so that other threads can go on meanwhile.

A structure of 20,000 rules is freed in one step when the last reference goes. That takes 30 ms, during which the thread
holds Python's lock and the event loop waits for it. So before that, all its objects are listed, outer before inner.
Then the list is emptied from its beginning, and each object is freed alone, while the list still holds the inner ones.
The objects themselves are not changed, so other references to them stay valid.

This module must stay interpreted: between two objects the interpreter releases the lock on request, which compiled
loops do not.
"""

from __future__ import annotations

from collections.abc import Iterable

from ratelimit_sidecar.config.yaml_data import YamlList
from ratelimit_sidecar.limiter.rules import RuleNode


def free_in_pieces(pieces: list[object]) -> None:
    """Empty the list, and so free its objects one by one.

    Args:
        pieces: outer objects before inner ones. Only objects without other references are freed.
    """
    pieces.reverse()
    while pieces:
        pieces.pop()


def pieces_of_data(documents: Iterable[object]) -> list[object]:
    """The objects in the data of rules files or xDS resources, down to single descriptors.

    A descriptor without descriptors below it is one piece, since a person has written it.
    """
    pieces: list[object] = []
    pending = list(documents)
    while pending:
        data = pending.pop()
        pieces.append(data)
        if isinstance(data, dict) and "descriptors" in data:
            pending.append(data["descriptors"])
        elif isinstance(data, list):
            pending += data
            if isinstance(data, YamlList):
                pieces += data.positions
    return pieces


def pieces_of_rules(roots: Iterable[RuleNode]) -> list[object]:
    """The objects in trees of rules."""
    pieces: list[object] = []
    pending = list(roots)
    while pending:
        node = pending.pop()
        pieces += (node, node.rule)
        for keys in (node.exact, node.key_only):
            pieces += keys
        pending += node.children
    return pieces
