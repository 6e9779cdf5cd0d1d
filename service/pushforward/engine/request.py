"""What the engine is asked and what it answers: flat records, one row per initial value problem."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import numpy as np
from numpy.typing import NDArray

from pushforward.solvers.state import Stop

__all__ = ["ADVICE", "Answer", "Chunk", "Kind", "Status"]

Array = NDArray[np.float64]


class Kind(StrEnum):
    """The direction of the integration."""

    ENCODE = "encode"  # x → z, from t_data to t_base
    DECODE = "decode"  # z → x, from t_base to t_data


class Status(IntEnum):
    """How a row ended.  Failure is data: other rows never notice."""

    OK = Stop.FINISHED
    MAX_STEPS = Stop.MAX_STEPS
    STEP_UNDERFLOW = Stop.STEP_UNDERFLOW
    NONFINITE = Stop.NONFINITE
    OUTSIDE_SUPPORT = 5
    CANCELLED = 6
    DEADLINE = 7


ADVICE: dict[Status, str] = {
    Status.OK: "",
    Status.MAX_STEPS: "the row used up its steps on the way: loosen rtol and atol, or raise max_steps",
    Status.STEP_UNDERFLOW: "the step shrank to nothing: loosen rtol and atol, or ask for precision float64",
    Status.NONFINITE: "the vector field became infinite or NaN: the row lies too far from the model's data",
    Status.OUTSIDE_SUPPORT: "the model's transform gives this row no density (log-density −∞)",
    Status.CANCELLED: "the request was cancelled before the row arrived",
    Status.DEADLINE: "the deadline passed before the row arrived: raise timeout_ms, or ask for fewer rows",
}


@dataclass
class Chunk:
    """Rows that travel together: n initial value problems of one model, direction and set of tolerances.

    Attributes:
        id: chosen by the sender; the answer carries it.
        model: name of the model.
        version: its version.
        kind: the direction.
        density: whether the log-density is integrated along.
        rows: x (encode) or z (decode), float64 [n, D].
        rtol: relative tolerance of z per step.
        atol: absolute tolerance of z per step.
        logp_atol: absolute tolerance of the log-density per step, nats.
        max_steps: attempted steps after which a row is given up.
        precision: ``float32`` or ``float64``, the arithmetic of the field.
        context: c, float64 [n, C], or None for an unconditional model.
        t_end: where to stop, for points on the way; None goes to the end.  With a time given,
            ``Answer.value`` holds the flow's coordinates z(t_end) and there is no log-density.
        deadline: on the engine's clock (``time.monotonic``), seconds; None for none.
        bulk: whether its rows give way to interactive ones.
        request: chunks of one request take turns as one; empty for a chunk that is a request of its own.
    """

    id: str
    model: str
    version: int
    kind: Kind
    density: bool
    rows: Array
    rtol: float
    atol: float
    logp_atol: float
    max_steps: int
    precision: str = "float32"
    context: Array | None = None
    t_end: float | None = None
    deadline: float | None = None
    bulk: bool = False
    request: str = ""


@dataclass
class Answer:
    """Row by row, in the order of the chunk.

    Attributes:
        id: of the chunk.
        value: z at the base (encode), x (decode) or z(t_end) where one was given, [n, D]; NaN unless the row
            is OK.
        log_density: log p(x), nats, in the units of the raw data, [n]; NaN where it was not asked for or
            failed.
        error_estimate: Σ |local error| of the log-density, nats, [n].
        steps: attempted steps, [n].
        accepted: accepted steps, [n].
        nfe: evaluations of the field, [n].
        status: ``Status``, [n].
        t: the time reached, [n].
        queue_s: from the submission until the first row was admitted, seconds.
        solve_s: from then until the last row left, seconds.
    """

    id: str
    value: Array
    log_density: Array
    error_estimate: Array
    t: Array
    steps: NDArray[np.int32]
    accepted: NDArray[np.int32]
    nfe: NDArray[np.int32]
    status: NDArray[np.uint8] = field(repr=False)
    queue_s: float = 0.0
    solve_s: float = 0.0
