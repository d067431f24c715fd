"""The canonical name of a bucket: algorithm, domain, path of the rule, matched values.

Equal on every replica, whatever the order of its files. Every text is preceded by its length, so no two different
paths share a name ((a_b, c) and (a, b_c) do where keys are joined by underscores). Layout:

    form:1 text(domain) { kind:1 text(key) text(value) }*      text(t) = LEB128(bytes in t) t

form says what kind of bucket it is, so that a rule whose algorithm or consistency changes begins a new one. kind says
how the rule matched the entry, and so which part of the rule's path the value stands for.

Callers choose the values, and so how long names are and how many there are. A long value stands in a name as its hash
(`bounded`). When there are too many buckets, new names of a rule share a few thousand *overflow buckets*, in whose
names nothing is a caller's (`overflow_keys`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from typing import Final, NamedTuple

TOKEN_BUCKET: Final = 0
FIXED_WINDOW: Final = 1
SLIDING_WINDOW: Final = 2
STRICT_TOKEN_BUCKET: Final = 3
OVERFLOW: Final = 0x40
"""Added to the form of a rule's overflow buckets."""
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
"""Last entry of such a bucket; key and value are requests per unit, 0 for windows, and unit."""

_KINDS: Final = frozenset((EXACT, KEY_ONLY, UNRULED, WILDCARD_VALUE, PATTERN, OVERRIDE, OVERRIDE_LIMIT))
_WINDOWS_AND_TOKEN_BUCKET: Final = (TOKEN_BUCKET, FIXED_WINDOW, SLIDING_WINDOW)
_FORMS_OF_VALUES: Final = (
    STRICT_TOKEN_BUCKET,
    *_WINDOWS_AND_TOKEN_BUCKET,
    *[form | LOCAL for form in _WINDOWS_AND_TOKEN_BUCKET],
)
FORMS: Final = frozenset((*_FORMS_OF_VALUES, *[form | OVERFLOW for form in _FORMS_OF_VALUES]))
OVERFLOW_BUCKETS: Final = 4_096
"""Of one rule. Whoever comes new to a full store shares one with as small a part of all others who do."""

MAX_VALUE_BYTES: Final = 128
"""Of a caller's text in a name; a longer one is hashed."""

_MAX_REMEMBERED: Final = 1 << 16
"""Of the characters of a text whose hash is remembered: headers that Envoy takes by default are no longer."""

_HASH_MARK: Final = "#"
_HASHED_LENGTH: Final = 33
_BYTES: Final = tuple(bytes((number,)) for number in range(256))
_CONTINUES: Final = 0x80
_MAX_SHIFT: Final = 28


_NO_TEXT: Final = b"\0"

_NOT_OF_TEXTS: Final = chr(0xD800)
"""A code point that `text_of` never gives."""
_ITS_ESCAPE: Final = b"\\ud800"


def hash64(raw: bytes) -> int:
    """A hash of 64 bits, the same on every replica."""
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")


def text_of(raw: bytes) -> str:
    """Bytes of a request as text, whatever they are: no two become the same (PEP 383)."""
    return raw.decode("utf-8", "surrogateescape")


class Texts:
    """Those of one request. A proxy may copy the same long header into many descriptors: it is decoded once."""

    def __init__(self) -> None:
        self._long: dict[bytes, str] = {}

    def of(self, raw: bytes) -> str:
        """See `text_of`."""
        if len(raw) <= MAX_VALUE_BYTES:
            return text_of(raw)
        text = self._long.get(raw)
        if text is None:
            text = self._long[raw] = text_of(raw)
        return text


def readable(text: str) -> str:
    """Text from `text_of` as Unicode: bytes that are none appear as `\\xff`."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        # The encoder writes `\udcff` in a tenth of the time in which a decoder writes `\xff`; of a header full of such
        # bytes that is longer than Envoy waits. What was `\ud` before is something else meanwhile.
        raw = text.replace("\\ud", _NOT_OF_TEXTS).encode("utf-8", "backslashreplace")
        return raw.replace(b"\\udc", b"\\x").replace(_ITS_ESCAPE, b"\\ud").decode()
    return text


def bounded(text: str) -> str:
    """A caller's text as it stands in the name of a bucket or a metric: valid Unicode of at most `MAX_VALUE_BYTES`.

    What is longer or isn't Unicode, or could be taken for a hash, is hashed: `#` and 32 hexadecimal digits.

    Args:
        text: from `text_of`.
    """
    if len(text) <= MAX_VALUE_BYTES and not (len(text) == _HASHED_LENGTH and text[0] == _HASH_MARK):
        if text.isascii():
            return text
        try:
            if len(text.encode()) <= MAX_VALUE_BYTES:
                return text
        except UnicodeEncodeError:
            pass
    return _remembered_hash(text) if len(text) <= _MAX_REMEMBERED else _hash_of(text)


def _hash_of(text: str) -> str:
    return _HASH_MARK + blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


# A proxy may copy the same long headers into many descriptors, and to encode and hash one can take half a millisecond.
_remembered_hash = lru_cache(maxsize=16)(_hash_of)


class KeyEntry(NamedTuple):
    """One entry of a bucket's name: what kind of match it was, and its texts."""

    kind: int
    key: str
    value: str


class BucketName(NamedTuple):
    """A name, read."""

    form: int
    domain: str
    entries: list[KeyEntry]


def encode_bucket_key(form: int, domain: str, entries: Iterable[KeyEntry]) -> bytes:
    return bucket_key_head(form, domain) + b"".join([entry_bytes(*entry) for entry in entries])


def bucket_key_head(form: int, domain: str) -> bytes:
    """The name of a bucket up to its entries."""
    return _BYTES[form] + _text(domain)


def entry_bytes(kind: int, key: str, value: str) -> bytes:
    """A `KeyEntry` as it stands in a name."""
    return _BYTES[kind] + _text(key) + _text(value)


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


def rule_key(name: bytes) -> bytes:
    """What of a name is the rule's, without what callers choose: a name itself, of which there are as many as there are
    rules, one for what no rule matches, and for limits given by requests one for each domain, unit and power of two.

    Raises:
        ValueError: not a name.
    """
    if not name or name[0] not in FORMS:
        raise ValueError("bucket key of an unknown form")
    at = _text_span(name, 1)[1]
    parts = [name[:at]]
    while at < len(name):
        kind = name[at]
        if kind not in _KINDS:
            raise ValueError(f"bucket key has an entry of unknown kind {kind}")
        key_end = _text_span(name, at + 1)[1]
        end = _text_span(name, key_end)[1]
        if kind == UNRULED:
            # Callers choose the domain and the keys, too.
            return name[:1] + _NO_TEXT + _BYTES[UNRULED] + _NO_TEXT + _NO_TEXT
        if kind == KEY_ONLY:
            parts.append(name[at:key_end] + _NO_TEXT)
        elif kind == OVERRIDE_LIMIT:
            # The next lower power of two: the requests' own limits may be as many as their values.
            key = _get_text(name, at + 1)[0]
            requests = int(key) if key.isascii() and key.isdecimal() else 0
            power = str(1 << requests.bit_length() - 1 if requests else 0)
            parts.append(_BYTES[kind] + _text(power) + name[key_end:end])
        elif kind not in (WILDCARD_VALUE, OVERRIDE):
            parts.append(name[at:end])
        at = end
    return b"".join(parts)


def overflow_keys(name: bytes) -> tuple[bytes, bytes]:
    """The names of the buckets that take the place of `name` when it gets none: one of its rule's `OVERFLOW_BUCKETS`,
    and the rule's last, for when there is no room for that either.

    Pure, so equal on every replica.

    Raises:
        ValueError: not a name.
    """
    own = rule_key(name)
    last = _BYTES[own[0] | OVERFLOW] + own[1:]
    return last + _NUMBERS[hash64(name) % OVERFLOW_BUCKETS], last


def is_overflow_key(name: bytes) -> bool:
    """True for what `overflow_keys` returns.

    Raises:
        ValueError: not a name.
    """
    last = rule_key(name)
    return bool(name[0] & OVERFLOW) and name.startswith(last) and name[len(last) :] in _ENDS


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
    start, end = _text_span(name, at)
    return name[start:end].decode(), end


def _text_span(name: bytes, at: int) -> tuple[int, int]:
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
    return at, end


_NUMBERS: Final = tuple(_BYTES[WILDCARD_VALUE] + _NO_TEXT + _text(str(number)) for number in range(OVERFLOW_BUCKETS))
"""The last entries of the names of overflow buckets. Replicas that had one for each rule take such a name for a bucket
that no rule knows."""

_ENDS: Final = frozenset((b"", *_NUMBERS))
