"""Changes of rules files, in all the ways in which people and programs make them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rules_source.loading import BROKEN, LOADED_WITHIN_S, Recorder, rules_of, rules_of_folder, rules_of_texts
from structlog.testing import capture_logs
from watchfiles._rust_notify import WatchfilesRustInternalError

from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.limiter.rules import RuleNode, Rules
from ratelimit_sidecar.rules_source import files as module
from ratelimit_sidecar.rules_source.files import RulesFiles, look_at

NEVER_S = 3_600.0
"""Without a look now and then: what is noticed was told by the kernel."""


def rules_files(path: Path, check_seconds: float) -> RulesFiles:
    """Those of a file or folder."""
    read = (lambda: rules_of_folder(path)) if path.is_dir() else (lambda: rules_of_texts({"it": path.read_text()}))
    return RulesFiles([path], read, check_seconds=check_seconds)


@contextlib.asynccontextmanager
async def followed(path: Path, *, check_seconds: float = NEVER_S) -> AsyncIterator[tuple[Recorder, RulesFiles]]:
    """The rules of a file or folder, loaded and watched."""
    files = rules_files(path, check_seconds)
    files.read_first()
    recorder = Recorder()
    running = asyncio.create_task(files.run(recorder.reloader))
    try:
        # Who loads is watching already.
        files.ask()
        await recorder.next_load()
        recorder.reloader.loads["success"] = 0
        yield recorder, files
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def move(path: Path, to: Path) -> None:
    path.rename(to)


def replace_file(file: Path, text: str) -> None:
    """As editors do it, and `mv`."""
    new = file.with_name("new")
    new.write_text(text)
    move(new, file)


def swap_link(link: Path, target: str) -> None:
    """Atomically, as Kubernetes and git-sync do it."""
    new = link.with_name("..data_tmp")
    new.symlink_to(target)
    move(new, link)


def make_config_map(volume: Path, text: str) -> None:
    """A ConfigMap as the kubelet lays it into a volume."""
    (volume / "..2026_01").mkdir(parents=True)
    (volume / "..2026_01/rules.yaml").write_text(text)
    (volume / "..data").symlink_to("..2026_01")
    (volume / "rules.yaml").symlink_to("..data/rules.yaml")


def update_config_map(volume: Path, text: str, version: str = "..2026_02") -> None:
    former = (volume / "..data").resolve()
    (volume / version).mkdir()
    (volume / version / "rules.yaml").write_text(text)
    swap_link(volume / "..data", version)
    shutil.rmtree(former)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one file."""
    inside = tmp_path / "rules"
    inside.mkdir()
    (inside / "a.yaml").write_text("one")
    return inside


async def test_a_file_written_anew_is_loaded(folder: Path) -> None:
    file = folder / "a.yaml"
    async with followed(file) as (recorder, _):
        file.write_text("two")
        assert await recorder.next_load() == ["two"]


async def test_a_file_replaced_by_a_rename_is_loaded_again_and_again(folder: Path) -> None:
    file = folder / "a.yaml"
    async with followed(file) as (recorder, _):
        for text in ("two", "three", "four"):
            replace_file(file, text)
            assert await recorder.next_load() == [text]


async def test_files_come_and_go_in_a_folder(folder: Path) -> None:
    async with followed(folder) as (recorder, _):
        (folder / "b.yaml").write_text("two")
        await recorder.until_loaded("one", "two")
        (folder / "a.yaml").unlink()
        assert await recorder.next_load() == ["two"]


async def test_the_first_file_of_an_empty_folder_is_loaded(tmp_path: Path) -> None:
    async with followed(tmp_path) as (recorder, _):
        (tmp_path / "b.yaml").write_text("two")
        assert await recorder.next_load() == ["two"]


async def test_a_folder_that_loses_all_its_files_keeps_its_rules_until_there_are_others(folder: Path) -> None:
    async with followed(folder) as (recorder, _):
        with capture_logs() as logs:
            (folder / "a.yaml").unlink()
            async with asyncio.timeout(LOADED_WITHIN_S):
                while recorder.reloader.rejected is None:  # noqa: ASYNC110 (nothing else tells of it)
                    await asyncio.sleep(0.01)
        assert [(log["file"], log["found"]) for log in logs if log["event"] == "rules_problem"] == [
            (str(folder), "no rules files any more")
        ]
        assert recorder.in_force == ["one"]
        (folder / "b.yaml").write_text("two")
        assert await recorder.next_load() == ["two"]


async def test_a_domain_that_loses_all_its_rules_keeps_them_as_its_file_may_be_half_written(folder: Path) -> None:
    emptied = Rules(rules_of("one").domains | {"two": RuleNode()})
    read = [rules_of("one", "two"), emptied, rules_of("one"), emptied]
    files = RulesFiles([folder], lambda: read.pop(0), check_seconds=NEVER_S)
    files.read_first()
    recorder = Recorder()
    running = asyncio.create_task(files.run(recorder.reloader))
    replace_file(folder / "a.yaml", "half written")
    while recorder.reloader.rejected is None:  # noqa: ASYNC110 (nothing else tells of it)
        await asyncio.sleep(0.01)
    (problem,) = recorder.reloader.rejected.problems
    assert (problem.file, problem.key, problem.found) == (str(folder), "domain two", "no rules any more")
    # Without the domain it is meant so.
    replace_file(folder / "a.yaml", "removed")
    assert await recorder.next_load() == ["one"]
    # It loses none when it comes again.
    replace_file(folder / "a.yaml", "there again")
    assert await recorder.next_load() == ["one", "two"]
    running.cancel()


async def test_a_domain_that_had_no_rules_from_the_start_keeps_none(folder: Path) -> None:
    read = [Rules({"two": RuleNode()}), Rules({"two": RuleNode()} | rules_of("one").domains)]
    files = RulesFiles([folder], lambda: read.pop(0), check_seconds=NEVER_S)
    files.read_first()
    recorder = Recorder()
    running = asyncio.create_task(files.run(recorder.reloader))
    replace_file(folder / "a.yaml", "more")
    assert await recorder.next_load() == ["one", "two"]
    running.cancel()


async def test_a_folder_that_was_always_empty_keeps_no_change_of_another_from_being_loaded(
    folder: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    files = RulesFiles([empty, folder], lambda: rules_of_folder(folder), check_seconds=NEVER_S)
    files.read_first()
    (folder / "a.yaml").write_text("two")
    recorder = Recorder()
    running = asyncio.create_task(files.run(recorder.reloader))
    assert await recorder.next_load() == ["two"]
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_an_updated_config_map_mounted_as_a_folder_is_loaded(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    make_config_map(volume, "one")
    async with followed(volume) as (recorder, _):
        update_config_map(volume, "two", "..2026_02")
        assert await recorder.next_load() == ["two"]
        update_config_map(volume, "three", "..2026_03")
        assert await recorder.next_load() == ["three"]


async def test_one_file_of_an_updated_config_map_is_loaded(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    make_config_map(volume, "one")
    async with followed(volume / "rules.yaml") as (recorder, _):
        update_config_map(volume, "two")
        assert await recorder.next_load() == ["two"]


async def test_a_link_on_the_way_that_is_swapped_leads_to_other_rules_which_are_watched_from_then_on(
    tmp_path: Path,
) -> None:
    for version in ("v1", "v2"):
        (tmp_path / "data" / version / "config").mkdir(parents=True)
        (tmp_path / "data" / version / "config/a.yaml").write_text(version)
    current = tmp_path / "data/current"
    current.symlink_to(tmp_path / "data/v1")
    async with followed(current / "config") as (recorder, _):
        swap_link(current, "v2")
        assert await recorder.next_load() == ["v2"]
        (tmp_path / "data/v2/config/a.yaml").write_text("v2, edited")
        assert await recorder.next_load() == ["v2, edited"]


async def test_a_linked_file_edited_where_it_is_is_loaded(tmp_path: Path, folder: Path) -> None:
    elsewhere = tmp_path / "elsewhere/b.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text("two")
    (folder / "b.yaml").symlink_to("../elsewhere/b.yaml")
    async with followed(folder) as (recorder, _):
        elsewhere.write_text("three")
        assert await recorder.next_load() == ["one", "three"]


async def test_a_folder_put_in_place_of_another_is_loaded_and_watched_from_then_on(folder: Path) -> None:
    other = folder.with_name("other")
    other.mkdir()
    (other / "a.yaml").write_text("two")
    async with followed(folder) as (recorder, _):
        move(folder, folder.with_name("old"))
        move(other, folder)
        await recorder.until_loaded("two")
        (folder / "a.yaml").write_text("three")
        assert await recorder.next_load() == ["three"]


async def test_a_folder_that_vanishes_and_comes_back_is_loaded(folder: Path) -> None:
    async with followed(folder) as (recorder, _):
        shutil.rmtree(folder)
        await recorder.until_loaded()
        make_config_map(folder, "back")
        await recorder.until_loaded("back")


async def test_bad_text_changes_nothing_and_the_next_good_one_is_loaded(folder: Path) -> None:
    file = folder / "a.yaml"
    async with followed(file) as (recorder, _):
        with capture_logs() as logs:
            replace_file(file, BROKEN)
            async with asyncio.timeout(20):
                while recorder.reloader.rejected is None:  # noqa: ASYNC110  # noqa: ASYNC110 (nothing else tells of it)
                    await asyncio.sleep(0.01)
        assert "rules_rejected" in [log["event"] for log in logs]
        assert recorder.in_force == ["one"]
        replace_file(file, "two")
        assert await recorder.next_load() == ["two"]
        assert recorder.reloader.rejected is None


async def test_a_change_between_the_first_reading_and_the_watch_is_loaded(folder: Path) -> None:
    file = folder / "a.yaml"
    recorder = Recorder()
    files = RulesFiles([file], lambda: rules_of_texts({"it": file.read_text()}), check_seconds=NEVER_S)
    assert sorted(files.read_first().domains) == ["one"]
    file.write_text("two")
    running = asyncio.create_task(files.run(recorder.reloader))
    assert await recorder.next_load() == ["two"]
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_a_change_during_the_first_reading_is_loaded(folder: Path) -> None:
    file = folder / "a.yaml"

    def read_and_edit() -> Rules:
        rules = rules_of_texts({"it": file.read_text()})
        file.write_text("two")
        return rules

    recorder = Recorder()
    files = RulesFiles([file], read_and_edit, check_seconds=NEVER_S)
    files.read_first()
    running = asyncio.create_task(files.run(recorder.reloader))
    assert await recorder.next_load() == ["two"]
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_bad_text_at_the_start_is_an_error(folder: Path) -> None:
    (folder / "a.yaml").write_text(BROKEN)
    with pytest.raises(ConfigError):
        RulesFiles([folder], lambda: rules_of_folder(folder)).read_first()


async def test_what_happens_without_changing_any_text_is_left_alone(folder: Path) -> None:
    file = folder / "a.yaml"
    async with followed(folder) as (recorder, _):
        os.utime(file)
        replace_file(file, "one")
        (folder / ".a.yaml.swp").write_text("an editor's")
        (folder / "subfolder").mkdir()
        await asyncio.sleep(0.5)
        file.write_text("two")
        assert await recorder.next_load() == ["two"]
        assert recorder.reloader.loads["success"] == 1


async def test_many_changes_in_a_row_are_loaded_once_they_are_over(folder: Path) -> None:
    async with followed(folder) as (recorder, _):
        for number in range(200):
            (folder / f"{number}.yaml").write_text(f"domain {number}")
        await recorder.until_loaded("one", *(f"domain {number}" for number in range(200)))
        assert recorder.reloader.loads["success"] < 5


async def test_who_asks_has_equal_text_loaded_again_at_once(folder: Path) -> None:
    async with followed(folder) as (recorder, files):
        for count in (1, 2):
            files.ask()
            assert await recorder.next_load() == ["one"]
            assert recorder.reloader.loads["success"] == count


async def test_what_happens_while_somebody_asks_is_not_overlooked(folder: Path) -> None:
    other = folder.with_name("other")
    other.mkdir()
    (other / "a.yaml").write_text("two")
    async with followed(folder) as (recorder, files):
        files.ask()
        move(folder, folder.with_name("old"))
        move(other, folder)
        await recorder.until_loaded("two")
        (folder / "a.yaml").write_text("three")
        assert await recorder.next_load() == ["three"]


async def test_without_events_files_are_looked_at_now_and_then(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_instances(*_: object, **__: object) -> None:
        raise WatchfilesRustInternalError("Too many open files (os error 24)")

    monkeypatch.setattr(module, "RustNotify", out_of_instances)
    with capture_logs() as logs:
        async with followed(folder, check_seconds=0.05) as (recorder, _):
            replace_file(folder / "a.yaml", "two")
            assert await recorder.next_load() == ["two"]
            (folder / "b.yaml").write_text("three")
            await recorder.until_loaded("three", "two")
    assert "Too many open files" in recorder.reloader.degraded_reason
    assert [log["event"] for log in logs].count("rules_not_watched") == 1


class Silent:
    """A watch on a file system that sends no events."""

    def __init__(self, _folders: object, **_: object) -> None: ...

    def watch(self, *, timeout_ms: int, stop_event: threading.Event, **_: object) -> None:
        stop_event.wait(timeout_ms / 1_000)

    def close(self) -> None: ...


class Failing(Silent):
    """A watch that fails when something happens."""

    def watch(self, *, timeout_ms: int, stop_event: threading.Event, **_: object) -> None:
        raise WatchfilesRustInternalError("no more")


@pytest.mark.parametrize("kind", [Silent, Failing])
async def test_a_watch_that_tells_of_nothing_only_delays_a_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Silent]
) -> None:
    monkeypatch.setattr(module, "RustNotify", kind)
    async with followed(folder, check_seconds=0.05) as (recorder, _):
        replace_file(folder / "a.yaml", "two")
        assert await recorder.next_load() == ["two"]
        assert recorder.reloader.degraded_reason == ""


async def test_without_events_a_file_is_not_loaded_while_it_is_being_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RustNotify", Silent)
    async with followed(folder, check_seconds=0.05) as (recorder, _):
        with (folder / "a.yaml").open("w") as slow:
            for part in ("two, ", "three, ", "four"):
                slow.write(part)
                slow.flush()
                await asyncio.sleep(0.06)
        assert await recorder.next_load() == ["two, three, four"]


async def test_when_it_is_cancelled_no_thread_is_left_waiting(folder: Path) -> None:
    async with followed(folder):
        await asyncio.sleep(0.05)
    async with asyncio.timeout(20):
        await asyncio.get_running_loop().shutdown_default_executor()


def test_the_folders_of_every_link_on_the_way_are_watched(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    make_config_map(volume, "one")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/way").symlink_to("../volume")
    (tmp_path / "start").symlink_to(tmp_path / "deep/way")
    look = look_at([tmp_path / "start/../start/rules.yaml"])
    assert look.folders == {tmp_path, tmp_path / "deep", volume, volume / "..2026_01"}


def test_a_folder_without_rules_is_watched_with_the_links_to_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links/rules").symlink_to("../empty")
    assert look_at([tmp_path / "links/rules"]).folders == {tmp_path / "links", tmp_path, tmp_path / "empty"}


def test_a_link_that_leads_to_itself_has_a_text_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to("b.yaml")
    (tmp_path / "b.yaml").symlink_to("a.yaml")
    file = tmp_path / "a.yaml"
    look = look_at([file])
    assert look.folders == {tmp_path}
    assert "symbolic links" in look.texts[file]


def test_of_a_path_that_leads_nowhere_the_last_folder_there_is_is_watched(tmp_path: Path) -> None:
    look = look_at([tmp_path / "no/such/rules"])
    assert look.folders == {tmp_path}


async def test_a_fifo_among_the_rules_is_refused_and_the_next_change_is_loaded(folder: Path) -> None:
    text = "domain: {}\ndescriptors:\n- {{key: user, rate_limit: {{unit: day, requests_per_unit: 5}}}}\n"
    (folder / "a.yaml").write_text(text.format("one"))
    files, recorder = RulesFiles([folder], lambda: load_rules([folder])), Recorder()
    files.read_first()
    running = asyncio.create_task(files.run(recorder.reloader))
    files.ask()
    await recorder.until_loaded("one")

    os.mkfifo(folder / "b.yaml")
    async with asyncio.timeout(LOADED_WITHIN_S):
        while recorder.reloader.rejected is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    [problem] = recorder.reloader.rejected.problems
    assert (problem.file, "a FIFO or a device" in problem.found) == (str(folder / "b.yaml"), True)

    (folder / "b.yaml").unlink()
    (folder / "b.yaml").write_text(text.format("two"))
    await recorder.until_loaded("one", "two")
    running.cancel()
    await asyncio.wait([running])
