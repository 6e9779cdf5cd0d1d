"""Exported programs compute what the torch modules compute, for every size of batch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tests.problems import FLOWS, ExportedModel, Foreign, exported, identity, oracle
from torch import Tensor

from pushforward.engine.request import Kind
from pushforward.errors import PublishFailed
from pushforward.flows.fields import MLP, Wrapped
from pushforward.flows.flow import Flow
from pushforward.flows.transforms import Compose, Log, Logit
from pushforward.programs.export import PRECISIONS, export_programs
from pushforward.programs.runtime import Program
from pushforward.solvers.solve import log_density
from pushforward.solvers.state import Clock, Span, Stop
from pushforward.solvers.step import Start, Step
from pushforward.solvers.tableau import METHODS

KINDS = {"density": True, "sample": False}
NAMES = {"encode", "decode"} | {f"{a}_{b}_{c}" for a in ("start", "step") for b in KINDS for c in PRECISIONS}


def started(model: ExportedModel, rows: int, precision: str, kind: str) -> tuple[Any, ...]:
    """Clock, span, state and context of rows on their way, with everything different from row to row."""
    random = np.random.default_rng(rows)
    z, context = model.points(Kind.DECODE, rows, seed=1)
    low, high = sorted((model.t_base, model.t_data))
    clock, span = np.zeros((rows, len(Clock))), np.zeros((rows, len(Span)))
    clock[:, Clock.T] = random.uniform(low, high, rows)
    span[:, Span.T_END] = np.where(random.random(rows) < 0.5, low, high)
    direction = np.sign(span[:, Span.T_END] - clock[:, Clock.T])
    clock[:, Clock.DT] = direction * random.uniform(0.02, 0.4, rows)
    clock[:, Clock.CAP] = random.choice([1.0, 10.0], rows)
    clock[:, Clock.ELL] = random.normal(size=rows)
    clock[:, [Clock.ATTEMPTS, Clock.ACCEPTED]] = random.integers(1, 50, (rows, 2))
    span[:, Span.RTOL], span[:, Span.ATOL], span[:, Span.LOGP_ATOL] = 10.0 ** random.uniform(
        -5, -1, (3, rows)
    )
    span[:, Span.MAX_STEPS] = random.integers(40, 60, rows)
    extra = [] if context is None else [context]
    (state,) = model.program(f"start_{kind}_{precision}")(clock[:, [Clock.T]], z, *extra)
    return clock, span, state, *extra


def field_of(model: ExportedModel, precision: str) -> Any:
    return copy.deepcopy(model.flow.field).to(PRECISIONS[precision])


@pytest.mark.parametrize("name", FLOWS)
def test_every_program_is_written_and_holds_itself(name: str) -> None:
    model = exported(name)
    assert set(model.data) == NAMES
    for program, data in model.data.items():
        graph = onnx.load_from_string(data).graph
        external = [i.name for i in graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
        assert not external, program
        assert all(value.type.tensor_type.shape.dim[0].dim_param for value in graph.input), program
        assert all(node.domain in ("", "ai.onnx") for node in graph.node), program


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FLOWS)
def test_start_and_step_are_the_torch_modules(name: str, precision: str, kind: str) -> None:
    model = exported(name)
    field = field_of(model, precision)
    start = Start(field, KINDS[kind])
    step = Step(field, METHODS[model.method], KINDS[kind], abs(model.t_data - model.t_base))
    # rounding; in float32 the estimated error, and with it the next step, is a difference of near equals
    exact, loose = {"float64": (1e-12, 1e-9), "float32": (2e-5, 0.5)}[precision]
    for rows in (1, 2, 33):
        inputs = started(model, rows, precision, kind)
        clock, span, state, *context = (torch.from_numpy(part) for part in inputs)
        z = state[:, : model.flow.dim].double()
        with torch.no_grad():
            expected_start = start(clock[:, [Clock.T]], z, *context)
            expected_clock, expected_state = step(clock, span, state, *context)
        (ours,) = model.program(f"start_{kind}_{precision}")(inputs[0][:, [Clock.T]], z.numpy(), *inputs[3:])
        np.testing.assert_allclose(ours, expected_start, rtol=exact, atol=exact)
        clock_next, state_next = model.program(f"step_{kind}_{precision}")(*inputs)
        np.testing.assert_allclose(state_next, expected_state, rtol=exact, atol=exact)
        columns = [Clock.T, Clock.ELL]
        np.testing.assert_allclose(clock_next[:, columns], expected_clock[:, columns], rtol=exact, atol=exact)
        columns = [Clock.ERROR, Clock.DT]
        np.testing.assert_allclose(clock_next[:, columns], expected_clock[:, columns], rtol=loose, atol=exact)
        whole = [Clock.ACCEPTED, Clock.CAP, Clock.ATTEMPTS, Clock.STOP]
        np.testing.assert_array_equal(clock_next[:, whole], expected_clock[:, whole])
        assert state_next.dtype == np.dtype(precision)
        assert clock_next.dtype == np.float64
        if rows == 33 and name != "linear3":  # rows of every fate, or little is compared
            assert 0 < (clock_next[:, Clock.CAP] == 1).sum() < rows
            assert {Stop.RUNNING, Stop.FINISHED} <= set(clock_next[:, Clock.STOP])


@pytest.mark.parametrize("name", FLOWS)
def test_transforms_are_the_torch_modules(name: str) -> None:
    model = exported(name)
    for rows in (1, 2, 33):
        z, _ = model.points(Kind.DECODE, rows)
        x, log_det = model.program("decode")(z)
        expected = model.flow.transform.decode(torch.from_numpy(z))
        np.testing.assert_allclose(x, expected[0], rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(log_det, expected[1], rtol=1e-13, atol=1e-13)
        again, same = model.program("encode")(x)
        np.testing.assert_allclose(again, z, rtol=0, atol=1e-11)
        np.testing.assert_allclose(same, log_det, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("name", "columns"), [("tanh2", [0]), ("deep5", [1, 3])])
def test_outside_the_support_the_program_says_minus_infinity(name: str, columns: list[int]) -> None:
    model = exported(name)
    x, _ = model.points(Kind.ENCODE, 9)
    x[::2, columns] = [[-0.25]] * 5
    log_det = model.program("encode")(x)[1][:, 0]
    assert np.isneginf(log_det[::2]).all()
    assert np.isfinite(log_det[1::2]).all()


@pytest.mark.parametrize("name", FLOWS)
def test_solves_in_float64_reach_the_reference(name: str) -> None:
    model = exported(name)
    x, context = model.points(Kind.ENCODE, 6)
    c = None if context is None else torch.from_numpy(context)
    reference, base = log_density(model.flow, torch.from_numpy(x), c)
    tolerance = 1e-7 if model.method == "bosh3" else 1e-9
    answer = model.solve(Kind.ENCODE, x, context, tolerance=tolerance, precision="float64", max_steps=100_000)
    np.testing.assert_allclose(answer.log_density, reference, rtol=0, atol=300 * tolerance)
    np.testing.assert_allclose(answer.value, base, rtol=0, atol=300 * tolerance)
    narrow = model.solve(Kind.ENCODE, x, context, tolerance=1e-5)
    np.testing.assert_allclose(narrow.log_density, reference, rtol=0, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", Kind)
@pytest.mark.parametrize("name", [name for name in FLOWS if FLOWS[name][1] == "dopri5"])
def test_a_batch_takes_the_steps_that_scipy_takes_row_by_row(name: str, direction: Kind, kind: str) -> None:
    model = exported(name)
    field, dim, rows = field_of(model, "float64"), model.flow.dim, 3
    # conditional fields: the oracle sees one row's context only
    x, context = model.points(direction, rows)
    z = model.flow.transform.encode(torch.from_numpy(x))[0].numpy() if direction is Kind.ENCODE else x
    ends = (model.t_data, model.t_base) if direction is Kind.ENCODE else (model.t_base, model.t_data)
    extra = [] if context is None else [context]
    clock, span = np.zeros((rows, len(Clock))), np.zeros((rows, len(Span)))
    clock[:, Clock.T], clock[:, Clock.CAP] = ends[0], 10
    clock[:, Clock.DT] = math.copysign(0.1, ends[1] - ends[0])
    span[:] = (ends[1], 1e-6, 1e-7, 1e-5, 1000)
    (state,) = model.program(f"start_{kind}_float64")(clock[:, [Clock.T]], z, *extra)
    times: list[list[float]] = [[] for _ in range(rows)]
    while (running := clock[:, Clock.STOP] == 0).any():
        before = clock.copy()
        clock_next, state_next = model.program(f"step_{kind}_float64")(clock, span, state, *extra)
        clock, state = (
            np.where(running[:, None], clock_next, clock),
            np.where(running[:, None], state_next, state),
        )
        for row in np.flatnonzero(clock[:, Clock.ACCEPTED] > before[:, Clock.ACCEPTED]):
            times[row].append(clock[row, Clock.T])
    for row in range(rows):
        c = None if context is None else torch.from_numpy(context[[row]])
        theirs = oracle(Given(field, c), z[row], *ends, 0.1, 1e-6, 1e-7, 1e-5 if KINDS[kind] else None)
        assert clock[row, Clock.ATTEMPTS] == theirs.attempts
        np.testing.assert_allclose(times[row], theirs.times, rtol=0, atol=1e-8)
        np.testing.assert_allclose(state[row, :dim], theirs.end[:dim], rtol=1e-8, atol=1e-8)
        if KINDS[kind]:
            assert clock[row, Clock.ELL] == pytest.approx(theirs.end[-1], rel=1e-8, abs=1e-8)
            assert clock[row, Clock.ERROR] == pytest.approx(theirs.error, rel=1e-4, abs=1e-12)


class Given:
    """A conditional field with its context filled in."""

    def __init__(self, field: Any, context: torch.Tensor | None) -> None:
        self.field, self.context = field, context

    def with_divergence(self, t: float, z: torch.Tensor) -> Any:
        return self.field.with_divergence(t, z, self.context)


def test_exporting_changes_nothing_about_the_flow(tmp_path: Path) -> None:
    flow = FLOWS["deep5"][0]()
    before = {name: (tensor.clone(), tensor.dtype) for name, tensor in flow.state_dict().items()}
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        export_programs(
            flow, METHODS["bosh3"], tmp_path, lambda name: told.append(name) or interrupt(name == "decode")
        )
    assert told == ["encode", "decode"]
    after = flow.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == d for name, (tensor, d) in before.items()
    )
    assert all(parameter.requires_grad for parameter in flow.parameters())
    assert flow.training


def interrupt(now: bool) -> None:
    if now:
        raise KeyboardInterrupt


class Bessel(Foreign):
    """Uses a function that ONNX does not have."""

    def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        return torch.special.i0e(super().forward(t, z, *c))


class Branching(Foreign):
    """Asks for a value in Python."""

    def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        value = super().forward(t, z, *c)
        return value if z.sum() > 0 else -value


@pytest.mark.parametrize("foreign", [Bessel, Branching])
def test_a_field_that_cannot_be_exported_is_refused(foreign: type[Foreign], tmp_path: Path) -> None:
    flow = Flow(Wrapped(foreign(2, (8,)), 2), identity(2))
    with pytest.raises(PublishFailed, match="field"):
        export_programs(flow, METHODS["bosh3"], tmp_path)


def test_numbers_in_transforms_keep_their_digits(tmp_path: Path) -> None:
    # 0.1 and 0.6 are no float32 numbers: rounded, they would move the edge of the support
    transform = Compose([Logit(2, [0], 0.1, 0.7), Log(2, [1], lower=0.1)])
    flow = Flow(MLP(2, (16,)), transform)
    with pytest.raises(KeyboardInterrupt):
        export_programs(flow, METHODS["bosh3"], tmp_path, lambda name: interrupt(name == "decode"))
    encode = Program((tmp_path / "encode.onnx").read_bytes(), "encode")
    x = np.array([[0.1 + 1e-9, 0.1 + 1e-9], [0.3, 5.0], [0.7 - 1e-9, 0.2]])
    expected = transform.encode(torch.from_numpy(x))
    for ours, theirs in zip(encode(x), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
