"""The conformance corpus: what rules, settings and requests go in, and what must come out, as YAML for people to read.

Every `*.yaml` file here is a list of cases; their names are sentences of the specification. A case:

    - case: a limit is reached at its last request       # one idea
      rules: |                     # a rules file; or `files:`, several by name
        domain: shop
        ...
      config: {...}                # more of sidecar.yaml
      environment: {...}           # variables, as envoyproxy/ratelimit has them
      requests: [...]              # in order; see `Request`
      counts: {rule: {...}}        # statistics after them, by the rule's name in metrics
      not_counted: [rule]
      problems: [...]              # instead of requests: what is wrong with the rules; see `ExpectedProblem`

What a case does not mention is not checked.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

FILES = sorted(Path(__file__).parent.glob("*.yaml"))

RULES_NAME = "rules.yaml"
"""Name of the file with a case's `rules`."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _entries(value: object) -> object:
    """`key=value,key=value`, or a list of pairs where keys or values have these signs in them."""
    return [pair.split("=", 1) for pair in value.split(",")] if isinstance(value, str) else value


def _limit(value: object) -> object:
    """`10/minute`"""
    return value.split("/") if isinstance(value, str) and "/" in value else value


Entries = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_entries)]
Limit = Annotated[tuple[int, str], BeforeValidator(_limit)]


class Descriptor(_Part):
    """What is asked for: `user=eve`, or with more to it `{entries: user=eve, hits: 0, limit: 5/minute}`."""

    entries: Entries
    hits: int | None = None
    limit: Limit | None = None


def _descriptor(value: object) -> object:
    return {"entries": value} if isinstance(value, str) else value


def _descriptors(value: object) -> object:
    return [_descriptor(item) for item in (value if isinstance(value, list) else [value])]


class Status(_Part):
    """Of one descriptor. `limit: none`: the answer shows none."""

    code: Literal["OK", "OVER_LIMIT"] | None = None
    limit: Limit | Literal["none"] | None = None
    name: str | None = None
    remaining: int | None = None
    reset: float | None = Field(None, description="seconds")


class Request(_Part):
    """A request and its answer.

    Args:
        at: seconds since the case began, which is when a window of every unit begins; as the one before when absent.
        ask: one descriptor, or a list.
        domain: that of the (first) rules file when absent.
        hits: of the whole request.
        times: so many such requests, with such an answer each.
        status: of the only descriptor; `statuses` of several, all of them.
        headers: all that the answer adds to the response; `header` some of them.
        metadata: all dynamic metadata; `merged` only what comes from rules.
        error: in place of an answer, a part of the text that refuses the request.
    """

    at: float | None = None
    ask: Annotated[tuple[Descriptor, ...], BeforeValidator(_descriptors)]
    domain: str | None = None
    hits: int = 0
    times: int = 1
    answer: Literal["OK", "OVER_LIMIT"] | None = None
    status: Status | None = None
    statuses: tuple[Status, ...] | None = None
    headers: dict[str, str] | None = None
    header: dict[str, str] = Field(default_factory=dict)
    body: str | None = None
    metadata: dict[str, object] | None = None
    merged: dict[str, object] | None = None
    error: str | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Request:
        assert (self.answer is None) != (self.error is None), "a request has an answer or an error"
        assert self.status is None or len(self.ask) == 1, "status is for one descriptor, statuses for several"
        assert self.statuses is None or len(self.statuses) == len(self.ask), "a status for each descriptor"
        return self

    @property
    def expected_statuses(self) -> tuple[Status, ...]:
        if self.statuses is not None:
            return self.statuses
        return (self.status,) if self.status is not None else (Status(),) * len(self.ask)


class ExpectedProblem(_Part):
    """What is wrong with the rules.

    Args:
        at: `line:column`, both from 1.
        key: where it stands, as in `descriptors[0].key`.
        says: parts of the message.
    """

    file: str = RULES_NAME
    at: str
    key: str
    says: tuple[str, ...]


class Counts(_Part):
    """Hits, named as envoyproxy/ratelimit names them."""

    total_hits: int | None = None
    within_limit: int | None = None
    near_limit: int | None = None
    over_limit: int | None = None
    shadow_mode: int | None = None


class Case(_Part):
    case: str
    rules: str | None = None
    files: dict[str, str] = Field(default_factory=dict)
    config: dict[str, object] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    requests: tuple[Request, ...] = ()
    counts: dict[str, Counts] = Field(default_factory=dict)
    not_counted: tuple[str, ...] = ()
    problems: tuple[ExpectedProblem, ...] = ()

    def __hash__(self) -> int:
        return hash(self.case)

    @model_validator(mode="after")
    def _is_whole(self) -> Case:
        assert bool(self.requests) != bool(self.problems), "a case has requests or problems"
        assert (self.rules is None) == bool(self.files), "a case has rules or files"
        instants = [request.at for request in self.requests if request.at is not None]
        assert instants == sorted(instants), "time does not go back"
        return self

    @property
    def all_files(self) -> dict[str, str]:
        return self.files if self.rules is None else {RULES_NAME: self.rules}

    @property
    def domain(self) -> str:
        """That of the first file."""
        found = re.search(r"^domain: *(.+)$", next(iter(self.all_files.values())), re.MULTILINE)
        return str(yaml.safe_load(found[1])) if found else ""


@functools.cache
def cases_of(file: Path) -> tuple[Case, ...]:
    return tuple(Case.model_validate(item) for item in yaml.load(file.read_text(), yaml.CSafeLoader))
