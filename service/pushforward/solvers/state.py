"""What a row carries between steps, as columns; shared by the step (torch) and the engine (numpy).

Two float64 matrices and one in the program's precision, a row of each per initial value problem:

- ``clock`` [B, 8]: changes at every step (:class:`Clock`);
- ``span`` [B, 5]: fixed at admission (:class:`Span`);
- ``state`` [B, 2 D + 1]: z and, of the first stage of the next step, k₁ = f(t, z) and its divergence; without
  the divergence, [B, 2 D], in programs that leave the log-density out.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Clock", "Span", "Stop"]


class Clock(IntEnum):
    """Columns of ``clock``."""

    T = 0  # time reached
    ELL = 1  # ∫ tr(∂f/∂z) dt so far, nats, along the direction of integration
    ERROR = 2  # Σ |local error of ELL| over accepted steps, nats
    ACCEPTED = 3  # accepted steps
    CAP = 4  # most that the next step may grow: 10, or 1 after a rejection
    DT = 5  # next step, signed
    ATTEMPTS = 6  # accepted and rejected steps
    STOP = 7  # why the row stopped (Stop), 0 while it runs


class Span(IntEnum):
    """Columns of ``span``."""

    T_END = 0
    RTOL = 1
    ATOL = 2
    LOGP_ATOL = 3  # tolerance of ELL per step, nats
    MAX_STEPS = 4


class Stop(IntEnum):
    """Values of ``Clock.STOP``."""

    RUNNING = 0
    FINISHED = 1
    MAX_STEPS = 2
    STEP_UNDERFLOW = 3
    NONFINITE = 4
