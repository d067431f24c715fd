"""The canonical name of a bucket: algorithm, domain, path of the rule, matched values.

Equal on every replica, whatever the order of its files. Every text is preceded by its length, so no two different
paths share a name ((a_b, c) and (a, b_c) do where keys are joined by underscores). Layout:

    form:1 text(domain) { kind:1 text(key) text(value) }*      text(t) = LEB128(bytes in t) t

form says what kind of bucket it is, so that a rule whose algorithm or consistency changes begins a new one. kind says
how the rule matched the entry, and so which part of the rule's path the value stands for.

Callers choose the values, and so how many names there are. When there are too many buckets, those of new names are
merged into the *overflow bucket* of their rule, whose name has nothing of a caller's in it (`overflow_key`).
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Final, NamedTuple

TOKEN_BUCKET: Final = 0
FIXED_WINDOW: Final = 1
SLIDING_WINDOW: Final = 2
STRICT_TOKEN_BUCKET: Final = 3
OVERFLOW: Final = 0x40
"""Added to the form of a rule's overflow bucket."""
LOCAL: Final = 0x80
"""Added to the form of a bucket that is never replicated."""

EXACT: Final = 0
"""The rule names key and value."""
KEY_ONLY: Final = 1
"""The rule names the key; every value has a bucket of its own."""
UNRULED: Final = 2
"""No rule matched: the entry belongs to the bucket given to every other descriptor."""
WILDCARD_VALUE: Final = 3
"""The rule names key and pattern, which stands in the entry before this one; every value has a bucket of its own."""
PATTERN: Final = 4
"""A pattern of the rule: alone when all its values share one bucket, else followed by the WILDCARD_VALUE."""
OVERRIDE: Final = 5
"""The request itself gave the limit."""
OVERRIDE_LIMIT: Final = 6
"""Last entry of such a bucket; key and value are requests per unit and unit."""

_KINDS: Final = frozenset((EXACT, KEY_ONLY, UNRULED, WILDCARD_VALUE, PATTERN, OVERRIDE, OVERRIDE_LIMIT))
_WINDOWS_AND_TOKEN_BUCKET: Final = (TOKEN_BUCKET, FIXED_WINDOW, SLIDING_WINDOW)
_FORMS_OF_VALUES: Final = (
    STRICT_TOKEN_BUCKET,
    *_WINDOWS_AND_TOKEN_BUCKET,
    *[form | LOCAL for form in _WINDOWS_AND_TOKEN_BUCKET],
)
FORMS: Final = frozenset((*_FORMS_OF_VALUES, *[form | OVERFLOW for form in _FORMS_OF_VALUES]))
_BYTES: Final = tuple(bytes((number,)) for number in range(256))
_CONTINUES: Final = 0x80
_MAX_SHIFT: Final = 28


def hash64(raw: bytes) -> int:
    """A hash of 64 bits, the same on every replica."""
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")


class KeyEntry(NamedTuple):
    kind: int
    key: str
    value: str


class BucketName(NamedTuple):
    """A name, read."""

    form: int
    domain: str
    entries: list[KeyEntry]


def encode_bucket_key(form: int, domain: str, entries: Iterable[KeyEntry]) -> bytes:
    parts = [_BYTES[form], _text(domain)]
    for kind, key, value in entries:
        parts += _BYTES[kind], _text(key), _text(value)
    return b"".join(parts)


def decode_bucket_key(name: bytes) -> BucketName:
    """Read a name.

    Raises:
        ValueError: not a name that `encode_bucket_key` writes.
    """
    if not name or name[0] not in FORMS:
        raise ValueError("bucket key of an unknown form")
    entries = []
    domain, at = _get_text(name, 1)
    while at < len(name):
        kind = name[at]
        if kind not in _KINDS:
            raise ValueError(f"bucket key has an entry of unknown kind {kind}")
        key, at = _get_text(name, at + 1)
        value, at = _get_text(name, at)
        entries.append(KeyEntry(kind, key, value))
    return BucketName(name[0], domain, entries)


def overflow_key(name: bytes) -> bytes:
    """The name of the bucket that takes the place of `name`, and of all others of its rule, when it gets none.

    Pure, so equal on every replica; an overflow bucket's name is its own. There are as many as there are rules, one
    for what no rule matches, and for limits given by requests one for each domain, unit and power of two.

    Raises:
        ValueError: not a name.
    """
    form, domain, entries = decode_bucket_key(name)
    kept = [bare for entry in entries if (bare := _without_values(entry)) is not None]
    if entries and all(entry.kind == UNRULED for entry in entries):
        # Callers choose the domain and the keys, too.
        domain, kept = "", [KeyEntry(UNRULED, "", "")]
    return encode_bucket_key(form | OVERFLOW, domain, kept)


def is_of_rule_alone(name: bytes) -> bool:
    """True when nothing in the name is a caller's choice: there are few such names.

    Raises:
        ValueError: not a name.
    """
    return overflow_key(name)[1:] == name[1:]


def _without_values(entry: KeyEntry) -> KeyEntry | None:
    """What of an entry is the rule's."""
    kind, key, value = entry
    if kind == KEY_ONLY:
        return KeyEntry(kind, key, "")
    if kind == OVERRIDE_LIMIT:
        # The next lower power of two: the requests' own limits may be as many as their values.
        requests = int(key) if key.isascii() and key.isdecimal() else 0
        return KeyEntry(kind, str(1 << requests.bit_length() - 1 if requests else 0), value)
    return None if kind in (WILDCARD_VALUE, OVERRIDE) else entry


def _text(text: str) -> bytes:
    raw = text.encode()
    length = len(raw)
    if length < _CONTINUES:
        return _BYTES[length] + raw
    prefix = bytearray()
    while length >= _CONTINUES:
        prefix.append(length & 0x7F | _CONTINUES)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + raw


def _get_text(name: bytes, at: int) -> tuple[str, int]:
    length = shift = 0
    while True:
        if at >= len(name) or shift > _MAX_SHIFT:
            raise ValueError("bucket key is cut short")
        byte = name[at]
        at += 1
        length |= (byte & 0x7F) << shift
        if byte < _CONTINUES:
            break
        shift += 7
    end = at + length
    if end > len(name):
        raise ValueError("bucket key is cut short")
    return name[at:end].decode(), end
