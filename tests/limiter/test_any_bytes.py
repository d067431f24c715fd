"""Nothing that a client of the proxy sends leads to an error, since Envoy lets pass what is answered with one."""

from __future__ import annotations

import time

import pytest
from google.protobuf.descriptor import Descriptor as MessageDescriptor
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st
from limiter.requests import NOW_US, OK, OVER_LIMIT, decide, make_limiter

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import Window
from ratelimit_sidecar.envoy_api.envoy.extensions.common.ratelimit.v3.ratelimit_pb2 import RateLimitDescriptor
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest
from ratelimit_sidecar.envoy_api.envoy.type.v3.ratelimit_unit_pb2 import RateLimitUnit
from ratelimit_sidecar.limiter.key import (
    MAX_CALLER_ENTRIES,
    MAX_VALUE_BYTES,
    bounded,
    decode_bucket_key,
    readable,
    text_of,
)
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Rule, RuleNode, Rules, Unit, limit_of_rate
from ratelimit_sidecar.limiter.settings import AnswerSettings, ResponseHeaders
from ratelimit_sidecar.limiter.v1.request_pb2 import Descriptor, Entry, Override, Request
from ratelimit_sidecar.limiter.wildcard import WildcardSet

CAFE = b"caf\xe9\xff"


def per_minute(name: str, requests: int = 2, **more: bool) -> Rule:
    return Rule(name, limit_of_rate(requests, Unit.MINUTE, Window.FIXED), requests, Unit.MINUTE, **more)


RULES = Rules(
    {
        "shop": RuleNode(
            exact={("plan", "spent"): RuleNode(per_minute("shop.plan_spent", 1))},
            wildcards={"path": WildcardSet([("caf*", RuleNode(per_minute("shop.path_caf*")))])},
            key_only={
                "user": RuleNode(per_minute("shop.user")),
                "detailed": RuleNode(per_minute("shop.detailed", metric_of_values=True)),
                "shown": RuleNode(per_minute("shop.shown"), value_in_metric=True),
            },
        )
    },
    default_rule=per_minute("default_rule"),
)
SETTINGS = AnswerSettings(dynamic_metadata=True, response_headers=ResponseHeaders())


def request_of(*descriptors: list[tuple[bytes, bytes]], domain: bytes = b"shop") -> bytes:
    return Request(
        domain=domain,
        descriptors=[
            Descriptor(entries=[Entry(key=key, value=value) for key, value in entries]) for entries in descriptors
        ],
    ).SerializeToString()


def rules_limiter() -> Limiter:
    return Limiter(RULES, Origin("here", 1), SETTINGS)


def test_a_value_that_is_no_utf8_has_a_bucket_of_its_own_and_a_spent_limit_beside_it_denies() -> None:
    limiter = rules_limiter()
    request = request_of([(b"user", CAFE)], [(b"plan", b"spent")])
    assert decide(limiter, request).overall_code == OK
    answer = decide(limiter, request)
    assert [status.code for status in answer.statuses] == [OK, OVER_LIMIT]
    assert answer.overall_code == OVER_LIMIT
    for other in (b"caf\xe9\xfe", b"caf\\xe9\\xff", "café".encode(), b"caf"):
        assert decide(limiter, request_of([(b"user", other)])).overall_code == OK
    assert decide(limiter, request_of([(b"user", CAFE)])).overall_code == OVER_LIMIT


def test_it_is_matched_byte_for_byte() -> None:
    limiter = rules_limiter()
    answers = [decide(limiter, request_of([(b"path", CAFE)])) for _ in range(3)]
    assert [answer.overall_code for answer in answers] == [OK, OK, OVER_LIMIT]
    assert answers[0].statuses[0].current_limit.requests_per_unit == 2
    assert [take.rule.name for take in limiter.plan(request_of([(b"path", CAFE)])).takes if take.rule] == [
        "shop.path_caf*"
    ]


AROUND = (b"", b" ", b"  ", b"\t", b" \t ")


@pytest.mark.parametrize("key", [b"user", b"plan", b"path", b"detailed", b"unknown"])
@pytest.mark.parametrize("own", [False, True])
def test_spaces_and_tabs_around_a_value_make_no_other_caller(key: bytes, own: bool) -> None:
    """Over HTTP/2 and HTTP/3 Envoy leaves them there, while what is behind it reads the value alone."""
    limiter = rules_limiter()
    value = b"spent" if key == b"plan" else b"caf one"
    override = Override(requests_per_unit=1, unit=RateLimitUnit.MINUTE) if own else None
    requests = [
        Request(
            domain=b"shop",
            descriptors=[Descriptor(entries=[Entry(key=key, value=before + value + after)], limit=override)],
        ).SerializeToString()
        for before in AROUND
        for after in AROUND
    ]
    codes = [decide(limiter, request).overall_code for request in requests]
    most = 1 if own or key == b"plan" else 2
    assert codes == [OK] * most + [OVER_LIMIT] * (len(requests) - most)
    assert len({take.bucket_key for request in requests for take in limiter.plan(request).takes}) == 1
    inside = request_of([(key, b"caf  one")])
    assert [take.bucket_key for take in limiter.plan(inside).takes] != [
        take.bucket_key for take in limiter.plan(requests[0]).takes
    ]


def test_pairs_without_an_order_are_matched_without_what_is_around_values() -> None:
    rules = Rules(
        {"shop": RuleNode(exact={("plan", "gold"): RuleNode(key_only={"app": RuleNode(per_minute("both"))})})}
    )
    pairs, plain_pairs = [("app", "web"), ("plan", " gold\t")], [("plan", "gold"), ("app", "web")]
    assert rules.in_order("shop", pairs) == [("plan", " gold\t"), ("app", "web")]
    match, plain = (rules.match("shop", entries) for entries in (rules.in_order("shop", pairs), plain_pairs))
    assert match is not None
    assert plain is not None
    assert match.bucket_key == plain.bucket_key


def test_metadata_and_names_of_metrics_are_text_all_the_same() -> None:
    limiter = rules_limiter()
    answer = decide(limiter, request_of([(b"detailed", CAFE)], [(b"shown", CAFE)]))
    entries = [of["entries"][0] for of in answer.dynamic_metadata["descriptors"]]
    assert entries == ["detailed=caf\\xe9\\xff", "shown=caf\\xe9\\xff"]
    assert {name for _, name in limiter.counts} == {
        f"shop.detailed_{bounded(text_of(CAFE))}",
        f"shop.shown_{bounded(text_of(CAFE))}",
    }


@given(
    st.lists(
        st.sampled_from(
            [b"\\", b"u", b"d", b"c8", b"0", b"\xff", b"\x80", b"\xed\xb2\x80", b"\\ud", b"\\ud800", b"\\udc80"]
        )
        | st.binary(max_size=3),
        max_size=12,
    ).map(b"".join)
)
def test_bytes_that_are_no_text_are_readable_and_others_stay(raw: bytes) -> None:
    assert readable(text_of(raw)) == raw.decode("utf-8", "backslashreplace")


@pytest.mark.parametrize("header", [b"\xff" * 60_000, b"a\xff" * 30_000])
def test_a_header_full_of_bytes_that_are_no_text_is_answered_before_envoy_gives_up(header: bytes) -> None:
    limiter = rules_limiter()
    request = request_of(*[[(key, header)] for key in (b"user", b"path", b"shown")])

    def seconds() -> float:
        began = time.thread_time()
        limiter.decide(request, NOW_US)
        return time.thread_time() - began

    assert min(seconds() for _ in range(5)) < 0.02


@pytest.mark.parametrize("header", [b"\xff" * 30_000, b"a\xff" * 15_000])
def test_long_headers_that_are_copied_into_many_descriptors_are_hashed_once(header: bytes) -> None:
    limiter = make_limiter(RULES)
    # Both in each: what is remembered is not of the last one alone.
    headers = (header, header + b"b")
    copied = request_of(*[[(b"user", value)] for _ in range(40) for value in headers])
    different = request_of(*[[(b"user", header + b"%d" % number)] for number in range(80)])

    def seconds(request: bytes) -> float:
        began = time.thread_time()
        limiter.decide(request, NOW_US)
        return time.thread_time() - began

    assert min(seconds(copied) for _ in range(5)) < min(seconds(different) for _ in range(5)) / 5
    once = request_of(*[[(b"user", value)] for value in headers])
    assert [take.bucket_key for take in limiter.plan(copied).takes] == 40 * [
        take.bucket_key for take in limiter.plan(once).takes
    ]


def test_an_override_of_an_unknown_unit_is_ignored_and_counted_and_the_rule_holds() -> None:
    limiter = rules_limiter()
    request = Request.FromString(request_of([(b"user", b"ada")]))
    request.descriptors[0].limit.CopyFrom(Override(requests_per_unit=1_000, unit=99))
    raw = request.SerializeToString()
    assert [decide(limiter, raw).overall_code for _ in range(3)] == [OK, OK, OVER_LIMIT]
    assert limiter.ignored_overrides == 3


@given(
    st.binary(max_size=10) | st.just(b"shop"),
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from([b"user", b"path", b"plan", b"detailed", b"shown", b""]) | st.binary(max_size=5),
                st.binary(max_size=12) | st.binary(min_size=120, max_size=200),
            ),
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_any_bytes_are_answered_and_counted_under_a_bounded_name(
    domain: bytes, descriptors: list[list[tuple[bytes, bytes]]]
) -> None:
    limiter = rules_limiter()
    raw = request_of(*descriptors, domain=domain or b"d")
    assert len(decide(limiter, raw).statuses) == len(descriptors)
    for take in limiter.plan(raw).takes:
        if take.rule is not None:
            assert limiter.store.limit_of_key(take.bucket_key) == take.rule.limit
    for bucket in limiter.store:
        _, domain_text, entries = decode_bucket_key(bucket.key)
        for text in (domain_text, *[part for entry in entries for part in (entry.key, entry.value)]):
            assert len(text.encode()) <= MAX_VALUE_BYTES
    for names in limiter.counts:
        "".join(names).encode()


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_different_bytes_have_different_names_and_a_name_is_none_of_another(one: bytes, other: bytes) -> None:
    names = bounded(text_of(one)), bounded(text_of(other))
    assert (names[0] == names[1]) == (one == other)
    assert bounded(names[0]) == names[0] or bounded(names[0]) != bounded(text_of(other))
    assert len(names[0].encode()) <= MAX_VALUE_BYTES


def test_what_looks_like_a_hash_is_hashed() -> None:
    long = "x" * 1_000
    assert bounded(bounded(long)) != bounded(long)


def test_long_headers_in_all_descriptors_do_not_make_an_answer_that_envoy_would_not_take() -> None:
    limiter = rules_limiter()
    headers = [(b"user", b"%d" % number + 60_000 * b"\xff") for number in range(8)]
    answer = decide(limiter, request_of(*([header] for header in 8 * headers)))
    assert len(answer.dynamic_metadata["descriptors"]) == 64
    assert answer.ByteSize() < 1 << 20


@pytest.mark.parametrize("override", [None, Override(requests_per_unit=1, unit=RateLimitUnit.DAY)])
def test_a_descriptor_of_thousands_of_entries_has_a_short_key_of_its_own(override: Override | None) -> None:
    limiter = rules_limiter()

    def code(entries: int, last: bytes) -> int:
        texts = [b"%0128d" % number for number in range(entries - 1)] + [last]
        descriptor = Descriptor(entries=[Entry(key=text, value=text) for text in texts], limit=override)
        request = Request(domain=b"shop", descriptors=[descriptor]).SerializeToString()
        return decide(limiter, request).overall_code

    rate = 2 if override is None else 1
    for entries in (MAX_CALLER_ENTRIES, MAX_CALLER_ENTRIES + 1, 5_000):
        for last in (b"a", b"b"):
            assert [code(entries, last) for _ in range(rate + 1)] == [OK] * rate + [OVER_LIMIT]
    assert len(limiter.store) == 6
    for bucket in limiter.store:
        assert len(bucket.key) < 2 * MAX_CALLER_ENTRIES * (MAX_VALUE_BYTES + 3) + 64
        assert RULES.rule_of_key(bucket.key) is not None


def test_long_values_take_little_memory() -> None:
    limiter = rules_limiter()
    for number in range(200):
        request = request_of([(b"user", b"%d" % number + b"x" * 60_000)])
        limiter.decide(request, NOW_US)
        assert limiter.plan(request) is not limiter.plan(request)
    assert max(len(bucket.key) for bucket in limiter.store) < 60


NEWER = ("is_negative_hits", "unit_multiplier")
"""Fields that newer Envoys' API has."""


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (RateLimitRequest, Request),
        (RateLimitDescriptor, Descriptor),
        (RateLimitDescriptor.Entry, Entry),
        (RateLimitDescriptor.RateLimitOverride, Override),
    ],
)
def test_the_request_is_envoys_with_bytes_for_strings(theirs: type, ours: type) -> None:
    def fields(message: MessageDescriptor) -> list[tuple[int, str, bool, int]]:
        same = {
            FieldDescriptor.TYPE_STRING: FieldDescriptor.TYPE_BYTES,
            FieldDescriptor.TYPE_ENUM: FieldDescriptor.TYPE_INT32,
        }
        return sorted(
            (field.number, field.name, field.is_repeated, same.get(field.type, field.type)) for field in message.fields
        )

    newer = [field for field in fields(ours.DESCRIPTOR) if field[1] in NEWER]  # type: ignore[attr-defined]
    assert sorted(fields(theirs.DESCRIPTOR) + newer) == fields(ours.DESCRIPTOR)  # type: ignore[attr-defined]


def test_limits_still_hold_with_no_settings_at_all() -> None:
    limiter = make_limiter(RULES)
    assert [decide(limiter, request_of([(b"user", CAFE)])).overall_code for _ in range(3)] == [OK, OK, OVER_LIMIT]
