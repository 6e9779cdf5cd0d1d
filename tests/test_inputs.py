import numpy as np
import pytest

from pushforward.errors import InvalidInput
from pushforward.inputs import check_matrix, from_lists, from_named


def test_long_lists_of_names_are_cut_in_messages() -> None:
    names = [f"feature{number}" for number in range(64)]
    with pytest.raises(InvalidInput) as caught:
        from_lists([[0.0]], names, "x")
    assert "'feature11' and 52 more" in caught.value.message
    with pytest.raises(InvalidInput) as caught:
        from_named([{"y" * 500: 1.0}], names, "rows")
    assert len(caught.value.message) < 1000
    assert len(caught.value.detail["missing"]) == 12


def test_one_column_is_as_good_as_many() -> None:
    assert from_named([{"a": 1}, {"a": 2}], ["a"], "rows").tolist() == [[1.0], [2.0]]
    assert from_lists([[1], [2]], ["a"], "x").tolist() == [[1.0], [2.0]]


def test_no_rows_have_the_right_width() -> None:
    assert from_lists([], ["a", "b"], "x").shape == (0, 2)
    assert from_named([], ["a", "b"], "rows").shape == (0, 2)


def test_arrays_are_checked_too() -> None:
    with pytest.raises(InvalidInput, match=r"x has shape \[2\]; it must have rows of 1"):
        check_matrix(np.zeros(2), ["a"], "x")
    with pytest.raises(InvalidInput, match=r"x\[1\]\[0\] is nan; 'a' must be a finite number") as caught:
        check_matrix(np.array([[0.0], [np.nan]]), ["a"], "x")
    assert caught.value.detail == {"where": "x[1][0]", "row": 1, "column": "a"}
