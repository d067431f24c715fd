"""The canonical name of a bucket: domain, path of the rule, matched values.

Equal on every replica, whatever the order of its files. Every text is preceded by its length, so no two different
paths share a name ((a_b, c) and (a, b_c) do where keys are joined by underscores). Layout:

    text(domain) { kind:1 text(key) text(value) }*      text(t) = LEB128(bytes in t) t

kind says how the rule matched the entry, and so which part of the rule's path the value stands for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

EXACT = 0
"""The rule names key and value."""
KEY_ONLY = 1
"""The rule names the key; every value has a bucket of its own."""
UNRULED = 2
"""No rule matched: the entry belongs to the bucket given to every other descriptor."""

_CONTINUES = 0x80


class KeyEntry(NamedTuple):
    kind: int
    key: str
    value: str


def encode_bucket_key(domain: str, entries: Iterable[KeyEntry]) -> bytes:
    out = bytearray()
    _put_text(out, domain)
    for kind, key, value in entries:
        out.append(kind)
        _put_text(out, key)
        _put_text(out, value)
    return bytes(out)


def decode_bucket_key(name: bytes) -> tuple[str, list[KeyEntry]]:
    """The domain and entries of a name.

    Raises:
        ValueError: not a name that `encode_bucket_key` writes.
    """
    entries = []
    domain, at = _get_text(name, 0)
    while at < len(name):
        kind = name[at]
        if kind not in (EXACT, KEY_ONLY, UNRULED):
            raise ValueError(f"bucket key has an entry of unknown kind {kind}")
        key, at = _get_text(name, at + 1)
        value, at = _get_text(name, at)
        entries.append(KeyEntry(kind, key, value))
    return domain, entries


def _put_text(out: bytearray, text: str) -> None:
    raw = text.encode()
    length = len(raw)
    while length >= _CONTINUES:
        out.append(length & 0x7F | _CONTINUES)
        length >>= 7
    out.append(length)
    out += raw


def _get_text(name: bytes, at: int) -> tuple[str, int]:
    length = shift = 0
    while True:
        if at >= len(name):
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
