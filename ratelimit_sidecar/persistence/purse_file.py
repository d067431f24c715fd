"""What the purses of strict limits had left, kept over a clean stop in a file that is used once.

    file = magic hash of holder, age { key amount }* checksum    hash, key = length:2 bytes    age, amount = 8 bytes

It is written when nothing is admitted or paid any more, and is gone, for certain, before this replica admits anything
again, but for what peers lend: while it cannot be deleted, as on a disk that has become read-only, this replica has no
home. So what is kept is only moved, as if this replica had held it all the time: no purse ever has more than it had.
The holder is a node in a membership: under another one, others may have got its home meanwhile. A process that is
killed writes no file, and begins with empty purses. An amount is in 2**-32 tokens, below 0 what is owed; numbers are
little-endian.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Final
from zlib import crc32

import structlog

from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.shares import Membership

MAGIC: Final = b"rlpurse\x02"
"""The last byte is the version of the format. Version 1 has no age."""

WITHOUT_AGE: Final = b"rlpurse\x01"

ENDING: Final = ".purses"
"""Added to the name of the snapshot's file."""

_LENGTH: Final = struct.Struct("<H")
_AMOUNT: Final = struct.Struct("<q")
_CHECKSUM: Final = struct.Struct("<I")

RETRY_SECONDS: Final = 10.0

_log = structlog.stdlib.get_logger(__name__)


class BadPurses(Exception):
    """The file cannot be used by this holder. The text says why, and completes "the file of purses ..."."""


class PurseFile:
    """The file of the purses in a ledger. Call `restore` before the ledger is used, then `run`, and `keep` at a clean
    stop.

    Args:
        state: the snapshot's file, beside which this one is.
        ledger: None without members: then a file from before is only deleted.
    """

    def __init__(self, state: Path, ledger: Ledger | None) -> None:
        self._path = state.with_name(state.name + ENDING)
        self._ledger = ledger
        self._holder = "" if ledger is None else holder_of(ledger.shares.node, ledger.shares.membership)
        self.degraded_reason = ""
        """Why the file cannot be deleted; "" if it is gone, as it should be."""

    async def restore(self) -> None:
        """Put back into the purses what is in the file, which is gone then. An error is logged."""
        try:
            kept, age_us = await asyncio.to_thread(take_purses, self._path, self._holder)
            if self._ledger is not None:
                self._ledger.restore(kept, age_us)
        except (OSError, BadPurses) as error:
            _log.error("purses_not_restored", file=str(self._path), reason=str(error))
            if isinstance(error, OSError):
                self._note_kept(error.strerror or str(error))

    async def run(self) -> None:
        """Delete the file once that is possible, if it was not before."""
        while self.degraded_reason:
            await asyncio.sleep(RETRY_SECONDS)
            with suppress(OSError):
                with suppress(BadPurses):
                    await asyncio.to_thread(take_purses, self._path, self._holder)
                self._note_kept("")
                _log.info("purses_deleted", file=str(self._path))

    def _note_kept(self, reason: str) -> None:
        self.degraded_reason = reason
        if self._ledger is not None:
            self._ledger.shares.are_purses_kept = bool(reason)

    async def keep(self, strict_us: int, *, has_rules: bool) -> None:
        """Write what the purses have, once nothing is admitted or paid any more. An error is logged.

        Args:
            has_rules: see `Ledger.amounts_to_keep`.
        """
        ledger = self._ledger
        if ledger is None:
            return
        try:
            purses = ledger.amounts_to_keep(strict_us, has_rules=has_rules)
            age_us = ledger.age_to_keep(strict_us, has_rules=has_rules)
            await asyncio.to_thread(write_purses, self._path, self._holder, purses, age_us)
        except OSError as error:
            _log.error("purses_not_kept", file=str(self._path), reason=error.strerror or str(error))


def holder_of(node: str, membership: Membership) -> str:
    """Who may use what is kept: this node, among these members."""
    return repr((node, membership.epoch, sorted(membership.weights.items())))


def write_purses(path: Path, holder: str, purses: Iterable[tuple[bytes, int]], age_us: int) -> None:
    """Write the file.

    Args:
        age_us: how long purses had refilled that are not in it, as they were full or nobody had used them.

    Raises:
        OSError: it could not be written; there is no file then.
    """
    new = path.with_name(path.name + ".new")
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            checksum = 0
            for piece in _pieces(holder, purses, age_us):
                checksum = crc32(piece, checksum)
                file.write(piece)
            file.write(_CHECKSUM.pack(checksum))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def take_purses(path: Path, holder: str) -> tuple[Mapping[bytes, int], int]:
    """Delete the file, and return what was in it, and the age; nothing when there is no file.

    Raises:
        BadPurses: it was malformed, or another holder's.
        OSError: it cannot be read or removed; then nothing of it may be used.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}, 0
    # Also if it is of no use here: its holder may come back, when others have refilled and spent the same.
    path.unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Not there any more even after a loss of power.
        os.fsync(folder)
    finally:
        os.close(folder)
    return _read(raw, holder)


def _pieces(holder: str, purses: Iterable[tuple[bytes, int]], age_us: int) -> Iterable[bytes]:
    name = sha256(holder.encode()).digest()
    yield MAGIC + _LENGTH.pack(len(name)) + name + _AMOUNT.pack(age_us)
    for key, amount in purses:
        if len(key) < 1 << 16:
            yield _LENGTH.pack(len(key)) + key + _AMOUNT.pack(max(-1 << 62, min(amount, 1 << 62)))


def _read(raw: bytes, holder: str) -> tuple[Mapping[bytes, int], int]:
    if raw[: len(MAGIC) - 1] != MAGIC[:-1]:
        raise BadPurses("is of another kind: it begins with other bytes")
    if raw[: len(MAGIC)] not in (MAGIC, WITHOUT_AGE):
        raise BadPurses("is of another version")
    end = len(raw) - _CHECKSUM.size
    if end < len(MAGIC) or _CHECKSUM.unpack_from(raw, end)[0] != crc32(raw[:end]):
        raise BadPurses("is damaged: its checksum is wrong")
    name, at = _text(raw, len(MAGIC))
    if name != sha256(holder.encode()).digest():
        raise BadPurses("is another node's, or of another membership")
    age_us = 0
    if raw.startswith(MAGIC):
        [age_us] = _AMOUNT.unpack_from(raw, at)
        at += _AMOUNT.size
    purses = {}
    while at < end:
        key, at = _text(raw, at)
        [purses[key]] = _AMOUNT.unpack_from(raw, at)
        at += _AMOUNT.size
    return purses, age_us


def _text(raw: bytes, at: int) -> tuple[bytes, int]:
    [length] = _LENGTH.unpack_from(raw, at)
    start = at + _LENGTH.size
    return raw[start : start + length], start + length
