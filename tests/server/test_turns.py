"""How the event loop's time is shared among those that have much to do."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import pytest
from server.work_clock import WorkClock
from young import collected_when_told

from ratelimit_sidecar.server.turn_event import TurnEvent
from ratelimit_sidecar.server.turns import QUANTUM_NS, StepQueue


class Work:
    """Steps, and the turn of the loop in which each was done."""

    def __init__(self) -> None:
        self.clock = WorkClock()
        self.turns = self.clock.turns
        self.done: list[tuple[int, str]] = []
        self._turn = 0

    def step(self, name: str, part: float = 0.25) -> Callable[[], None]:
        def do() -> None:
            self.clock.work(part)
            self.done.append((self._turn, name))

        return do

    def join(self, queue: StepQueue, name: str, steps: int, part: float = 0.25) -> None:
        for _ in range(steps):
            self.turns.join(queue, self.step(name, part))

    async def until_done(self, steps: int) -> None:
        async with asyncio.timeout(30):
            while len(self.done) < steps:
                self._turn += 1
                await asyncio.sleep(0)

    def by_turn(self) -> list[str]:
        """The names of the steps of each turn that had some."""
        numbers = sorted({turn for turn, _ in self.done})
        return ["".join(name for turn, name in self.done if turn == number) for number in numbers]


@pytest.fixture
def work() -> Work:
    return Work()


async def test_in_each_turn_of_the_loop_steps_take_one_quantum(work: Work) -> None:
    work.join(StepQueue(), "a", 10)
    await work.until_done(10)
    assert work.by_turn() == ["aaaa", "aaaa", "aa"]


async def test_the_step_that_exceeds_a_quantum_is_the_last_of_its_turn(work: Work) -> None:
    work.join(StepQueue(), "a", 3, part=2.5)
    await work.until_done(3)
    assert work.by_turn() == ["a", "a", "a"]


async def test_queues_take_turns_however_many_steps_each_has(work: Work) -> None:
    many, few = StepQueue(), StepQueue()
    work.join(many, "m", 12)
    work.join(few, "f", 5)
    await work.until_done(17)
    assert work.by_turn() == ["mmmm", "ffff", "mmmm", "fmmm", "m"]


async def test_however_many_queues_there_are_all_of_them_have_one_quantum(work: Work) -> None:
    for name in "abcdefghi":
        work.join(StepQueue(), name, 1)
    await work.until_done(9)
    assert work.by_turn() == ["abcd", "efgh", "i"]


async def test_a_step_may_add_another_behind_those_that_wait(work: Work) -> None:
    queue = StepQueue()

    def first() -> None:
        work.step("1")()
        work.join(queue, "3", 1)

    work.turns.join(queue, first)
    work.join(queue, "2", 1)
    await work.until_done(3)
    assert work.by_turn() == ["123"]


async def test_a_step_that_fails_holds_nobody_up(work: Work) -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context["exception"]))
    failing, other = StepQueue(), StepQueue()

    def fail() -> None:
        raise ValueError

    work.turns.join(failing, fail)
    work.join(other, "b", 1)
    await work.until_done(1)
    work.join(failing, "a", 1)
    await work.until_done(2)
    assert work.by_turn() == ["b", "a"]
    assert [type(failure) for failure in failures] == [ValueError]


async def test_what_a_step_leaves_to_the_loop_counts_as_far_as_it_is_charged(work: Work) -> None:
    queue = StepQueue()

    def step() -> None:
        work.step("a", 0)()
        work.turns.charge(QUANTUM_NS // 2)

    for _ in range(5):
        work.turns.join(queue, step)
    await work.until_done(5)
    assert work.by_turn() == ["aa", "aa", "a"]


async def test_who_uses_up_a_quantum_at_once_in_one_turn_has_to_wait_for_the_next(work: Work) -> None:
    queue, other = StepQueue(), StepQueue()
    work.turns.note(queue, QUANTUM_NS)
    # That may have been in many turns.
    assert not queue.is_waiting
    work.turns.note(queue, QUANTUM_NS - 1)
    assert not queue.is_waiting
    work.turns.note(queue, 1)
    assert queue.is_waiting
    assert not other.is_waiting
    for is_waiting in (True, False):
        await asyncio.sleep(0)
        assert queue.is_waiting == is_waiting


async def test_who_uses_less_in_each_turn_never_waits(work: Work) -> None:
    queue = StepQueue()
    for _ in range(20):
        work.turns.note(queue, QUANTUM_NS - 1)
        assert not queue.is_waiting
        await asyncio.sleep(0)


async def test_as_long_as_steps_wait_nothing_is_done_at_once(work: Work) -> None:
    queue = StepQueue()
    work.join(queue, "a", 2, part=1)
    assert queue.is_waiting
    await work.until_done(1)
    assert queue.is_waiting
    await work.until_done(2)
    # Nor in the turn after that: who comes then comes behind those who have come before, and in front of nobody.
    assert queue.is_waiting
    await asyncio.sleep(0)
    assert not queue.is_waiting


async def test_who_comes_just_after_the_last_step_is_next(work: Work) -> None:
    queue = StepQueue()
    work.join(queue, "a", 1)
    await work.until_done(1)
    work.join(queue, "b", 1)
    await work.until_done(2)
    assert work.by_turn() == ["a", "b"]
    for is_waiting in (True, False):
        assert queue.is_waiting == is_waiting
        await asyncio.sleep(0)


async def test_who_is_to_be_told_is_told_once_when_a_queue_begins_to_wait(work: Work) -> None:
    queue = StepQueue()
    queue.on_waiting.add(work.step("told", 0))
    queue.on_waiting.add(lambda: work.join(queue, "joins", 1))
    work.join(queue, "a", 3)
    assert work.by_turn() == ["told"]
    await work.until_done(5)
    assert [name for _, name in work.done] == ["told", "a", "joins", "a", "a"]


# Tasks


async def test_tasks_go_on_within_the_quantum_of_their_turn(work: Work) -> None:
    queue = StepQueue()

    async def run(name: str) -> None:
        signal = TurnEvent(work.turns, queue)
        for _ in range(3):
            await signal.turn()
            work.step(name)()

    tasks = [asyncio.create_task(run(name)) for name in "abcdef"]
    await work.until_done(18)
    assert work.by_turn() == ["abcd", "efab", "cdef", "abcd", "ef"]
    await asyncio.wait(tasks)


async def test_a_signal_wakes_its_task_once_however_often_it_is_set(work: Work) -> None:
    signal = TurnEvent(work.turns, StepQueue())
    # Before it waits, too.
    signal.set()
    wakes = 0

    async def run() -> None:
        nonlocal wakes
        while True:
            await signal.wait()
            wakes += 1

    task = asyncio.create_task(run())
    for expected in range(1, 4):
        signal.set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert wakes == expected
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("is_set", [False, True])
async def test_a_task_that_waits_can_be_cancelled_and_others_go_on(work: Work, is_set: bool) -> None:
    queue = StepQueue()
    signal, other = TurnEvent(work.turns, queue), TurnEvent(work.turns, queue)
    waiting, going_on = asyncio.create_task(signal.wait()), asyncio.create_task(other.wait())
    await asyncio.sleep(0)
    if is_set:
        signal.set()
    waiting.cancel()
    other.set()
    async with asyncio.timeout(30):
        await asyncio.wait([waiting, going_on])
    assert waiting.cancelled()
    assert not going_on.cancelled()
    # A task that waits afterwards waits for a signal of its own.
    again = asyncio.create_task(signal.wait())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not again.done()
    signal.set()
    async with asyncio.timeout(30):
        await again


async def test_a_task_that_is_cancelled_while_it_waits_leaves_nothing_to_the_cycle_collector(work: Work) -> None:
    with collected_when_told():
        before = [found for found in gc.get_objects() if isinstance(found, asyncio.Future)]
        tasks = [asyncio.create_task(TurnEvent(work.turns, StepQueue()).wait()) for _ in range(10)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        del task, tasks
        await asyncio.sleep(0)
        after = [found for found in gc.get_objects() if isinstance(found, asyncio.Future)]
        left = [found for found in after if found.cancelled() and found not in before]
    assert left == []
