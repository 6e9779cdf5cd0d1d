"""Memory of maximum-likelihood training: the adjoint against backpropagation through the solver.

``python benchmarks/adjoint.py``: the most bytes that autograd keeps for the backward pass, and seconds of one
core for a gradient, over the number of solver steps; D = 8, two hidden layers of 64, 256 rows.
"""

from __future__ import annotations

import time
import weakref

import torch
from torch import Tensor

from pushforward.flows.fields import MLP
from pushforward.training.objectives import maximum_likelihood


class Saved:
    """Counts the bytes of all tensors that are saved for a backward pass, while they are."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def pack(self, tensor: Tensor) -> list[Tensor]:
        """Called by autograd when it saves a tensor."""
        held = Held([tensor.detach()])  # with its history it would keep the graph alive
        self.live += tensor.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(held, self.drop, tensor.nbytes)
        return held

    def drop(self, size: int) -> None:
        """The tensor is needed no more."""
        self.live -= size


class Held(list[Tensor]):
    """A list that can be referred to weakly."""


def measure(steps: int, adjoint: bool) -> tuple[float, float]:
    """Megabytes and seconds of one gradient."""
    torch.manual_seed(0)
    field, rows, saved = MLP(8, (64, 64)), torch.randn(256, 8), Saved()
    began = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held[0]):
        maximum_likelihood(field, rows, steps=steps, adjoint=adjoint).backward()
    return saved.peak / 1e6, time.process_time() - began


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    measure(2, adjoint=True)
    print("| steps | adjoint, MB | through the solver, MB | adjoint, s | through the solver, s |")
    print("|---:|---:|---:|---:|---:|")
    for steps in (8, 16, 32, 64, 128):
        (a, ta), (b, tb) = measure(steps, adjoint=True), measure(steps, adjoint=False)
        print(f"| {steps} | {a:.2f} | {b:.1f} | {ta:.2f} | {tb:.2f} |")


if __name__ == "__main__":
    main()
