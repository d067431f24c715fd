"""Patterns find what a regular expression made of each in turn finds."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.limiter.wildcard import WildcardSet

TEXTS = st.text("ab", max_size=3)
PATTERNS = st.lists(TEXTS, min_size=2, max_size=4).map("*".join)


@given(st.lists(PATTERNS, max_size=6), st.text("ab", max_size=7))
def test_the_first_pattern_that_fits_the_whole_value_is_found(patterns: list[str], value: str) -> None:
    fitting = [
        (pattern, number)
        for number, pattern in enumerate(patterns)
        if re.fullmatch(".*".join(pattern.split("*")), value)
    ]
    found = WildcardSet((pattern, number) for number, pattern in enumerate(patterns)).find(value)
    assert found == (fitting[0] if fitting else None)


def test_beginning_and_end_of_a_pattern_do_not_share_text_of_the_value() -> None:
    assert WildcardSet([("ab*ba", 1)]).find("aba") is None
