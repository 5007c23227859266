"""What is held out: a share of the rows, the same for the same seed, and nothing that is trained on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.datasets.split import NothingToHoldOut, held_out, row_content

rows_with_repeats = st.lists(st.integers(0, 12).map(lambda n: b"%d" % n), min_size=2, max_size=60)


@given(rows_with_repeats, st.floats(0.01, 0.9), st.integers(0, 9))
def test_equal_rows_are_on_one_side_and_neither_is_empty(rows: list[bytes], fraction: float, seed: int) -> None:
    if len(set(rows)) < 2:
        with pytest.raises(NothingToHoldOut):
            held_out(rows, fraction, seed)
        return
    held = held_out(rows, fraction, seed)
    kept = {row for position, row in enumerate(rows) if position not in held}
    assert held and kept
    assert not kept & {rows[position] for position in held}
    smallest = min(rows.count(row) for row in set(rows))
    assert len(held) <= max(round(fraction * len(rows)), smallest, 1)


@given(st.integers(20, 200), st.floats(0.05, 0.9), st.integers(0, 9))
def test_the_share_is_as_asked_where_no_row_repeats(count: int, fraction: float, seed: int) -> None:
    rows = [b"row %d" % n for n in range(count)]
    held = held_out(rows, fraction, seed)
    assert len(held) == max(1, round(fraction * count)) == len(held_out(rows[::-1], fraction, seed))
    assert {rows[position] for position in held} == {
        rows[::-1][position] for position in held_out(rows[::-1], fraction, seed)
    }


def test_a_row_is_the_same_in_any_order_of_its_fields() -> None:
    assert row_content({"a": 1, "b": "ü"}) == row_content({"b": "ü", "a": 1}) != row_content({"a": 1, "b": "u"})


def test_another_seed_holds_other_rows_out() -> None:
    rows = [b"row %d" % n for n in range(100)]
    assert held_out(rows, 0.2, 0) == held_out(rows, 0.2, 0) != held_out(rows, 0.2, 1)
