"""Rules and requests at random, and a matcher so simple that it can be checked by reading.

It is written from the facts about envoyproxy/ratelimit alone: level by level the exact pair, then the patterns in file
order, then the key without value; a limit counts only where rule and descriptor are equally deep.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

DOMAIN = "api"


@dataclass(frozen=True)
class Descriptor:
    """One descriptor of a rules file."""

    key: str
    value: str = ""
    limits: bool = True
    share_threshold: bool = False
    value_to_metric: bool = False
    detailed_metric: bool = False
    children: tuple[Descriptor, ...] = field(default=())


@dataclass(frozen=True)
class Outcome:
    """What the naive matcher says: the descriptors passed on the way, and what tells the bucket from others."""

    path: tuple[Descriptor, ...]
    bucket: tuple[str, ...]
    metric: str


Entries = Sequence[tuple[str, str]]


def fits(pattern: str, value: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), value, re.DOTALL) is not None


def naive_match(file: Sequence[Descriptor], entries: Entries) -> Outcome | None:
    path: list[Descriptor] = []
    level = file
    for key, value in entries:
        of_key = [descriptor for descriptor in level if descriptor.key == key]
        exact = [descriptor for descriptor in of_key if "*" not in descriptor.value and descriptor.value == value != ""]
        patterns = [descriptor for descriptor in of_key if "*" in descriptor.value and fits(descriptor.value, value)]
        any_value = [descriptor for descriptor in of_key if descriptor.value == ""]
        candidates = exact + patterns + any_value
        if not candidates:
            return None
        path.append(candidates[0])
        level = candidates[0].children
    if not path[-1].limits:
        return None
    values = [
        descriptor.value if descriptor.share_threshold else value
        for descriptor, (_, value) in zip(path, entries, strict=True)
    ]
    return Outcome(tuple(path), tuple(values), naive_metric(path, entries))


def naive_metric(path: Sequence[Descriptor], entries: Entries) -> str:
    name = DOMAIN
    for descriptor, (key, value) in zip(path, entries, strict=True):
        shows_value = path[-1].detailed_metric or descriptor.value_to_metric
        shown = value if shows_value and not descriptor.share_threshold else descriptor.value
        name += f".{key}_{shown}" if shown else f".{key}"
    return name


def paths(file: Sequence[Descriptor], above: tuple[Descriptor, ...] = ()) -> Iterator[tuple[Descriptor, ...]]:
    for descriptor in file:
        yield (*above, descriptor)
        yield from paths(descriptor.children, (*above, descriptor))


keys = st.sampled_from(["a", "b", "a_b"])
values = st.text("xy_\n", max_size=3)
patterns = st.text("xy_*", min_size=1, max_size=4).filter(lambda text: "*" in text)


@st.composite
def files(draw: st.DrawFn, depth: int = 3) -> tuple[Descriptor, ...]:
    pairs = draw(st.lists(st.tuples(keys, values | patterns | st.just("")), max_size=5, unique=True))
    return tuple(
        Descriptor(
            key,
            value,
            limits=draw(st.booleans()),
            share_threshold="*" in value and draw(st.booleans()),
            value_to_metric=draw(st.booleans()),
            detailed_metric=draw(st.booleans()),
            children=draw(files(depth - 1)) if depth > 1 else (),
        )
        for key, value in pairs
    )


@st.composite
def requests(draw: st.DrawFn, file: Sequence[Descriptor]) -> list[tuple[str, str]]:
    """Entries that often go the way of some rule: at random they would seldom get past the first level."""
    known = list(paths(file))
    if known and draw(st.booleans()):
        path = draw(st.sampled_from(known))
        entries = [(descriptor.key, draw(values_for(descriptor))) for descriptor in path]
        return entries + draw(st.lists(st.tuples(keys, values), max_size=1))
    return draw(st.lists(st.tuples(keys, values), min_size=1, max_size=4))


def values_for(descriptor: Descriptor) -> st.SearchStrategy[str]:
    if not descriptor.value:
        return values
    if "*" not in descriptor.value:
        return st.just(descriptor.value)
    parts = descriptor.value.split("*")
    return st.lists(values, min_size=len(parts), max_size=len(parts)).map(
        lambda fillings: "".join(map("".join, zip(parts, [*fillings[1:], ""], strict=True)))
    )
