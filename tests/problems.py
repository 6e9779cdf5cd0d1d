"""What several test files share: fields with closed forms, random fields, an oracle, exported programs."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import RK45
from scipy.linalg import expm
from tests.shared import being_filled, once, side_by_side
from torch import Tensor, nn

from pushforward.engine.request import Answer, Chunk, Kind
from pushforward.flows.fields import MLP, Linear, Sum, VectorField, Wrapped, planar
from pushforward.flows.flow import Flow
from pushforward.flows.transforms import Compose, Log, Logit, Standardize, Whiten
from pushforward.loading import BATCH_MULTIPLES, run_chunk
from pushforward.programs.export import export_programs
from pushforward.programs.runtime import Program
from pushforward.publish import publish
from pushforward.solvers.tableau import METHODS

torch.set_num_threads(1)

Array = NDArray[np.float64]

# ---------------------------------------------------------------------------------------------- fields


def shaken(field: Any, seed: int = 0, gain: float = 1.2) -> Any:
    """The field with random weights everywhere: an untrained one is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in field.named_parameters():
        scale = (
            gain / parameter.shape[-1] ** 0.5
            if (parameter.ndim == 2 and "weights" in name) or "weight" in name
            else 0.3
        )
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return field


def identity(dim: int) -> Standardize:
    return Standardize(torch.zeros(dim), torch.ones(dim))


class Foreign(nn.Module):
    """A field as other libraries have it: a perceptron on [z, t, c], any depth and activation."""

    def __init__(
        self, dim: int, hidden: Sequence[int], context_dim: int = 0, act: type[nn.Module] = nn.Tanh
    ) -> None:
        super().__init__()
        sizes = [dim + 1 + context_dim, *hidden, dim]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), act()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        return self.net(torch.cat([z, t * torch.ones_like(z[:, :1]), *c], 1))


class Growth(nn.Module):
    """dz/dt = z cos t: z(t) = z₀ exp(sin t − sin t₀), and ∫ tr = D (sin t − sin t₀)."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.one * z * torch.cos(t)


class Tangent(Growth):
    """dz/dt = 1 + z², which leaves every bound in finite time: z = tan(t − t₀ + arctan z₀)."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.one + z * z


class Expiring(Growth):
    """dz/dt = √(1/2 − t) z: not a number after t = 1/2."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.one * z * torch.sqrt(0.5 - t)


class Waves(Growth):
    """dz/dt = 5 cos 300 t + 0 z: so rough in time that an accurate solve takes hundreds of steps."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.one * 5 * torch.cos(300 * t) + 0 * z


class Troubled(Foreign):
    """A foreign field that turns into another one for rows whose (one) context is 10, 20 or 30."""

    def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        ordinary, (c,) = super().forward(t, z, *c), c
        blow_up = 5 * (1 + z * z)
        expire = z * torch.sqrt(torch.where(c == 20, 0.5 - t, 1.0))
        # z × (1, 1, 1), ten thousand times as fast as all the rest: every step of a round of it must be short
        next_, previous = (torch.cat([z[:, k:], z[:, :k]], 1) for k in (1, 2))
        endless = 1e4 * (next_ - previous)
        other = torch.where(c == 10, blow_up, torch.where(c == 20, expire, endless))
        return torch.where(c < 10, ordinary, other)


def wrapped_flow(module: nn.Module, dim: int, t_base: float = 0.0, t_data: float = 1.0) -> Flow:
    return Flow(Wrapped(module, dim).double(), identity(dim), t_base, t_data)


# ------------------------------------------------------------------------------------- the linear flow


def linear_flow(dim: int, seed: int = 0, t_base: float = 0.0, t_data: float = 1.0) -> Flow:
    """dz/dt = A z + b with a constant b, behind a standardisation; see ``Affine``."""
    random = np.random.default_rng(seed)
    field = Linear(dim)
    with torch.no_grad():
        field.weight.copy_(torch.from_numpy(random.normal(size=(dim, dim)) / dim**0.5))
        field.bias.bias.copy_(torch.from_numpy(random.normal(size=dim)))
    mean, scale = random.normal(size=dim), random.uniform(0.5, 2, size=dim)
    return Flow(field, Standardize(torch.from_numpy(mean), torch.from_numpy(scale)), t_base, t_data)


class Affine:
    """The linear flow in closed form: x = M z + m with z ~ N(0, I), so x ~ N(m, M Mᵀ)."""

    def __init__(self, flow: Flow) -> None:
        field, transform = flow.field, flow.transform
        assert isinstance(field, Linear)
        dim, interval = flow.dim, flow.t_data - flow.t_base
        generator = np.zeros((dim + 1, dim + 1))
        generator[:dim, :dim] = field.weight.detach().double().numpy()
        generator[:dim, dim] = field.bias.bias.detach().double().numpy()
        whole = expm(generator * interval)
        mean, scale = transform.mean.numpy()[0], transform.scale.numpy()[0]
        self.matrix = scale[:, None] * whole[:dim, :dim]
        self.shift = scale * whole[:dim, dim] + mean
        self.log_det_of_flow = interval * np.trace(generator)

    def forward(self, z: Array) -> Array:
        return z @ self.matrix.T + self.shift

    def inverse(self, x: Array) -> Array:
        return np.linalg.solve(self.matrix, (x - self.shift).T).T

    def log_density(self, x: Array) -> Array:
        z = self.inverse(x)
        _, log_det = np.linalg.slogdet(self.matrix)
        return -0.5 * (z * z).sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi) - log_det


# ------------------------------------------------------------------------------------------ the oracle


@dataclass
class Trajectory:
    """Accepted times, the state [z, ℓ] (or z) at the end, attempted steps, and Σ |local error of ℓ|."""

    times: list[float]
    end: Array
    attempts: int
    error: float


class Oracle(RK45):
    """SciPy's RK45 with our exponent and, where ℓ is the last component, a tolerance of its own in nats."""

    def __init__(self, *args: Any, logp_atol: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.error_exponent, self.logp_atol = -3 / 16, logp_atol

    def _estimate_error_norm(self, K: Array, h: float, scale: Array) -> float:
        self.last_error = error = self._estimate_error(K, h)
        if self.logp_atol is None:
            return float(np.sqrt(np.mean((error / scale) ** 2)))
        z = float(np.sqrt(np.mean((error[:-1] / scale[:-1]) ** 2)))
        return max(z, abs(error[-1]) / self.logp_atol)


def oracle(
    field: VectorField,
    z: Array,
    t_start: float,
    t_end: float,
    first_step: float,
    rtol: float,
    atol: float,
    logp_atol: float | None = None,
) -> Trajectory:
    """One row by SciPy, with the divergence integrated when it has a tolerance."""

    def right_hand_side(t: float, y: Array) -> Array:
        with torch.no_grad():
            value, divergence = field.with_divergence(t, torch.from_numpy(y[None, : len(z)]))
        rates = value if logp_atol is None else torch.cat([value, divergence], 1)
        return rates[0].numpy()

    start = z if logp_atol is None else np.append(z, 0.0)
    solver = Oracle(
        right_hand_side,
        t_start,
        start,
        t_end,
        rtol=rtol,
        atol=atol,
        first_step=first_step,
        logp_atol=logp_atol,
    )
    times, error = [], 0.0
    while solver.status == "running":
        solver.step()
        times.append(solver.t)
        error += abs(solver.last_error[-1])
    assert solver.status == "finished"
    return Trajectory(times, solver.y, (solver.nfev - 1) // 6, error)


# ---------------------------------------------------------------------------------- exported programs


def _flows() -> dict[str, tuple[Callable[[], Flow], str]]:
    def scaled(dim: int) -> Standardize:
        return Standardize(torch.linspace(-0.5, 0.5, dim), torch.linspace(0.5, 1.5, dim))

    def tanh2() -> Flow:
        return Flow(shaken(MLP(2, (32, 32), activation="tanh"), 1), Compose([Log(2, [0]), scaled(2)]))

    def silu13() -> Flow:
        return Flow(shaken(MLP(13, (32, 16), 3, gate=True), 2), scaled(13))

    def sum30() -> Flow:
        parts = [MLP(30, (16,), activation="softplus"), MLP(30, (32, 16))]
        cholesky = torch.eye(30) + 0.1 * torch.ones(30, 30).tril()
        return Flow(shaken(Sum(parts), 3, gain=1.2), Whiten(torch.zeros(30), cholesky))

    def planar64() -> Flow:
        return Flow(shaken(planar(64, 32), 4), scaled(64), t_base=1.0, t_data=-1.0)

    def deep5() -> Flow:
        return Flow(shaken(MLP(5, (16, 32, 16), 2), 5), Compose([Logit(5, [1, 3]), scaled(5)]))

    def foreign3() -> Flow:
        return Flow(Wrapped(shaken(Troubled(3, (20, 20, 20), 1), 6), 3, 1), scaled(3))

    return {
        "tanh2": (tanh2, "dopri5"),
        "silu13": (silu13, "dopri5"),
        "sum30": (sum30, "dopri5"),
        "planar64": (planar64, "dopri5"),
        "deep5": (deep5, "tsit5"),
        "foreign3": (foreign3, "bosh3"),
        "linear3": (lambda: linear_flow(3, seed=5), "dopri5"),
    }


FLOWS = _flows()


def programs_of(name: str) -> Path:
    """The folder with the programs of a flow of ``FLOWS``, exported once a run."""
    flow, method = FLOWS[name]
    return once(name, lambda folder: export_programs(flow(), METHODS[method], folder))


class ExportedModel:
    """The programs of a flow of ``FLOWS``, as the engine sees a model."""

    def __init__(self, name: str) -> None:
        make, method = FLOWS[name]
        flow = make()
        self.flow, self.method = flow, method
        self.t_base, self.t_data, self.stages = flow.t_base, flow.t_data, METHODS[method].stages
        self.dt_data_to_base = self.dt_base_to_data = 0.1
        for other in FLOWS:  # rather than wait for another process, export what will be needed next
            if other != name and being_filled(name):
                programs_of(other)
        self.data = {path.stem: path.read_bytes() for path in programs_of(name).iterdir()}
        self._programs = {name: Program(data, name) for name, data in self.data.items()}

    def program(self, name: str) -> Program:
        return self._programs[name]

    def pad(self, multiple: int) -> None:
        for program in self._programs.values():
            program.multiple = multiple

    def points(self, kind: Kind, count: int, seed: int = 0) -> tuple[Array, Array | None]:
        """Rows to start from (inside the support when they are data) and their contexts."""
        random = np.random.default_rng([seed, *kind.value.encode()])
        z = random.normal(size=(count, self.flow.dim))
        c = random.normal(size=(count, self.flow.context_dim)) if self.flow.context_dim else None
        if kind is Kind.DECODE:
            return z, c
        return self.flow.transform.decode(torch.from_numpy(z))[0].numpy(), c

    def solve(
        self, kind: Kind, rows: Array, context: Array | None, slots: int = 256, **settings: Any
    ) -> Answer:
        """One chunk on an engine of its own."""
        return run_chunk(self, chunk("solve", kind, rows, context, **settings), slots)


def chunk(id: str, kind: Kind, rows: Array, context: Array | None = None, **settings: Any) -> Chunk:
    """A chunk with defaults; ``tolerance`` sets all three."""
    tolerance = settings.pop("tolerance", 1e-5)
    defaults = dict.fromkeys(("rtol", "atol", "logp_atol"), tolerance) | {"density": True, "max_steps": 1000}
    return Chunk(id, "model", 1, kind, rows=rows, context=context, **(defaults | settings))


@functools.cache
def exported(name: str) -> ExportedModel:
    """A flow of ``FLOWS``, its batches padded as far as this machine needs it."""
    model = ExportedModel(name)
    rows, context = model.points(Kind.ENCODE, 32)
    for multiple in BATCH_MULTIPLES["cpu"]:
        model.pad(multiple)
        same = True
        for precision in ("float32", "float64"):
            together = model.solve(Kind.ENCODE, rows, context, precision=precision)
            apart = model.solve(Kind.ENCODE, rows, context, precision=precision, slots=1)
            same &= together.value.tobytes() == apart.value.tobytes()
            same &= together.log_density.tobytes() == apart.log_density.tobytes()
        if same:
            return model
    raise AssertionError(f"{name}: rows depend on their batch, whatever the padding")


# ------------------------------------------------------------------------------------ published models


def publish_blobs(store: str, seed: int) -> None:
    """Publish p(a, b | c) from a plain torch module, as the next version of ``blobs``."""
    x, c = blobs(400)
    publish(
        foreign_blobs(seed),
        store=store,
        name="blobs",
        calibration=x,
        calibration_context=c,
        transform=Standardize(torch.from_numpy(x.mean(0)), torch.from_numpy(x.std(0))),
        features=["a", "b"],
        context_features=["c"],
        description="Two blobs.",
        data={"source": "generator", "rows": len(x)},
        metrics={"held_out_log_density": -2.5},
        training={"seed": seed},
        card="## Limits\n\nFor tests only.",
    )


def foreign_blobs(seed: int) -> Foreign:
    return shaken(Foreign(2, (24, 16), 1), seed)


def blobs(rows: int) -> tuple[Array, Array]:
    """Rows [n, 2] and contexts [n, 1]."""
    random = np.random.default_rng(0)
    c = random.choice([-1.0, 1.0], size=(rows, 1))
    return random.normal(size=(rows, 2)) * [1.0, 3.0] + 2 * c, c


def published() -> Path:
    """A store to which two processes published ``blobs`` at the same time."""
    program = "import sys, tests.problems; tests.problems.publish_blobs(sys.argv[1], int(sys.argv[2]))"
    return once("blobs", lambda store: side_by_side(program, [(str(store), "1"), (str(store), "2")]))
