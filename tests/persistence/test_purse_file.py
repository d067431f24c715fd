"""Purses are kept over a clean stop, and used once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from zlib import crc32

import pytest

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.persistence import purse_file
from ratelimit_sidecar.persistence.purse_file import (
    WITHOUT_AGE,
    BadPurses,
    PurseFile,
    holder_of,
    take_purses,
    write_purses,
)

AGE_US = 86_400_000_000
KEPT = {b"one": 5 << 32, b"\x00two \xff": -7, b"most": 1 << 62}


def test_what_was_written_is_there_once(tmp_path: Path) -> None:
    file = tmp_path / "state.purses"
    write_purses(file, "a", KEPT.items(), AGE_US)
    assert file.stat().st_mode & 0o777 == 0o600
    assert take_purses(file, "a") == (KEPT, AGE_US)
    assert take_purses(file, "a") == ({}, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_version_before_is_used_but_has_no_age(tmp_path: Path) -> None:
    file = tmp_path / "state.purses"
    write_purses(file, "a", KEPT.items(), AGE_US)
    raw = file.read_bytes()
    before = WITHOUT_AGE + raw[len(WITHOUT_AGE) : 42] + raw[50:-4]
    file.write_bytes(before + crc32(before).to_bytes(4, "little"))
    assert take_purses(file, "a") == (KEPT, 0)


def test_another_node_or_membership_gets_nothing_and_leaves_nothing_to_the_first(tmp_path: Path) -> None:
    file = tmp_path / "state.purses"
    first, *others = [
        holder_of(node, Membership(epoch, weights))
        for node, epoch, weights in (
            ("a", 1, {"a": 1, "b": 1}),
            ("b", 1, {"a": 1, "b": 1}),
            ("a", 2, {"a": 1, "b": 1}),
            ("a", 1, {"a": 1, "b": 2}),
        )
    ]
    for holder in others:
        write_purses(file, first, KEPT.items(), AGE_US)
        with pytest.raises(BadPurses, match="another"):
            take_purses(file, holder)
        assert take_purses(file, first) == ({}, 0)
    write_purses(file, first, KEPT.items(), AGE_US)
    assert take_purses(file, holder_of("a", Membership(1, {"b": 1, "a": 1}))) == (KEPT, AGE_US)


def test_without_members_a_file_from_before_is_deleted_and_none_is_written(tmp_path: Path) -> None:
    purses = PurseFile(tmp_path / "state", None)
    write_purses(tmp_path / "state.purses", holder_of("a", Membership(1, {"a": 1})), KEPT.items(), AGE_US)
    asyncio.run(purses.restore())
    asyncio.run(purses.keep(0, has_rules=True))
    assert list(tmp_path.iterdir()) == []


def test_while_the_file_cannot_be_deleted_this_node_has_no_home_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purse_file, "RETRY_SECONDS", 0.01)
    shares = Shares(Membership(1, {"a": 1}), "a", 0)
    file = tmp_path / "state.purses"
    purses = PurseFile(tmp_path / "state", Ledger(shares, Origin("a", 1), lambda _key: None))
    file.mkdir()

    async def restore_and_run() -> None:
        await purses.restore()
        assert (shares.home_fraction(0), purses.degraded_reason) == (0, "Is a directory")
        running = asyncio.create_task(purses.run())
        await asyncio.sleep(0.05)
        assert not running.done()
        file.rmdir()
        write_purses(file, "another", KEPT.items(), AGE_US)
        await running

    asyncio.run(restore_and_run())
    assert not file.exists()
    assert (shares.home_fraction(0), purses.degraded_reason) == (1, "")


def test_a_file_that_is_torn_damaged_or_foreign_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "state.purses"
    write_purses(file, "a", KEPT.items(), AGE_US)
    raw = file.read_bytes()
    bad = [raw[:length] for length in range(len(raw))]
    bad += [raw[:at] + bytes((raw[at] ^ 1,)) + raw[at + 1 :] for at in range(len(raw))]
    for each in (*bad, b"text", raw + b"\0"):
        file.write_bytes(each)
        with pytest.raises(BadPurses):
            take_purses(file, "a")


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "state.purses").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_purses(tmp_path / "state.purses", "a", KEPT.items(), AGE_US)
    assert [path.name for path in tmp_path.iterdir()] == ["state.purses"]
