"""How a flow is fitted, as one record of checked settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pushforward.errors import InvalidInput

__all__ = ["Objective", "Pairing", "Recipe"]

Objective = Literal["flow_matching", "maximum_likelihood"]
Pairing = Literal["independent", "optimal_transport"]


@dataclass(frozen=True)
class Recipe:
    """How to fit; the defaults are those of ``docs/training.md``.

    Attributes:
        hidden: widths of the field's hidden layers, multiples of 16; up to two keep the divergence in closed
            form.
        activation: ``silu``, ``tanh`` or ``softplus``.
        gate: whether hidden units are gated by time and context.
        objective: ``flow_matching``, or ``maximum_likelihood`` by the adjoint method.
        pairing: of noise and data in flow matching: ``independent``, or ``optimal_transport`` within a batch.
        noise: σ: the fitted density is that of data + N(0, σ²) in the coordinates of the field.
        sharpness: factor on the initial weights of the first layer; 3 resolves finer structure in few
            dimensions.
        steps: of the optimiser.
        batch: rows per step.
        learning_rate: the highest; AdamW, linear warm-up, cosine to 2 %.
        warmup: steps.
        weight_decay: of AdamW.
        clip: the largest norm of a gradient.
        average: decay of the exponential moving average of the weights, which is what is kept.
        checks: how often the exact validation log-density is taken; the best check wins.
        seed: of weights, batches and noise.
    """

    hidden: tuple[int, ...] = (256, 256)
    activation: str = "silu"
    gate: bool = False
    objective: Objective = "flow_matching"
    pairing: Pairing = "independent"
    noise: float = 0.05
    sharpness: float = 1.0
    steps: int = 4000
    batch: int = 256
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 1e-4
    clip: float = 1.0
    average: float = 0.999
    checks: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("objective", Objective), ("pairing", Pairing)):
            if getattr(self, name) not in get_args(kind):
                right = " or ".join(get_args(kind))
                raise InvalidInput(f"{name} must be {right}, not {getattr(self, name)!r}.", where=name)
        rules: Sequence[tuple[str, bool, str]] = (
            ("noise", 0 < self.noise < 1, "above 0 and below 1"),
            ("sharpness", self.sharpness > 0, "above 0"),
            ("steps", self.steps >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("warmup", self.warmup >= 0, "at least 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("clip", self.clip > 0, "above 0"),
            ("average", 0 <= self.average < 1, "at least 0 and below 1"),
            ("checks", self.checks >= 1, "at least 1"),
        )
        for name, fine, right in rules:
            if not fine:
                raise InvalidInput(f"{name} must be {right}, not {getattr(self, name)!r}.", where=name)

    def learning_rate_at(self, step: int) -> float:
        """Of step 0, 1, …: linear warm-up, then a half cosine down to 2 % of the highest."""
        warmup = min(self.warmup, self.steps // 4)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def checks_at(self) -> frozenset[int]:
        """The numbers of steps after which the validation log-density is taken."""
        return frozenset(max(1, round(self.steps * k / self.checks)) for k in range(1, self.checks + 1))
