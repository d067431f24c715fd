"""How much of the event loop replication takes, and when."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from ratelimit_sidecar.replication.turns import (
    FAIR_SHARE_NS,
    GROWTH,
    LONG_TURN_NS,
    MAX_SHARE_NS,
    SHARE_NS,
    Turns,
)


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

    async def pieces(self, name: str, number: int, *, is_urgent: bool = False) -> None:
        """Work in so many pieces, each of which takes a quarter of a share."""
        left = number

        def work() -> bool:
            nonlocal left
            left -= 1
            self.now_ns += SHARE_NS // 4
            self.done.append((self._turn, name))
            return left > 0

        await self.turns.do(work, is_urgent=is_urgent)

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
    [
        (0, SHARE_NS),
        (SHARE_NS, SHARE_NS),
        (400_000, 400_000),
        (800_000, 400_000),
        (1_500_000, FAIR_SHARE_NS),
        (3_000_000, 1_000_000),
        (100_000_000, MAX_SHARE_NS),
    ],
)
async def test_where_turns_stay_long_the_share_is_half_of_them_or_a_third_to_a_bound(
    work: Work, others_ns: int, share_ns: int
) -> None:
    work.others_ns = others_ns
    piece_ns = 50_000
    await work.at_once(*[piece_ns] * 4_000)
    *_, last, _ = work.of_turns()
    assert last == share_ns // piece_ns


async def test_a_long_turn_among_short_ones_is_not_followed_by_a_long_share(work: Work) -> None:
    piece_ns = SHARE_NS // 4
    work.others_after = {40: 4_000_000, 41: 0}
    await work.at_once(*[piece_ns] * 80)
    assert max(work.of_turns()) * piece_ns < FAIR_SHARE_NS


async def test_the_share_grows_by_one_part_at_a_time_and_shrinks_at_once(work: Work) -> None:
    work.others_ns = 400_000
    piece_ns = SHARE_NS // GROWTH
    first = [GROWTH, GROWTH, GROWTH + 1, GROWTH + 3]
    work.others_after[sum(first)] = SHARE_NS
    await work.at_once(*[piece_ns] * (sum(first) + 2 * GROWTH))
    assert work.of_turns() == [*first, GROWTH, GROWTH]


async def test_after_a_quiet_time_there_is_no_long_share(work: Work) -> None:
    work.others_ns = 15_000_000
    piece_ns = 50_000
    await work.at_once(*[piece_ns] * 4_000)
    assert work.of_turns()[-3] * piece_ns > 2 * FAIR_SHARE_NS
    work.others_ns = 0
    work.done.clear()
    await work.at_once(*[piece_ns] * 100)
    assert max(work.of_turns()) * piece_ns <= FAIR_SHARE_NS


async def test_what_comes_when_all_is_done_in_a_long_share_is_done_too(work: Work) -> None:
    work.others_ns = 15_000_000
    await work.at_once(*[50_000] * 4_000)
    for _ in range(20):
        await asyncio.wait_for(work.piece("late", 50_000), 5.0)


async def test_others_have_one_turn_at_a_time_when_theirs_stay_long(work: Work) -> None:
    work.others_ns = 2 * LONG_TURN_NS
    await work.at_once(*[MAX_SHARE_NS] * 200)
    left = [after - before for (before, _), (after, _) in pairwise(work.done)]
    assert left == sorted(left, reverse=True)
    assert (left[0], left[-1]) == (2, 1)


async def test_and_two_again_when_they_are_short_again(work: Work) -> None:
    work.others_ns = 2 * LONG_TURN_NS
    work.others_after[200] = 0
    await work.at_once(*[MAX_SHARE_NS] * 230)
    left = [after - before for (before, _), (after, _) in pairwise(work.done)]
    assert (left[150], left[-1]) == (1, 2)


async def test_of_work_in_many_pieces_one_is_done_at_a_time(work: Work) -> None:
    await work.piece("first", SHARE_NS)
    await asyncio.gather(work.pieces("a", 3), work.pieces("b", 1), work.pieces("c", 4))
    assert "".join(name for _, name in work.done[1:]) == "abcacacc"


async def test_every_second_piece_is_one_of_urgent_work(work: Work) -> None:
    await work.piece("first", SHARE_NS)
    await asyncio.gather(*[work.pieces(name, 2) for name in "abc"], work.pieces("u", 4, is_urgent=True))
    assert "".join(name for _, name in work.done[1:]) == "aubucuaubc"


async def test_work_in_pieces_fills_a_share_and_leaves_two_turns(work: Work) -> None:
    await asyncio.gather(work.at_once(), work.pieces("a", 10))
    assert work.of_turns() == [4, 4, 2]


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
