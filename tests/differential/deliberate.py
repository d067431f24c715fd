"""Which disagreements are deliberate: what recognises each row of the table of differences that a run can meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from differential.compare import MISSING, Asked, Disagreement
from ratelimit_sidecar.config.differences import DIFFERENCES

PERIODS = {"HOUR": 3600, "DAY": 86_400, "WEEK": 604_800, "MONTH": 30 * 86_400, "YEAR": 365 * 86_400}


@dataclass(frozen=True, slots=True)
class Case:
    """A rules file, and what was asked until the services disagreed.

    Args:
        file: the rules.
        joined: see `Generator`.
        asked: the requests up to the one that the services disagree about.
    """

    file: Mapping[str, Any]
    joined: bool
    asked: Sequence[Asked]


def reason(case: Case, disagreement: Disagreement) -> str | None:
    """The id of the difference in the table that explains it; None where it is a fault."""
    for name, explains in EXPLANATIONS.items():
        if explains(case, disagreement):
            assert name in DIFFERENCES
            return name
    return None


def _is_applied(_: Case, disagreement: Disagreement) -> bool:
    return disagreement.field.startswith("metadata.applied") and disagreement.there is MISSING


def _is_forgotten_metadata(case: Case, disagreement: Disagreement) -> bool:
    """In a file in which a rule with metadata is of a kind of which they are forgotten there."""
    return disagreement.field.startswith("metadata.metadata") and _has_forgotten(case.file, is_forgetful=False)


def _has_forgotten(above: Mapping[str, Any], *, is_forgetful: bool) -> bool:
    for descriptor in above.get("descriptors", ()):
        forgets_below = is_forgetful or "value_to_metric" in descriptor or "*" in descriptor["key"]
        forgets = forgets_below or "detailed_metric" in descriptor or "unlimited" in descriptor.get("rate_limit", {})
        if (forgets and "metadata" in descriptor) or _has_forgotten(descriptor, is_forgetful=forgets_below):
            return True
    return False


def _is_mixed_up(case: Case, disagreement: Disagreement) -> bool:
    """In a file in which the metadata of two rules have a mapping under the same key."""
    keys = Counter(
        key for metadata in _all_metadata(case.file) for key, value in metadata.items() if isinstance(value, dict)
    )
    return disagreement.field.startswith("metadata.metadata") and any(count > 1 for count in keys.values())


def _all_metadata(above: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for descriptor in above.get("descriptors", ()):
        yield descriptor.get("metadata", {})
        yield from _all_metadata(descriptor)


def _is_error_code(_: Case, disagreement: Disagreement) -> bool:
    return disagreement == Disagreement("error.code", "UNKNOWN", "INVALID_ARGUMENT")


def _is_joined(case: Case, _: Disagreement) -> bool:
    return case.joined


def _begin_together(case: Case, _: Disagreement) -> bool:
    now = case.asked[-1].after
    begins = {now - now % period for period in PERIODS.values()}
    brings_limits = any(
        descriptor.HasField("limit") for asked in case.asked for descriptor in asked.message.descriptors
    )
    return brings_limits and len(begins) < len(PERIODS)


EXPLANATIONS: Mapping[str, Callable[[Case, Disagreement], bool]] = {
    "metadata-applied": _is_applied,
    "metadata-kept": _is_forgotten_metadata,
    "metadata-mixed-up": _is_mixed_up,
    "error-code": _is_error_code,
    "joined": _is_joined,
    "windows-begin-together": _begin_together,
}
