"""Large structures given back piece by piece, so that other threads can go on meanwhile.

What holds 20,000 rules is freed in one step once nobody refers to it, 30 ms in which the thread keeps Python's lock and
the event loop waits for it. So before the last reference goes, everything in it is listed, outer before inner; then the
list is emptied from its beginning, and each object is freed alone, its inner ones being held by the list still. Nothing
is taken out of the objects themselves: whoever else refers to one still has all of it.

This module must stay interpreted: between any two objects the interpreter lets go of the lock when it is wanted, which
compiled loops do not.
"""

from __future__ import annotations

from collections.abc import Iterable

from ratelimit_sidecar.config.yaml_data import YamlList
from ratelimit_sidecar.limiter.rules import RuleNode


def free_in_pieces(pieces: list[object]) -> None:
    """Empty the list.

    Args:
        pieces: what holds another one stands before it. Only what nobody else refers to is freed.
    """
    pieces.reverse()
    while pieces:
        pieces.pop()


def pieces_of_data(documents: Iterable[object]) -> list[object]:
    """What the data of rules files consists of, down to single descriptors; the same goes for that of xDS resources.

    A descriptor without descriptors below is one piece: its size is what a person has written.
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
    """What trees of rules consist of."""
    pieces: list[object] = []
    pending = list(roots)
    while pending:
        node = pending.pop()
        pieces += (node, node.rule)
        for keys in (node.exact, node.key_only):
            pieces += keys
        pending += node.children
    return pieces
