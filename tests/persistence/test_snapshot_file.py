"""The file: put in place whole, set aside when it is none, and never in the way of the sidecar."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import threading
from pathlib import Path

import pytest
from persistence.test_redis_store import until
from persistence.test_snapshot import AFTER, BEFORE, NOW_US, RULES, make_store, take
from structlog.testing import capture_logs

from ratelimit_sidecar.crdt.limit import AnyLimit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.persistence import snapshot_file
from ratelimit_sidecar.persistence.put_off import RECORD_BUCKETS
from ratelimit_sidecar.persistence.snapshot_file import SnapshotFile, StateError
from ratelimit_sidecar.persistence.snapshot_format import REPLICATED, SnapshotSize, _record, snapshot
from simulation.steps import done


def files_in(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and permissions."""
    return sorted((path.name, path.stat().st_size, path.stat().st_mode & 0o777) for path in folder.iterdir())


def snapshots_of(path: Path, store: Store) -> SnapshotFile:
    return SnapshotFile(path, store, lambda: NOW_US, RULES.local_limit_of_key, 0.01)


def store_with(*values: str) -> Store:
    store = make_store(BEFORE)
    for value in values:
        take(store, "fixed", value, 3, NOW_US)
    return store


async def test_what_was_saved_is_there_again(tmp_path: Path) -> None:
    file = tmp_path / "state"
    saved = snapshots_of(file, store_with("a", "b"))
    await saved.save()
    assert (saved.status.taken, saved.status.buckets) == (1, 2)
    assert files_in(tmp_path) == [("state", saved.status.bytes, 0o600)]
    after = make_store(AFTER)
    loaded = snapshots_of(file, after)
    await loaded.load()
    assert sorted(bucket.remaining for bucket in after) == [97, 97]
    assert (loaded.status.restored_buckets, loaded.status.last_us, loaded.status.degraded_reason) == (2, NOW_US, "")


async def test_buckets_that_have_no_room_are_told_of(tmp_path: Path) -> None:
    await snapshots_of(tmp_path / "state", store_with("a", "b", "c")).save()
    smaller = Store(AFTER, RULES.replicated_limit_of_key, max_buckets=2)
    with capture_logs() as logs:
        await snapshots_of(tmp_path / "state", smaller).load()
    assert [(log["event"], log["buckets"]) for log in logs if log["log_level"] == "warning"] == [
        ("buckets_without_room", 1)
    ]
    assert len(smaller) == 2


async def test_without_a_file_the_start_goes_on(tmp_path: Path) -> None:
    store = make_store(AFTER)
    await snapshots_of(tmp_path / "state", store).load()
    assert len(store) == 0


@pytest.mark.parametrize("content", [b"", b"something else altogether", b"rlsidec\x02newer"])
async def test_what_is_no_snapshot_is_set_aside_and_the_start_goes_on(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "state"
    file.write_bytes(content)
    store = make_store(AFTER)
    snapshots = snapshots_of(file, store)
    await snapshots.load()
    assert len(store) == 0
    assert not file.exists()
    assert (tmp_path / "state.unreadable").read_bytes() == content
    await snapshots.save()
    assert file.exists()


async def test_of_a_record_that_cannot_be_read_the_others_are_restored(tmp_path: Path) -> None:
    file = tmp_path / "state"
    pieces = snapshot(store_with(*map(str, range(2 * RECORD_BUCKETS))), lambda: NOW_US, SnapshotSize())
    magic, header, first, second, end = filter(None, pieces)
    assert first[0] == REPLICATED
    content = b"".join([magic, header, _record(REPLICATED, b"no Deltas"), second, end])
    file.write_bytes(content)
    after = make_store(AFTER)
    await snapshots_of(file, after).load()
    assert len(after) == RECORD_BUCKETS
    assert (tmp_path / "state.unreadable").read_bytes() == content


async def test_what_cannot_be_read_is_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.mkdir()
    snapshots = snapshots_of(file, make_store(AFTER))
    await snapshots.load()
    assert (tmp_path / "state.unreadable").is_dir()
    await snapshots.save()
    assert file.is_file()


async def test_what_cannot_be_read_for_a_moment_is_read_again(tmp_path: Path) -> None:
    file, kept = tmp_path / "state", tmp_path / "kept"
    await snapshots_of(kept, store_with("a", "b")).save()
    file.mkdir()
    after = make_store(AFTER)
    with capture_logs() as logs:
        loading = asyncio.create_task(snapshots_of(file, after).load())
        while not logs:  # noqa: ASYNC110
            await asyncio.sleep(0)
        file.rmdir()
        kept.rename(file)
        await loading
    assert [log["event"] for log in logs] == ["snapshot_read_again", "restored"]
    assert sorted(bucket.remaining for bucket in after) == [97, 97]


async def test_what_cannot_be_restored_for_a_reason_nobody_foresaw_is_set_aside(tmp_path: Path) -> None:
    def now_us() -> int:
        if file.exists():
            raise ZeroDivisionError
        return NOW_US

    file = tmp_path / "state"
    await snapshots_of(file, store_with("a", "b")).save()
    content = file.read_bytes()
    snapshots = SnapshotFile(file, make_store(AFTER), now_us, RULES.local_limit_of_key, 0.01)
    await snapshots.load()
    assert (tmp_path / "state.unreadable").read_bytes() == content
    await snapshots.save()
    assert file.read_bytes() != content


async def test_a_disk_that_is_full_leaves_the_old_snapshot_and_is_told_of_until_there_is_room(tmp_path: Path) -> None:
    file = tmp_path / "state"
    store = store_with("a")
    snapshots = snapshots_of(file, store)
    await snapshots.save()
    whole = file.read_bytes()
    for number in range(2_000):
        take(store, "month", f"more {number}", 1, NOW_US)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, limits[1]))
    try:
        await snapshots.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == whole
    assert (snapshots.status.failed, snapshots.status.degraded_reason) == (1, "File too large")
    assert files_in(tmp_path) == [("state", len(whole), 0o600)]
    await snapshots.save()
    assert snapshots.status.degraded_reason == ""
    assert snapshots.status.buckets == 2_001


async def test_a_file_belongs_to_one_process(tmp_path: Path) -> None:
    file = tmp_path / "state"
    first = snapshots_of(file, make_store(BEFORE))
    first.lock()
    with pytest.raises(StateError, match="another process keeps its state in it"):
        snapshots_of(file, make_store(AFTER)).lock()


async def test_on_a_disk_in_trouble_the_file_is_locked_once_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_file, "DISK_TROUBLE", {errno.ENOENT})
    file = tmp_path / "later" / "state"
    snapshots = snapshots_of(file, store_with("a"))
    snapshots.lock()
    await snapshots.save()
    assert (snapshots.status.failed, snapshots.status.degraded_reason) == (1, "No such file or directory")
    file.parent.mkdir()
    other = snapshots_of(file, make_store(BEFORE))
    other.lock()
    await snapshots.save()
    assert not file.exists()
    del other
    await snapshots.save()
    assert (snapshots.status.taken, snapshots.status.failed, snapshots.status.degraded_reason) == (1, 2, "")
    with pytest.raises(StateError, match="another process keeps its state in it"):
        snapshots_of(file, make_store(AFTER)).lock()


async def test_a_folder_that_is_not_there_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot write beside it: No such file or directory"):
        snapshots_of(tmp_path / "nowhere" / "state", make_store(BEFORE)).lock()


@pytest.mark.parametrize("turns", [1, 3, 10, 30, 100])
async def test_a_save_that_is_cancelled_leaves_the_old_snapshot(tmp_path: Path, turns: int) -> None:
    file = tmp_path / "state"
    store = store_with(*map(str, range(5_000)))
    snapshots = snapshots_of(file, store_with("a"))
    await snapshots.save()
    whole = file.read_bytes()
    slow = snapshots_of(file, store)
    saving = asyncio.create_task(slow.save())
    for _ in range(turns):
        await asyncio.sleep(0)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert file.read_bytes() == whole
    await slow.save(at_once=True)
    assert slow.status.buckets == 5_000


@pytest.mark.parametrize("pieces", [6, 8, 20])
async def test_of_a_snapshot_that_was_cut_short_the_start_has_what_was_nearly_used_up(
    tmp_path: Path, pieces: int
) -> None:
    file, store = tmp_path / "state", store_with("early")
    await snapshots_of(file, store).save()
    for number in range(20 * RECORD_BUCKETS):
        take(store, "fixed", f"invented {number}", 1, NOW_US)
        if number % (10 * RECORD_BUCKETS) == 0:
            take(store, "fixed", f"tenant {number}", 90, NOW_US)
    written = [piece for piece in snapshot(store, lambda: NOW_US, SnapshotSize()) if piece][:pieces]
    (tmp_path / "state.new").write_bytes(b"".join(written)[:-1])
    after = make_store(AFTER)
    snapshots = snapshots_of(file, after)
    await snapshots.load()
    assert len(after) >= (pieces - 3) * RECORD_BUCKETS - 2
    assert sorted(bucket.remaining for bucket in after if bucket.remaining != 99) == [10, 10, 97]
    assert snapshots.status.restored_buckets == 1
    await snapshots.save()
    assert [name for name, _, _ in files_in(tmp_path)] == ["state"]


@pytest.mark.parametrize("content", [b"", b"rlsidec\x01", b"rlsidec\x02newer", bytes(100_000)])
async def test_one_that_was_cut_short_with_nothing_in_it_is_in_nobodys_way(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "state"
    await snapshots_of(file, store_with("a")).save()
    (tmp_path / "state.new").write_bytes(content)
    after = make_store(AFTER)
    await snapshots_of(file, after).load()
    assert len(after) == 1
    assert file.exists()


class Start:
    """A sidecar that has started with a file: its rules and its clock may change."""

    def __init__(self, file: Path, rules: Rules = RULES, now_us: int = NOW_US) -> None:
        self.rules, self.now_us = rules, now_us
        self.store = make_store(AFTER, rules)
        self.snapshots = SnapshotFile(file, self.store, lambda: self.now_us, self.local_limit_of_key, 0.01)

    def local_limit_of_key(self, key: bytes) -> AnyLimit | None:
        return self.rules.local_limit_of_key(key)

    def use_rules(self, rules: Rules) -> None:
        self.rules, self.store.limit_of_key = rules, rules.replicated_limit_of_key
        self.snapshots.use_rules()

    def left(self) -> list[int]:
        return sorted(bucket.remaining for bucket in self.store)

    async def until_joined(self, buckets: int) -> None:
        joining = asyncio.create_task(self.snapshots.join_put_off())
        await until(lambda: len(self.store) == buckets and self.snapshots.is_all_joined)
        joining.cancel()
        await asyncio.wait([joining])


@pytest.fixture
async def file(tmp_path: Path) -> Path:
    """The state of a process that has ended: three buckets, one of them not replicated."""
    store = store_with("a", "b")
    take(store, "alone", "a", 30, NOW_US)
    await snapshots_of(tmp_path / "state", store).save()
    return tmp_path / "state"


async def test_what_has_no_rule_yet_stays_in_the_file_and_is_joined_when_its_rule_comes(file: Path) -> None:
    for _ in range(2):
        started = Start(file, Rules({}))
        await started.snapshots.load()
        assert len(started.store) == 0
        await started.snapshots.save()
    started.use_rules(RULES)
    await started.until_joined(3)
    assert started.left() == [10, 97, 97]
    assert started.store.drain_changes() == [], "what an earlier life took is not told again as this one's"
    await started.snapshots.save()
    again = Start(file)
    await again.snapshots.load()
    assert again.left() == [10, 97, 97]
    assert again.snapshots.is_all_joined


async def test_what_has_no_rule_yet_does_not_wait_for_a_snapshot_under_way_which_has_it_all(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Start(file, Rules({}))
    await started.snapshots.load()
    has_begun, may_go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    open_file = os.open

    def open_late(path: Path, *args: int) -> int:
        loop.call_soon_threadsafe(has_begun.set)
        assert may_go_on.wait(10)
        return open_file(path, *args)

    monkeypatch.setattr(os, "open", open_late)
    saving = asyncio.create_task(started.snapshots.save())
    await has_begun.wait()
    started.use_rules(RULES)
    await started.until_joined(3)
    assert started.left() == [10, 97, 97]
    # The buckets are gone before the snapshot comes to them.
    done(started.store.clear())
    may_go_on.set()
    await saving
    again = Start(file)
    await again.snapshots.load()
    assert again.left() == [10, 97, 97]


async def test_what_is_ahead_of_a_clock_stays_in_the_file_and_is_joined_once_the_clock_has_come_forward(
    file: Path,
) -> None:
    behind_us = NOW_US - 100_000_000_000
    started = Start(file, now_us=behind_us)
    with capture_logs() as logs:
        await started.snapshots.load()
    assert [(log["event"], log["ahead_of_clock"]) for log in logs if log["log_level"] == "warning"] == [
        ("buckets_put_off", 3)
    ]
    assert started.left() == [40, 100, 100]
    await started.snapshots.save()
    again = Start(file, now_us=behind_us)
    await again.snapshots.load()
    again.now_us = NOW_US
    await again.until_joined(3)
    assert again.left() == [10, 97, 97]


async def test_a_bucket_of_a_rule_that_is_gone_is_forgotten_in_the_end(file: Path) -> None:
    started = Start(file, Rules({}), now_us=NOW_US + 32 * 86_400_000_000)
    await started.snapshots.load()
    assert started.snapshots.is_all_joined


async def test_run_saves_again_and_again(tmp_path: Path) -> None:
    third = asyncio.Event()

    def now_us() -> int:
        if snapshots.status.taken >= 2:
            third.set()
        return NOW_US

    snapshots = SnapshotFile(tmp_path / "state", store_with("a"), now_us, RULES.local_limit_of_key, 0.01)
    running = asyncio.create_task(snapshots.run())
    await asyncio.wait_for(third.wait(), 10)
    running.cancel()
