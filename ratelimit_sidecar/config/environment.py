"""Environment variables as a source of values, where the configuration file has none.

The fields of the schema name their variables (`FromEnvironment`), and the functions here read them: booleans as Go's
strconv.ParseBool, durations and maps as envoyproxy/ratelimit does. PyPI's library for Go's durations, durationpy, reads
floats, and takes units and texts that Go refuses. The results are checked like values in a file, and a
problem names the variable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from ratelimit_sidecar.config.document import Document
from ratelimit_sidecar.config.errors import ENVIRONMENT, KeyPath, Problem, dotted, quoted
from ratelimit_sidecar.config.structure import FromEnvironment, Section, environment_of, keys_of, section_of, walk
from ratelimit_sidecar.config.yaml_data import resolve

_BOOLS = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}

_DURATION = re.compile(r"(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h))+")
_DURATION_PART = re.compile(r"([0-9.]+)([^0-9.]+)")
_SECONDS = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),
    "μs": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3_600),
}


class Unreadable(Exception):
    """A variable whose text cannot be read. The exception's text completes "expected ..."."""


def text(variable: str, *, only: bool = False) -> FromEnvironment:
    """The variable's text, unchanged."""
    return FromEnvironment((variable,), lambda values: values[variable], only)


def flag(variable: str) -> FromEnvironment:
    """A boolean."""
    return FromEnvironment((variable,), lambda values: read_bool(values[variable]))


def switch(variable: str) -> FromEnvironment:
    """A section, which is present if the variable is true."""
    return FromEnvironment((variable,), lambda values: {} if read_bool(values[variable]) else None)


def choice(variable: str, chosen: str) -> FromEnvironment:
    """One of several words, which is chosen if the variable is true."""
    return FromEnvironment((variable,), lambda values: chosen if read_bool(values[variable]) else None)


def fraction(variable: str) -> FromEnvironment:
    """A number from 0 to 1; a greater one counts as 1."""
    return FromEnvironment((variable,), lambda values: _read_fraction(values[variable]))


def duration(variable: str) -> FromEnvironment:
    """Seconds, from Go's spelling: 1m30s, 500ms."""
    return FromEnvironment((variable,), lambda values: _read_duration(values[variable]))


def pairs(variable: str, separators: str, *, secret: bool = False) -> FromEnvironment:
    """A mapping of text to text, `key:value,key:value`.

    Args:
        separators: possible separators of key and value; the first one that occurs is used.
    """
    return FromEnvironment((variable,), lambda values: _read_pairs(values[variable], separators), secret=secret)


def read_bool(given: str) -> bool:
    """A boolean as Go's strconv.ParseBool reads it.

    Raises:
        Unreadable: it is no boolean.
    """
    if given not in _BOOLS:
        raise Unreadable("true or false")
    return _BOOLS[given]


def _read_fraction(given: str) -> object:
    value = resolve(given)
    # Not a bool, which is an int as well.
    return 1 if type(value) in (int, Decimal) and isinstance(value, int | Decimal) and value > 1 else value


def _read_duration(given: str) -> Decimal:
    if given == "0":
        return Decimal(0)
    if not _DURATION.fullmatch(given):
        raise Unreadable("a duration such as 3s or 1m30s")
    return sum((Decimal(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(given)), Decimal(0))


def _read_pairs(given: str, separators: str) -> dict[str, str]:
    found = {}
    for pair in filter(str.strip, given.split(",")):
        separator = next((one for one in separators if one in pair), None)
        if separator is None:
            raise Unreadable("pairs as in key:value,key:value")
        key, _, value = pair.partition(separator)
        found[key.strip()] = value.strip()
    return found


@dataclass(frozen=True, slots=True)
class Given:
    """The variables that a value came from, and their texts, as a `Problem` shows them."""

    names: str
    found: str


@dataclass(frozen=True, slots=True)
class Completed:
    """A configuration file's data, completed from the environment.

    Args:
        variables: by dotted key, the variables that its value came from.
        problems: variables that cannot be read, and keys in the file that only the environment may set. Both are left
            out of the data.
    """

    data: Mapping[str, object]
    variables: Mapping[str, Given]
    problems: Sequence[Problem]

    def naming_variables(self, problem: Problem) -> Problem:
        """The problem, but naming variables instead of the file if the value came from variables."""
        # A variable for a list gives its only item.
        given = self.variables.get(problem.key.removesuffix("[0]"))
        if given is None:
            return problem
        return replace(problem, file=ENVIRONMENT, line=None, column=None, key=given.names, found=given.found)


def complete(
    section: type[Section], document: Document, data: Mapping[str, object], environ: Mapping[str, str]
) -> Completed:
    """Complete `data`, the content of `document`.

    An empty variable counts as not set. If a section may be absent, variables for its keys count only when it is
    present: in the file, or through a variable of its own.
    """
    completer = _Completer(document, environ)
    completed = completer.complete(section, data, ())
    return Completed(completed, completer.variables, completer.problems)


class _Completer:
    """Walks over the schema and adds the values of variables to a document's data; `complete` is its interface."""

    def __init__(self, document: Document, environ: Mapping[str, str]) -> None:
        self.variables: dict[str, Given] = {}
        self.problems: list[Problem] = []
        self._document = document
        self._environ = environ

    def complete(self, section: type[Section], data: Mapping[str, object], at: KeyPath) -> Mapping[str, object]:
        completed = dict(data)
        for key, field in keys_of(section).items():
            source, path = environment_of(field), (*at, key)
            if source is not None:
                if source.only and self._document.has(path):
                    self._misplaced(path, source)
                    del completed[key]
                if completed.get(key) is None:
                    self._read(source, completed, path)
            below, inner = section_of(field), completed.get(key)
            if below is None or not (inner is None or isinstance(inner, dict)):
                # A value that is no mapping is reported when the data is validated.
                continue
            if inner is None and field.default is None:
                continue
            inner = self.complete(below, inner or {}, path)
            if inner or completed.get(key) is not None:
                completed[key] = inner
        return completed

    def _read(self, source: FromEnvironment, data: dict[str, object], path: KeyPath) -> None:
        values = {name: self._environ[name] for name in source.variables if self._environ.get(name)}
        if not values:
            return
        found = "a value that is kept to itself" if source.secret else " and ".join(map(quoted, values.values()))
        given = Given(", ".join(values), found)
        try:
            value = source.read(values)
        except Unreadable as error:
            self.problems.append(Problem(ENVIRONMENT, None, None, given.names, given.found, str(error)))
            return
        if value is not None:
            data[str(path[-1])] = value
            self.variables[dotted(path)] = given

    def _misplaced(self, path: KeyPath, source: FromEnvironment) -> None:
        found, fix = f"the key {quoted(dotted(path))}", f"set the environment variable {source.names} instead"
        self.problems.append(self._document.problem(path, found, "it in the environment", fix))


def variables_of(section: type[Section]) -> Iterator[tuple[str, str]]:
    """Every variable for a field of the section or one below it, with the field's dotted key."""
    for path, field in walk(section):
        source = environment_of(field)
        for variable in source.variables if source is not None else ():
            yield variable, dotted(path)
