"""The sidecar in fixed windows answers as the real envoyproxy/ratelimit does, and its checker judges as the other's."""

from __future__ import annotations

import pytest

from differential.build import SOURCE_VARIABLE, Reference, Unavailable, build
from differential.odd_yaml import judge
from differential.run import FILES, REQUESTS, play_round
from differential.services import redis_server

pytestmark = pytest.mark.long

ODD_FILES = 500


@pytest.fixture(scope="module")
def reference() -> Reference:
    try:
        redis_server()
        return build()
    except Unavailable as unavailable:
        pytest.skip(f"{unavailable}. {SOURCE_VARIABLE} may name a checkout of it")


# By the seed, 3 is in shadow mode, and 5 in quota mode.
@pytest.mark.parametrize("seed", [0, 3, 5])
def test_answers_differ_only_in_what_the_table_names(reference: Reference, seed: int) -> None:
    outcome = play_round(reference, seed)
    assert not outcome.undeclared, "\n\n".join(map(str, outcome.undeclared))
    # Fewer when an hour ended meanwhile.
    assert outcome.requests > FILES * REQUESTS // 2
    assert outcome.deliberate["error-code"]


def test_rules_are_refused_by_both_or_the_table_says_why(reference: Reference) -> None:
    verdicts = judge(reference, 0, range(ODD_FILES))
    assert not verdicts.undeclared, "\n\n".join(verdicts.undeclared)
    assert ODD_FILES // 10 < verdicts.refused < ODD_FILES
