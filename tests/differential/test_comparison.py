"""What the differential test compares, and what it takes for deliberate, without envoyproxy/ratelimit."""

from __future__ import annotations

from random import Random

import pytest
import yaml

from differential.compare import MISSING, Asked, Disagreement, Failure, disagreements
from differential.deliberate import EXPLANATIONS, Case, reason
from differential.generate import Generator
from differential.odd_yaml import REFUSED_HERE, REFUSED_THERE
from differential.run import FILES, scripts
from ratelimit_sidecar.config.differences import ANSWERS, RULES
from ratelimit_sidecar.config.rules_file import rules_of_resources
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse

SAME_SECOND = Asked(RateLimitRequest(domain="shop"), 1_790_000_000, 1_790_000_000)


def answer(**changes: int) -> RateLimitResponse:
    response = RateLimitResponse(overall_code=RateLimitResponse.OK)
    status = response.statuses.add(code=RateLimitResponse.OK, limit_remaining=changes.get("remaining", 3))
    status.current_limit.requests_per_unit = 5
    status.duration_until_reset.seconds = changes.get("reset", 60)
    response.response_headers_to_add.add(key="RateLimit-Reset", value=str(changes.get("reset", 60)))
    response.dynamic_metadata["domain"] = "shop"
    return response


def fields(asked: Asked, there: RateLimitResponse | Failure, here: RateLimitResponse | Failure) -> list[str]:
    return [disagreement.field for disagreement in disagreements(asked, there, here)]


def test_equal_answers_agree() -> None:
    assert not fields(SAME_SECOND, answer(), answer())


def test_every_field_is_compared() -> None:
    other = answer(remaining=2, reset=59)
    other.overall_code = RateLimitResponse.OVER_LIMIT
    other.dynamic_metadata["domain"] = None
    other.raw_body = b"x"
    assert fields(SAME_SECOND, answer(), other) == [
        "headers.RateLimit-Reset",
        "metadata.domain",
        "overall_code",
        "raw_body",
        "statuses.0.duration_until_reset",
        "statuses.0.limit_remaining",
    ]


def test_a_reset_may_differ_by_the_seconds_that_went_by() -> None:
    second_later = Asked(SAME_SECOND.message, SAME_SECOND.before, SAME_SECOND.before + 1)
    assert not fields(second_later, answer(), answer(reset=59))
    assert fields(second_later, answer(), answer(reset=58))


def test_an_error_is_no_answer() -> None:
    disagreed = list(disagreements(SAME_SECOND, Failure("UNKNOWN", "no domain"), answer()))
    assert Disagreement("error.code", "UNKNOWN", MISSING) in disagreed
    assert Disagreement("overall_code", MISSING, "OK") in disagreed


@pytest.mark.parametrize(
    ("disagreement", "name"),
    [
        (Disagreement("metadata.applied.0.hits", MISSING, 1), "metadata-applied"),
        (Disagreement("error.code", "UNKNOWN", "INVALID_ARGUMENT"), "error-code"),
        (Disagreement("error.code", "UNKNOWN", "UNAVAILABLE"), None),
        (Disagreement("statuses.0.limit_remaining", 1, 2), None),
        (Disagreement("metadata.metadata.tier", MISSING, "gold"), None),
    ],
)
def test_only_what_the_table_names_is_deliberate(disagreement: Disagreement, name: str | None) -> None:
    file = {"domain": "shop", "descriptors": [{"key": "user", "metadata": {"tier": "gold"}}]}
    assert reason(Case(file, joined=False, asked=[SAME_SECOND]), disagreement) == name


def test_metadata_of_one_rule_explain_nothing_and_mappings_of_two_under_one_key_do() -> None:
    mapping = {"metadata": {"tier": {"name": "gold"}}}
    disagreement = Disagreement("metadata.metadata.tier.name", "gold", MISSING)
    one = {"descriptors": [{"key": "user", **mapping}, {"key": "plan", "metadata": {"tier": "free"}}]}
    two = {"descriptors": [{"key": "user", **mapping}, {"key": "plan", **mapping}]}
    assert reason(Case(one, joined=False, asked=[SAME_SECOND]), disagreement) is None
    assert reason(Case(two, joined=False, asked=[SAME_SECOND]), disagreement) == "metadata-mixed-up"


def test_what_is_explained_is_in_the_table() -> None:
    assert EXPLANATIONS.keys() <= ANSWERS.keys()
    assert REFUSED_HERE.keys() | REFUSED_THERE.keys() <= RULES.keys()


def test_a_seed_says_all() -> None:
    first, again = list(scripts(7, is_complete=True)), list(scripts(7, is_complete=True))
    assert len(first) == FILES
    assert first == again
    assert first != list(scripts(8, is_complete=True))


def test_random_rules_are_accepted_and_have_every_key_of_the_grammar() -> None:
    used = ""
    for seed in range(50):
        generator = Generator(Random(seed), is_complete=True, joined=seed % 10 == 0, mixed=True)
        file = generator.rules_file("shop")
        rules_of_resources({"rules": file})
        used += yaml.safe_dump(file)
    for key in (
        "value",
        "rate_limit",
        "descriptors",
        "share_threshold",
        "detailed_metric",
        "value_to_metric",
        "metadata",
    ):
        assert f"{key}:" in used
    for key in ("unit", "requests_per_unit", "unlimited", "name", "replaces", "shadow_mode", "quota_mode"):
        assert f"{key}:" in used
