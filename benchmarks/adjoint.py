"""Memory of maximum-likelihood training: the adjoint method against backpropagation through the solver.

One gradient of the mean log-density of 512 rows (D = 30, H = 128, classical Runge–Kutta, equal steps), each
in a process of its own; the peak is what the resident set grows by while the gradient is computed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import measure
from networks import load
from pushforward.training.objectives import maximum_likelihood

DIM, ROWS = 30, 512
STEPS = (4, 8, 16, 32, 64, 128)
FIGURE = measure.HERE.parent / "docs" / "figures" / "adjoint_memory.svg"


def resident(key: str) -> int:
    """A line of this process's memory status, in bytes: VmRSS (now) or VmHWM (peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def one(steps: int, adjoint: bool) -> None:
    """Compute one gradient in this process, and write its peak memory, its seconds and itself."""
    torch.set_num_threads(1)
    network = load(DIM)
    field = network.field().requires_grad_(True)
    rows = torch.tensor(network.rows, dtype=torch.float32).repeat(ROWS // len(network.rows), 1)
    maximum_likelihood(field, rows[:2], steps=1, adjoint=adjoint).backward()
    field.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = resident("VmRSS"), time.perf_counter()
    maximum_likelihood(field, rows, steps=steps, adjoint=adjoint).backward()
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    gradient = torch.cat([p.grad.flatten() for p in field.parameters() if p.grad is not None])
    json.dump({"peak": peak, "seconds": seconds, "gradient": gradient.tolist()}, sys.stdout)


def run(steps: int, adjoint: bool) -> dict[str, Any]:
    """The same in a fresh process, whose freed tensors go back to the system at once."""
    command = [sys.executable, __file__, "--one", str(steps), str(int(adjoint))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def figure(rows: list[dict[str, Any]]) -> None:
    """Peak memory against steps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pushforward"
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(figsize=(6, 3.5))
    steps = [row["steps"] for row in rows]
    axes.loglog(steps, [row["solver MB"] for row in rows], "o-", label="backpropagation through the solver")
    axes.loglog(steps, [row["adjoint MB"] for row in rows], "s-", label="adjoint")
    axes.set(xlabel="solver steps", ylabel="peak memory of one gradient, MB", xticks=steps, xticklabels=steps)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(FIGURE, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """A table over step counts."""
    quick = measure.arguments(__doc__).quick
    load(DIM)
    rows = []
    for steps in STEPS[:3] if quick else STEPS:
        solver, adjoint = run(steps, adjoint=False), run(steps, adjoint=True)
        g, h = np.array(solver["gradient"]), np.array(adjoint["gradient"])
        rows.append(
            {"steps": steps, "solver MB": solver["peak"] / 1e6, "adjoint MB": adjoint["peak"] / 1e6}
            | {"solver s": solver["seconds"], "adjoint s": adjoint["seconds"]}
            | {"gradients differ by": float(np.linalg.norm(g - h) / np.linalg.norm(g))}
        )
    measure.show(rows)
    measure.save("adjoint", rows, quick=quick)
    if not quick:
        figure(rows)


if __name__ == "__main__":
    if "--one" in sys.argv:
        one(int(sys.argv[2]), bool(int(sys.argv[3])))
    else:
        main()
