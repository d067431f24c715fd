"""What is answered or accepted otherwise than by envoyproxy/ratelimit, on purpose, with the reason.

docs/reference/envoyproxy-ratelimit.md shows these tables. The differential test (tests/differential) compares both
services and fails on whatever is in none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that the sidecar does otherwise than envoyproxy/ratelimit, as a row of the tables shows it.

    Args:
        what: the subject of the difference.
        there: what envoyproxy/ratelimit does with it.
        here: what the sidecar does.
        why: the reason to keep the difference.
    """

    what: str
    there: str
    here: str
    why: str


ANSWERS: Mapping[str, Difference] = {
    "error-code": Difference(
        "A request without domain or descriptors",
        "gRPC code UNKNOWN",
        "INVALID_ARGUMENT, with the same text",
        "Envoy treats both alike",
    ),
    "unknown-unit": Difference(
        "A limit in a descriptor whose unit is unknown",
        "the process ends",
        "the limit is ignored, and counted in `ratelimit_ignored_overrides_total`",
        "a request must neither end the service nor lift the limit of a rule",
    ),
    "too-many-hits": Difference(
        "Hits that lift a count beyond 2^63",
        "the call fails with an error of Redis",
        "denied; hits count as 2^48 at most",
        "a request must not fail by what it asks for",
    ),
    "negative-hits": Difference(
        "A descriptor with `is_negative_hits`",
        "its hits are charged",
        "its hits are given back to a token bucket, at most as many as were taken; what the same request takes of that"
        " limit is charged in any case",
        "so a request can hold what it may cost, and settle for what it cost ([how](../llm-tokens.md))",
    ),
    "unit-multiplier": Difference(
        "`unit_multiplier` in a descriptor's limit",
        "as if it were 1",
        "heeded where the period is one of the units, as 24 hours are; otherwise as an unknown unit",
        "a limit per ten minutes is none per minute",
    ),
    "joined": Difference(
        "Keys and values that are the same once they are joined by underscores, as (`a_b`, `c`) and (`a`, `b_c`)",
        "match the same rules, also with wildcards: `key: user, value: '*x'` limits `user_id=x`; and share a counter",
        "are different; only a wildcard in a `key` itself, as `user*`, is for key and value joined",
        "a caller who chooses a value could use up, or get, the limit of others",
    ),
    "windows-begin-together": Difference(
        "Limits of different units for one descriptor, one from the request, in the first hour of a day or the like",
        "share a counter while their windows begin at the same instant",
        "have a counter each",
        "what a limit counts must not depend on the hour",
    ),
    "blanks": Difference(
        "Spaces and tabs around a value",
        "make another value",
        "are no part of it",
        "a caller over HTTP/2 or HTTP/3 can put any number there, of which the upstream sees nothing",
    ),
    "stop-increment": Difference(
        "Denied requests with `STOP_CACHE_KEY_INCREMENT_WHEN_OVERLIMIT`, here `charging: all_or_nothing`",
        "the limits that deny count on, the others do not",
        "they charge no limit",
        "a large denied request leaves smaller ones what there is",
    ),
    "shadow-hits": Difference(
        "Hits of a rule in shadow mode that cross the limit, in metrics",
        "those beyond the limit",
        "all of the request",
        "all of them would be denied",
    ),
    "metadata-applied": Difference(
        "Dynamic metadata",
        "say what was asked",
        "have a key `applied` besides, with the rule, limit and hits of each descriptor",
        "filters and access logs need them",
    ),
    "metadata-kept": Difference(
        "`metadata` of rules with `unlimited` or `detailed_metric`, and of those with, or below, `value_to_metric` or a"
        " wildcard in a `key`",
        "are lost in most cases",
        "are in the answer as those of other rules are",
        "the rule says so",
    ),
    "metadata-mixed-up": Difference(
        "`metadata` of two rules that both have a mapping under one key, after a request that met both",
        "the first rule's hold the other's from then on, in all answers",
        "are merged for that answer",
        "what one caller is told must not depend on what others asked",
    ),
}
"""Each by the name that the differential test has for it."""

RULES: Mapping[str, Difference] = {
    "twice-in-a-mapping": Difference(
        "The same key twice in one mapping",
        "the last one counts",
        "refused",
        "nearly always a slip",
    ),
    "second-document": Difference(
        "A second document in one file that holds something, or whatever follows the end of the first",
        "not read",
        "refused",
        "its rules would silently not be in force",
    ),
    "no-number": Difference(
        "`rate_limit` with neither `requests_per_unit` nor `unlimited`",
        "denies all",
        "refused; write `requests_per_unit: 0`",
        "nearly always a slip",
    ),
    "unknown-unit-of-unlimited": Difference(
        "A unit that does not exist, beside `unlimited: true`",
        "accepted",
        "refused",
        "one that exists is refused on both sides",
    ),
    "misplaced-key": Difference(
        "A key that exists, in a place where it does nothing, as `unit` beside `key`",
        "accepted",
        "refused",
        "a limit that was meant would not be in force",
    ),
    "tags": Difference(
        "Tags that are not YAML's own, `!!binary` and `!!set`",
        "most are passed over",
        "refused",
        "what they ask for is not done",
    ),
    "blanks-in-rules": Difference(
        "A `value` with spaces or tabs around it",
        "accepted",
        "refused",
        "no caller's value has them here",
    ),
    "null-in-metadata": Difference(
        "Null as a key within `metadata`",
        "becomes `<nil>`",
        "refused",
        "nearly always a slip",
    ),
    "too-deep": Difference(
        "More than 127 levels of `descriptors`, or `metadata` so deep that Envoy cannot read the answer",
        "accepted",
        "refused",
        "nothing could read or match them",
    ),
    "keys-in-metadata": Difference(
        "Keys within `metadata` that are numbers, as `010` and `1e3`",
        "become `8` and `1000` below the first level",
        "stand as they are written, on every level",
        "a key is a text",
    ),
    "joined-rules": Difference(
        "`key: a_b, value: c` beside `key: a, value: b_c` on one level",
        "refused, as the same twice",
        "accepted",
        "here they are different",
    ),
    "fractions": Difference(
        "Numbers with a fraction as `key` or `value`",
        "refused",
        "accepted as they are written",
        "what they mean is plain",
    ),
    "empty-documents": Difference(
        "Documents without content before the rules",
        "refused: only the first document is read",
        "passed over",
        "templates leave them",
    ),
    "merge-of-no-mapping": Difference(
        "`<<` within `metadata` whose value is no mapping",
        "refused",
        "a key like any other",
        "YAML 1.2 has no merge keys",
    ),
    "yaml-version": Difference(
        "`%YAML 1.2` and other versions than 1.1",
        "refused",
        "accepted",
        "the grammar of rules is the same in all of them",
    ),
}
"""Each by the name that the differential test has for it."""

DIFFERENCES: Mapping[str, Difference] = {**ANSWERS, **RULES}


def table(differences: Mapping[str, Difference]) -> str:
    """The differences as a table in Markdown."""
    rows = [
        "| What | There | Here | Why |",
        "|---|---|---|---|",
        *(f"| {row.what} | {row.there} | {row.here} | {row.why} |" for row in differences.values()),
    ]
    return "\n".join(rows)
