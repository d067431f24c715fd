"""Snapshots in a file: one every few seconds and one at the stop; the last one is read at the start.

The event loop makes them in short pieces, and a thread writes and reads the file, so no request waits for the disk. A
new snapshot replaces the old one once it is complete and on the disk (write, fsync, rename). A file that is incomplete,
damaged or of a newer format is renamed, and the start goes on without it. Of a new snapshot that was cut short, by a
kill or because a stop took too long, the start joins what there is. What cannot be joined yet goes into the next
snapshots (`put_off`).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import structlog

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.store import LimitOfKey, Store
from ratelimit_sidecar.persistence.put_off import PutOff
from ratelimit_sidecar.persistence.snapshot_format import (
    END,
    BadSnapshot,
    RestoreTarget,
    SnapshotInfo,
    SnapshotSize,
    check,
    records_again,
    restore,
    snapshot,
)
from ratelimit_sidecar.persistence.time_slice import LOOP_SHARE, PIECE_SECONDS, TimeSlice

NEW: Final = ".new"
"""Added to the file's name while it is being written."""
ASIDE: Final = ".unreadable"
"""Added to the name of a file that cannot be used."""
LOCK: Final = ".lock"

READ_TRIES: Final = 3
READ_AGAIN_S: Final = 0.5

DISK_TROUBLE = frozenset({errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO})
"""Of a disk that was in order once, so not reasons to refuse to start: no state is better than no sidecar."""

WRITE_BYTES: Final = 256 * 1_024

_log = structlog.stdlib.get_logger(__name__)


class StateError(Exception):
    """This process cannot use the file; the text says which one and why."""


@dataclass(slots=True)
class SnapshotStatus:
    """The state of snapshots, for metrics and the console.

    Args:
        taken: snapshots written since the start.
        failed: snapshots that could not be written.
        restored_buckets: in the snapshot that was read at the start.
        buckets, bytes: of the last snapshot written or read.
        last_us: when the last one was started, microseconds since the epoch; None without one.
        degraded_reason: why the last attempt failed; "" if it did not.
    """

    taken: int = 0
    failed: int = 0
    restored_buckets: int = 0
    buckets: int = 0
    bytes: int = 0
    last_us: int | None = None
    degraded_reason: str = ""


class SnapshotFile:
    """Writes the snapshots of one store to a file, and reads them. Call `lock` and `load` before `run` and
    `join_put_off`, and `save` at the end.

    Args:
        local_limit_of_key: as `Rules.local_limit_of_key`, for the rules in force.
        every_seconds: the interval of snapshots.
    """

    def __init__(
        self,
        path: Path,
        store: Store,
        now_us: Callable[[], int],
        local_limit_of_key: LimitOfKey,
        every_seconds: float,
    ) -> None:
        self.status = SnapshotStatus()
        self._path = path
        self._store = store
        self._now_us = now_us
        self._local_limit_of_key = local_limit_of_key
        self._every_seconds = every_seconds
        self._lock: BinaryIO | None = None
        self._is_locked_later = False
        self._saving = asyncio.Lock()
        self._put_off = PutOff()
        self._rules_changed = asyncio.Event()

    def lock(self) -> None:
        """Lock the file for this process. If the disk is in trouble, `save` does it once it can.

        Raises:
            StateError: another process has it, or its folder cannot be written to.
        """
        try:
            lock = _beside(self._path, LOCK).open("ab")
        except OSError as error:
            if error.errno in DISK_TROUBLE:
                self._is_locked_later = True
                self._fail("snapshot_not_locked", error)
                return
            raise StateError(f"{self._path}: cannot write beside it: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise StateError(f"{self._path}: another process keeps its state in it") from error
        self._lock, self._is_locked_later = lock, False

    async def load(self) -> None:
        """Join the snapshot in the file, in pieces, between which requests are answered.

        A record that is bad is left out. If that happens, or all of it fails for whatever reason, the file is renamed,
        so that the next snapshot, which has less, does not replace it.
        """
        try:
            await self._load_patiently()
        except BadSnapshot as error:
            await self._set_aside(f"the snapshot {error}")
        except OSError as error:
            await self._set_aside(f"it cannot be read: {error.strerror or error}")
        except Exception as error:
            _log.exception("restore_failed", file=str(self._path))
            await self._set_aside(f"it could not be restored: {error!r}")
        # What cannot be read of one that was cut short is gone: the next snapshot replaces it.
        with suppress(BadSnapshot, OSError):
            await self._load_cut_short()
        put_off = self._put_off
        if not self.is_all_joined:
            _log.warning(
                "buckets_put_off",
                file=str(self._path),
                without_rule=put_off.without_rule,
                ahead_of_clock=put_off.ahead.buckets,
                left_out=put_off.left_out,
            )

    async def _load_patiently(self) -> None:
        """The disk, or too many open files, may fail for a moment. To join a snapshot twice does no harm."""
        for _ in range(READ_TRIES - 1):
            try:
                return await self._load()
            except OSError as error:
                _log.warning("snapshot_read_again", file=str(self._path), reason=error.strerror or str(error))
                self._put_off = PutOff()
            await asyncio.sleep(READ_AGAIN_S)
        return await self._load()

    async def _load(self) -> None:
        opened = await asyncio.to_thread(_open_checked, self._path, may_be_cut=False)
        if opened is None:
            _log.info("no_snapshot", file=str(self._path))
            return
        file, checked = opened
        refused_before = self._store.refused_keys
        with file:
            joined = await self._join(records_again(file), checked.origin, self._put_off)
        refused = self._store.refused_keys - refused_before
        if refused:
            _log.warning("buckets_without_room", file=str(self._path), buckets=refused, fix="a greater max_buckets")
        entries, bad_records, why_bad = joined
        self.status.restored_buckets = self.status.buckets = checked.buckets
        self.status.last_us = checked.begun_at_us
        _log.info("restored", file=str(self._path), buckets=checked.buckets, entries=entries, bad_records=bad_records)
        if bad_records:
            await self._set_aside(f"the snapshot {why_bad}")

    async def _load_cut_short(self) -> None:
        """Join what there is of a snapshot that was not completed, if one was begun after the last complete one."""
        new = _beside(self._path, NEW)
        opened = await asyncio.to_thread(_open_checked, new, may_be_cut=True)
        if opened is None:
            return
        file, checked = opened
        _log.warning("snapshot_cut_short", file=str(new), reason="the last process ended before it was complete")
        with file:
            await self._join(records_again(file), checked.origin, self._put_off)

    async def _join(
        self, records: Iterator[tuple[int, bytes]], origin: Origin, put_off: PutOff
    ) -> tuple[int, int, str]:
        """Join records, but for those that are bad, and as far as they can be read.

        Args:
            origin: that wrote them.
            put_off: gets what cannot be joined yet.

        Returns:
            How many entries they have, how many are bad, and why the first is.
        """
        to = RestoreTarget(self._store, origin, self._local_limit_of_key, put_off)
        entries = bad_records = 0
        why_bad = ""
        while True:
            try:
                record = await asyncio.to_thread(next, records, None)
                entries += await _in_turns(restore(*(record or (END, b"")), to, self._now_us()))
            except BadSnapshot as error:
                bad_records += 1
                why_bad = why_bad or str(error)
            else:
                if record is None:
                    return entries, bad_records, why_bad

    @property
    def is_all_joined(self) -> bool:
        """False while something is put off."""
        return not self._put_off.records

    def use_rules(self) -> None:
        """Other rules are in force: have `join_put_off` look whether they have what was put off."""
        self._rules_changed.set()

    async def join_put_off(self) -> None:
        """Join what was put off, once there are rules for it or the clock has come forward, for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every_seconds):
                    await self._rules_changed.wait()
            has_changed = self._rules_changed.is_set()
            self._rules_changed.clear()
            if has_changed or self._put_off.ahead.is_due(self._now_us()):
                await self._try_put_off()

    async def _try_put_off(self) -> None:
        if self.is_all_joined:
            return
        left = PutOff()
        # Until all of it was looked at, each snapshot has all of it, also one that is under way: joined twice does no
        # harm.
        await self._join(iter(self._put_off.records), self._store.origin, left)
        self._put_off = left
        _log.info(
            "put_off_joined", file=str(self._path), without_rule=left.without_rule, ahead_of_clock=left.ahead.buckets
        )

    async def run(self) -> None:
        """Save a snapshot at each interval, for ever."""
        while True:
            await asyncio.sleep(self._every_seconds)
            await self.save()

    async def save(self, *, at_once: bool = False) -> None:
        """Write a snapshot. An error with the file is logged if it differs from the last one.

        Args:
            at_once: True at the stop, to leave no time to requests.
        """
        async with self._saving:
            if self._is_locked_later and not await self._is_locked_now():
                return
            begun_us = self._now_us()
            size = SnapshotSize()
            new = _beside(self._path, NEW)
            try:
                await self._write(
                    new, snapshot(self._store, self._now_us, size, self._put_off.records), at_once=at_once
                )
            except OSError as error:
                self.status.failed += 1
                self._fail("snapshot_failed", error)
                with suppress(OSError):
                    await asyncio.to_thread(new.unlink, missing_ok=True)
                return
            status = self.status
            if status.degraded_reason:
                _log.info("snapshot_written_again", file=str(self._path))
            status.taken += 1
            status.buckets, status.bytes, status.last_us, status.degraded_reason = (
                size.buckets,
                size.bytes,
                begun_us,
                "",
            )

    async def _is_locked_now(self) -> bool:
        try:
            await asyncio.to_thread(self.lock)
        except StateError as error:
            _log.error("snapshot_not_locked", file=str(self._path), reason=str(error))
        self.status.failed += self._lock is None
        return self._lock is not None

    async def _write(self, new: Path, pieces: Iterator[bytes], *, at_once: bool) -> None:
        file = await asyncio.to_thread(_create, new)
        try:
            waiting: list[bytes] = []
            count = 0
            while True:
                began = time.perf_counter()
                piece: bytes | None = b""
                while time.perf_counter() - began < PIECE_SECONDS and count < WRITE_BYTES:
                    piece = next(pieces, None)
                    if piece is None:
                        break
                    if piece:
                        waiting.append(piece)
                        count += len(piece)
                spent = time.perf_counter() - began
                if piece is None or count >= WRITE_BYTES:
                    await asyncio.to_thread(file.write, b"".join(waiting))
                    waiting.clear()
                    count = 0
                if piece is None:
                    break
                await asyncio.sleep(0 if at_once else spent / LOOP_SHARE)
            await asyncio.to_thread(_put_in_place, file, new, self._path)
        finally:
            await asyncio.to_thread(file.close)

    async def _set_aside(self, reason: str) -> None:
        aside = _beside(self._path, ASIDE)
        _log.error("snapshot_set_aside", file=str(self._path), to=str(aside), reason=reason)
        try:
            await asyncio.to_thread(self._path.replace, aside)
        except OSError as error:
            self._fail("snapshot_not_set_aside", error)

    def _fail(self, event: str, error: OSError) -> None:
        degraded_reason = error.strerror or str(error)
        if degraded_reason != self.status.degraded_reason:
            self.status.degraded_reason = degraded_reason
            _log.error(event, file=str(self._path), reason=degraded_reason)


async def _in_turns(pieces: Iterator[int]) -> int:
    """Run through the pieces, a slice at a time. Returns their sum."""
    total = 0
    time_slice = TimeSlice()
    for piece in pieces:
        total += piece
        await time_slice.rest_when_due()
    return total


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _open_checked(path: Path, *, may_be_cut: bool) -> tuple[BinaryIO, SnapshotInfo] | None:
    """None when there is no file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    try:
        return file, check(file, may_be_cut=may_be_cut)
    except BaseException:
        file.close()
        raise


def _create(path: Path) -> BinaryIO:
    """Create the file, readable for its owner alone: it contains values of requests."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb")


def _put_in_place(file: BinaryIO, new: Path, path: Path) -> None:
    """Replace the old file by the new one, and have both the file and its name on the disk."""
    file.flush()
    os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
