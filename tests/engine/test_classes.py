"""Interactive and bulk rows in one engine, and its accounts: a bundled model, and a clock of our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pushforward.engine.engine import Engine
from pushforward.engine.request import Answer, Array, Chunk, Status
from pushforward.loading import LoadedModel, default_chunk, load_model, run_chunk
from pushforward.messages import NFE, OCCUPANCY, STEP_SECONDS, Counts
from pushforward.programs.runtime import Program


@pytest.fixture(scope="module")
def wine(checkout: Path) -> LoadedModel:
    return load_model(checkout / "model_store" / "wine" / "1")


@pytest.fixture(scope="module")
def rows(wine: LoadedModel) -> Array:
    return np.resize(wine.tensors("golden.safetensors")["x"], (300, wine.manifest.dim))


@pytest.fixture
def make(wine: LoadedModel, rows: Array) -> Callable[..., Chunk]:
    def make(id: str, count: int, **settings: object) -> Chunk:
        chunk = default_chunk(wine.manifest.solver, rows[:count], None)
        return dataclasses.replace(chunk, id=id, **settings)

    return make


class Paced:
    """A model on a machine where a step takes 0.1 ms and 0.02 ms for every row, and the machine's clock.

    The rows are solved by the model's own programs.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model, self.now = model, 0.0
        self.t_base, self.t_data, self.stages = model.t_base, model.t_data, model.stages
        self.dt_data_to_base, self.dt_base_to_data = model.dt_data_to_base, model.dt_base_to_data
        self.steps: list[int] = []  # the rows of each

    def __call__(self, name: str, version: int) -> Paced:
        return self

    def clock(self) -> float:
        return self.now

    def program(self, name: str) -> Callable[..., list[Array]]:
        program = self._model.program(name)
        return self._paced(program) if name.startswith("step") else program

    def _paced(self, program: Program) -> Callable[..., list[Array]]:
        def step(*inputs: Array) -> list[Array]:
            self.now += 1e-4 + 2e-5 * len(inputs[0])
            self.steps.append(len(inputs[0]))
            return program(*inputs)

        return step


def finish(engine: Engine) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    while engine.busy:
        for answer in engine.step():
            assert answer.id not in answers
            answers[answer.id] = answer
    assert engine.running == engine.waiting == 0
    return answers


def same(answer: Answer, other: Answer) -> bool:
    return all(
        getattr(answer, part).tobytes() == getattr(other, part).tobytes()
        for part in ("value", "log_density", "error_estimate", "t", "steps", "accepted", "nfe", "status")
    )


# ---------------------------------------------------------------------------------------------- classes


def test_an_interactive_row_is_answered_as_fast_as_alone_beside_full_slots(
    wine: LoadedModel, make: Callable[..., Chunk]
) -> None:
    alone = run_chunk(wine, make("alone", 1))
    paced = Paced(wine)
    engine = Engine(paced, slots=16, clock=paced.clock, step_budget_s=60)
    engine.submit(make("job", 300, bulk=True))
    for _ in range(3):
        engine.step()
    engine.submit(make("row", 1))
    for _ in range(alone.steps[0] - 1):
        assert "row" not in {answer.id for answer in engine.step()}
    (answer,) = engine.step()
    assert set(paced.steps) == {16}
    assert answer.id == "row"
    assert same(answer, alone)


def test_bulk_rows_come_through_an_endless_stream_of_interactive_ones(
    wine: LoadedModel, make: Callable[..., Chunk]
) -> None:
    engine = Engine(lambda *_: wine, slots=16, step_budget_s=60)
    engine.submit(make("stream 0", 100))
    engine.step()
    engine.submit(make("job", 40, bulk=True))
    found, number = None, 1
    while found is None:
        if engine.waiting < 200:
            engine.submit(make(f"stream {number}", 100))
            number += 1
        found = next((answer for answer in engine.step() if answer.id == "job"), None)
        assert engine.running <= 16
    assert same(found, run_chunk(wine, make("job", 40)))


def test_rows_that_pause_go_on_as_if_nothing_had_been(wine: LoadedModel, make: Callable[..., Chunk]) -> None:
    paced = Paced(wine)
    engine = Engine(paced, slots=64, clock=paced.clock, step_budget_s=0.0005)
    engine.submit(make("job", 200, bulk=True))
    for number in range(60):
        if number % 5 == 2:
            engine.submit(make(f"row {number}", 1 + number % 3))
        engine.step()
    assert min(paced.steps) < 25 < max(paced.steps)  # some paused, and they had run before
    job = finish(engine)["job"]
    assert same(job, run_chunk(wine, make("job", 200)))


@pytest.mark.parametrize("budget", [0.001, 0.002, 0.004])
def test_a_turn_of_all_pools_keeps_to_the_budget_while_interactive_rows_are_about(
    wine: LoadedModel, make: Callable[..., Chunk], budget: float
) -> None:
    paced = Paced(wine)
    engine = Engine(paced, slots=256, clock=paced.clock, step_budget_s=budget)
    for version in (1, 2, 3):
        engine.submit(make(f"job {version}", 300, version=version, bulk=True))
    for _ in range(6):  # they learn how long their steps take
        engine.step()
    assert max(paced.steps) == 256
    engine.submit(make("row", 1, version=2))
    engine.submit(make("other row", 1, version=4))
    left, turns = 2, []
    while left:
        before = paced.now
        left -= sum("row" in answer.id for answer in engine.step())
        turns.append(paced.now - before)
    assert turns[0] <= budget + 2.5e-4  # nothing was known of small steps, nor of the fourth pool
    assert max(turns[1:]) <= 1.05 * budget
    assert sum(turns[2:-2]) >= 0.8 * budget * len(turns[2:-2])  # which is used
    before = len(paced.steps)
    engine.step()
    engine.step()
    assert max(paced.steps[before:]) > 200  # and bulk has the slots again
    finish(engine)


def test_pools_take_turns_with_bulk_rows(wine: LoadedModel, make: Callable[..., Chunk]) -> None:
    # so that an interactive row that arrives waits for one bulk step, not for three
    engine = Engine(lambda *_: wine, slots=8)
    for version in (1, 2, 3):
        engine.submit(make(str(version), 8, version=version, bulk=True))
    for turn in range(1, 7):
        engine.step()
        assert engine.steps == turn
    steps = run_chunk(wine, make("alone", 8)).steps
    answers = []
    while engine.busy:
        answers += [answer.id for answer in engine.step()]
    assert sorted(answers) == ["1", "2", "3"]
    assert engine.steps == 3 * max(steps)


def test_the_chunks_of_a_request_take_turns_as_one(wine: LoadedModel, make: Callable[..., Chunk]) -> None:
    engine = Engine(lambda *_: wine, slots=32)
    for number in range(4):
        engine.submit(make(f"big/{number}", 100, request="big"))
    engine.submit(make("small", 100))
    order = []
    while engine.busy:
        order += [answer.id for answer in engine.step()]
    # half of the slots are the small request's
    assert order.index("small") <= 1


def test_with_one_slot_both_classes_move(wine: LoadedModel, make: Callable[..., Chunk]) -> None:
    engine = Engine(lambda *_: wine, slots=1, step_budget_s=60)
    engine.submit(make("row", 1))
    engine.submit(make("job", 1, bulk=True))
    answers = finish(engine)
    assert engine.steps == max(answers["row"].steps[0], answers["job"].steps[0])


# ------------------------------------------------------------------------------------- leaving early


def paused(wine: LoadedModel, make: Callable[..., Chunk], **settings: object) -> tuple[Engine, Paced]:
    """An engine in which 32 bulk rows run, most of them paused for an interactive one, and 8 wait."""
    paced = Paced(wine)
    engine = Engine(paced, slots=32, clock=paced.clock, step_budget_s=0.0002)
    engine.submit(make("job", 40, bulk=True, **settings))
    engine.step()
    engine.submit(make("row", 1))
    engine.step()
    assert paced.steps[-2:] == [32, paced.steps[-1]]
    assert paced.steps[-1] < 10
    return engine, paced


def test_bulk_rows_that_pause_can_be_cancelled(wine: LoadedModel, make: Callable[..., Chunk]) -> None:
    engine, _ = paused(wine, make)
    answer = engine.cancel("job")
    assert answer is not None
    assert (answer.status == Status.CANCELLED).all()
    assert set(answer.steps.tolist()) == {0, 1, 2}
    assert (engine.running, engine.waiting) == (1, 0)
    assert set(finish(engine)) == {"row"}


def test_bulk_rows_that_pause_have_their_deadline(wine: LoadedModel, make: Callable[..., Chunk]) -> None:
    engine, paced = paused(wine, make, deadline=0.02)
    paced.now = 0.02
    (answer,) = engine.step()
    assert answer.id == "job"
    assert (answer.status == Status.DEADLINE).all()
    assert set(finish(engine)) == {"row"}


def test_later_deadlines_are_kept_when_earlier_ones_have_passed(
    wine: LoadedModel, make: Callable[..., Chunk]
) -> None:
    now = 0.0
    engine = Engine(lambda *_: wine, slots=1, clock=lambda: now)
    for id, deadline in (("c", 30.0), ("a", 10.0), ("b", 20.0), ("free", None)):
        engine.submit(make(id, 2, deadline=deadline))
    gone = []
    for time in (5.0, 10.0, 15.0, 20.0, 25.0, 30.0):
        now = time
        gone += [[answer.id for answer in engine.step()]]
    assert gone == [[], ["a"], [], ["b"], [], ["c"]]
    assert (finish(engine)["free"].status == Status.OK).all()


def test_a_program_that_fails_in_a_step_is_the_callers_matter(
    checkout: Path, wine: LoadedModel, make: Callable[..., Chunk]
) -> None:
    other = load_model(checkout / "model_store" / "digits" / "1")

    class Mixed(Paced):
        def program(self, name: str) -> Callable[..., list[Array]]:
            return (other if name.startswith("step") else wine).program(name)

    engine = Engine(Mixed(wine), slots=8)
    engine.submit(make("a", 3))
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        engine.step()


# ------------------------------------------------------------------------------------------- accounts


def test_the_counts_are_those_of_the_answers(wine: LoadedModel, make: Callable[..., Chunk]) -> None:
    paced = Paced(wine)
    engine = Engine(paced, slots=16, clock=paced.clock)
    engine.submit(make("a", 100))
    engine.submit(make("b", 30, bulk=True))
    engine.submit(make("few steps", 5, max_steps=3))
    engine.submit(make("gone", 20))
    engine.step()
    cancelled = engine.cancel("gone")
    assert cancelled is not None
    answers = [*finish(engine).values(), cancelled]
    counts = engine.take_counts()
    seen: dict[int, int] = {}
    for status in np.concatenate([answer.status for answer in answers]).tolist():
        seen[status] = seen.get(status, 0) + 1
    assert counts.status == seen
    assert seen[Status.CANCELLED] == 20
    assert seen[Status.MAX_STEPS] == 5
    steps = np.concatenate([answer.steps for answer in answers])
    accepted = np.concatenate([answer.accepted for answer in answers])
    nfe = np.concatenate([answer.nfe for answer in answers])
    assert counts.accepted == accepted.sum()
    assert counts.rejected == (steps - accepted).sum()
    assert counts.nfe_sum == nfe.sum()
    assert counts.nfe == histogram(nfe, NFE)
    # every step of a row was a row of a step
    assert counts.occupancy_sum == steps.sum() == sum(paced.steps)
    assert counts.occupancy == histogram(paced.steps, OCCUPANCY)
    assert sum(counts.step_seconds) == engine.steps == len(paced.steps)
    assert counts.step_seconds == histogram([1e-4 + 2e-5 * rows for rows in paced.steps], STEP_SECONDS)
    assert counts.step_seconds_sum == pytest.approx(paced.now)
    assert engine.take_counts() == Counts()


def histogram(values: object, edges: tuple[float, ...]) -> list[int]:
    found = np.searchsorted(edges, np.round(values, 9), side="left")  # type: ignore[call-overload]
    return np.bincount(found, minlength=len(edges) + 1).tolist()


def test_an_answer_tells_how_long_it_waited_and_took(wine: LoadedModel, make: Callable[..., Chunk]) -> None:
    paced = Paced(wine)
    engine = Engine(paced, slots=4, clock=paced.clock)
    paced.now = 7.0
    engine.submit(make("first", 4))
    engine.submit(make("second", 4))
    engine.submit(make("never", 4))
    engine.step()
    began = paced.now
    never = engine.cancel("never")
    assert never is not None
    assert never.queue_s == began - 7.0
    assert never.solve_s == 0
    admitted, left = {}, {}
    waiting = engine.waiting
    while engine.busy:
        before = paced.now
        for answer in engine.step():
            left[answer.id] = (paced.now, answer)
        if engine.waiting < waiting and "second" not in admitted:
            admitted["second"] = before
    end, first = left["first"]
    assert first.queue_s == 0
    assert first.solve_s == end - 7.0
    end, second = left["second"]
    assert second.queue_s == admitted["second"] - 7.0
    assert second.queue_s + second.solve_s == pytest.approx(end - 7.0)


def test_it_is_known_how_many_rows_of_a_version_are_in_flight(
    wine: LoadedModel, make: Callable[..., Chunk]
) -> None:
    engine = Engine(lambda *_: wine, slots=8)
    engine.submit(make("a", 20, version=1))
    engine.submit(make("b", 30, version=1, bulk=True, density=False))
    engine.submit(make("c", 5, version=2))
    assert engine.rows_of("", 1) == 50
    assert engine.rows_of("", 2) == 5
    assert engine.rows_of("", 3) == engine.rows_of("other", 1) == 0
    engine.forget("", 1)  # its rows stay until they are done
    seen = [50]
    while engine.busy:
        engine.step()
        seen.append(engine.rows_of("", 1))
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 0
    engine.forget("", 1)
    engine.submit(make("again", 3, version=1))
    assert (finish(engine)["again"].status == Status.OK).all()
