"""How much of the event loop replication takes, and when."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from ratelimit_sidecar.replication.turns import LONG_TURN_NS, MAX_SHARE_NS, SHARE_NS, Turns


class Work:
    """Pieces of work that take as long as they say, and in which turn of the loop each was done."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.others_ns = 0
        """What requests take in each turn."""
        self.others_after: dict[int, int] = {}
        """And what from then on, when so many pieces have been done."""
        self.turns = Turns(lambda: self.now_ns)
        self.done: list[tuple[int, str]] = []
        self._turn = 0

    async def piece(self, name: str, takes_ns: int) -> None:
        def work() -> None:
            self.now_ns += takes_ns
            self.done.append((self._turn, name))
            self.others_ns = self.others_after.get(len(self.done), self.others_ns)

        await self.turns.do(work)

    async def at_once(self, *takes_ns: int) -> None:
        """So many pieces, named by their numbers."""
        self._count_turns()
        async with asyncio.TaskGroup() as tasks:
            for number, each_ns in enumerate(takes_ns):
                tasks.create_task(self.piece(str(number), each_ns))

    def of_turns(self) -> list[int]:
        """How many pieces were done in each turn that had some."""
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
    await work.at_once(SHARE_NS, 5 * SHARE_NS, SHARE_NS)
    assert [name for _, name in work.done] == ["0", "1", "2"]
    assert [after - before for (before, _), (after, _) in pairwise(work.done)] == [2, 2]


async def test_what_is_short_shares_a_turn(work: Work) -> None:
    await work.at_once(*[SHARE_NS // 4] * 4)
    assert work.of_turns() == [4]


async def test_the_piece_that_fills_the_share_is_the_last(work: Work) -> None:
    await work.at_once(*[SHARE_NS // 4 + 1] * 12)
    assert [name for _, name in work.done] == [str(number) for number in range(12)]
    assert work.of_turns() == [4, 4, 4]


@pytest.mark.parametrize(
    ("others_ns", "share_ns"),
    [(0, SHARE_NS), (SHARE_NS, SHARE_NS), (450_000, 450_000), (10_000_000, MAX_SHARE_NS)],
)
async def test_where_turns_are_long_the_share_is_larger_to_a_bound(work: Work, others_ns: int, share_ns: int) -> None:
    work.others_ns = others_ns
    piece_ns = 50_000
    first, pieces = SHARE_NS // piece_ns, share_ns // piece_ns
    await work.at_once(*[piece_ns] * (first + 4 * pieces))
    # The first come before others have had a turn.
    assert work.of_turns() == [first] + [pieces] * 4


@pytest.mark.parametrize(("others_ns", "left"), [(LONG_TURN_NS - 1, [2, 2, 2, 2]), (LONG_TURN_NS, [2, 1, 1, 1])])
async def test_others_have_one_turn_at_a_time_when_theirs_are_long(work: Work, others_ns: int, left: list[int]) -> None:
    work.others_ns = others_ns
    await work.at_once(*[MAX_SHARE_NS] * 5)
    assert [after - before for (before, _), (after, _) in pairwise(work.done)] == left


async def test_and_two_again_when_they_are_short_again(work: Work) -> None:
    work.others_ns = LONG_TURN_NS
    work.others_after[3] = 0
    await work.at_once(*[MAX_SHARE_NS] * 6)
    assert [after - before for (before, _), (after, _) in pairwise(work.done)] == [2, 1, 1, 2, 2]


async def test_a_share_that_was_not_filled_is_filled_later(work: Work) -> None:
    await work.piece("before", SHARE_NS - 1)
    await work.at_once(2, 1)
    assert work.of_turns() == [1, 1, 1]


async def test_a_piece_that_fails_tells_its_caller_and_lets_the_next_one_in(work: Work) -> None:
    def fail() -> None:
        work.now_ns += SHARE_NS
        raise ZeroDivisionError

    failed = await asyncio.gather(*[work.turns.do(fail) for _ in range(3)], return_exceptions=True)
    assert [type(each) for each in failed] == [ZeroDivisionError] * 3
    await work.piece("next", 1)
    assert [name for _, name in work.done] == ["next"]


async def test_a_piece_whose_caller_has_gone_is_not_done(work: Work) -> None:
    tasks = [asyncio.create_task(work.piece(name, SHARE_NS)) for name in "abc"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.wait(tasks)
    assert [name for _, name in work.done] == ["a", "c"]
    assert tasks[1].cancelled()
