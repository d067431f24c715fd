"""What `replaces` of rules says that is allowed, and probably not meant: `ratelimit-sidecar check` warns of it.

envoyproxy/ratelimit accepts all of it without a word, so `serve` does, too. Names hold within a domain, whatever the
files that it is in. The documents must be without problems.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ratelimit_sidecar.config.document import Document
from ratelimit_sidecar.config.errors import KeyPath, Problem, quoted
from ratelimit_sidecar.config.yaml_data import YamlList, YamlMap


@dataclass(frozen=True, slots=True)
class _Named:
    """The `rate_limit` of a descriptor.

    Args:
        at: where it stands.
        name: "" for none.
        replaces: names, in their order in the file.
    """

    document: Document
    at: KeyPath
    name: str
    replaces: tuple[str, ...]
    is_shadow: bool
    is_unlimited: bool

    def warning(self, index: int, found: str, expected: str, fix: str) -> Problem:
        return self.document.problem((*self.at, "replaces", index, "name"), found, expected, fix)


def doubtful_replaces(documents: Iterable[Document]) -> Iterator[Problem]:
    """A warning for each entry of `replaces` that does nothing, or takes a limit away for none."""
    domains: dict[str, list[_Named]] = {}
    for document in documents:
        if isinstance(document.data, YamlMap):
            domains.setdefault(document.data.source_of("domain") or "", []).extend(_limits(document))
    for limits in domains.values():
        by_name: dict[str, list[_Named]] = {}
        for limit in limits:
            by_name.setdefault(limit.name, []).append(limit)
        named = {name: tuple(found) for name, found in by_name.items() if name}
        for limit in limits:
            for index, name in enumerate(limit.replaces):
                yield from _entry_problems(limit, index, name, named)


def _entry_problems(limit: _Named, index: int, name: str, named: Mapping[str, tuple[_Named, ...]]) -> Iterator[Problem]:
    replaced = named.get(name)
    what = quoted(name)
    if replaced is None:
        fix = "correct it, or remove the entry"
        yield limit.warning(index, f"{what}, which no limit has", "the name of a limit of the domain", fix)
    elif all(other.is_unlimited for other in replaced):
        yield limit.warning(index, f"{what}, which is unlimited", "a limit that can be replaced", "remove the entry")
    elif limit.name and limit.name in _replaced_by(name, named):
        found = f"{what}, which replaces {quoted(limit.name)}"
        fix = "remove one of the entries: a request that meets all of them is held to none"
        yield limit.warning(index, found, "no circle", fix)
    elif all(other.is_shadow for other in replaced):
        yield limit.warning(index, f"{what}, in shadow_mode", "a limit that is enforced", "remove one of the two")
    elif limit.is_shadow:
        fix = "remove one of the two: a request that meets both is held to none"
        yield limit.warning(index, f"{what}, in a rule in shadow_mode", "a rule that is enforced in its place", fix)


def _replaced_by(name: str, named: Mapping[str, tuple[_Named, ...]]) -> set[str]:
    """The names that limits of this name replace, and those replace, and so on."""
    found: set[str] = set()
    left = [name]
    while left:
        for limit in named.get(left.pop(), ()):
            left += set(limit.replaces) - found
            found.update(limit.replaces)
    return found


def _limits(document: Document) -> Iterator[_Named]:
    left: list[tuple[object, KeyPath]] = [(document.data, ())]
    while left:
        above, path = left.pop()
        items = above.get("descriptors") if isinstance(above, YamlMap) else None
        for index, item in enumerate(items if isinstance(items, YamlList) else ()):
            at = (*path, "descriptors", index)
            left.append((item, at))
            rate_limit = item.get("rate_limit") if isinstance(item, YamlMap) else None
            if not isinstance(item, YamlMap) or not isinstance(rate_limit, YamlMap):
                continue
            replaces = rate_limit.get("replaces")
            entries = replaces if isinstance(replaces, YamlList) else ()
            yield _Named(
                document,
                (*at, "rate_limit"),
                rate_limit.source_of("name") or "",
                tuple([entry.source_of("name") or "" for entry in entries if isinstance(entry, YamlMap)]),
                item.get("shadow_mode") is True,
                rate_limit.get("unlimited") is True,
            )
