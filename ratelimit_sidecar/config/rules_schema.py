"""The grammar of a rules file, level by level: envoyproxy/ratelimit's, with our own optional keys.

`descriptors` stays raw here: each level is validated on its own, so that one broken descriptor hides no other problem.
Problems of several keys together are in `rules_checks`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from math import isfinite
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from ratelimit_sidecar.config.bucket import BucketConfig, TokenCount
from ratelimit_sidecar.config.structure import AsWritten, Expected, Section, ShownDefault
from ratelimit_sidecar.crdt.limit import DEFAULT_MAX_DEBT, MAX_MAX_DEBT, Window
from ratelimit_sidecar.crdt.strict import TICKET_US
from ratelimit_sidecar.limiter.http_mapping import NAMED, Part
from ratelimit_sidecar.limiter.rules import MAX_REQUESTS_PER_UNIT, Charge, Consistency, Unit
from ratelimit_sidecar.limiter.wildcard import WILDCARD

UNITS = tuple(unit.name.lower() for unit in Unit)

NO_UNIT = "UNKNOWN"
"""Envoy's unit for no unit; counts as absent."""

AlgorithmName = Literal["token_bucket", "fixed_window", "sliding_window"]
ALGORITHMS: tuple[str, ...] = get_args(AlgorithmName)
BUCKET_ALGORITHM: AlgorithmName = "token_bucket"

ChargingName = Literal["each", "all_or_nothing"]
CHARGINGS: tuple[str, ...] = get_args(ChargingName)
ALL_OR_NOTHING: ChargingName = "all_or_nothing"

_WAIT = re.compile("([0-9]{1,4})(ms|s)")

MAX_BODY_BYTES = 16_384
"""The longest `body`, which is sent with every denial, in UTF-8: a thousand of them may wait for a client to take them.
"""

MAX_METADATA_DEPTH = 30
"""The deepest nesting of metadata. An answer has three nested messages for each level, and protobuf's parsers, so
Envoy, accept at most 100.
"""


@dataclass(frozen=True, slots=True)
class RuleDefaults:
    """The defaults of rules, and the settings of overrides (limits in requests).

    Args:
        consistency: how far buckets are shared.
        window: how a limit is counted; None for a token bucket.
        has_members: True if limits may be strict, since members are configured.
        charge: which hits count.
        all_or_nothing: True if a denied request is charged nothing, unless a domain says otherwise.
    """

    consistency: Consistency = Consistency.EVENTUAL
    window: Window | None = None
    has_members: bool = False
    charge: Charge = Charge.ADMITTED
    all_or_nothing: bool = False

    @property
    def override_window(self) -> Window | None:
        """How limits in requests are counted. A window holds what was taken, whatever the limit is by then. The level
        of a token bucket depends on its rate, so each limit would need a bucket of its own, and a changed one would
        begin full. Only token buckets can be strict.
        """
        if self.window is None and self.consistency is not Consistency.STRICT:
            return Window.SLIDING
        return self.window


def window_of(algorithm: str) -> Window | None:
    """The window of an algorithm of `ALGORITHMS`; None for a token bucket."""
    return None if algorithm == BUCKET_ALGORITHM else Window(algorithm)


def is_no_unit(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.upper() == NO_UNIT)


def _to_unit(value: object) -> object:
    if is_no_unit(value):
        return None
    return Unit.__members__.get(value.upper(), value) if isinstance(value, str) else value


def _to_wait_us(value: object) -> object:
    parts = _WAIT.fullmatch(value) if isinstance(value, str) else None
    if parts is None:
        raise ValueError("not a wait")
    wait_us = int(parts[1]) * (1_000 if parts[2] == "ms" else 1_000_000)
    if not 0 < wait_us <= TICKET_US:
        raise ValueError("not a wait")
    return wait_us


def _to_consistency(value: object) -> object:
    return Consistency(value) if value in CONSISTENCIES else value


def _to_charge(value: object) -> object:
    return Charge(value) if value in CHARGES else value


def _to_part(value: object) -> object:
    return Part(value) if value in PARTS else value


def _to_metadata(value: object) -> object:
    return _plain(value) if isinstance(value, dict) else value


def _plain(value: object, depth: int = 0) -> object:
    """The value without positions, and with numbers as in JSON."""
    if isinstance(value, dict | list) and depth == MAX_METADATA_DEPTH:
        raise ValueError("deeper than Envoy reads")
    if isinstance(value, dict):
        return {key: _plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, depth + 1) for inner in value]
    if isinstance(value, Decimal | float):
        number = float(value)
        if not isfinite(number):
            raise ValueError("beyond what a double holds")
        return number
    return value


CHARGES = tuple(charge.value for charge in Charge)
PARTS = tuple(part.value for part in Part)
NAMED_PARTS = tuple(part.value for part in Part if part in NAMED)
CONSISTENCIES = tuple(consistency.value for consistency in Consistency)

_TEXT = "text that is not empty"

Domain = Annotated[
    str,
    AsWritten(),
    Field(min_length=1),
    Expected(_TEXT, or_else="write the domain of Envoy's rate limit filter, as in domain: shop"),
]
Key = Annotated[
    str,
    AsWritten(),
    Field(min_length=1),
    Expected(_TEXT, or_else="write the key of the entry that the descriptor matches"),
]
MappedKey = Annotated[
    str,
    AsWritten(),
    Field(min_length=1),
    Expected(_TEXT, or_else="write the key that a descriptor of the rules has"),
]
ReplacedName = Annotated[
    str,
    AsWritten(),
    Field(min_length=1),
    Expected(_TEXT, or_else="write the name of the rate_limit it replaces, or remove the entry"),
]
Scalar = Annotated[str, Expected("text")]
Flag = Annotated[bool, Expected("true or false", quoting="plain")]
RawDescriptors = Annotated[
    tuple[Annotated[object, Expected("a descriptor")], ...],
    Field(strict=False),
]
UnitName = Annotated[
    Unit | None,
    BeforeValidator(_to_unit),
    Expected(
        f"one of {', '.join(UNITS)}",
        choices=UNITS,
        or_else="choose one of them, or give a bucket in place of rate_limit for any other period",
    ),
]
RequestsPerUnit = Annotated[
    int,
    Field(ge=0, le=MAX_REQUESTS_PER_UNIT),
    Expected(f"a whole number from 0 to {MAX_REQUESTS_PER_UNIT}", quoting="plain"),
]
Algorithm = Annotated[
    AlgorithmName,
    Expected(f"one of {', '.join(ALGORITHMS)}", choices=ALGORITHMS),
]
ConsistencyName = Annotated[
    Consistency,
    BeforeValidator(_to_consistency),
    Expected(f"one of {', '.join(CONSISTENCIES)}", choices=CONSISTENCIES),
]
Wait = Annotated[
    int,
    BeforeValidator(_to_wait_us),
    Expected("a time of 1ms to 1s, such as 250ms"),
]
"""In microseconds."""
MaxDebt = Annotated[
    int, Field(ge=1, le=MAX_MAX_DEBT), Expected(f"a whole number from 1 to {MAX_MAX_DEBT}", quoting="plain")
]
ChargeName = Annotated[
    Charge,
    BeforeValidator(_to_charge),
    Expected(f"one of {', '.join(CHARGES)}", choices=CHARGES),
]
PartName = Annotated[
    Part,
    BeforeValidator(_to_part),
    Expected(f"one of {', '.join(PARTS)}", choices=PARTS),
]
Charging = Annotated[ChargingName, Expected(f"one of {', '.join(CHARGINGS)}", choices=CHARGINGS)]


def _check_body(body: str) -> str:
    if len(body.encode()) > MAX_BODY_BYTES:
        raise ValueError
    return body


Body = Annotated[
    str,
    AsWritten(),
    Field(min_length=1),
    AfterValidator(_check_body),
    Expected(f"text of 1 to {MAX_BODY_BYTES} bytes"),
]
Metadata = Annotated[
    dict[str, object],
    BeforeValidator(_to_metadata),
    Expected(
        f"a mapping of any form, at most {MAX_METADATA_DEPTH} mappings and lists inside each other, its numbers within"
        " the range of a double"
    ),
]
_NEEDED = ShownDefault("required, unless unlimited")


class Replaces(Section):
    """The name of a limit that does not count in requests in which this one applies."""

    name: ReplacedName = Field(description="The `name` in the `rate_limit` of the other rule.")


class RateLimit(Section):
    """The limit of a rule, in envoyproxy/ratelimit's terms."""

    unit: Annotated[UnitName, _NEEDED] = Field(
        None, description="The unit of time, in upper or lower case. A month has 30 days, a year 365."
    )
    requests_per_unit: Annotated[RequestsPerUnit | None, _NEEDED] = Field(
        None, description="Requests admitted per unit in the long run; 0 denies all requests but those of 0 hits."
    )
    unlimited: Flag = Field(
        False,
        description="In place of the two keys above: all requests pass, even where a wider rule would limit them.",
    )
    name: Annotated[Scalar | None, AsWritten()] = Field(
        None, description="The name in answers, and for `replaces` of other rules."
    )
    replaces: Annotated[tuple[Replaces, ...], Field(strict=False)] = Field(
        (),
        description="Limits that do not count in a request that also matches this rule: a list of `name: ...`, each"
        " the `name` of another rule's `rate_limit`.",
    )


class Descriptor(Section):
    """One rule, or one step on the way to deeper ones."""

    key: Key = Field(
        description=f"Key of the entry it matches. `{WILDCARD}` in it, as in envoyproxy/ratelimit, stands for any text,"
        " also none, in key and value joined by an underscore: `user*` matches `user_id=bob`, of which the text is"
        " `user_id_bob`. On a level with such a key all patterns are for that text."
    )
    value: Annotated[Scalar | None, AsWritten(), ShownDefault("every value")] = Field(
        None,
        description=f"Value of the entry it matches; `{WILDCARD}` in it stands for any text, also none, and each value"
        " has a bucket of its own. Without it every value matches, likewise. Scalars are taken as written: 10 is the"
        " text 10. Spaces and tabs around a request's value are no part of it. A rule with another `key`, `value` or"
        " `share_threshold`, or in another domain, is another limit, which begins full: also one for one value, put"
        " beside that for all.",
    )
    rate_limit: RateLimit | None = Field(
        None, description="The limit, in envoyproxy/ratelimit's terms. Without it, or a bucket, matching requests pass."
    )
    shadow_mode: Flag = Field(False, description="Decide, charge and count, but answer OK.")
    quota_mode: Flag = Field(
        False,
        description="Over this limit alone a request is still let through; it is denied when all limits in quota mode"
        " that it meets are over.",
    )
    detailed_metric: Flag = Field(False, description="In metrics, name all values of the request.")
    value_to_metric: Flag = Field(
        False, description="In metrics, name the value of this entry in place of its pattern, or of nothing."
    )
    share_threshold: Flag = Field(
        False,
        description=f"All values that a `value` with `{WILDCARD}` matches share one bucket, those of each key"
        f" where the `{WILDCARD}` is in `key`.",
    )
    metadata: Metadata | None = Field(
        None, description="Goes into the dynamic metadata of answers in which this rule admits."
    )
    algorithm: Annotated[Algorithm | None, ShownDefault("`algorithm` of the sidecar, else token_bucket")] = Field(
        None,
        description="How the limit is enforced: `token_bucket`, so unused requests add up to at most `burst`;"
        " `fixed_window`, counted anew in each unit by the clock, as envoyproxy/ratelimit does; `sliding_window`,"
        " counted over the unit that ends now. With another one it is another limit, which begins full.",
    )
    burst: Annotated[TokenCount | None, ShownDefault("requests_per_unit")] = Field(
        None, description="Requests that a token bucket admits at once after a quiet time."
    )
    bucket: BucketConfig | None = Field(None, description="The limit as a token bucket, in place of rate_limit.")
    consistency: Annotated[ConsistencyName | None, ShownDefault("as `CRDT_ENGINE` says")] = Field(
        None,
        description="How far its buckets are shared: `eventual`, over the whole mesh; `strict` (token buckets only),"
        " divided among the `sync.members`, which together never exceed the limit; `local`, not at all: each sidecar"
        " has the limit to itself. With another one it is another limit, which begins full; a strict"
        " one begins with what it would have refilled since the sidecar began.",
    )
    wait: Annotated[Wait | None, ShownDefault("nothing waits")] = Field(
        None,
        description="Of a strict limit: how long a request that finds too few tokens here may wait for those of other"
        " members, such as `250ms`. Envoy must wait longer than that, in steps of a few ms: see"
        " [strict limits](../algorithm.md#tickets-for-requests-that-wait).",
    )
    max_debt: Annotated[MaxDebt | None, ShownDefault(str(DEFAULT_MAX_DEBT))] = Field(
        None,
        description="The most debt of a token bucket, in capacities; the rest is forgiven. Where clients can burst at"
        " all sidecars at once, let it be at least their number.",
    )
    charge: Annotated[ChargeName | None, ShownDefault("that of the domain")] = Field(
        None,
        description="Which hits count: those `admitted`; with `reported` also all of descriptors that bring hits of"
        " their own, as with Envoy's `apply_on_stream_done`; or `always` all. What is denied and charged is debt. Hits"
        " that are reported after the response want one of these two: as `admitted` those beyond what is left are not"
        " charged.",
    )
    retry_after: Flag = Field(False, description="Headers of a denial say when to come back.")
    body: Annotated[Body | None, AsWritten(), ShownDefault("Envoy's own")] = Field(
        None, description="Body of the response to a denied request."
    )
    descriptors: RawDescriptors = Field((), description="The rules below, for descriptors with one more entry.")


class AuthzEntry(Section):
    """One entry of a descriptor that is made from an HTTP request."""

    key: MappedKey = Field(description="The key of the entry, which a descriptor of the rules matches.")
    source: Annotated[PartName | None, ShownDefault("required, unless value")] = Field(
        None,
        alias="from",
        description="The part of the request that is its value. `header`: the header `name`, the first of several;"
        " of `authorization`, and of all unless Envoy sends headers raw, what is before a comma."
        " `context_extension`: what Envoy's configuration of the route has under `name`. `path`: without the query."
        " `method`. `source_address`: of whoever is connected to Envoy, without port. `principal`: who that is by its"
        " TLS certificate. Over HTTP there are only the first, `path` and `method`."
        " Where the request has none, the whole descriptor is left out, as Envoy does.",
    )
    name: Annotated[Scalar | None, AsWritten(), ShownDefault("`key`")] = Field(
        None, description="The name of the header, in any case, or of the context extension."
    )
    value: Annotated[Scalar | None, AsWritten(), ShownDefault("that of the request")] = Field(
        None, description="A value for all requests, in place of `from`."
    )


class AuthzDescriptor(Section):
    """One descriptor that is made from an HTTP request."""

    entries: Annotated[tuple[AuthzEntry, ...], Field(strict=False)] = Field(description="Its entries, in order.")


class ExtAuthz(Section):
    """The mapping from HTTP requests (ext_authz) to descriptors."""

    default: Flag = Field(
        False,
        description="Whether this mapping is also for requests that name no domain; at most one domain may say so.",
    )
    descriptors: Annotated[tuple[AuthzDescriptor, ...], Field(strict=False)] = Field(
        description="The descriptors of a request, as `rate_limits` of a route are in Envoy."
    )


class RulesFile(Section):
    """Rules of one domain."""

    domain: Domain = Field(
        description="The domain that Envoy's rate limit filter sends. One file has all its rules, unless"
        " `merge_domains` is on."
    )
    charge: Annotated[ChargeName | None, ShownDefault("`charge` of the sidecar")] = Field(
        None, description="Which hits count, for rules without their own setting."
    )
    charging: Annotated[Charging | None, ShownDefault("`charging` of the sidecar, else each")] = Field(
        None,
        description="`each`: every limit that a request meets is charged, as in envoyproxy/ratelimit, also when another"
        " denies the request. `all_or_nothing`: a denied request is charged nothing, but for what `charge` counts in"
        " any case.",
    )
    ext_authz: ExtAuthz | None = Field(
        None,
        description="How requests that Envoy's ext_authz filter sends are limited: which descriptors they have. Without"
        " it they are not.",
    )
    descriptors: RawDescriptors = Field((), description="The rules for descriptors, by their first entry.")
