"""How much of the event loop replication takes, and when."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from ratelimit_sidecar.replication.scheduler import (
    FAIR_QUANTUM_NS,
    GROWTH,
    LARGE_FRAME_BYTES,
    LEAST_QUANTUM_NS,
    LONG_TURN_NS,
    MAX_LARGE_FRAMES,
    MAX_QUANTUM_NS,
    Scheduler,
)


class Work:
    """Steps that take as long as they say, and in which turn of the loop each was done."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.others_ns = 0
        """What requests take in each turn."""
        self.others_after: dict[int, int] = {}
        """And what from then on, when so many steps have been done."""
        self.scheduler = Scheduler(lambda: self.now_ns)
        self.done: list[tuple[int, str]] = []
        self._turn = 0

    async def step(self, name: str, takes_ns: int) -> None:
        def job() -> Iterator[None]:
            self.now_ns += takes_ns
            self.done.append((self._turn, name))
            self.others_ns = self.others_after.get(len(self.done), self.others_ns)
            return
            yield

        await self.scheduler.run(job())

    async def steps(self, name: str, number: int, *, is_urgent: bool = False) -> None:
        """Work in so many steps, each of which takes a quarter of a quantum."""

        def job() -> Iterator[None]:
            for left in reversed(range(number)):
                self.now_ns += LEAST_QUANTUM_NS // 4
                self.done.append((self._turn, name))
                if left:
                    yield

        await self.scheduler.run(job(), is_urgent=is_urgent)

    async def at_once(self, *takes_ns: int) -> None:
        """So many steps, named by their numbers."""
        self._count_turns()
        async with asyncio.TaskGroup() as tasks:
            for number, each_ns in enumerate(takes_ns):
                tasks.create_task(self.step(str(number), each_ns))

    def of_turns(self) -> list[int]:
        """How many steps were done in each turn that had some."""
        turns = [turn for turn, _ in self.done]
        return [turns.count(turn) for turn in sorted(set(turns))]

    def _count_turns(self) -> None:
        self._turn += 1
        self.now_ns += self.others_ns
        asyncio.get_running_loop().call_soon(self._count_turns)


@pytest.fixture
def work() -> Work:
    return Work()


async def test_what_is_long_leaves_two_turns_to_others_and_comes_in_order(work: Work) -> None:
    await work.at_once(LEAST_QUANTUM_NS, 5 * LEAST_QUANTUM_NS, LEAST_QUANTUM_NS)
    assert [name for _, name in work.done] == ["0", "1", "2"]
    assert [after - before for (before, _), (after, _) in pairwise(work.done)] == [2, 2]


async def test_what_is_short_shares_a_turn(work: Work) -> None:
    await work.at_once(*[LEAST_QUANTUM_NS // 4] * 4)
    assert work.of_turns() == [4]


async def test_the_step_that_uses_up_the_quantum_is_the_last(work: Work) -> None:
    await work.at_once(*[LEAST_QUANTUM_NS // 4 + 1] * 12)
    assert [name for _, name in work.done] == [str(number) for number in range(12)]
    assert work.of_turns() == [4, 4, 4]


@pytest.mark.parametrize(
    ("others_ns", "quantum_ns"),
    [
        (0, LEAST_QUANTUM_NS),
        (LEAST_QUANTUM_NS, LEAST_QUANTUM_NS),
        (400_000, 400_000),
        (800_000, 400_000),
        (1_500_000, FAIR_QUANTUM_NS),
        (3_000_000, 1_000_000),
        (100_000_000, MAX_QUANTUM_NS),
    ],
)
async def test_where_turns_stay_long_the_quantum_is_half_of_them_or_a_third_to_a_bound(
    work: Work, others_ns: int, quantum_ns: int
) -> None:
    work.others_ns = others_ns
    step_ns = 50_000
    await work.at_once(*[step_ns] * 4_000)
    *_, last, _ = work.of_turns()
    assert last == quantum_ns // step_ns


async def test_a_long_turn_among_short_ones_is_not_followed_by_a_long_quantum(work: Work) -> None:
    step_ns = LEAST_QUANTUM_NS // 4
    work.others_after = {40: 4_000_000, 41: 0}
    await work.at_once(*[step_ns] * 80)
    assert max(work.of_turns()) * step_ns < FAIR_QUANTUM_NS


async def test_the_quantum_grows_by_one_part_at_a_time_and_shrinks_at_once(work: Work) -> None:
    work.others_ns = 400_000
    step_ns = LEAST_QUANTUM_NS // GROWTH
    first = [GROWTH, GROWTH, GROWTH + 1, GROWTH + 3]
    work.others_after[sum(first)] = LEAST_QUANTUM_NS
    await work.at_once(*[step_ns] * (sum(first) + 2 * GROWTH))
    assert work.of_turns() == [*first, GROWTH, GROWTH]


async def test_after_a_quiet_time_there_is_no_long_quantum(work: Work) -> None:
    work.others_ns = 15_000_000
    step_ns = 50_000
    await work.at_once(*[step_ns] * 4_000)
    assert work.of_turns()[-3] * step_ns > 2 * FAIR_QUANTUM_NS
    work.others_ns = 0
    work.done.clear()
    await work.at_once(*[step_ns] * 100)
    assert max(work.of_turns()) * step_ns <= FAIR_QUANTUM_NS


async def test_what_comes_when_all_is_done_in_a_long_quantum_is_done_too(work: Work) -> None:
    work.others_ns = 15_000_000
    await work.at_once(*[50_000] * 4_000)
    for _ in range(20):
        await asyncio.wait_for(work.step("late", 50_000), 5.0)


async def test_others_have_one_turn_at_a_time_when_theirs_stay_long(work: Work) -> None:
    work.others_ns = 2 * LONG_TURN_NS
    await work.at_once(*[MAX_QUANTUM_NS] * 200)
    left = [after - before for (before, _), (after, _) in pairwise(work.done)]
    assert left == sorted(left, reverse=True)
    assert (left[0], left[-1]) == (2, 1)


async def test_and_two_again_when_they_are_short_again(work: Work) -> None:
    work.others_ns = 2 * LONG_TURN_NS
    work.others_after[200] = 0
    await work.at_once(*[MAX_QUANTUM_NS] * 230)
    left = [after - before for (before, _), (after, _) in pairwise(work.done)]
    assert (left[150], left[-1]) == (1, 2)


async def test_of_work_in_many_steps_one_is_done_at_a_time(work: Work) -> None:
    await work.step("first", LEAST_QUANTUM_NS)
    await asyncio.gather(work.steps("a", 3), work.steps("b", 1), work.steps("c", 4))
    assert "".join(name for _, name in work.done[1:]) == "abcacacc"


async def test_every_second_step_is_one_of_urgent_work(work: Work) -> None:
    await work.step("first", LEAST_QUANTUM_NS)
    await asyncio.gather(*[work.steps(name, 2) for name in "abc"], work.steps("u", 4, is_urgent=True))
    assert "".join(name for _, name in work.done[1:]) == "aubucuaubc"


async def test_work_in_steps_uses_up_a_quantum_and_leaves_two_turns(work: Work) -> None:
    await asyncio.gather(work.at_once(), work.steps("a", 10))
    assert work.of_turns() == [4, 4, 2]


async def test_a_quantum_that_was_not_used_up_is_used_later(work: Work) -> None:
    await work.step("before", LEAST_QUANTUM_NS - 1)
    await work.at_once(2, 1)
    assert work.of_turns() == [1, 1, 1]


async def test_a_step_that_fails_tells_its_caller_and_lets_the_next_one_in(work: Work) -> None:
    def fail() -> Iterator[None]:
        work.now_ns += LEAST_QUANTUM_NS
        raise ZeroDivisionError
        yield

    failed = await asyncio.gather(*[work.scheduler.run(fail()) for _ in range(3)], return_exceptions=True)
    assert [type(each) for each in failed] == [ZeroDivisionError] * 3
    await work.step("next", 1)
    assert [name for _, name in work.done] == ["next"]


async def test_a_step_whose_caller_has_gone_is_not_done(work: Work) -> None:
    tasks = [asyncio.create_task(work.step(name, LEAST_QUANTUM_NS)) for name in "abc"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.wait(tasks)
    assert [name for _, name in work.done] == ["a", "c"]
    assert tasks[1].cancelled()


def test_no_job_is_made_and_then_not_done() -> None:
    """A generator that nobody iterates does nothing, and no type checker says so."""
    root = Path(__file__).parents[2]
    folders = (
        "ratelimit_sidecar/replication",
        "ratelimit_sidecar/persistence",
        "tests/replication",
        "simulation",
        "tests/simulation",
    )
    for path in [each for folder in folders for each in (root / folder).glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                called = node.value.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                assert not name.endswith("_steps"), f"{path}:{node.lineno}"


async def test_only_a_few_large_frames_are_handled_at_once_and_small_ones_do_not_wait_for_them() -> None:
    at_work, most, small = 0, 0, 0
    scheduler = Scheduler()

    def large() -> Iterator[None]:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        for _ in range(100):
            yield
        at_work -= 1

    def little() -> Iterator[None]:
        nonlocal small
        small = at_work
        return
        yield

    async with asyncio.TaskGroup() as tasks:
        for _ in range(3 * MAX_LARGE_FRAMES):
            tasks.create_task(scheduler.handle(LARGE_FRAME_BYTES + 1, large()))
        tasks.create_task(scheduler.handle(LARGE_FRAME_BYTES, little()))
    assert (at_work, most) == (0, MAX_LARGE_FRAMES)
    assert small == MAX_LARGE_FRAMES
