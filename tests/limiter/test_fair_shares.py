from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.limiter.fair_shares import Group, fair_level, grouped, rounded_want

TOTALS = st.integers(0, 2**70)
WANTS = st.lists(st.integers(0, 2**64), min_size=1, max_size=30)


def shares(total: int, wants: list[int]) -> list[int]:
    level = fair_level(total, grouped(wants))
    return [level.share(want) for want in wants]


@given(TOTALS, WANTS)
def test_the_sum_is_the_total_less_what_rounding_leaves(total: int, wants: list[int]) -> None:
    assert total - len(wants) < sum(shares(total, wants)) <= total


@given(TOTALS, WANTS)
def test_who_lacks_something_gets_as_much_as_anybody(total: int, wants: list[int]) -> None:
    given_ = shares(total, wants)
    for want, share in zip(wants, given_, strict=True):
        if share < want:
            assert share == max(given_)


@given(TOTALS, WANTS)
def test_who_wants_more_gets_no_less(total: int, wants: list[int]) -> None:
    by_want = sorted(zip(wants, shares(total, wants), strict=True))
    assert [share for _, share in by_want] == sorted(share for _, share in by_want)


@given(TOTALS, WANTS)
def test_who_wants_no_more_than_its_part_gets_all_of_it(total: int, wants: list[int]) -> None:
    for want, share in zip(wants, shares(total, wants), strict=True):
        if want <= total // len(wants):
            assert share >= want


@given(TOTALS, st.integers(0, 2**64), WANTS)
def test_nobody_loses_when_there_is_more_to_divide(total: int, more: int, wants: list[int]) -> None:
    pairs = zip(shares(total, wants), shares(total + more, wants), strict=True)
    assert all(before <= after for before, after in pairs)


@given(TOTALS, st.integers(0, 2**64), WANTS)
def test_when_one_wants_more_it_gets_no_less_and_the_others_no_more(total: int, more: int, wants: list[int]) -> None:
    before, after = shares(total, wants), shares(total, [wants[0] + more, *wants[1:]])
    # What rounding leaves can be somebody's.
    assert before[0] <= after[0] + 1
    assert all(one + 1 >= other for one, other in zip(before[1:], after[1:], strict=True))


@given(TOTALS, WANTS)
def test_groups_are_divided_among_like_those_in_them(total: int, wants: list[int]) -> None:
    assert fair_level(total, grouped(wants)) == fair_level(total, [Group(want, 1) for want in wants])


def test_ten_to_one_to_one_is_cut_at_the_level_that_is_left() -> None:
    assert shares(300, [1_000, 100, 40]) == [160, 100, 40]
    assert shares(300, [1_000, 100, 100]) == [100, 100, 100]


def test_what_nobody_wants_is_spread_evenly() -> None:
    assert shares(300, [100, 10, 10]) == [160, 70, 70]


def test_without_anybody_nobody_gets_anything() -> None:
    assert fair_level(300, []).share(0) == 0


@given(st.integers(0, 2**70))
def test_a_want_is_rounded_up_by_less_than_a_thirty_second(want: int) -> None:
    assert want <= rounded_want(want) <= want + want // 32
    assert rounded_want(rounded_want(want)) == rounded_want(want)
