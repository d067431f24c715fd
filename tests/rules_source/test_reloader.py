"""What becomes of attempts to load rules."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from observed import small_limiter
from rules_source.loading import BROKEN, LOADED_WITHIN_S, NOW_US, Recorder, rules_of, rules_of_texts
from structlog.testing import capture_logs

from ratelimit_sidecar.config.errors import ConfigError, Problem
from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.cycle_collector import MOST_YOUNG, young_objects
from ratelimit_sidecar.limiter.limiter import Retired
from ratelimit_sidecar.limiter.rules import Rule, Rules
from ratelimit_sidecar.rules_source import reloader as reloader_module
from ratelimit_sidecar.rules_source.reloader import MAX_PROBLEMS_LOGGED, LoadedRules, Reloader


def broken() -> Rules:
    return rules_of_texts({"a.yaml": BROKEN, "b.yaml": "fine", "c.yaml": BROKEN})


async def test_good_rules_are_put_in_force_and_counted() -> None:
    recorder = Recorder("files: a.yaml")
    with capture_logs() as logs:
        rejected = await recorder.reloader.load(lambda: rules_of("one", "two"), "7")
    assert rejected is None
    assert recorder.in_force == ["one", "two"]
    assert recorder.reloader.loaded == LoadedRules(2, "7", NOW_US)
    assert recorder.reloader.last_success_us == NOW_US
    assert recorder.reloader.loads == {"success": 1, "error": 0}
    assert [(log["event"], log["rules"], log["version"], log["source"]) for log in logs] == [
        ("rules_loaded", 2, "7", "files: a.yaml")
    ]


async def test_bad_rules_leave_the_old_ones_in_force_and_each_problem_is_logged_by_its_parts() -> None:
    recorder = Recorder("files: rules")
    await recorder.reloader.load(lambda: rules_of("old"))
    recorder.now_us += 5
    with capture_logs() as logs:
        rejected = await recorder.reloader.load(broken)
    assert recorder.in_force == ["old"]
    assert recorder.reloader.loaded == LoadedRules(1, "", NOW_US)
    assert recorder.reloader.loads == {"success": 1, "error": 1}
    assert rejected is not None
    assert rejected is recorder.reloader.rejected
    assert rejected.at_us == NOW_US + 5
    assert [problem.file for problem in rejected.problems] == ["a.yaml", "c.yaml"]
    parts = {
        "line": 3,
        "column": 5,
        "key": "domain",
        "found": "nothing of use",
        "expected": "a domain",
        "fix": "mend it",
    }
    assert logs == [
        {"event": "rules_problem", "log_level": "error", "file": "a.yaml", **parts},
        {"event": "rules_problem", "log_level": "error", "file": "c.yaml", **parts},
        {
            "event": "rules_rejected",
            "log_level": "error",
            "source": "files: rules",
            "version": "",
            "problems": 2,
            "in_force": "the rules from before",
        },
    ]


async def test_the_next_good_rules_end_the_rejection() -> None:
    recorder = Recorder()
    await recorder.reloader.load(broken)
    assert recorder.reloader.loaded is None
    await recorder.reloader.load(lambda: rules_of("new"))
    assert recorder.reloader.rejected is None
    assert recorder.reloader.loads == {"success": 1, "error": 1}


async def test_of_very_many_problems_only_the_first_are_logged() -> None:
    def hopeless() -> Rules:
        raise ConfigError([Problem("a.yaml", line, 1, "", "noise") for line in range(1, 10_000)])

    recorder = Recorder()
    with capture_logs() as logs:
        await recorder.reloader.load(hopeless)
    assert [log["event"] for log in logs] == ["rules_problem"] * MAX_PROBLEMS_LOGGED + ["rules_rejected"]
    assert logs[-1]["problems"] == 9_999


async def test_a_fault_in_reading_is_a_rejection_with_its_traceback_in_the_log() -> None:
    def faulty() -> Rules:
        raise ZeroDivisionError("secret")

    recorder = Recorder("files: a.yaml")
    await recorder.reloader.load(lambda: rules_of("old"))
    with capture_logs() as logs:
        rejected = await recorder.reloader.load(faulty)
    assert rejected is not None
    assert [problem.file for problem in rejected.problems] == ["files: a.yaml"]
    assert recorder.in_force == ["old"]
    assert (logs[0]["event"], logs[0]["exc_info"]) == ("rules_load_failed", True)


async def test_a_fault_in_putting_them_in_force_is_a_rejection_too() -> None:
    def cannot(_rules: Rules) -> None:
        raise RuntimeError

    reloader = Reloader(cannot, lambda: NOW_US, "somewhere", None)
    assert await reloader.load(lambda: rules_of("new")) is not None
    assert (reloader.loads, reloader.loaded) == ({"success": 0, "error": 1}, None)


async def test_the_loop_runs_while_rules_are_read() -> None:
    may_end = threading.Event()

    def slow() -> Rules:
        assert may_end.wait(20)
        return rules_of("new")

    recorder = Recorder()
    loading = asyncio.create_task(recorder.reloader.load(slow))
    await asyncio.sleep(0)
    may_end.set()
    assert await loading is None


@pytest.mark.parametrize("read", [lambda: rules_of("new"), broken])
async def test_while_rules_are_read_nothing_is_collected(read: Callable[[], Rules]) -> None:
    seen = []

    def observed() -> Rules:
        before = gc.get_stats()
        # As clients may have the loop do meanwhile.
        young_objects.note(MOST_YOUNG)
        seen.append(gc.isenabled() or gc.get_stats() != before)
        return read()

    gc.unfreeze()
    await Recorder().reloader.load(observed)
    assert seen == [False]
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


async def test_garbage_from_before_a_reload_is_not_kept_by_it() -> None:
    class Node:
        pass

    node = Node()
    node.itself = node  # type: ignore[attr-defined]
    freed = weakref.ref(node)
    del node
    await Recorder().reloader.load(lambda: rules_of("new"))
    assert freed() is None


async def test_old_rules_are_freed_although_nothing_is_collected(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "domain: shop\ndescriptors: [{key: user, value: a*, rate_limit: {unit: day, requests_per_unit: 1}}]\n"
    )
    limiter = small_limiter()
    reloader = Reloader(limiter.use_rules, lambda: NOW_US, "files", None)
    assert await reloader.load(lambda: load_rules([file])) is None
    # Counted, since weak references to objects of compiled classes crash the interpreter.
    old, unowned = limiter.rules.domains["shop"].wildcards["user"], object()
    assert sys.getrefcount(old) > sys.getrefcount(unowned)
    assert await reloader.load(lambda: rules_of("new")) is None
    assert sys.getrefcount(old) == sys.getrefcount(unowned)


class Owned(dict):
    """Remembers who emptied it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.emptied_by: list[threading.Thread] = []

    def popitem(self) -> tuple:
        self.emptied_by.append(threading.current_thread())
        return super().popitem()


async def test_what_old_rules_leave_behind_is_given_back_one_by_one_and_not_by_the_loop() -> None:
    plans, terms = Owned({b"a": None, b"b": None}), Owned({1: None})
    retired = Retired(rules_of("old"), plans, terms, {})
    reloader = Reloader(lambda _: retired, lambda: NOW_US, "files", None)
    assert await reloader.load(lambda: rules_of("new")) is None
    assert (len(plans.emptied_by), len(terms.emptied_by)) == (2, 1)
    assert threading.current_thread() not in {*plans.emptied_by, *terms.emptied_by}
    assert (retired.plans, retired.compiled, retired.rules) == ({}, {}, None)


async def test_domains_that_have_no_rules_any_more_are_told() -> None:
    """Rules that move to another file limit nothing in between."""
    retired = Retired(rules_of("old", "older", "kept"), {}, {}, {})
    with capture_logs() as logs:
        await Reloader(lambda _: retired, lambda: NOW_US, "files", None).load(lambda: rules_of("new", "kept"))
    [gone] = [log for log in logs if log["event"] == "domains_gone"]
    assert (gone["domains"], gone["count"], gone["log_level"]) == (["old", "older"], 2, "warning")


async def test_old_rules_are_taken_to_pieces_before_they_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def free_in_pieces(pieces: list[object]) -> None:
        names.extend(piece.name for piece in pieces if isinstance(piece, Rule))

    monkeypatch.setattr(reloader_module, "free_in_pieces", free_in_pieces)
    retired = Retired(rules_of("old", "older"), {}, {}, {})
    await Reloader(lambda _: retired, lambda: NOW_US, "files", None).load(lambda: rules_of("new"))
    assert sorted(names) == ["old.user", "older.user"]


async def test_new_rules_count_as_loaded_before_the_old_ones_are_given_back() -> None:
    loaded = []

    class Late(dict):
        def popitem(self) -> tuple:
            loaded.append(reloader.loaded)
            return super().popitem()

    retired = Retired(None, Late({b"a": None}), {}, {})
    reloader = Reloader(lambda _: retired, lambda: NOW_US, "files", None)
    await reloader.load(lambda: rules_of("one", "two"))
    assert loaded == [LoadedRules(2, "", NOW_US)]


def test_rules_in_force_from_the_start_count_as_loaded() -> None:
    used: list[Rules] = []
    reloader = Reloader(used.append, lambda: NOW_US, "files: a.yaml", rules_of("one", "two"))
    assert reloader.loaded == LoadedRules(2, "", NOW_US)
    assert reloader.loads == {"success": 1, "error": 0}
    assert used == []


def test_without_any_there_is_no_success() -> None:
    reloader = Reloader(lambda _: None, lambda: NOW_US, "an xDS server", None)
    assert reloader.last_success_us is None
    assert reloader.loads == {"success": 0, "error": 0}


async def test_rules_that_take_too_long_to_read_are_told_of_and_put_in_force_when_they_are_there() -> None:
    recorder = Recorder()
    recorder.reloader.slow_read_seconds = 0.01
    recorder.reloader.degraded_reason = "not watched"
    answers = threading.Event()

    def read() -> Rules:
        assert answers.wait(LOADED_WITHIN_S)
        return rules_of("one")

    loading = asyncio.create_task(recorder.reloader.load(read))
    async with asyncio.timeout(LOADED_WITHIN_S):
        while recorder.reloader.degraded_reason == "not watched":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert recorder.reloader.degraded_reason == "reading them has taken more than 0.01 s so far"
    answers.set()
    assert await recorder.next_load() == ["one"]
    await loading
    assert recorder.reloader.degraded_reason == "not watched"
