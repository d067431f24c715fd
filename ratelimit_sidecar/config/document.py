"""A YAML document as plain data that remembers positions.

Theory of operation. One loop without recursion turns the parser's events into containers and scalars, so no file can
exhaust the stack. A problem that leaves the rest of the document clear (a duplicate key) is noted, and reading goes on;
any other (broken YAML) ends it. Anchors, aliases and merge keys (`<<`) work as in envoyproxy/ratelimit; the bounds hold
after they are expanded. Keys are text as they are written. Documents without a value, which templates leave, are
ignored.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple, NoReturn

import yaml

from ratelimit_sidecar.config.errors import ConfigError, KeyPath, Problem, dotted, quoted
from ratelimit_sidecar.config.reclamation import free_in_pieces, pieces_of_data
from ratelimit_sidecar.config.regular_file import read_regular_file
from ratelimit_sidecar.config.yaml_data import START, Entry, Position, YamlList, YamlMap, resolve

MAX_BYTES = 16 * 1024 * 1024
"""Larger than any Kubernetes ConfigMap (1 MiB), and small enough to read at once."""

_SEARCHED_CHARS = 65_536
"""The characters searched at a time. A search holds Python's lock: for 1/3 ms, and for 5 ms with a megabyte."""

MAX_DEPTH = 256
"""The deepest nesting of mappings and lists; envoyproxy/ratelimit's grammar has two for each level of descriptors. So
later recursion over them stays far below Python's limit of 1,000 calls.
"""

MAX_NODES = 2_000_000
"""The most scalars, mappings and lists, those behind an alias counted each time; about 200,000 rules."""

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_Loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

_STR_TAG = "tag:yaml.org,2002:str"
_MAP_TAG = "tag:yaml.org,2002:map"
_SEQ_TAG = "tag:yaml.org,2002:seq"
_SCALAR_TAGS: Mapping[str, tuple[type, ...]] = {
    _STR_TAG: (str,),
    "tag:yaml.org,2002:int": (int,),
    "tag:yaml.org,2002:float": (int, Decimal),
    "tag:yaml.org,2002:bool": (bool,),
    "tag:yaml.org,2002:null": (type(None),),
    "tag:yaml.org,2002:timestamp": (str,),
}
"""The type of a scalar with each tag."""
_MERGE = "<<"


@dataclass(frozen=True, slots=True)
class Document:
    """One parsed file.

    Args:
        data: `YamlMap`, `YamlList`, str, int, Decimal, bool or None, nested.
        origin: where the outermost value stands; None when it was not read from text, nor was anything in it.
        problems: mistakes that did not prevent parsing.
    """

    file: str
    data: object = field(default_factory=YamlMap)
    origin: Position | None = START
    problems: tuple[Problem, ...] = ()

    def position(self, path: KeyPath) -> Position | None:
        """The position of the value at `path`; for a missing one, that of the mapping or list that lacks it."""
        return self._find(path)[1]

    def has(self, path: KeyPath) -> bool:
        """Whether there is a value at `path`; a key without one does not count."""
        return self._find(path)[0] is not None

    def describe(self, path: KeyPath) -> str:
        """The value at `path` in words, for the "found" of a problem."""
        value, _, source = self._find(path)
        if isinstance(value, YamlMap):
            return "a mapping" if value else "an empty mapping"
        if isinstance(value, YamlList):
            return "a list" if value else "an empty list"
        if isinstance(value, str):
            return quoted(value)
        return source or "nothing"

    def problem(self, path: KeyPath, found: str, expected: str = "", fix: str = "") -> Problem:
        line, column = self.position(path) or (None, None)
        return Problem(self.file, line, column, dotted(path), found, expected, fix)

    def place(self, path: KeyPath) -> str:
        """The place of the value at `path` for the text of another problem: `file:line`."""
        position = self.position(path)
        return f"{self.file}:{position.line}" if position else self.file

    def _find(self, path: KeyPath) -> Entry:
        """Value, position and source at `path`. A missing value is None, at the position of what lacks it."""
        value, position, source = self.data, self.origin, None
        for step in path:
            entry = value.entry(step) if isinstance(value, YamlMap | YamlList) else None
            if entry is None:
                return None, position, None
            value, position, source = entry
        return value, position, source


def load(path: Path, *, must_be_regular: bool = False) -> Document:
    """Read and parse a file.

    Args:
        must_be_regular: True to refuse a FIFO or device. (A file that is read only once may be one.)

    Raises:
        ConfigError: it cannot be read, is too large, is neither UTF-8 nor UTF-16 with a byte order mark, or is not one
        YAML document.
    """
    file = str(path)
    try:
        if must_be_regular:
            raw = read_regular_file(path, MAX_BYTES + 1)
        else:
            with path.open("rb") as stream:
                raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        problem = Problem(file, None, None, "", "no such file", "a readable YAML file", "check its path")
        raise ConfigError([problem]) from None
    except OSError as error:
        raise ConfigError([unreadable(file, error, "a readable YAML file")]) from error
    return parse(raw, file)


def parse(raw: bytes, file: str) -> Document:
    """Parse the content of `file`.

    Raises:
        ConfigError: see `load`.
    """
    if len(raw) > MAX_BYTES:
        found = f"more than {MAX_BYTES // 1024 // 1024} MiB"
        raise ConfigError([Problem(file, None, None, "", found, "less", "split the file")])
    text = _decode(raw, file)
    builder = _Builder(file)
    try:
        _build(builder, text, file)
    except ConfigError:
        builder.give_back()
        raise
    return builder.document()


def _build(builder: _Builder, text: str, file: str) -> None:
    loader = _Loader(text)
    try:
        while (event := loader.get_event()) is not None:
            builder.feed(event)
    except yaml.MarkedYAMLError as error:
        raise ConfigError([*builder.problems, _syntax_problem(error, text, file)]) from None
    except yaml.YAMLError as error:
        problem = Problem(file, *START, "", f"broken YAML: {quoted(str(error))}", "one YAML document")
        raise ConfigError([*builder.problems, problem]) from None
    finally:
        loader.dispose()


def unreadable(file: str, error: OSError, expected: str) -> Problem:
    return Problem(file, None, None, "", f"that it cannot be read ({error.strerror})", expected)


def _decode(raw: bytes, file: str) -> str:
    try:
        text = raw.decode("utf-16" if raw.startswith(_UTF16_MARKS) else "utf-8")
    except UnicodeDecodeError as error:
        if raw.startswith(_UTF16_MARKS):
            found = f"a byte order mark of UTF-16 before what is not ({error.reason})"
            raise ConfigError([Problem(file, *START, "", found, "UTF-8 text", "save the file as UTF-8")]) from None
        before = raw[: error.start].decode()
        found = f"the byte 0x{raw[error.start]:02x}, which is not UTF-8"
        problem = Problem(file, *_end_of(before), "", found, "UTF-8 text", "save the file as UTF-8")
        raise ConfigError([problem]) from None
    unprintable = _find_unprintable(text)
    if unprintable:
        found = f"the control character U+{ord(unprintable[0]):04X}"
        position = _end_of(text[: unprintable.start()])
        raise ConfigError([Problem(file, *position, "", found, "printable text", "remove it")])
    return text


def _find_unprintable(text: str) -> re.Match[str] | None:
    for start in range(0, len(text), _SEARCHED_CHARS):
        # It is one character, so none lies across two parts.
        found = yaml.reader.Reader.NON_PRINTABLE.search(text, start, start + _SEARCHED_CHARS)
        if found:
            return found
    return None


def _end_of(text: str) -> Position:
    return Position(text.count("\n") + 1, len(text) - text.rfind("\n"))


def _syntax_problem(error: yaml.MarkedYAMLError, text: str, file: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else START
    found = f"broken YAML: {error.problem or error.context}"
    lines = text.splitlines()
    fix = "check quotes, brackets and indentation there"
    if line <= len(lines) and lines[line - 1][column - 1 :].startswith("\t"):
        found = "a tab where YAML allows only spaces"
        fix = "indent with spaces"
    elif error.context and error.context_mark and error.context_mark.line != line - 1:
        fix = f"the cause may be earlier, {error.context} from line {error.context_mark.line + 1} on"
    return Problem(file, line, column, "", found, "one YAML document", fix)


class _Value(NamedTuple):
    """A finished value, and where it stands."""

    data: object
    position: Position
    source: str | None
    """The source text of a scalar that is not text."""
    nodes: int
    """The number of values: itself and all below it, those behind aliases included."""

    @property
    def text(self) -> str | None:
        """A scalar as it is written; None for null, and for a value that is no scalar."""
        return self.data if isinstance(self.data, str) else None if self.data is None else self.source


@dataclass(slots=True)
class _Frame:
    """A mapping or list that is not closed yet."""

    container: YamlMap | YamlList
    position: Position
    anchor: str | None
    key: _Value | None = None
    """In a mapping, the key whose value comes next."""
    merges: list[YamlMap] = field(default_factory=list)
    nodes: int = 1


class _Builder:
    """Builds a document from parser events, collecting what need not stop it."""

    def __init__(self, file: str) -> None:
        self.problems: list[Problem] = []
        self._file = file
        self._root: _Value | None = None
        self._begin = START
        """The position where the current document begins."""
        self._open: list[_Frame] = []
        self._anchors: dict[str, _Value | None] = {}
        """Anchored values by name; None while the anchored container is still open."""
        self._nodes = 0

    def document(self) -> Document:
        root = self._root or _Value(None, START, None, 0)
        return Document(self._file, root.data, root.position, tuple(self.problems))

    def give_back(self) -> None:
        """Free the partly built document, which cannot be used."""
        done = [] if self._root is None else [self._root.data]
        pieces = pieces_of_data([*done, *(frame.container for frame in self._open)])
        done.clear()
        self._root = None
        self._open.clear()
        self._anchors.clear()
        free_in_pieces(pieces)

    def feed(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.CollectionEndEvent):
            self._end()
            return
        mark = event.start_mark
        position = Position(mark.line + 1, mark.column + 1) if mark else START
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, position)
            if event.anchor:
                self._anchors[event.anchor] = value
            self._add(value)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._start(event, position)
        elif isinstance(event, yaml.AliasEvent):
            self._add(self._alias(event, position))
        elif isinstance(event, yaml.DocumentStartEvent):
            self._begin = position

    def _scalar(self, event: yaml.ScalarEvent, position: Position) -> _Value:
        text = event.value
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            # Only the pure Python parser lets these through; they have no UTF-8 form.
            self._fail(position, "half a surrogate pair", "printable text", "remove it")
        if event.tag in (None, "!"):
            data = resolve(text) if event.tag is None and event.implicit[0] else text
        else:
            data = self._tagged(event.tag, text, position)
        return _Value(data, position, None if isinstance(data, str) else text, 1)

    def _tagged(self, tag: str, text: str, position: Position) -> object:
        types = _SCALAR_TAGS.get(tag)
        if types is None:
            self._refuse_tag(tag, position)
        if types == (str,):
            return text
        data = resolve(text)
        if type(data) not in types:
            self._fail(position, f"{quoted(text)} with the tag {quoted(tag)}", "a value of that kind", "remove the tag")
        return data

    def _start(self, event: yaml.CollectionStartEvent, position: Position) -> None:
        is_map = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", _MAP_TAG if is_map else _SEQ_TAG):
            self._refuse_tag(event.tag, position)
        if not self._open:
            self._check_is_first(is_null=False)
        if len(self._open) >= MAX_DEPTH:
            self._fail(position, f"more than {MAX_DEPTH} mappings and lists inside each other", "fewer")
        if event.anchor:
            self._anchors[event.anchor] = None
        self._open.append(_Frame(YamlMap() if is_map else YamlList(), position, event.anchor))

    def _end(self) -> None:
        frame = self._open.pop()
        container = frame.container
        if isinstance(container, YamlMap):
            for other in frame.merges:
                for key in other:
                    if key in container:
                        continue
                    container[key] = other[key]
                    container.positions[key] = other.positions[key]
                    if key in other.sources:
                        container.sources[key] = other.sources[key]
        value = _Value(container, frame.position, None, frame.nodes)
        if frame.anchor:
            self._anchors[frame.anchor] = value
        self._add(value, counted=True)

    def _alias(self, event: yaml.AliasEvent, position: Position) -> _Value:
        name = event.anchor or ""
        if name not in self._anchors:
            self._fail(position, f"the alias *{name}", "an anchor before it", f"define &{name} further up")
        value = self._anchors[name]
        if value is None:
            self._fail(position, f"the alias *{name} inside what it stands for", "no such circle")
        return _Value(value.data, position, value.source, value.nodes)

    def _add(self, value: _Value, *, counted: bool = False) -> None:
        """Add a finished value to its container."""
        self._nodes += 1 if counted else value.nodes
        if self._nodes > MAX_NODES:
            self._fail(value.position, f"more than {MAX_NODES} values", "fewer", "split the file")
        if not self._open:
            self._check_is_first(is_null=value.data is None)
            if value.data is not None or self._root is None:
                self._root = value
            return
        frame = self._open[-1]
        frame.nodes += value.nodes
        container = frame.container
        if isinstance(container, YamlList):
            if value.source is not None:
                container.sources[len(container)] = value.source
            container.append(value.data)
            container.positions.append(value.position)
        elif frame.key is None:
            frame.key = value
        else:
            key, frame.key = frame.key, None
            self._add_entry(frame, container, key, value)

    def _check_is_first(self, *, is_null: bool) -> None:
        if not is_null and self._root is not None and self._root.data is not None:
            self._fail(self._begin, "a second document", "one YAML document", "put it into a file of its own")

    def _add_entry(self, frame: _Frame, container: YamlMap, key: _Value, value: _Value) -> None:
        name = key.text
        if name is None:
            found, fix = "a key that is empty, a mapping or a list", "give the value a name"
            self._note(key.position, self._path(), found, "text as a key", fix)
            return
        if name == _MERGE and self._merge(frame, value):
            return
        if name in container:
            first = container.positions[name]
            found = f"the key {quoted(name)} again"
            expected = "each key once"
            fix = f"it already stands in line {first.line}: remove one of them"
            self._note(key.position, (*self._path(), name), found, expected, fix)
            return
        container[name] = value.data
        container.positions[name] = key.position
        if value.source is not None:
            container.sources[name] = value.source

    def _merge(self, frame: _Frame, value: _Value) -> bool:
        """Note the entries that a `<<` merges: later ones in the list are weaker, and own entries are the strongest."""
        others = value.data if isinstance(value.data, YamlList) else [value.data]
        maps = [other for other in others if isinstance(other, YamlMap)]
        if len(maps) != len(others):
            return False
        frame.merges += maps
        return True

    def _path(self) -> KeyPath:
        """The path of the innermost open container."""
        steps: list[str | int] = []
        for frame in self._open[:-1]:
            if isinstance(frame.container, YamlList):
                steps.append(len(frame.container))
            elif frame.key is not None and frame.key.text is not None:
                steps.append(frame.key.text)
        return tuple(steps)

    def _note(self, position: Position, path: KeyPath, found: str, expected: str, fix: str = "") -> None:
        self.problems.append(Problem(self._file, *position, dotted(path), found, expected, fix))

    def _fail(self, position: Position, found: str, expected: str, fix: str = "") -> NoReturn:
        self._note(position, self._path(), found, expected, fix)
        raise ConfigError(self.problems)

    def _refuse_tag(self, tag: str | None, position: Position) -> NoReturn:
        self._fail(position, f"the tag {quoted(tag or '')}", "one of YAML's own tags, or none", "remove the tag")
