"""Bucket keys: algorithm, domain, path of the rule, matched values, in bytes.

The key of a bucket is equal on every replica, whatever the order of its files. Every text is preceded by its length, so
different paths have different keys ((a_b, c) and (a, b_c) would not if texts were joined by underscores). Layout:

    bucket type:1 text(domain) { kind:1 text(key) text(value) }*      text(t) = LEB128(bytes in t) t

The bucket type says how the bucket counts and how it is shared. So a rule whose algorithm or consistency changes gets
new buckets. The kind says how the rule matched the entry, and so which part of the rule's path the value stands for.

Callers choose the values, and so how long keys are and how many there are. A long value is replaced by its hash
(`bounded`), and so are the last entries of a descriptor that has many (`caller_entries`). When there are too many
buckets, new keys of a rule share a few thousand *overflow buckets*, whose keys contain nothing that a caller chose
(`overflow_keys`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Final, NamedTuple

TOKEN_BUCKET: Final = 0
FIXED_WINDOW: Final = 1
SLIDING_WINDOW: Final = 2
STRICT_TOKEN_BUCKET: Final = 3
OVERFLOW: Final = 0x40
"""Added to the bucket type of a rule's overflow buckets."""
LOCAL: Final = 0x80
"""Added to the bucket type of a bucket that is never replicated."""

EXACT: Final = 0
"""The rule names key and value."""
KEY_ONLY: Final = 1
"""The rule names the key; every value has a bucket of its own."""
DEFAULT_RULE: Final = 2
"""No rule matched: the entry belongs to a bucket of the default rule."""
WILDCARD_VALUE: Final = 3
"""The value that matched a pattern, which is in the entry before; every value has a bucket of its own."""
PATTERN: Final = 4
"""A pattern of the rule. If its values do not share one bucket, a WILDCARD_VALUE follows."""
OVERRIDE: Final = 5
"""The request itself gave the limit."""
OVERRIDE_LIMIT: Final = 6
"""Last entry of an override; key and value are requests per unit (0 for windows) and unit."""

_KINDS: Final = frozenset((EXACT, KEY_ONLY, DEFAULT_RULE, WILDCARD_VALUE, PATTERN, OVERRIDE, OVERRIDE_LIMIT))
_WINDOWS_AND_TOKEN_BUCKET: Final = (TOKEN_BUCKET, FIXED_WINDOW, SLIDING_WINDOW)
_TYPES: Final = (
    STRICT_TOKEN_BUCKET,
    *_WINDOWS_AND_TOKEN_BUCKET,
    *[bucket_type | LOCAL for bucket_type in _WINDOWS_AND_TOKEN_BUCKET],
)
BUCKET_TYPES: Final = frozenset((*_TYPES, *[bucket_type | OVERFLOW for bucket_type in _TYPES]))
OVERFLOW_BUCKETS: Final = 4_096
"""The overflow buckets of one rule. When the store is full, each new key shares one with 1/4,096 of all other
new keys.
"""

MAX_VALUE_BYTES: Final = 128
"""The longest text of a caller in a bucket key; a longer one is hashed."""

MAX_CALLER_ENTRIES: Final = 16
"""The most entries of a caller's own descriptor in a bucket key; from the last of them on they are hashed together."""

BLANKS: Final = " \t"
"""What may stand around the value of a header, and is no part of it (RFC 9110, section 5.5). Envoy takes it away from
HTTP/1.1 alone. What is behind Envoy does not see it, so callers would have a bucket for each number of blanks.
"""

_MAX_REMEMBERED: Final = 1 << 16
"""The longest text, in characters, whose hash is cached. Headers that Envoy takes by default are no longer."""

_HASH_MARK: Final = "#"
_HASHED_LENGTH: Final = 33
_BYTES: Final = tuple(bytes((number,)) for number in range(256))
_CONTINUES: Final = 0x80
_MAX_SHIFT: Final = 28


_NO_TEXT: Final = b"\0"

_NOT_OF_TEXTS: Final = chr(0xD800)
"""A code point that is never in a result of `text_of`."""
_ITS_ESCAPE: Final = b"\\ud800"


def hash64(raw: bytes) -> int:
    """A hash of 64 bits, the same on every replica."""
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")


def text_of(raw: bytes) -> str:
    """Decode bytes of a request, whatever they are. Different bytes give different texts (PEP 383)."""
    return raw.decode("utf-8", "surrogateescape")


class Texts:
    """Decodes the texts of one request; each long text only once.

    A proxy may copy the same long header into many descriptors.
    """

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
    """Text from `text_of` as valid Unicode: bytes that are not UTF-8 appear as `\\xff`."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        # Encoding to `\udcff` takes a tenth of the time of decoding to `\xff`, which with a long header is longer than
        # Envoy waits. A `\ud` that is already in the text is replaced meanwhile.
        raw = text.replace("\\ud", _NOT_OF_TEXTS).encode("utf-8", "backslashreplace")
        return raw.replace(b"\\udc", b"\\x").replace(_ITS_ESCAPE, b"\\ud").decode()
    return text


def bounded(text: str) -> str:
    """A caller's text as it stands in a bucket key or metric: valid Unicode of at most `MAX_VALUE_BYTES`.

    A text that is longer, is not Unicode, or looks like a hash is replaced by `#` and 32 hexadecimal digits.

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
    return _hash_of_bytes(text.encode("utf-8", "surrogateescape"))


def _hash_of_bytes(raw: bytes) -> str:
    return _HASH_MARK + blake2b(raw, digest_size=16).hexdigest()


# A proxy may copy the same long headers into many descriptors, and hashing one can take half a millisecond.
_remembered_hash = lru_cache(maxsize=16)(_hash_of)


class KeyEntry(NamedTuple):
    """One entry of a bucket key: the kind of match, and the texts."""

    kind: int
    key: str
    value: str


def caller_entries(kind: int, entries: Sequence[tuple[str, str]]) -> list[KeyEntry]:
    """A caller's whole descriptor as it stands in a bucket key: at most `MAX_CALLER_ENTRIES`, each text `bounded`,
    values without the `BLANKS` around them.
    """
    named = [KeyEntry(kind, bounded(key), bounded(value.strip(BLANKS))) for key, value in entries]
    if len(named) > MAX_CALLER_ENTRIES:
        rest = b"".join([entry_bytes(*entry) for entry in named[MAX_CALLER_ENTRIES - 1 :]])
        named[MAX_CALLER_ENTRIES - 1 :] = [KeyEntry(kind, "", _hash_of_bytes(rest))]
    return named


class DecodedKey(NamedTuple):
    """A decoded bucket key."""

    bucket_type: int
    domain: str
    entries: list[KeyEntry]


def encode_bucket_key(bucket_type: int, domain: str, entries: Iterable[KeyEntry]) -> bytes:
    return bucket_key_head(bucket_type, domain) + b"".join([entry_bytes(*entry) for entry in entries])


def bucket_key_head(bucket_type: int, domain: str) -> bytes:
    """The bucket key up to its entries."""
    return _BYTES[bucket_type] + _text(domain)


def entry_bytes(kind: int, key: str, value: str) -> bytes:
    """A `KeyEntry` in bytes."""
    return _BYTES[kind] + _text(key) + _text(value)


def decode_bucket_key(bucket_key: bytes) -> DecodedKey:
    """Decode a bucket key.

    Raises:
        ValueError: not a key that `encode_bucket_key` makes.
    """
    if not bucket_key or bucket_key[0] not in BUCKET_TYPES:
        raise ValueError("bucket key of an unknown type")
    entries = []
    domain, at = _get_text(bucket_key, 1)
    while at < len(bucket_key):
        kind = bucket_key[at]
        if kind not in _KINDS:
            raise ValueError(f"bucket key has an entry of unknown kind {kind}")
        key, at = _get_text(bucket_key, at + 1)
        value, at = _get_text(bucket_key, at)
        entries.append(KeyEntry(kind, key, value))
    return DecodedKey(bucket_key[0], domain, entries)


def rule_key(bucket_key: bytes) -> bytes:
    """The bucket key with all caller-chosen parts removed; the same for all buckets of one rule.

    It is itself a bucket key. There is one for each rule, one for the default rule, and for overrides one for each
    domain, unit and power of two.

    Raises:
        ValueError: not a bucket key.
    """
    if not bucket_key or bucket_key[0] not in BUCKET_TYPES:
        raise ValueError("bucket key of an unknown type")
    at = _text_span(bucket_key, 1)[1]
    parts = [bucket_key[:at]]
    while at < len(bucket_key):
        kind = bucket_key[at]
        if kind not in _KINDS:
            raise ValueError(f"bucket key has an entry of unknown kind {kind}")
        key_end = _text_span(bucket_key, at + 1)[1]
        end = _text_span(bucket_key, key_end)[1]
        if kind == DEFAULT_RULE:
            # Callers choose the domain and the keys, too.
            return bucket_key[:1] + _NO_TEXT + _BYTES[DEFAULT_RULE] + _NO_TEXT + _NO_TEXT
        if kind == KEY_ONLY:
            parts.append(bucket_key[at:key_end] + _NO_TEXT)
        elif kind == OVERRIDE_LIMIT:
            # Round down to a power of two, since requests may bring any number of different limits.
            key = _get_text(bucket_key, at + 1)[0]
            requests = int(key) if key.isascii() and key.isdecimal() else 0
            power = str(1 << requests.bit_length() - 1 if requests else 0)
            parts.append(_BYTES[kind] + _text(power) + bucket_key[key_end:end])
        elif kind not in (WILDCARD_VALUE, OVERRIDE):
            parts.append(bucket_key[at:end])
        at = end
    return b"".join(parts)


def overflow_keys(bucket_key: bytes) -> tuple[bytes, bytes]:
    """The keys of the overflow buckets to try when `bucket_key` gets no bucket: first one of its rule's
    `OVERFLOW_BUCKETS`, then the rule's last one, which always has room.

    They are the same on every replica.

    Raises:
        ValueError: not a bucket key.
    """
    own = rule_key(bucket_key)
    last = _BYTES[own[0] | OVERFLOW] + own[1:]
    return last + _NUMBERS[hash64(bucket_key) % OVERFLOW_BUCKETS], last


def is_overflow_key(bucket_key: bytes) -> bool:
    """True for keys that `overflow_keys` returns.

    Raises:
        ValueError: not a bucket key.
    """
    last = rule_key(bucket_key)
    return bool(bucket_key[0] & OVERFLOW) and bucket_key.startswith(last) and bucket_key[len(last) :] in _ENDS


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


def _get_text(bucket_key: bytes, at: int) -> tuple[str, int]:
    start, end = _text_span(bucket_key, at)
    return bucket_key[start:end].decode(), end


def _text_span(bucket_key: bytes, at: int) -> tuple[int, int]:
    length = shift = 0
    while True:
        if at >= len(bucket_key) or shift > _MAX_SHIFT:
            raise ValueError("bucket key is cut short")
        byte = bucket_key[at]
        at += 1
        length |= (byte & 0x7F) << shift
        if byte < _CONTINUES:
            break
        shift += 7
    end = at + length
    if end > len(bucket_key):
        raise ValueError("bucket key is cut short")
    return at, end


_NUMBERS: Final = tuple(_BYTES[WILDCARD_VALUE] + _NO_TEXT + _text(str(number)) for number in range(OVERFLOW_BUCKETS))
"""The last entries of the keys of overflow buckets. An older version has only one overflow bucket for each rule, and
ignores these keys.
"""

_ENDS: Final = frozenset((b"", *_NUMBERS))
