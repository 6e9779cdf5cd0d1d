"""Transforms: inverses, log-determinants against autograd, and −∞ outside the support."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from pushforward.flows.fields import MLP
from pushforward.flows.flow import Flow, base_log_density
from pushforward.flows.transforms import Compose, Log, Logit, Standardize, Transform, Whiten

CHOLESKY = torch.tensor([[1.5, 0, 0], [-0.4, 0.3, 0], [2.0, 1.0, 0.7]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

TRANSFORMS: dict[str, Transform] = {
    "standardize": Standardize(MEAN, torch.tensor([0.1, 3.0, 1.0])),
    "whiten": Whiten(MEAN, CHOLESKY),
    "log": Log(3, [0, 2], lower=-1.0),
    "logit": Logit(3, [1], lower=-2.0, upper=3.0),
    "compose": Compose([Logit(3, [0], 0.0, 4.0), Log(3, [2], lower=-5.0), Whiten(MEAN, CHOLESKY)]),
}


def base(rows: int = 9, dim: int = 3) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_decode_inverts_encode(name: str) -> None:
    transform = TRANSFORMS[name]
    z = base()
    x, log_det = transform.decode(z)
    again, same = transform.encode(x)
    torch.testing.assert_close(again, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(same, log_det, rtol=0, atol=1e-12)
    assert x.dtype == log_det.dtype == torch.float64
    assert log_det.shape == (len(z), 1)
    assert (x - z).abs().max() > 0.01


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_log_determinant_is_that_of_the_jacobian(name: str) -> None:
    transform = TRANSFORMS[name]
    x, log_det = transform.decode(base())
    jacobian = vmap(jacrev(lambda row: transform.encode(row[None])[0][0]))(x)
    torch.testing.assert_close(log_det[:, 0], torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    transform, z = TRANSFORMS[name], base(33)
    x = transform.decode(z)[0]
    for function, rows in ((transform.decode, z), (transform.encode, x)):
        together = function(rows)
        for row in (0, 15, 32):
            for alone, among in zip(function(rows[[row]]), together, strict=True):
                torch.testing.assert_close(alone[0], among[row], rtol=1e-14, atol=1e-14)


Rows = list[list[float]]
# transform, rows outside its support, rows inside
SUPPORTS: dict[str, tuple[Transform, Rows, Rows]] = {
    "log": (Log(2, [0]), [[0.0, 1.0], [-1e-9, 1.0], [-3.0, 1.0]], [[1e-300, -5.0], [1e300, 0.0]]),
    "log above 2": (Log(2, [1], lower=2.0), [[9.0, 2.0], [9.0, 1.0]], [[-9.0, 2.0000001]]),
    "logit": (Logit(2, [0, 1]), [[0.0, 0.5], [0.5, 1.0], [-1.0, 3.0]], [[1e-300, 0.5], [0.5, 1 - 1e-15]]),
    "logit on [-1, 1]": (Logit(2, [1], -1.0, 1.0), [[0.0, -1.0], [0.0, 1.5]], [[7.0, 0.999999]]),
    "first of two": (
        Compose([Log(2, [0]), Standardize(MEAN[:2], MEAN[:2] ** 2)]),
        [[-1.0, 0.0]],
        [[1.0, 0.0]],
    ),
    "last of two": (
        Compose([Whiten(torch.zeros(2), torch.eye(2)), Logit(2, [0])]),
        [[1.5, 0.0]],
        [[0.5, -9.0]],
    ),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_outside_the_support_the_log_determinant_is_minus_infinity(name: str) -> None:
    transform, outside, inside = SUPPORTS[name]
    x = torch.tensor(outside + inside, dtype=torch.float64)
    z, log_det = transform.encode(x)
    assert torch.equal(torch.isneginf(log_det[:, 0]), torch.arange(len(x)) < len(outside))
    assert torch.isfinite(log_det[len(outside) :]).all()
    assert torch.isfinite(z).all()  # rows outside come along as ordinary numbers


@pytest.mark.parametrize("transform", [Log(2, [0]), Logit(2, [0])], ids=["log", "logit"])
def test_points_far_out_decode_to_a_number_with_a_finite_log_determinant(transform: Transform) -> None:
    z = torch.tensor([[-700.0, 0], [-40, 0], [40, 0], [700, 0]], dtype=torch.float64)
    x, log_det = transform.decode(z)
    assert torch.isfinite(x).all()
    assert torch.isfinite(log_det).all()


def test_a_logit_far_out_never_claims_infinite_density() -> None:
    # beyond z = 745 the naive log(1 − sigmoid(z)) is −∞, which would make the density +∞
    _, log_det = Logit(1, [0]).decode(torch.tensor([[-2000.0], [2000.0]], dtype=torch.float64))
    torch.testing.assert_close(log_det, torch.full((2, 1), 2000.0, dtype=torch.float64))


REFUSED: dict[str, tuple[Callable[[], Transform], str]] = {
    "no scale": (lambda: Standardize(torch.zeros(2), torch.tensor([1.0, 0.0])), "scale must be positive"),
    "negative scale": (lambda: Standardize(MEAN[:2], torch.tensor([1.0, -1.0])), "scale must be positive"),
    "NaN scale": (lambda: Standardize(MEAN[:2], torch.tensor([1.0, math.nan])), "scale must be positive"),
    "no column": (lambda: Log(2, []), r"columns in 0 … 1, not \[\]"),
    "column too high": (lambda: Log(2, [2]), r"columns in 0 … 1, not \[2\]"),
    "column too low": (lambda: Logit(2, [-1]), "columns in 0 … 1"),
    "no width": (lambda: Logit(2, [0], 1.0, 1.0), "lower must be below upper, not 1.0 and 1.0"),
    "nothing to compose": (lambda: Compose([]), "at least one"),
    "dims": (lambda: Compose([Log(2, [0]), Log(3, [0])]), "all of one dim"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_transforms_that_cannot_be_are_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


# -------------------------------------------------------------------------------------- the flow itself


def test_the_base_is_standard_normal() -> None:
    z = base(20)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1, keepdim=True)
    torch.testing.assert_close(base_log_density(z), expected, rtol=0, atol=1e-12)


NOT_A_FLOW: dict[str, tuple[tuple[object, ...], str]] = {
    "dims": ((MLP(2, (16,)), TRANSFORMS["log"]), "the transform has 3 features, the field 2"),
    "no interval": (
        (MLP(3, (16,)), TRANSFORMS["log"], 1.0, 1.0),
        "two different finite ends, not 1.0 and 1.0",
    ),
    "endless": ((MLP(3, (16,)), TRANSFORMS["log"], 0.0, math.inf), "two different finite ends"),
    "NaN": ((MLP(3, (16,)), TRANSFORMS["log"], math.nan, 1.0), "two different finite ends"),
}


@pytest.mark.parametrize("name", NOT_A_FLOW)
def test_flows_that_cannot_be_are_refused(name: str) -> None:
    arguments, message = NOT_A_FLOW[name]
    with pytest.raises(ValueError, match=message):
        Flow(*arguments)
