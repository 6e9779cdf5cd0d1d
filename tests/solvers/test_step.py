"""The step: SciPy's RK45 step for step, ends that are met exactly, and rows that fail without harm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.problems import Expiring, Growth, Tangent, Waves, oracle, shaken, wrapped_flow
from torch import Tensor, nn

from pushforward.flows.fields import MLP, VectorField, Wrapped, planar
from pushforward.solvers.solve import integrate
from pushforward.solvers.state import Clock, Span, Stop
from pushforward.solvers.step import Start, Step
from pushforward.solvers.tableau import METHODS

FIELDS: dict[str, VectorField] = {
    "growth": Wrapped(Growth(), 3).double(),
    "planar": shaken(planar(3, 16), 1, gain=3).double(),
    "tanh": shaken(MLP(8, (32, 32), activation="tanh"), 2, gain=2).double(),
    "silu": shaken(MLP(8, (32,), gate=True), 3, gain=1.2).double(),
    "softplus": shaken(MLP(5, (16, 16, 16), activation="softplus"), 4, gain=1).double(),
}


@dataclass
class Run:
    """Every attempt of a few rows: clocks before and after it, and the states after it."""

    before: list[Tensor]
    after: list[Tensor]
    states: list[Tensor]

    def accepted(self, row: int) -> list[float]:
        """Times after the accepted steps of a row."""
        pairs = zip(self.before, self.after, strict=True)
        return [float(b[row, Clock.T]) for a, b in pairs if b[row, Clock.ACCEPTED] > a[row, Clock.ACCEPTED]]


@torch.no_grad()
def run(
    field: VectorField,
    z: Tensor,
    t_start: float,
    t_end: float,
    first_step: float,
    tolerances: tuple[float, float, float],
    *,
    method: str = "dopri5",
    divergence: bool = True,
    max_steps: int = 2000,
) -> Run:
    """Attempt steps until every row has stopped; a row that has stopped is no longer stepped."""
    start, step = Start(field, divergence), Step(field, METHODS[method], divergence, abs(t_end - t_start))
    state = start(torch.full((len(z), 1), t_start, dtype=torch.float64), z)
    clock = torch.zeros(len(z), len(Clock), dtype=torch.float64)
    clock[:, Clock.T], clock[:, Clock.CAP] = t_start, 10
    clock[:, Clock.DT] = math.copysign(first_step, t_end - t_start)
    span = torch.zeros(len(z), len(Span), dtype=torch.float64)
    span[:] = torch.tensor([t_end, *tolerances, max_steps], dtype=torch.float64)
    result = Run([], [], [])
    while (running := clock[:, Clock.STOP] == Stop.RUNNING).any():
        clock_next, state_next = clock.clone(), state.clone()
        clock_next[running], state_next[running] = step(clock[running], span[running], state[running])
        result.before.append(clock)
        result.after.append(clock_next)
        result.states.append(state_next)
        clock, state = clock_next, state_next
    return result


def points(dim: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (1.0, 0.0), (0.6, -0.2)], ids=str)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("name", FIELDS)
def test_steps_and_times_are_those_of_scipy(
    name: str, tolerance: float, interval: tuple[float, float]
) -> None:
    field = FIELDS[name]
    z, first = points(field.dim), 0.11
    ours = run(field, z, *interval, first, (tolerance, tolerance / 10, tolerance))
    for row in range(len(z)):
        theirs = oracle(
            field, z[row].numpy(), *interval, first, tolerance, tolerance / 10, logp_atol=tolerance
        )
        clock = ours.after[-1][row]
        assert clock[Clock.ATTEMPTS] == theirs.attempts
        assert clock[Clock.ACCEPTED] == len(theirs.times)
        np.testing.assert_allclose(ours.accepted(row), theirs.times, rtol=0, atol=1e-9)
        np.testing.assert_allclose(ours.states[-1][row, : field.dim], theirs.end[:-1], rtol=1e-9, atol=1e-9)
        assert float(clock[Clock.ELL]) == pytest.approx(theirs.end[-1], rel=1e-9, abs=1e-9)
        assert float(clock[Clock.ERROR]) == pytest.approx(theirs.error, rel=1e-4, abs=1e-13)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (1.0, 0.0)], ids=str)
@pytest.mark.parametrize("name", FIELDS)
def test_without_divergence_too(name: str, interval: tuple[float, float]) -> None:
    field = FIELDS[name]
    z = points(field.dim)
    ours = run(field, z, *interval, 0.3, (1e-6, 1e-6, math.nan), divergence=False)
    for row in range(len(z)):
        theirs = oracle(field, z[row].numpy(), *interval, 0.3, 1e-6, 1e-6)
        assert ours.after[-1][row, Clock.ATTEMPTS] == theirs.attempts
        np.testing.assert_allclose(ours.accepted(row), theirs.times, rtol=0, atol=1e-9)
        np.testing.assert_allclose(ours.states[-1][row, : field.dim], theirs.end, rtol=1e-9, atol=1e-9)
        assert ours.after[-1][row, Clock.ELL] == 0


def test_these_runs_have_rejections_to_compare() -> None:
    # Without some, the runs above would not compare what happens after a rejection.
    end = run(FIELDS["tanh"], points(8), 0.0, 1.0, 0.11, (1e-5, 1e-6, 1e-5)).after[-1]
    assert (end[:, Clock.ATTEMPTS] > end[:, Clock.ACCEPTED]).all()


class Recorder(nn.Module):
    """A field that writes down every time at which it is asked."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.times = field, []

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.times.append(t)
        return self.field(t, z)


INTERVALS = [(0.0, 1.0), (1.0, 0.0), (0.1, 0.7), (0.7, 0.1), (-0.3, 1.7), (1.3, -0.9), (2.0, 1.0 / 3.0)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("interval", INTERVALS, ids=str)
def test_the_field_is_never_asked_outside_the_interval(interval: tuple[float, float], method: str) -> None:
    for first in (0.019, 0.5999999999999, 100.0):
        recorder = Recorder(Waves())
        field = Wrapped(recorder, 2).double()
        end = run(field, points(2), *interval, first, (0.1, 0.1, 0.1), method=method).after[-1]
        times = torch.cat([t.flatten() for t in recorder.times])
        assert times.min() >= min(interval)
        assert times.max() <= max(interval)
        assert (end[:, Clock.STOP] == Stop.FINISHED).all()
        assert (end[:, Clock.T] == interval[1]).all()  # to the last bit


def test_a_first_step_that_is_too_long_is_cut_to_the_interval() -> None:
    end = run(FIELDS["growth"], points(3), 0.0, 0.25, 100.0, (1e-2, 1e-2, 1e-2)).after[-1]
    assert (end[:, Clock.ATTEMPTS] == 1).all()
    assert (end[:, Clock.T] == 0.25).all()


def test_a_remainder_of_rounding_size_is_taken_with_the_step() -> None:
    # ten steps of 0.1 end at 0.9999999999999999, which would need an eleventh
    class Still(Growth):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return 0 * self.one * z

    field = Wrapped(Still(), 1).double()
    step = Step(field, METHODS["rk4"], False)
    clock = torch.zeros(1, len(Clock), dtype=torch.float64)
    clock[:, Clock.DT], clock[:, Clock.CAP] = 0.1, 10
    span = torch.tensor([[1.0, 1.0, 1.0, 1.0, 100.0]], dtype=torch.float64)
    state = torch.ones(1, 2, dtype=torch.float64)
    for _ in range(10):
        clock, state = step(clock, span, state)
    assert clock[0, Clock.STOP] == Stop.FINISHED
    assert clock[0, Clock.T] == 1


def test_an_interval_of_no_length_is_finished_at_once() -> None:
    ours = run(FIELDS["tanh"], points(8), 0.5, 0.5, 0.1, (1e-8, 1e-8, 1e-8))
    assert len(ours.after) == 1
    assert torch.equal(ours.states[0][:, :8], points(8))
    assert (ours.after[0][:, [Clock.ELL, Clock.ERROR]] == 0).all()


@pytest.mark.parametrize("name", FIELDS)
def test_the_factor_keeps_to_its_bounds(name: str) -> None:
    ours = run(FIELDS[name], points(FIELDS[name].dim), 0.0, 1.0, 1e-4, (1e-6, 1e-6, 1e-6))
    grown, after_rejection = 0, 0
    for before, after in zip(ours.before, ours.after, strict=True):
        for row in range(len(before)):
            b, a = before[row], after[row]
            if b[Clock.STOP] != Stop.RUNNING or a[Clock.STOP] == Stop.FINISHED:
                continue  # the last step may be cut: its length is not the one that was planned
            factor = float(a[Clock.DT] / b[Clock.DT])
            if a[Clock.ACCEPTED] > b[Clock.ACCEPTED]:
                assert 0.9 - 1e-12 <= factor <= b[Clock.CAP] + 1e-12
                assert a[Clock.CAP] == 10
                grown += factor > 9.999
            else:
                assert 0.2 - 1e-12 <= factor <= 0.9 + 1e-12
                assert a[Clock.CAP] == 1
                assert a[Clock.T] == b[Clock.T]
            after_rejection += b[Clock.CAP] == 1
    assert grown >= 4  # the first step was far too small
    assert after_rejection or name not in ("tanh", "planar")


def test_a_rejected_step_leaves_the_row_where_it_was() -> None:
    field, z = FIELDS["tanh"], points(8)
    ours = run(field, z, 0.0, 1.0, 1.0, (1e-9, 1e-9, 1e-9))
    fixed = [Clock.T, Clock.ELL, Clock.ERROR, Clock.ACCEPTED]
    assert torch.equal(ours.after[0][:, fixed], ours.before[0][:, fixed])
    assert torch.equal(ours.states[0][:, :8], z)
    assert (ours.after[0][:, Clock.ATTEMPTS] == 1).all()


def test_the_log_density_has_a_tolerance_of_its_own_in_nats() -> None:
    field, z = FIELDS["tanh"], points(8)
    reference = run(field, z, 0.0, 1.0, 0.1, (1e-10, 1e-10, 1e-10), method="dopri8").after[-1][:, Clock.ELL]
    errors, steps = [], []
    for logp_atol in (1e-2, 1e-4, 1e-6):
        end = run(field, z, 0.0, 1.0, 0.1, (1.0, 1.0, logp_atol)).after[-1]
        errors.append(float((end[:, Clock.ELL] - reference).abs().max()))
        steps.append(float(end[:, Clock.ACCEPTED].mean()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert steps[0] < steps[1] < steps[2]
    assert errors[2] < 1e-4


# ---------------------------------------------------------------------------------- rows that fail

TROUBLE = {
    "underflow": (Tangent(), [0.0, 0.5], 2.0, Stop.STEP_UNDERFLOW, math.pi / 2 - math.atan(0.5)),
    "underflow, backwards": (Tangent(), [0.0, -0.5], -2.0, Stop.STEP_UNDERFLOW, math.atan(0.5) - math.pi / 2),
    "nonfinite": (Expiring(), [1.0, 2.0], 1.0, Stop.NONFINITE, 0.5),
    "nonfinite start": (Growth(), [1.0, math.nan], 1.0, Stop.NONFINITE, 0.0),
    "infinite start": (Growth(), [1.0, math.inf], 1.0, Stop.NONFINITE, 0.0),
    "max_steps": (Waves(), [1.0, 2.0], 1.0, Stop.MAX_STEPS, None),
}


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", TROUBLE)
def test_a_row_that_fails_says_how_and_where(name: str, precision: torch.dtype) -> None:
    module, z, t_end, stop, where = TROUBLE[name]
    field = Wrapped(module, 2).to(precision)
    max_steps = 50 if stop == Stop.MAX_STEPS else 2000
    ours = run(
        field, torch.tensor([z]).to(precision), 0.0, t_end, 0.1, (1e-6, 1e-6, 1e-6), max_steps=max_steps
    )
    end = ours.after[-1][0]
    assert end[Clock.STOP] == stop
    if where is not None:
        assert float(end[Clock.T]) == pytest.approx(where, abs=2e-6)
    if stop == Stop.MAX_STEPS:
        assert end[Clock.ATTEMPTS] == max_steps
    for before, after in zip(ours.before, ours.after, strict=True):
        # NaN reaches neither the step size nor what was reached before
        assert torch.isfinite(after[0, [Clock.T, Clock.DT, Clock.ATTEMPTS, Clock.CAP]]).all()
        assert after[0, Clock.DT] * t_end > 0
        assert after[0, Clock.T] * t_end >= before[0, Clock.T] * t_end
        if math.isfinite(sum(z)):
            assert torch.isfinite(after).all()
    if math.isfinite(sum(z)):
        assert torch.isfinite(ours.states[-1]).all()


def test_a_step_that_is_not_finite_shrinks_fivefold() -> None:
    ours = run(Wrapped(Expiring(), 1).double(), points(1, 1), 0.0, 1.0, 0.8, (1e-3, 1e-3, 1e-3))
    assert float(ours.after[0][0, Clock.DT]) == pytest.approx(0.16)
    assert ours.after[0][0, Clock.T] == 0


def test_the_attempt_that_arrives_is_not_one_too_many() -> None:
    field, z = FIELDS["silu"], points(8, 1)
    needed = int(run(field, z, 0.0, 1.0, 0.1, (1e-5, 1e-5, 1e-5)).after[-1][0, Clock.ATTEMPTS])
    exactly = run(field, z, 0.0, 1.0, 0.1, (1e-5, 1e-5, 1e-5), max_steps=needed).after[-1][0]
    short = run(field, z, 0.0, 1.0, 0.1, (1e-5, 1e-5, 1e-5), max_steps=needed - 1).after[-1][0]
    assert exactly[Clock.STOP] == Stop.FINISHED
    assert short[Clock.STOP] == Stop.MAX_STEPS
    assert short[Clock.ATTEMPTS] == needed - 1


def test_rows_that_fail_do_not_disturb_the_others() -> None:
    flow = wrapped_flow(Tangent(), 2, 0.0, 1.0)
    mates = torch.tensor([[-1.0, 0.2], [0.0, 0.9], [math.nan, 0.0], [-1e30, 0.1], [0.3, 0.1]]).double()
    together = integrate(flow, mates, None, 0.0, 1.0, method="dopri5", tolerance=1e-8)
    for row, stop in zip((0, 1, 2, 4), (1, 3, 4, 1), strict=True):
        alone = integrate(flow, mates[[row]], None, 0.0, 1.0, method="dopri5", tolerance=1e-8)
        assert together.clock[row, Clock.STOP] == alone.clock[0, Clock.STOP] == stop
        assert together.clock[row, Clock.ATTEMPTS] == alone.clock[0, Clock.ATTEMPTS]
        if stop == Stop.FINISHED:
            exact = torch.tan(1.0 + torch.atan(mates[row]))
            torch.testing.assert_close(together.z[row], exact, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(together.z[row], alone.z[0], rtol=1e-12, atol=1e-12)


def test_fixed_step_methods_keep_their_step_and_give_up_on_nan() -> None:
    for method in ("rk4", "euler"):
        fine = run(Wrapped(Waves(), 2).double(), points(2), 0.0, 1.0, 1 / 8, (1e-9,) * 3, method=method)
        assert (fine.after[-1][:, Clock.ATTEMPTS] == 8).all()
        broken = run(Wrapped(Expiring(), 2).double(), points(2), 0.0, 1.0, 1 / 8, (1e-9,) * 3, method=method)
        assert (broken.after[-1][:, Clock.STOP] == Stop.NONFINITE).all()
        assert (broken.after[-1][:, Clock.T] <= 0.5).all()
