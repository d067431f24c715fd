"""Rules files and requests at random, from a seed: every key of the grammar, and what proxies send or might."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Final

from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse

UNITS: Final = ("HOUR", "DAY", "WEEK", "MONTH", "YEAR")
"""None that ends within a run, but for the hour: a window that begins between two answers to one request is told apart
by the clock (`run`)."""

_KEYS: Final = ("k", "key", "größe", "a.b", "x-y", "1", "true")
_STARRED_KEYS: Final = ("k*", "*", "x*y")
_VALUES: Final = (
    "v",
    "w",
    "foo",
    "foobar",
    "fob",
    "foo/bar",
    "ü",
    "日本語",
    "a*c",
    "abc",
    "foo*",
    "*",
    "10.0.0.1",
    "no",
    "a b",
)
_TRAILING: Final = ("foo*", "f*", "*", "ü*", "a*")
_ANYWHERE: Final = ("*bar", "f*r", "a*c", "**", "f*o*r", "*")
_NAMES: Final = ("one", "two", "three")
_REQUESTS: Final = (0, 1, 1, 2, 2, 3, 5, 10, 1000, 2**32 - 1)
_HITS: Final = (0, 1, 1, 2, 3, 7, 1000, 2**32)
_JOINED_KEYS: Final = ("a", "a_b", "a_b_c")
_JOINED_VALUES: Final = ("b", "c", "b_c", "b_c_d", "")
_MAX_DEPTH: Final = 4


class Generator:
    """Draws rules files, and requests to them.

    Args:
        random: where choices come from.
        is_complete: see `Version`.
        joined: keys and values hold underscores, so that different descriptors look the same where they are joined by
            one.
        mixed: rules with metadata may be of those kinds of which envoyproxy/ratelimit forgets them.
    """

    def __init__(self, random: Random, *, is_complete: bool, joined: bool, mixed: bool) -> None:
        self._random = random
        self._is_complete = is_complete
        self._joined = joined
        self._mixed = mixed
        self._keys: Sequence[str] = _JOINED_KEYS if joined else _KEYS
        self._values: Sequence[str] = _JOINED_VALUES if joined else _VALUES

    def rules_file(self, domain: str) -> dict[str, Any]:
        return {"domain": domain, "descriptors": self._descriptors(1, is_forgetful=False)}

    def request(self, file: Mapping[str, Any]) -> RateLimitRequest:
        domain = self._random.choices((file["domain"], "unknown", "", f"{file['domain']} "), (96, 2, 1, 1))[0]
        request = RateLimitRequest(domain=domain)
        if self._chance(0.3):
            request.hits_addend = self._random.choice((1, 2, 3, 50, 2**32 - 1))
        for _ in range(self._random.choices((0, 1, 2, 3, 4), (1, 50, 30, 15, 4))[0]):
            descriptor = request.descriptors.add()
            for key, value in self._entries(file["descriptors"]):
                descriptor.entries.add(key=key, value=value)
            if self._chance(0.25):
                descriptor.hits_addend.value = self._random.choice(_HITS)
            if self._chance(0.12):
                descriptor.limit.requests_per_unit = self._random.choice(_REQUESTS)
                # type.v3.RateLimitUnit has the same numbers, but no week.
                descriptor.limit.unit = RateLimitResponse.RateLimit.Unit.Value(self._random.choice(UNITS))
        return request

    def _descriptors(self, depth: int, *, is_forgetful: bool) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for _ in range(self._random.randint(1, 5 if depth == 1 else 3)):
            descriptor = self._descriptor(depth, is_forgetful)
            # As envoyproxy/ratelimit joins them: two of one name it refuses.
            value = descriptor.get("value")
            found.setdefault(descriptor["key"] + (f"_{value}" if value else ""), descriptor)
        return list(found.values())

    def _descriptor(self, depth: int, is_forgetful: bool) -> dict[str, Any]:
        """Draw a descriptor of a rules file, with those below it.

        Args:
            is_forgetful: metadata below are forgotten by envoyproxy/ratelimit.
        """
        may_be_starred = self._is_complete and not self._joined
        keys = _STARRED_KEYS if may_be_starred and self._chance(0.05) else self._keys
        descriptor: dict[str, Any] = {"key": self._random.choice(keys)}
        is_forgetful |= "*" in descriptor["key"]
        has_pattern = False
        if self._chance(0.65):
            has_pattern = self._chance(0.5)
            patterns = (*_TRAILING, *_ANYWHERE) if self._is_complete else _TRAILING
            values = [value for value in self._values if has_pattern or "*" not in value]
            descriptor["value"] = self._random.choice(patterns if has_pattern else values)
        if has_pattern and self._chance(0.4):
            descriptor["share_threshold"] = True
        if self._chance(0.15):
            descriptor["value_to_metric"] = True
            is_forgetful = True
        if self._chance(0.15):
            descriptor["detailed_metric"] = True
        if self._chance(0.8):
            descriptor |= self._limit()
        forgets = is_forgetful or "detailed_metric" in descriptor or "unlimited" in descriptor.get("rate_limit", {})
        if self._is_complete and (self._mixed or not forgets) and self._chance(0.3):
            descriptor["metadata"] = self._metadata(2)
        if depth < _MAX_DEPTH and self._chance(0.4):
            descriptor["descriptors"] = self._descriptors(depth + 1, is_forgetful=is_forgetful)
        items = list(descriptor.items())
        self._random.shuffle(items)
        return dict(items)

    def _limit(self) -> dict[str, Any]:
        limit: dict[str, Any] = {}
        if self._chance(0.1):
            limit["unlimited"] = True
        else:
            unit = self._random.choice(UNITS)
            limit["unit"] = self._random.choice((unit, unit.lower(), unit.capitalize()))
            limit["requests_per_unit"] = self._random.choice(_REQUESTS)
        if self._chance(0.4):
            limit["name"] = self._random.choice(_NAMES)
        if self._chance(0.25):
            others = [name for name in _NAMES if name != limit.get("name")]
            limit["replaces"] = [{"name": name} for name in self._random.sample(others, self._random.randint(1, 2))]
        descriptor: dict[str, Any] = {"rate_limit": limit}
        if self._chance(0.2):
            descriptor["shadow_mode"] = self._chance(0.8)
        if self._is_complete and self._chance(0.25):
            descriptor["quota_mode"] = self._chance(0.8)
        return descriptor

    def _metadata(self, depth: int) -> dict[str, Any]:
        keys = self._random.sample(("tier", "größe", "nested", "list", "1"), self._random.randint(0, 3))
        return {key: self._metadata_value(depth) for key in keys}

    def _metadata_value(self, depth: int) -> Any:
        kind = self._random.randrange(4 if depth else 2)
        if kind == 3:
            return [self._metadata_value(depth - 1) for _ in range(self._random.randint(0, 2))]
        if kind == 2:
            return self._metadata(depth - 1)
        return self._random.choice(("gold", "", "日本", 0, -1, 1.5, 2**53, True, False, None))

    def _entries(self, descriptors: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        """Of a path through the rules, more often than not left as it is."""
        entries: list[tuple[str, str]] = []
        level = descriptors
        while level and (not entries or self._chance(0.8)):
            descriptor = self._random.choice(level)
            entries.append((self._filled(descriptor["key"]), self._value_for(descriptor.get("value", ""))))
            level = descriptor.get("descriptors", ())
        change = self._random.randrange(20)
        if change == 0:
            entries.pop()
        elif change == 1:
            entries.append(self._any_entry())
        elif change == 2:
            entries[self._random.randrange(len(entries))] = self._any_entry()
        elif change == 3:
            self._random.shuffle(entries)
        elif change == 4:
            entries = []
        return entries

    def _any_entry(self) -> tuple[str, str]:
        return self._random.choice((*self._keys, "unknown")), self._random.choice((*self._values, ""))

    def _value_for(self, value: str) -> str:
        if "*" in value and self._chance(0.9):
            return self._filled(value)
        if not value or self._chance(0.05):
            return self._random.choice((*self._values, ""))
        return value

    def _filled(self, pattern: str) -> str:
        return "".join([self._random.choice(("", "x", "o", "日")) if part == "*" else part for part in pattern])

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability
