"""Fit a field to rows: the loop, the weight average, early stopping, checkpoints.

The same seed gives the same weights, bit for bit, on the same machine with the same number of threads; so
does a fit that was interrupted and resumed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pushforward.errors import Conflict, TrainingFailed
from pushforward.flows.fields import MLP
from pushforward.flows.flow import Flow
from pushforward.flows.transforms import Transform
from pushforward.training import objectives
from pushforward.training.data import Array
from pushforward.training.progress import Check, Quiet, Watch
from pushforward.training.recipe import Recipe

__all__ = ["Fit", "fit"]

VALIDATION_ROWS = 1000  # more would cost time and not change which check is the best
ADVICE = "Use a smaller learning rate, and look for extreme values in the features: a log transform may help."


@dataclass(frozen=True)
class Fit:
    """A fitted flow, and how it went.

    Attributes:
        flow: with the averaged weights of the best check.
        history: all checks.
        best: the check that was kept.
    """

    flow: Flow
    history: tuple[Check, ...]
    best: Check


def fit(
    train: Array,
    validation: Array,
    transform: Transform,
    *,
    context: Array | None = None,
    validation_context: Array | None = None,
    recipe: Recipe | None = None,
    dequantize: Array | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    watch: Watch | None = None,
) -> Fit:
    """Fit a flow to raw rows.

    Args:
        train: [n, D] raw rows.
        validation: [m, D] raw rows that decide which check is the best.
        transform: raw data ↔ the coordinates of the field.
        context: [n, C] of the training rows, raw: standardised for the fit, with the scaling folded into the
            weights of the result.
        validation_context: [m, C].
        recipe: how; the defaults of ``Recipe`` when None.
        dequantize: [D] widths w of the uniform noise on (−w/2, w/2) that each feature gets in every batch.
        checkpoint: a file to which the state is written at every check.
        resume: continue from the checkpoint, if there is one.
        watch: is told of every step and check.

    Raises:
        Conflict: the checkpoint belongs to other data or another recipe.
        TrainingFailed: the loss is not finite, no check had a finite log-density, or the checkpoint cannot be
            written.
    """
    recipe, watch = recipe or Recipe(), watch or Quiet()
    run = _Run(train, validation, transform, context, validation_context, recipe, dequantize)
    if checkpoint is not None and resume and checkpoint.exists():
        run.load(checkpoint)
    checks_at = recipe.checks_at()
    with watch:
        watch.start(run.step, recipe.steps, run.history)
        while run.step < recipe.steps:
            loss = run.advance()
            watch.step(run.step, loss)
            if run.step in checks_at:
                watch.check(run.check(loss))
                if checkpoint is not None:
                    run.save(checkpoint)
    return run.result()


class _Run:
    """The state of a fit between two steps."""

    def __init__(
        self,
        train: Array,
        validation: Array,
        transform: Transform,
        context: Array | None,
        validation_context: Array | None,
        recipe: Recipe,
        dequantize: Array | None,
    ) -> None:
        self.recipe, self.transform = recipe, transform
        self.raw = torch.from_numpy(np.ascontiguousarray(train, dtype=np.float64))
        self.widths = None if dequantize is None or not dequantize.any() else torch.from_numpy(dequantize)
        self.encoded = transform.encode(self.raw)[0].float()
        self.generator = torch.Generator().manual_seed(recipe.seed)
        held_out = torch.from_numpy(np.ascontiguousarray(validation[:VALIDATION_ROWS], dtype=np.float64))
        if self.widths is not None:  # drawn once: all checks see the same rows
            held_out = held_out + self.widths * self._uniform(held_out.shape)
        self.validation, log_det = transform.encode(held_out)
        self.validation_log_det = log_det
        self.scaling = None if context is None else _Scaling.of(context)
        self.context = self.validation_context = None
        if self.scaling is not None:
            assert context is not None and validation_context is not None
            self.context = self.scaling(context)
            self.validation_context = self.scaling(validation_context[:VALIDATION_ROWS])
        context_dim = 0 if context is None else context.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.field = MLP(transform.dim, recipe.hidden, context_dim, recipe.activation, recipe.gate)
            for weight in self.field.weights[0].parameters():
                weight.data *= recipe.sharpness
        self.parameters = list(self.field.parameters())
        self.averaged = copy.deepcopy(self.field)
        self.kept = copy.deepcopy(self.field)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.step = 0
        self.history: list[Check] = []
        digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
        for tensor in (self.encoded, self.validation, self.context, self.widths):
            digest.update(b"-" if tensor is None else tensor.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def advance(self) -> float:
        """One step of the optimiser; its loss."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(self.step)
        loss = self._loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingFailed(f"The loss is {value} at step {self.step + 1}. {ADVICE}")
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.averaged.parameters(), self.parameters, strict=True):
                average.lerp_(parameter, 1 - recipe.average)
        self.step += 1
        return value

    def _loss(self) -> Tensor:
        recipe = self.recipe
        index = torch.randint(len(self.encoded), (recipe.batch,), generator=self.generator)
        x1 = self.encoded[index]
        if self.widths is not None:
            raw = self.raw[index]
            x1 = self.transform.encode(raw + self.widths * self._uniform(raw.shape))[0].float()
        context = None if self.context is None else self.context[index]
        x0 = torch.randn(x1.shape, generator=self.generator)
        if recipe.objective == "maximum_likelihood":
            return objectives.maximum_likelihood(self.field, x1 + recipe.noise * x0, context)
        if recipe.pairing == "optimal_transport":
            x0 = x0[objectives.optimal_pairs(x0, x1, context)]
        t = torch.arange(recipe.batch)[:, None] + torch.rand((recipe.batch, 1), generator=self.generator)
        return objectives.flow_matching(self.field, x0, x1, t / recipe.batch, context, recipe.noise)

    def _uniform(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64) - 0.5

    def check(self, loss: float) -> Check:
        """The validation log-density of the averaged weights; they are kept if it is the best so far.

        Each row's −log p is clipped at the 95th percentile: a single far row would rule the mean.
        """
        with torch.no_grad():
            log_p = objectives.log_density(self.averaged, self.validation.float(), self.validation_context)
            nll = -(log_p.double() + self.validation_log_det)[:, 0]
            nll = nll.nan_to_num(nan=math.inf)
            held_out = -float(nll.clamp(max=float(nll.quantile(0.95))).mean())
        check = Check(self.step, loss, held_out)
        if not self.history or held_out > max(past.held_out for past in self.history):
            self.kept.load_state_dict(self.averaged.state_dict())
        self.history.append(check)
        return check

    def result(self) -> Fit:
        """The flow with the kept weights."""
        best = max(self.history, key=lambda check: check.held_out)
        if not math.isfinite(best.held_out):
            raise TrainingFailed(
                f"The log-density of the validation rows was not finite at any check. {ADVICE}"
            )
        field = copy.deepcopy(self.kept)
        if self.scaling is not None:
            self.scaling.fold_into(field)
        return Fit(Flow(field.eval().requires_grad_(False), self.transform), tuple(self.history), best)

    def _tensors(self) -> dict[str, Tensor]:
        """The whole state but numbers, by name; the tensors themselves, not copies."""
        tensors = {"generator": self.generator.get_state()}
        for name, module in (("field", self.field), ("averaged", self.averaged), ("kept", self.kept)):
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        for index, parameter in enumerate(self.parameters):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{key}"] = value
        return tensors

    def save(self, path: Path) -> None:
        """Write the state; a reader sees the old file or the new one, never half of it.

        Raises:
            TrainingFailed: it cannot be written.
        """
        facts = {
            "fingerprint": self.fingerprint,
            "step": self.step,
            "history": [asdict(check) for check in self.history],
        }
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self._tensors(), partial, metadata={"facts": json.dumps(facts)})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            if partial.is_file():
                partial.unlink()
            raise TrainingFailed(f"The checkpoint {path} could not be written: {error}.") from error

    def load(self, path: Path) -> None:
        """Continue from a saved state.

        Raises:
            Conflict: it is no checkpoint, or one of other data or another recipe.
        """
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {}).get("facts", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise Conflict(
                f"{path} is not a readable checkpoint ({error}). Delete it to start anew."
            ) from error
        if facts.get("fingerprint") != self.fingerprint:
            raise Conflict(
                f"The checkpoint {path} belongs to other data or other settings. "
                "Give the same ones to continue it, or delete it to start anew."
            )
        self.step = facts["step"]
        self.history = [Check(**check) for check in facts["history"]]
        self.generator.set_state(tensors.pop("generator"))
        for name, module in (("field", self.field), ("averaged", self.averaged), ("kept", self.kept)):
            prefix = f"{name}."
            module.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
        for index, parameter in enumerate(self.parameters):
            prefix = f"optimizer.{index}."
            self.optimizer.state[parameter] = {
                k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
            }


@dataclass(frozen=True)
class _Scaling:
    """c → (c − mean) / scale, for the time of training."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, context: Array) -> _Scaling:
        return cls(torch.from_numpy(context.mean(0)), torch.from_numpy(context.std(0)))

    def __call__(self, context: Array) -> Tensor:
        return ((torch.from_numpy(np.ascontiguousarray(context)) - self.mean) / self.scale).float()

    def fold_into(self, field: MLP) -> None:
        """Make a field that was trained on scaled context take the raw one; context enters by affine maps."""
        first = field.time.features
        for affine in (*field.biases, *field.gates):
            weight = affine.weight.detach().double()
            weight[:, first:] /= self.scale
            affine.bias.data = (affine.bias.double() - weight[:, first:] @ self.mean).float()
            affine.weight.data = weight.float()
