"""The closed-batch solver in torch: the reference that the exported programs and the engine are held to.

It runs the same step module row by row, without export, engine or scheduling, in float64 on any torch device;
rows that have stopped are taken out.  Publishing uses it with an 8th-order method at 1e-10 to measure the
true error of what will be served.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.flows.flow import Flow, base_log_density
from pushforward.solvers.state import Clock, Span, Stop
from pushforward.solvers.step import Start, Step
from pushforward.solvers.tableau import METHODS

__all__ = ["Solution", "integrate", "log_density"]


@dataclass
class Solution:
    """Where n rows ended: z [n, D] and their clocks [n, 8] (see ``solvers.state``)."""

    z: Tensor
    clock: Tensor


@torch.no_grad()
def integrate(
    flow: Flow,
    z: Tensor,
    context: Tensor | None,
    t_start: float,
    t_end: float,
    *,
    method: str = "dopri8",
    tolerance: float = 1e-10,
    first_step: float = 1e-2,
    max_steps: int = 10_000,
    divergence: bool = True,
) -> Solution:
    """Integrate rows z [n, D] from t_start to t_end with rtol = atol = logp_atol = ``tolerance``."""
    field = flow.field
    start, step = Start(field, divergence), Step(field, METHODS[method], divergence, abs(t_end - t_start))
    step = step.to(z.device)
    n = len(z)
    t = torch.full((n, 1), t_start, dtype=torch.float64, device=z.device)
    state = start(t, z.double(), context)
    clock = torch.zeros(n, len(Clock), dtype=torch.float64, device=z.device)
    clock[:, Clock.T], clock[:, Clock.CAP] = t_start, 10.0
    clock[:, Clock.DT] = math.copysign(first_step, t_end - t_start)
    span = torch.tensor(
        [[t_end, tolerance, tolerance, tolerance, max_steps]], dtype=torch.float64, device=z.device
    )
    assert span.shape[1] == len(Span)
    span = span.repeat(n, 1)

    solution = Solution(state[:, : flow.dim].double(), clock.clone())
    running = torch.arange(n, device=z.device)
    while len(running):
        clock, state = step(clock, span, state, context)
        stopped = clock[:, Clock.STOP] != Stop.RUNNING
        if stopped.any():
            solution.z[running[stopped]] = state[stopped, : flow.dim].double()
            solution.clock[running[stopped]] = clock[stopped]
            clock, span, state, running = (part[~stopped] for part in (clock, span, state, running))
            context = None if context is None else context[~stopped]
    return solution


@torch.no_grad()
def log_density(
    flow: Flow, x: Tensor, context: Tensor | None = None, *, method: str = "dopri8", tolerance: float = 1e-10
) -> tuple[Tensor, Tensor]:
    """log p(x | c) [n], nats, and the base point z [n, D], in float64; NaN for rows that did not arrive."""
    flow = copy.deepcopy(flow).double()
    z, log_det = flow.transform.encode(x.double())
    context = None if context is None else context.double()
    solution = integrate(flow, z, context, flow.t_data, flow.t_base, method=method, tolerance=tolerance)
    arrived = solution.clock[:, Clock.STOP] == Stop.FINISHED
    value = base_log_density(solution.z)[:, 0] + solution.clock[:, Clock.ELL] + log_det[:, 0]
    return torch.where(arrived | (log_det[:, 0] == -math.inf), value, math.nan), solution.z
