"""Sections of a configuration: pydantic models whose errors become `Problem`s with a position and a fix.

Each field says once, by `Expected`, which values it takes; errors and reference pages both quote that. A key without a
value (`bucket:` with everything below it commented out) counts as absent, as in Go's YAML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from ratelimit_sidecar.config.document import Document
from ratelimit_sidecar.config.errors import KeyPath, Problem, did_you_mean, quoted
from ratelimit_sidecar.config.yaml_data import YamlList, YamlMap, resolve


@dataclass(frozen=True, slots=True)
class Expected:
    """The values that a scalar field takes. It is the last item of the `Annotated` of that field.

    Args:
        text: completes "expected ...".
        quoting: decides the fix: "text" if a number found there only lacks quotes, "plain" if a text found there may
            only have quotes too many.
        choices: all possible values, for suggestions.
        or_else: the fix if nothing better is known for the value found.
    """

    text: str
    quoting: Literal["text", "plain", "choice"] = "choice"
    choices: tuple[str, ...] = ()
    or_else: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(
            handler(source),
            "unexpected",
            custom_error_message="{expected}",
            custom_error_context={"expected": self.text, "rule": self},
        )

    def fix(self, found: object, source: str) -> str:
        """The fix for a wrong value, which is written as `source` in the file; "" if the text of the problem
        suffices.
        """
        if self.quoting == "text" and not isinstance(found, str | dict | list | None):
            return f"write it in quotes: {quoted(source)}"
        if not isinstance(found, str):
            return self.or_else
        if self.quoting == "plain" and found and not isinstance(resolve(found), str):
            return "remove the quotes"
        return did_you_mean(found, self.choices) or self.or_else


@dataclass(frozen=True, slots=True)
class AsWritten:
    """Marks a text field that takes any scalar as it is written in the file: 10 is the text 10, as in Go's YAML."""


@dataclass(frozen=True, slots=True)
class FromEnvironment:
    """The variables that can set a field.

    Args:
        read: makes the value, as the file would have it, from the variables that are set and not empty (at least one);
            None if they give no value. It raises `environment.Unreadable`. Its result is checked like a value in the
            file.
        only: True if the file cannot set the field.
        secret: True if the variables' texts must not be shown.
    """

    variables: tuple[str, ...]
    read: Callable[[Mapping[str, str]], object]
    only: bool = False
    secret: bool = False

    @property
    def names(self) -> str:
        return ", ".join(self.variables)


@dataclass(frozen=True, slots=True)
class ShownDefault:
    """The text of a computed default in the reference."""

    text: str


class Section(BaseModel):
    """A mapping with known keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_keys_without_value(cls, data: object) -> object:
        if not isinstance(data, dict) or None not in data.values():
            return data
        keys = keys_of(cls)
        return {key: value for key, value in data.items() if value is not None or key not in keys}


S = TypeVar("S", bound=Section)


def unexpected(expected: str, fix: str = "") -> PydanticCustomError:
    """The error to raise in a validator that can say more than the field's `Expected`."""
    return PydanticCustomError("unexpected", "{expected}", {"expected": expected, "fix": fix})


def validate(section: type[S], data: object, document: Document, at: KeyPath = ()) -> tuple[S | None, list[Problem]]:
    """Check `data`, which is at `at` in the document.

    Returns:
        The section, or None and all problems.
    """
    try:
        return section.model_validate(_as_written(section, data)), []
    except ValidationError as error:
        return None, [_problem(section, details, document, at) for details in error.errors(include_url=False)]


@cache
def keys_of(section: type[Section]) -> Mapping[str, FieldInfo]:
    """The fields of a section by their keys in the file."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def file_keys_of(section: type[Section]) -> list[str]:
    """The keys a file may use."""
    keys = []
    for key, field in keys_of(section).items():
        source = environment_of(field)
        if source is None or not source.only:
            keys.append(key)
    return keys


def environment_of(field: FieldInfo) -> FromEnvironment | None:
    for extra in field.metadata:
        if isinstance(extra, FromEnvironment):
            return extra
    return None


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field (or each item of its list) is; None if it holds scalars."""
    return _section_in(field.annotation)


def is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def walk(section: type[Section], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every field of a section and those below it, with its path."""
    for key, field in keys_of(section).items():
        yield (*at, key), field
        below = section_of(field)
        if below is not None:
            yield from walk(below, (*at, key))


def expected_of(field: FieldInfo) -> str:
    """The text that completes "expected ..." for a field."""
    rule = _rule_of(field)
    return rule.text if rule else _expected_of_type(field.annotation)


def mapping_with_keys_of(section: type[Section]) -> str:
    keys = file_keys_of(section)
    return f"a mapping with the {'key' if len(keys) == 1 else 'keys'} {', '.join(keys)}"


@cache
def _fields_as_written(section: type[Section]) -> tuple[frozenset[str], Mapping[str, type[Section]]]:
    """The keys of a section that are `AsWritten`, and by key the sections in it that have such keys."""
    here, below = set(), {}
    for key, field in keys_of(section).items():
        inner = section_of(field)
        if any(isinstance(extra, AsWritten) for extra in field.metadata):
            here.add(key)
        elif inner is not None and any(_fields_as_written(inner)):
            below[key] = inner
    return frozenset(here), below


def _as_written(section: type[Section], data: object) -> object:
    """The same data with the source text in place of scalars that are `AsWritten`."""
    if isinstance(data, YamlList):
        return [_as_written(section, item) for item in data]
    if not isinstance(data, YamlMap):
        return data
    here, below = _fields_as_written(section)
    changed: dict[str, object] = {}
    for key in here & data.sources.keys():
        if data[key] is not None:
            changed[key] = data.sources[key]
    for key in below.keys() & data.keys():
        inner = _as_written(below[key], data[key])
        if inner is not data[key]:
            changed[key] = inner
    return {**data, **changed} if changed else data


def _rule_of(field: FieldInfo) -> Expected | None:
    for extra in field.metadata:
        if isinstance(extra, Expected):
            return extra
    return None


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for part in get_args(annotation):
        section = _section_in(part)
        if section is not None:
            return section
    return None


def _expected_of_type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return mapping_with_keys_of(annotation)
    if origin is Annotated:
        texts = [extra.text for extra in parts if isinstance(extra, Expected)]
        return texts[-1] if texts else _expected_of_type(parts[0])
    if origin in (Union, UnionType):
        return _expected_of_type(next(part for part in parts if part is not type(None)))
    if origin is tuple:
        return f"a list, each item {_expected_of_type(parts[0])}"
    raise TypeError(f"{annotation} has no Expected")


def _problem(section: type[Section], details: ErrorDetails, document: Document, at: KeyPath) -> Problem:
    loc = details["loc"]
    path = (*at, *loc)
    found = document.describe(path)
    kind, context, value = details["type"], details.get("ctx", {}), details["input"]
    if kind == "extra_forbidden":
        return _unknown_key(_section_at(section, loc[:-1]), str(loc[-1]), document, path)
    if kind == "unexpected":
        rule = context.get("rule")
        fix = rule.fix(value, found) if isinstance(rule, Expected) else context["fix"]
        return document.problem(path, found, context["expected"], fix)
    if kind == "missing":
        field = keys_of(_section_at(section, loc[:-1]))[str(loc[-1])]
        rule = _rule_of(field)
        return document.problem(path, "nothing", expected_of(field), rule.or_else if rule else "")
    if kind == "tuple_type":
        field = keys_of(_section_at(section, loc[:-1]))[str(loc[-1])]
        fix = "" if isinstance(value, dict) else f"write it as a list: [{found}]"
        return document.problem(path, found, expected_of(field), fix)
    if kind == "model_type":
        return document.problem(path, found, mapping_with_keys_of(_section_at(section, loc)))
    raise AssertionError(f"pydantic error {kind} at {loc} has no wording")


def _section_at(section: type[Section], loc: KeyPath) -> type[Section]:
    for step in loc:
        if isinstance(step, str):
            below = section_of(keys_of(section)[step])
            assert below is not None, f"{loc} leads through a scalar"
            section = below
    return section


def _unknown_key(section: type[Section], key: str, document: Document, path: KeyPath) -> Problem:
    found, keys = f"the unknown key {quoted(key)}", file_keys_of(section)
    expected = f"one of {', '.join(keys)}"
    fix = did_you_mean(key, keys) or "remove it, or correct its name"
    for name, field in keys_of(section).items():
        below = section_of(field)
        if below is not None and key in keys_of(below):
            fix = f"it belongs below {name}: check the indentation"
    return document.problem(path, found, expected, fix)
