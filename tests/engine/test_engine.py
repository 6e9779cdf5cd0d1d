"""The engine's books: chunks of every size and fate, slots, cancels, deadlines, statuses, pools."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tests.problems import FLOWS, ExportedModel, chunk, exported

from pushforward.engine.engine import Engine, Model
from pushforward.engine.request import ADVICE, Answer, Chunk, Kind, Status
from pushforward.messages import Counts
from pushforward.noise import standard_normal
from pushforward.solvers.solve import integrate
from pushforward.solvers.state import Clock


@pytest.fixture
def engine() -> Engine:
    return Engine(lambda *_: exported("tanh2"), slots=8)


@pytest.fixture
def model() -> ExportedModel:
    return exported("tanh2")


def finish(engine: Engine) -> dict[str, Answer]:
    """Everything that is left to answer."""
    answers: dict[str, Answer] = {}
    while engine.busy:
        for answer in engine.step():
            assert answer.id not in answers
            answers[answer.id] = answer
    assert engine.running == engine.waiting == 0
    return answers


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("name", ["tanh2", "silu13"])
def test_a_chunk_without_rows_is_answered_at_the_next_step(name: str, kind: Kind) -> None:
    empty = Engine(lambda *_: exported(name))
    dim, context_dim = exported(name).flow.dim, exported(name).flow.context_dim
    context = np.empty((0, context_dim)) if context_dim else None
    empty.submit(chunk("empty", kind, np.empty((0, dim)), context))
    assert empty.busy
    (answer,) = empty.step()
    assert answer.id == "empty"
    assert answer.value.shape == (0, dim)
    assert len(answer.status) == len(answer.log_density) == len(answer.steps) == 0
    assert not empty.busy


def test_a_chunk_outside_the_support_is_answered_without_integrating(engine: Engine) -> None:
    engine.submit(chunk("outside", Kind.ENCODE, np.array([[-1.0, 0.0], [0.0, 3.0]])))
    assert engine.busy
    assert engine.running == engine.waiting == 0
    (answer,) = engine.step()
    assert (answer.status == Status.OUTSIDE_SUPPORT).all()
    assert np.isneginf(answer.log_density).all()
    assert np.isnan(answer.value).all()
    assert (answer.nfe == 0).all()
    assert (answer.steps == 0).all()
    assert (answer.t == 1.0).all()
    assert engine.take_counts() == Counts(nfe=[2] + 16 * [0], status={Status.OUTSIDE_SUPPORT: 2})
    assert not engine.busy


def test_rows_outside_the_support_do_not_hold_the_others_up(engine: Engine, model: ExportedModel) -> None:
    x, _ = model.points(Kind.ENCODE, 5)
    x[[1, 3], 0] = -1.0
    engine.submit(chunk("mixed", Kind.ENCODE, x))
    answer = finish(engine)["mixed"]
    assert answer.status.tolist() == [1, 5, 1, 5, 1]
    inside = model.solve(Kind.ENCODE, x[[0, 2, 4]], None)
    assert answer.log_density[[0, 2, 4]].tobytes() == inside.log_density.tobytes()
    assert np.isneginf(answer.log_density[[1, 3]]).all()


def test_outside_the_support_means_nothing_where_no_density_is_asked(engine: Engine) -> None:
    engine.submit(chunk("z", Kind.ENCODE, np.array([[-1.0, 0.0]]), density=False))
    (answer,) = engine.step()
    assert answer.status[0] == Status.OUTSIDE_SUPPORT
    assert np.isnan(answer.log_density[0])


def test_a_chunk_larger_than_the_slots_takes_them_all_and_no_more(model: ExportedModel) -> None:
    engine, slots = Engine(lambda *_: model, slots=8), 8
    x, _ = model.points(Kind.ENCODE, 50)
    engine.submit(chunk("large", Kind.ENCODE, x))
    assert engine.waiting == 50
    most, answers = 0, []
    while engine.busy:
        answers += engine.step()
        most = max(most, engine.running)
        assert engine.running <= slots
    assert most == slots
    assert answers[0].value.tobytes() == model.solve(Kind.ENCODE, x, None).value.tobytes()


@pytest.mark.parametrize("slots", [1, 3, 40])
def test_no_turn_is_wasted(model: ExportedModel, slots: int) -> None:
    # a slot that is free is taken at the next turn, so the slots' turns are the rows' steps
    x, _ = model.points(Kind.ENCODE, 40)
    engine = Engine(lambda *_: model, slots)
    engine.submit(chunk("a", Kind.ENCODE, x))
    count, answers = 0, []
    while engine.busy:
        answers += engine.step()
        count += 1
    steps = answers[0].steps
    free = [0] * slots
    for row in range(40):  # rows are admitted in order, each by the slot that is free first
        slot = free.index(min(free))
        free[slot] += steps[row]
    assert count == max(free)


@pytest.mark.parametrize("kind", Kind)
def test_an_answer_is_the_torch_solution_row_by_row(kind: Kind) -> None:
    for name in FLOWS:
        model = exported(name)
        rows, context = model.points(kind, 4)
        answer = model.solve(kind, rows, context, precision="float64", tolerance=1e-6)
        flow = FLOWS[name][0]().double()
        c = None if context is None else torch.from_numpy(context)
        ends = (model.t_data, model.t_base) if kind is Kind.ENCODE else (model.t_base, model.t_data)
        z = (
            flow.transform.encode(torch.from_numpy(rows))[0]
            if kind is Kind.ENCODE
            else torch.from_numpy(rows)
        )
        solution = integrate(flow, z, c, *ends, method=model.method, tolerance=1e-6, first_step=0.1)
        value = solution.z if kind is Kind.ENCODE else flow.transform.decode(solution.z)[0]
        np.testing.assert_allclose(answer.value, value, rtol=1e-7, atol=1e-7)
        np.testing.assert_array_equal(answer.steps, solution.clock[:, Clock.ATTEMPTS])
        np.testing.assert_array_equal(answer.accepted, solution.clock[:, Clock.ACCEPTED])
        np.testing.assert_allclose(
            answer.error_estimate, solution.clock[:, Clock.ERROR], rtol=1e-3, atol=1e-12
        )
        np.testing.assert_array_equal(answer.nfe, 1 + answer.steps * model.stages)
        np.testing.assert_array_equal(answer.t, ends[1])


@pytest.mark.parametrize("name", FLOWS)
def test_there_and_back_again(name: str) -> None:
    model = exported(name)
    z, context = model.points(Kind.DECODE, 20)
    tight = {"precision": "float64", "tolerance": 1e-8, "max_steps": 100_000}
    samples = model.solve(Kind.DECODE, z, context, **tight)
    back = model.solve(Kind.ENCODE, samples.value, context, **tight)
    assert (samples.status == Status.OK).all()
    np.testing.assert_allclose(back.value, z, rtol=0, atol=1e-5)
    np.testing.assert_allclose(back.log_density, samples.log_density, rtol=0, atol=1e-5)


def test_density_is_left_out_when_it_is_not_asked_for(model: ExportedModel) -> None:
    z, _ = model.points(Kind.DECODE, 9)
    answer = model.solve(Kind.DECODE, z, None, density=False)
    assert np.isnan(answer.log_density).all()
    assert (answer.error_estimate == 0).all()
    np.testing.assert_allclose(answer.value, model.solve(Kind.DECODE, z, None).value, atol=1e-3)


@pytest.mark.parametrize("kind", Kind)
def test_a_time_on_the_way_gives_the_point_there(model: ExportedModel, kind: Kind) -> None:
    rows, _ = model.points(kind, 6)
    flow = FLOWS["tanh2"][0]().double()
    z, start = torch.from_numpy(rows), 0.0
    if kind is Kind.ENCODE:
        z, start = flow.transform.encode(z)[0], 1.0
    for t in (0.0, 0.3, 1.0):
        answer = model.solve(kind, rows, None, t_end=t, precision="float64", tolerance=1e-8, max_steps=10_000)
        exact = integrate(flow, z, None, start, t).z
        np.testing.assert_allclose(answer.value, exact, rtol=0, atol=1e-5)
        assert np.isnan(answer.log_density).all()
        assert (answer.t == t).all()
        assert (answer.status == Status.OK).all()


def test_samples_do_not_depend_on_how_they_are_cut_up(model: ExportedModel) -> None:
    engine = Engine(lambda *_: model, slots=16)
    engine.submit(chunk("whole", Kind.DECODE, standard_normal(7, 0, 100, 2)))
    for start, end in ((0, 1), (1, 38), (38, 100)):
        engine.submit(chunk(str(start), Kind.DECODE, standard_normal(7, start, end - start, 2)))
    engine.submit(chunk("fewer", Kind.DECODE, standard_normal(7, 0, 60, 2)))
    answers = finish(engine)
    whole = answers["whole"]
    parts = [answers[start] for start in ("0", "1", "38")]
    for part in ("value", "log_density", "steps"):
        cut = np.concatenate([getattr(answer, part) for answer in parts])
        assert cut.tobytes() == getattr(whole, part).tobytes()
        assert getattr(answers["fewer"], part).tobytes() == getattr(whole, part)[:60].tobytes()


# ------------------------------------------------------------------------------ cancels and deadlines


def test_cancelling_before_the_first_step(engine: Engine, model: ExportedModel) -> None:
    engine.submit(chunk("a", Kind.ENCODE, model.points(Kind.ENCODE, 20)[0]))
    answer = engine.cancel("a")
    assert answer is not None
    assert (answer.status == Status.CANCELLED).all()
    assert (answer.steps == 0).all()
    assert (answer.t == 1.0).all()
    assert np.isnan(answer.value).all()
    assert np.isnan(answer.log_density).all()
    assert finish(engine) == {}


def test_cancelling_half_way_keeps_the_rows_that_had_arrived(engine: Engine, model: ExportedModel) -> None:
    x, _ = model.points(Kind.ENCODE, 20)
    whole = model.solve(Kind.ENCODE, x, None)
    engine.submit(chunk("a", Kind.ENCODE, x))
    while engine.waiting > 4:
        assert engine.step() == []
    answer = engine.cancel("a")
    assert answer is not None
    arrived, cancelled = answer.status == Status.OK, answer.status == Status.CANCELLED
    assert arrived.sum() >= 4
    assert cancelled.sum() >= 8
    assert (arrived | cancelled).all()
    assert answer.log_density[arrived].tobytes() == whole.log_density[arrived].tobytes()
    assert np.isnan(answer.value[cancelled]).all()
    assert (answer.steps[cancelled] < whole.steps[cancelled]).all()
    running = cancelled & (answer.steps > 0)
    assert running.any()
    assert ((answer.t[running] > 0) & (answer.t[running] <= 1)).all()
    assert (answer.t[-4:] == 1.0).all()  # these waited still
    assert engine.running == engine.waiting == 0
    assert not engine.busy


def test_cancelling_what_is_not_there_changes_nothing(engine: Engine, model: ExportedModel) -> None:
    x, _ = model.points(Kind.ENCODE, 3)
    engine.submit(chunk("a", Kind.ENCODE, x))
    assert engine.cancel("b") is None
    answers = finish(engine)
    assert set(answers) == {"a"}
    assert engine.cancel("a") is None


def test_cancelling_what_was_done_at_submission_and_has_not_been_told(engine: Engine) -> None:
    outside = np.array([[-1.0, 0.0]])
    engine.submit(chunk("gone", Kind.ENCODE, outside))
    engine.submit(chunk("other", Kind.ENCODE, outside))
    answer = engine.cancel("gone")
    assert answer is not None
    assert answer.status.tolist() == [Status.OUTSIDE_SUPPORT]
    assert [answer.id for answer in engine.step()] == ["other"]
    assert not engine.busy


def test_the_places_of_a_cancelled_chunk_are_taken_at_the_next_turn(model: ExportedModel) -> None:
    engine = Engine(lambda *_: model, slots=4)
    x, _ = model.points(Kind.ENCODE, 4)
    engine.submit(chunk("a", Kind.ENCODE, x))
    engine.submit(chunk("b", Kind.ENCODE, x))
    engine.step()
    assert (engine.running, engine.waiting) == (4, 4)
    engine.cancel("a")
    assert (engine.running, engine.waiting) == (0, 4)
    engine.step()
    assert (engine.running, engine.waiting) == (4, 0)
    assert finish(engine)["b"].value.tobytes() == model.solve(Kind.ENCODE, x, None).value.tobytes()


def test_deadlines_are_those_of_the_clock(model: ExportedModel) -> None:
    now = 100.0
    engine = Engine(lambda *_: model, slots=4, clock=lambda: now)
    x, _ = model.points(Kind.ENCODE, 6)
    for id, deadline in (
        ("passed", 99.0),
        ("just now", 100.0),
        ("soon", 103.0),
        ("late", 1e9),
        ("never", None),
    ):
        engine.submit(chunk(id, Kind.ENCODE, x, deadline=deadline))
    answers = {answer.id: answer for answer in engine.step()}
    assert set(answers) == {"passed", "just now"}
    now = 102.9
    while engine.waiting == 18:
        assert engine.step() == []
    now = 103.0
    answers |= {answer.id: answer for answer in engine.step()}
    assert (answers["soon"].status != Status.OK).any()
    answers |= finish(engine)
    for id in ("passed", "just now"):
        assert (answers[id].status == Status.DEADLINE).all()
        assert (answers[id].steps == 0).all()
    for id in ("late", "never"):
        assert (answers[id].status == Status.OK).all()
    assert set(answers["soon"].status.tolist()) <= {Status.OK, Status.DEADLINE}
    alone = model.solve(Kind.ENCODE, x, None)
    assert answers["never"].log_density.tobytes() == alone.log_density.tobytes()


# --------------------------------------------------------------------------------------- rows that fail


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_every_failure_has_its_status_and_its_neighbours_do_not_notice(precision: str) -> None:
    model = exported("foreign3")
    x, context = model.points(Kind.DECODE, 7)
    assert context is not None
    alone = model.solve(Kind.DECODE, x, context, precision=precision, tolerance=1e-4)
    context[[1, 3, 5], 0] = (10, 20, 30)
    answer = model.solve(Kind.DECODE, x, context, precision=precision, tolerance=1e-4, max_steps=300)
    failures = [Status.STEP_UNDERFLOW, Status.NONFINITE, Status.MAX_STEPS]
    assert answer.status[[1, 3, 5]].tolist() == failures
    assert answer.steps[5] == 300
    assert answer.t[3] == pytest.approx(0.5, abs=1e-5)
    assert 0 < answer.t[1] < 1
    for part in ("value", "log_density", "steps", "error_estimate"):
        ours, theirs = getattr(answer, part), getattr(alone, part)
        assert ours[[0, 2, 4, 6]].tobytes() == theirs[[0, 2, 4, 6]].tobytes()
    assert np.isnan(answer.value[[1, 3, 5]]).all()
    assert np.isnan(answer.log_density[[1, 3, 5]]).all()
    np.testing.assert_array_equal(answer.nfe, 1 + answer.steps * model.stages)
    assert all(ADVICE[status] for status in failures)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200], ids=str)
@pytest.mark.parametrize("name", ["planar64", "silu13"])
def test_numbers_that_no_field_can_take_end_as_nonfinite(name: str, bad: float) -> None:
    model = exported(name)
    x, context = model.points(Kind.ENCODE, 3)
    x[1, -1] = bad
    answer = model.solve(Kind.ENCODE, x, context)
    assert answer.status.tolist() == [Status.OK, Status.NONFINITE, Status.OK]
    assert np.isnan(answer.log_density[1])
    assert answer.t[1] == model.t_data


def test_a_density_too_small_for_a_number_is_a_failure_rather_than_minus_infinity() -> None:
    # −∞ is reserved for rows outside the support; 1e200² overflows
    model = exported("planar64")
    x, _ = model.points(Kind.ENCODE, 2)
    x[1] = 1e200
    answer = model.solve(Kind.ENCODE, x, None, precision="float64")
    assert answer.status.tolist() == [Status.OK, Status.NONFINITE]
    assert np.isnan(answer.log_density[1])


def test_a_tolerance_that_cannot_be_met_is_the_rows_own_failure(model: ExportedModel) -> None:
    x, _ = model.points(Kind.ENCODE, 2)
    answer = model.solve(Kind.ENCODE, x, None, tolerance=1e-18, max_steps=500)
    assert (answer.status == Status.MAX_STEPS).all()
    assert (answer.steps == 500).all()


# ------------------------------------------------------------------------------------ models and pools


class Models:
    """Versions 1 and 2 of one name, and how often each was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(self, name: str, version: int) -> Model:
        self.asked.append((name, version))
        return exported({1: "tanh2", 2: "silu13"}[version])


def numbered(version: int, id: str, rows: int = 5, **settings: object) -> Chunk:
    model = exported({1: "tanh2", 2: "silu13"}[version])
    made = chunk(id, Kind.ENCODE, *model.points(Kind.ENCODE, rows), **settings)
    return dataclasses.replace(made, version=version)


def test_models_do_not_share_slots() -> None:
    engine = Engine(Models(), slots=4)
    engine.submit(numbered(1, "a", 20))
    engine.submit(numbered(2, "b", 3))
    engine.step()
    assert engine.running == 7
    answers = finish(engine)
    assert answers["a"].value.shape == (20, 2)
    assert answers["b"].value.shape == (3, 13)


def test_forgetting_a_version_drops_its_idle_pools_only() -> None:
    engine = Engine(Models(), slots=4)
    engine.submit(numbered(1, "a", 6))
    engine.submit(numbered(2, "b", 6))
    engine.forget("model", 1)  # busy: stays until it is done
    answers = finish(engine)
    assert (answers["a"].status == Status.OK).all()
    engine.forget("model", 1)
    engine.forget("model", 1)
    engine.submit(numbered(1, "again", 6))
    assert finish(engine)["again"].value.tobytes() == answers["a"].value.tobytes()


@pytest.mark.parametrize("fault", ["unknown model", "unknown program", "wrong width", "missing context"])
def test_a_chunk_that_cannot_be_taken_leaves_the_engine_as_it_was(fault: str) -> None:
    engine = Engine(Models(), slots=4)
    engine.submit(numbered(1, "healthy", 6))
    bad = numbered(2, "bad")
    bad = {
        "unknown model": dataclasses.replace(bad, version=3),
        "unknown program": dataclasses.replace(bad, precision="float16"),
        "wrong width": dataclasses.replace(bad, rows=np.ones((2, 5))),
        "missing context": dataclasses.replace(bad, context=None),
    }[fault]
    with pytest.raises(Exception):  # noqa: B017, PT011 — whatever the model says
        engine.submit(bad)
    assert engine.waiting == 6
    answers = finish(engine)
    assert set(answers) == {"healthy"}
    assert engine.cancel("bad") is None
    engine.submit(numbered(2, "next"))
    assert (finish(engine)["next"].status == Status.OK).all()


def test_two_chunks_of_one_name_are_both_answered(model: ExportedModel) -> None:
    engine = Engine(lambda *_: model)
    x, _ = model.points(Kind.ENCODE, 4)
    engine.submit(chunk("same", Kind.ENCODE, x[:3]))
    engine.submit(chunk("same", Kind.ENCODE, x[3:]))
    sizes = [len(answer.status) for _ in range(1000) if engine.busy for answer in engine.step()]
    assert sorted(sizes) == [1, 3]
    assert engine.cancel("same") is None


def test_rows_that_came_in_are_not_written_to(model: ExportedModel) -> None:
    for kind in Kind:
        rows, _ = model.points(kind, 12)
        before = rows.copy()
        first = model.solve(kind, rows, None, slots=3)
        kept = first.value.copy()
        model.solve(kind, rows[::-1].copy(), None, slots=3)
        np.testing.assert_array_equal(rows, before)
        np.testing.assert_array_equal(first.value, kept)  # nor answers that went out
