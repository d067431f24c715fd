"""How much a node keeps for its peers, counted: the entries of all containers that hang on its replicator.

Counting needs no names of what is in there, so it sees what is added one day; and unlike bytes it is the same in
every run and on every interpreter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

_CONTAINERS = (dict, list, set, frozenset, deque, tuple)

_OWN_MODULE = "ratelimit_sidecar.replication."


def entries_in(*roots: object) -> int:
    """Entries of the containers that can be reached from `roots` through containers and objects of the mesh's modules.

    Buckets, rules, frames and what is outside of the mesh are not looked into.
    """
    seen: set[int] = set()
    stack: list[object] = list(roots)
    total = 0
    while stack:
        found = stack.pop()
        kind = type(found)
        if isinstance(found, _CONTAINERS):
            if id(found) in seen:
                continue
            seen.add(id(found))
            total += len(found)
            stack.extend(found)
            if isinstance(found, dict):
                stack.extend(found.values())
        elif kind.__module__.startswith(_OWN_MODULE) and id(found) not in seen:
            seen.add(id(found))
            stack.extend(_attributes(found))
    return total


def _attributes(found: object) -> Iterable[object]:
    values: list[object] = list(getattr(found, "__dict__", {}).values())
    for kind in type(found).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(found, name):
                values.append(getattr(found, name))
    return values
