"""Whole log-density solves at equal error: torchdiffeq, zuko, torchode, diffrax, Pushforward.

Every contender gets the same network and rows, one core, and its own cheapest tolerance (rtol = atol, four a
decade) whose p99 error of log p against the float64 reference is at most the target.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

import measure
import ours
from networks import HIDDEN, Network, load, log_density
from rivals import jax_solver, torch_solvers

TARGET = 1e-4  # nats, p99 over rows
GRID = 10.0 ** np.arange(-3, -8.1, -0.25)

LogDensity = Callable[[np.ndarray, float], np.ndarray]  # (float32 rows [n, D], tolerance) → log p [n]


def with_torch(solve: torch_solvers.Solve) -> LogDensity:
    """A solve on tensors as one on arrays."""

    def run(rows: np.ndarray, tolerance: float) -> np.ndarray:
        z, ell = solve(torch.from_numpy(rows), tolerance)
        return log_density(z.numpy(), ell.numpy())

    return run


def with_jax(network: Network, trace: str) -> LogDensity:
    """The same for diffrax."""
    solve = jax_solver.compiled(network.weights, trace)

    def run(rows: np.ndarray, tolerance: float) -> np.ndarray:
        z, ell = solve(rows, tolerance)
        return log_density(np.asarray(z), np.asarray(ell))

    return run


def contenders(network: Network) -> dict[str, LogDensity]:
    """Name → solve.  The closed forms of rivals are what their users get who derive the trace by hand."""
    field = torch_solvers.Field(network.weights)
    solves = {
        "torchdiffeq, autograd loop": torch_solvers.with_torchdiffeq(field, "autograd loop"),
        "torchdiffeq, vmap(jacrev)": torch_solvers.with_torchdiffeq(field, "vmap(jacrev)"),
        "torchdiffeq, batched vjp": torch_solvers.with_torchdiffeq(field, "batched vjp"),
        "zuko": torch_solvers.with_zuko(field),
        "torchode, autograd loop": torch_solvers.with_torchode(field, "autograd loop"),
        "torchode, vmap(jacrev)": torch_solvers.with_torchode(field, "vmap(jacrev)"),
        "torchdiffeq, closed form": torch_solvers.with_torchdiffeq(field, "closed form"),
        "torchode, closed form": torch_solvers.with_torchode(field, "closed form"),
    }
    result = {name: with_torch(solve) for name, solve in solves.items()}
    result["diffrax, autodiff"] = with_jax(network, "autodiff")
    result["diffrax, closed form"] = with_jax(network, "closed form")
    result["Pushforward"] = ours.Solver(network)
    return result


def batched(solve: LogDensity, batch: int) -> LogDensity:
    """The solve in batches of that many rows."""

    def run(rows: np.ndarray, tolerance: float) -> np.ndarray:
        return np.concatenate([solve(rows[i : i + batch], tolerance) for i in range(0, len(rows), batch)])

    return run


def cheapest(solve: LogDensity, rows: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """The loosest tolerance of the grid that reaches the target (by bisection), and its p99 error."""
    reached: dict[float, float] = {}
    low, high = 0, len(GRID) - 1
    while low <= high:
        middle = (low + high) // 2
        error = float(np.quantile(np.abs(solve(rows, GRID[middle]) - reference), 0.99))
        if error <= TARGET:
            reached[GRID[middle]], high = error, middle - 1
        else:
            low = middle + 1
    if not reached:
        return float("nan"), error
    tolerance = max(reached)
    return float(tolerance), reached[tolerance]


def main() -> None:
    """Choose tolerances, then time."""
    quick = measure.arguments(__doc__).quick
    measure.pin_to_one_core()
    torch.set_num_threads(1)
    results = []
    for dim in (2,) if quick else HIDDEN:
        network = load(dim)
        rows = network.rows.astype(np.float32)
        solves = contenders(network)
        for batch, count in ((256, 256), (1, 8 if quick else 32)):
            calls, settings = {}, {}
            for name, solve in solves.items():
                run = batched(solve, batch)
                settings[name] = cheapest(run, rows[:count], network.log_density[:count])
                tolerance = settings[name][0]
                if np.isfinite(tolerance):
                    timed = rows[: max(batch, 8)]
                    calls[name] = lambda run=run, timed=timed, tolerance=tolerance: run(timed, tolerance)
            times = measure.paired(calls, rounds=2 if quick else 7)
            shown = []
            for name, (tolerance, error) in settings.items():
                row = {"D": dim, "H": network.hidden, "rows": batch, "solver": name}
                row |= {"tolerance": tolerance, "p99 error": error}
                if name in times:
                    row["ms"] = float(np.median(times[name])) * 1e3 / (max(batch, 8) // batch)
                    row["times Pushforward"] = measure.ratio(times, name, "Pushforward")
                shown.append(row)
            measure.show(shown)
            results += shown
    measure.save("solve", results, target=TARGET, quick=quick)


if __name__ == "__main__":
    main()
