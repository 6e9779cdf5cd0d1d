"""Log-density solves as they are written today with torchdiffeq, zuko and torchode.

The field is what a user of those libraries writes: a plain module; with one time for the whole batch
(torchdiffeq, zuko) the biases are computed once per evaluation, not per row.  A solve takes standardised rows
[n, D] in float32 and a tolerance (rtol = atol), and returns z at the base and ℓ = ∫ tr(∂f/∂z) dt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torchode
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, vmap
from torchdiffeq import odeint
from zuko.transforms import FreeFormJacobianTransform

Solve = Callable[[Tensor, float], tuple[Tensor, Tensor]]
Trace = Callable[["Field", Tensor, Tensor], tuple[Tensor, Tensor]]


class Field(nn.Module):
    """W₃ σ(W₂ σ(W₁ z + b₁(t)) + b₂(t)) + b₃(t), σ = SiLU."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        for i in range(3):
            self.register_buffer(f"w{i}", torch.tensor(weights[f"weights.{i}.weight"]).T.contiguous())
        # the three biases are one affine map of the time features
        names = [f"biases.{i}" for i in range(3)]
        self.register_buffer(
            "time", torch.tensor(np.concatenate([weights[f"{n}.weight"] for n in names])).T.contiguous()
        )
        self.register_buffer("constant", torch.tensor(np.concatenate([weights[f"{n}.bias"] for n in names])))
        self.sizes = [weights[f"{n}.bias"].size for n in names]
        k = torch.arange(1, 9) * (torch.pi / 2)
        self.register_buffer("frequency", k)
        self.register_buffer("bracket", self.w1 * (self.w2 @ self.w0).T)  # W₂ ∘ (W₁ W₃)ᵀ, transposed

    def biases(self, t: Tensor) -> tuple[Tensor, ...]:
        angle = t[..., None] * self.frequency
        features = torch.cat([torch.sin(angle), torch.cos(angle)], -1)
        return torch.addmm(self.constant, features.reshape(-1, 16), self.time).split(self.sizes, 1)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        b0, b1, b2 = self.biases(t)
        h = nn.functional.silu(z @ self.w0 + b0)
        h = nn.functional.silu(h @ self.w1 + b1)
        return h @ self.w2 + b2


def autograd_loop(field: Field, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """One backward pass per dimension, as in torchdiffeq's own example and in FFJORD."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        dz = field(t, z)
        columns = (
            torch.autograd.grad(dz[:, i].sum(), z, retain_graph=True)[0][:, i] for i in range(z.shape[1])
        )
        return dz.detach(), torch.stack(list(columns)).sum(0)


def batched_vjp(field: Field, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same D backward passes in one batch, as in zuko: the fastest of them for few rows."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        dz = field(t, z)
        basis = torch.eye(z.shape[1], dtype=z.dtype).expand(len(z), -1, -1).movedim(-1, 0)
        (jacobian,) = torch.autograd.grad(dz, z, basis, is_grads_batched=True)
        return dz.detach(), torch.einsum("i...i", jacobian)


def _by_rows(jacobian: Callable[..., Callable[..., Tensor]]) -> Trace:
    def trace(field: Field, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        def row(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            dz = field(t, z[None])[0]
            return dz, dz

        dims = (0, 0 if t.ndim else None)
        jac, dz = vmap(jacobian(row, has_aux=True), in_dims=dims)(z, t)
        return dz, jac.diagonal(dim1=1, dim2=2).sum(1)

    return trace


def closed_form(field: Field, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """d₂ᵀ (W₂ ∘ (W₁ W₃)ᵀ) d₁: what a user gets who derives it by hand."""
    b0, b1, b2 = field.biases(t)

    def silu(a: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(a)
        h = a * s
        return h, s + h * (1 - s)

    h, d1 = silu(z @ field.w0 + b0)
    h, d2 = silu(h @ field.w1 + b1)
    return h @ field.w2 + b2, ((d1 @ field.bracket) * d2).sum(1)


TRACES: dict[str, Trace] = {
    "autograd loop": autograd_loop,
    "batched vjp": batched_vjp,
    "vmap(jacrev)": _by_rows(jacrev),
    "vmap(jacfwd)": _by_rows(jacfwd),
    "closed form": closed_form,
}


def with_torchdiffeq(field: Field, trace: str) -> Solve:
    """Dormand–Prince 5(4), one step size for the batch; its norm is the larger RMS of z and ℓ."""
    ends = torch.tensor([1.0, 0.0])

    def solve(z: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        def augmented(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return TRACES[trace](field, t, y[0])

        with torch.no_grad():
            z, ell = odeint(
                augmented, (z, z.new_zeros(len(z))), ends, rtol=tolerance, atol=tolerance, method="dopri5"
            )
        return z[-1], ell[-1]

    return solve


def with_zuko(field: Field, trace: str = "batched vjp") -> Solve:
    """zuko's own transform with its own exact trace, D vector-Jacobian products in one batch."""

    def solve(z: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        transform = FreeFormJacobianTransform(field, 1.0, 0.0, rtol=tolerance, atol=tolerance, exact=True)
        with torch.no_grad():
            return transform.call_and_ladj(z)

    return solve


def with_torchode(field: Field, trace: str) -> Solve:
    """Dormand–Prince 5(4) with a step size per row and the integral controller."""
    ends = torch.tensor([1.0, 0.0])

    def augmented(t: Tensor, y: Tensor) -> Tensor:
        dz, divergence = TRACES[trace](field, t, y[:, :-1])
        return torch.cat([dz, divergence[:, None]], 1)

    term = torchode.ODETerm(augmented)
    method = torchode.Dopri5(term=term)

    def solve(z: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        solver = torchode.AutoDiffAdjoint(method, controller)
        y = nn.functional.pad(z, (0, 1))
        with torch.no_grad():
            solution = solver.solve(torchode.InitialValueProblem(y0=y, t_eval=ends.expand(len(z), 2)))
        y = solution.ys[:, -1]
        return y[:, :-1], y[:, -1]

    return solve
