"""From columns to arrays: what is refused, and in which words; parts and transforms."""

import numpy as np
import pytest
import torch

from pushforward.errors import InvalidInput
from pushforward.flows.transforms import Standardize
from pushforward.training.data import Table, build_transform, check_varies, noise_widths, read_columns, split

N = 40
AGE = np.linspace(20, 60, N)
BMI = np.linspace(18, 30, N) ** 2
TEXT = np.array(["Oslo"] * N, object)
LABEL = np.arange(N) % 4 == 0


def with_value(row, value):
    column = AGE.astype(object)
    column[row] = value
    return column


@pytest.mark.parametrize(
    ("columns", "options", "where", "says"),
    [
        ([("age", AGE), ("age", BMI)], {}, "age", "Two columns are named 'age'"),
        ([("age", AGE), ("city", TEXT)], {}, "city", "'city' is not numeric: row 1 is 'Oslo'"),
        ([("age", with_value(6, None)), ("bmi", BMI)], {}, "age", "a missing value, the first in row 7"),
        ([("age", with_value(6, "")), ("bmi", BMI)], {}, "age", "a missing value, the first in row 7"),
        ([("age", np.where(AGE > 50, np.nan, AGE))], {}, "age", "10 missing values, the first in row 31"),
        ([("age", np.where(AGE > 59, np.inf, AGE))], {}, "age", "infinite in row 40"),
        ([("age", AGE)], {"label": "sick"}, "sick", "There is no column 'sick'. The columns are: 'age'"),
        (
            [("age", AGE), ("sick", AGE)],
            {"label": "sick"},
            "sick",
            "must be 0 or false (normal) or 1 or true",
        ),
        ([("age", AGE), ("bmi", BMI)], {"columns": ["age", "hight"]}, "hight", "There is no column 'hight'"),
        ([("age", AGE), ("bmi", BMI)], {"columns": ["age"], "context": ["age"]}, "age", "more than once"),
        ([("age", AGE), ("bmi", BMI)], {"columns": ["age", "age"]}, "age", "more than once"),
        ([("age", AGE)], {"context": ["age"]}, None, "No column is left"),
        ([("age", AGE[:1])], {}, None, "The table has 1 row; training needs at least 20"),
        ([("age", AGE[:0])], {}, None, "The table has no rows"),
    ],
)
def test_a_table_that_cannot_be_trained_on_is_refused_by_column(columns, options, where, says):
    names, values = zip(*columns, strict=True)
    with pytest.raises(InvalidInput) as refusal:
        read_columns(names, values, **options)
    assert says in refusal.value.message
    assert refusal.value.where == where


def test_columns_are_sorted_into_features_context_and_label():
    table = read_columns(
        ["age", "sick", "bmi", "site"],
        [AGE, np.where(LABEL, "1", "0"), BMI, np.arange(N)],
        label="sick",
        context=["site"],
    )
    assert table.features == ("age", "bmi")
    assert table.context_features == ("site",)
    np.testing.assert_array_equal(table.rows, np.stack([AGE, BMI], 1))
    np.testing.assert_array_equal(table.context, np.arange(N)[:, None])
    np.testing.assert_array_equal(table.anomalous, LABEL)


def test_numbers_written_as_text_are_read():
    table = read_columns(["age"], [np.array([f"{value:.3f}" for value in AGE], object)])
    np.testing.assert_allclose(table.rows[:, 0], AGE, atol=5e-4)


def test_the_parts_are_disjoint_complete_and_the_same_for_the_same_seed(rng):
    table = Table(rng.normal(size=(400, 2)), ("a", "b"), anomalous=np.arange(400) % 10 == 0)
    parts = split(table, seed=3)
    pieces = [parts.train, parts.validation, parts.held_out, parts.anomalies]
    rows = np.concatenate([piece.rows for piece in pieces])
    assert len(np.unique(rows, axis=0)) == 400 == len(rows)
    assert [len(piece) for piece in pieces] == [243, 27, 90, 40]
    assert parts.anomalies.anomalous.all()
    assert not any(piece.anomalous.any() for piece in pieces[:3])
    np.testing.assert_array_equal(split(table, seed=3).train.rows, parts.train.rows)
    assert not np.array_equal(split(table, seed=4).train.rows, parts.train.rows)


def test_too_few_normal_rows_are_refused(rng):
    table = Table(rng.normal(size=(100, 2)), ("a", "b"), anomalous=np.arange(100) >= 5)
    with pytest.raises(InvalidInput, match="Only 5 rows are labelled normal"):
        split(table)


def test_a_constant_column_is_refused_unless_it_gets_noise():
    table = Table(np.stack([AGE, np.full(N, 3.0)], 1), ("age", "three"))
    with pytest.raises(InvalidInput, match="'three' is 3 in every training row") as refusal:
        check_varies(table)
    assert refusal.value.where == "three"
    check_varies(table, besides=["three"])


def test_only_integer_features_are_dequantised():
    table = Table(np.stack([AGE, np.arange(N, dtype=float)], 1), ("age", "visits"))
    np.testing.assert_array_equal(noise_widths(table, ["visits"]), [0, 1])
    with pytest.raises(InvalidInput, match="'age' is not integer: it has the value 21"):
        noise_widths(table, ["age"])
    with pytest.raises(InvalidInput, match="no feature 'height'"):
        noise_widths(table, ["height"])


def test_standardising_and_whitening_do_what_they_say(rng):
    rows = rng.normal(size=(5000, 3)) @ np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 2.0]]) + 7
    plain = build_transform(rows, ["a", "b", "c"])
    assert isinstance(plain, Standardize)
    z = plain.encode(torch.from_numpy(rows))[0]
    torch.testing.assert_close(z.mean(0), torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3).double(), atol=1e-9, rtol=0)
    white, _ = build_transform(rows, ["a", "b", "c"], whiten=True).encode(torch.from_numpy(rows))
    torch.testing.assert_close(torch.cov(white.T), torch.eye(3).double(), atol=0.02, rtol=0)


def test_whitening_survives_few_rows_and_dependent_columns(rng):
    rows = rng.normal(size=(20, 30))
    rows[:, 1] = 2 * rows[:, 0]
    transform = build_transform(rows, [f"x{i}" for i in range(30)], whiten=True)
    z, log_det = transform.encode(torch.from_numpy(rng.normal(size=(50, 30))))
    assert torch.isfinite(log_det).all()
    assert (
        z.abs().max() < 30
    )  # unshrunk, the 10 directions without variance would be divided by about nothing


def test_log_and_logit_features_are_transformed_before_scaling():
    rows = np.stack([AGE, AGE / 100, BMI], 1)
    transform = build_transform(rows, ["a", "share", "b"], log=["a"], logit={"share": (0.0, 1.0)})
    expected = np.stack([np.log(AGE), np.log(AGE / 100) - np.log1p(-AGE / 100), BMI], 1)
    expected = (expected - expected.mean(0)) / expected.std(0)
    np.testing.assert_allclose(transform.encode(torch.from_numpy(rows))[0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"log": ["b"]}, "'b' has the value -1, outside (0, inf): leave out its log transform"),
        ({"logit": {"a": (0.0, 30.0)}}, "outside (0, 30): leave out its logit transform"),
        ({"log": ["c"]}, "There is no feature 'c'"),
    ],
)
def test_a_value_outside_the_support_of_a_transform_is_refused(options, says):
    rows = np.stack([AGE, BMI], 1)
    with pytest.raises(InvalidInput) as refusal:
        build_transform(rows, ["a", "b"], others=np.array([[25.0, -1.0]]), **options)
    assert says in refusal.value.message
