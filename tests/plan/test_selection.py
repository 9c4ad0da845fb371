"""Selections of test samples beside lists of ids."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_pipe.errors import UsageError
from hydra_pipe.plan.id_ranges import cut, parse_selection, size_of, write_selection


def listed(spans: tuple[tuple[int, int], ...]) -> list[int]:
    return [i for first, last in spans for i in range(first, last)]


def spans_of(ids: set[int]) -> tuple[tuple[int, int], ...]:
    return parse_selection(",".join(map(str, ids)), 61)


@given(st.sets(st.integers(0, 60), min_size=1))
def test_a_selection_is_read_as_it_is_written(ids: set[int]) -> None:
    spans = spans_of(ids)
    assert listed(spans) == sorted(ids)
    assert size_of(spans) == len(ids)
    assert all(before[1] < after[0] for before, after in pairwise(spans))
    assert parse_selection(write_selection(spans), 61) == spans


@given(st.sets(st.integers(0, 60), min_size=1), st.integers(0, 70), st.integers(0, 70))
def test_a_cut_is_a_slice_of_the_ids(ids: set[int], first: int, last: int) -> None:
    assert listed(cut(spans_of(ids), first, last)) == sorted(ids)[first:last]


def test_order_and_overlaps_do_not_matter() -> None:
    assert parse_selection("7, 3-5,4-6,0", 8) == ((0, 1), (3, 8))


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "1--2", "1:2", "1.5", "²", "1,,2"])
def test_what_is_no_selection_is_wrong_usage(text: str) -> None:
    with pytest.raises(
        UsageError, match="is not a selection: write ids and spans of them, such as 0-99,150"
    ):
        parse_selection(text, 100)


@pytest.mark.parametrize("text", ["100", "5-100", "9-3"])
def test_ids_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not within the 100 test samples, which are 0-99"):
        parse_selection(text, 100)
