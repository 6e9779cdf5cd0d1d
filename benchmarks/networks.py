"""The networks that everybody solves: one trained two-hidden-layer field per dimension, with held-out rows.

All contenders get the same weights, the same float64 rows and are judged by the same float64 reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from sklearn import datasets, decomposition
from torchdiffeq import odeint

from measure import HERE
from pushforward.flows.fields import MLP

HIDDEN = {2: 64, 8: 64, 30: 128, 64: 256}
DATA = {
    2: "two moons",
    8: "digits, first 8 principal components",
    30: "breast cancer",
    64: "digits with uniform noise",
}
ROWS = 256
SIGMA = 0.05


@dataclass(frozen=True)
class Network:
    """A trained field W₃ σ(W₂ σ(W₁ z + b₁(t)) + b₂(t)) + b₃(t), σ = SiLU, b affine in 16 features of time.

    Attributes:
        weights: W₁, W₂, W₃ (``weights.i.weight``) and maps to the biases (``biases.i.weight``, ``.bias``).
        rows: [256, D] held-out, standardised rows.
        log_density: [256] their log-density in nats, float64, at tolerance 1e-11.
    """

    dim: int
    weights: dict[str, np.ndarray]
    rows: np.ndarray
    log_density: np.ndarray

    @property
    def hidden(self) -> int:
        """Units of each hidden layer."""
        return HIDDEN[self.dim]

    def field(self, dtype: torch.dtype = torch.float32) -> MLP:
        """The field as Pushforward has it."""
        field = MLP(self.dim, (self.hidden, self.hidden))
        field.load_state_dict({name: torch.tensor(value) for name, value in self.weights.items()})
        return field.to(dtype).requires_grad_(False)


def table(dim: int) -> np.ndarray:
    """A standardised data set of that many columns, in a fixed random order."""
    rng = np.random.default_rng(dim)
    if dim == 2:
        x = datasets.make_moons(6000, noise=0.07, random_state=0)[0]
    elif dim == 30:
        x = datasets.load_breast_cancer().data
    else:
        x = datasets.load_digits().data
        x = x + rng.random(x.shape) if dim == 64 else decomposition.PCA(dim, random_state=0).fit_transform(x)
    x = (x - x.mean(0)) / x.std(0)
    return x[rng.permutation(len(x))]


def train(dim: int, x: np.ndarray, steps: int) -> MLP:
    """Conditional flow matching with independent pairs; the average of the weights is kept."""
    torch.manual_seed(dim)
    field = MLP(dim, (HIDDEN[dim], HIDDEN[dim]))
    average = torch.optim.swa_utils.AveragedModel(
        field, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(field.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    data = torch.tensor(x, dtype=torch.float32)
    for _ in range(steps):
        end = data[torch.randint(len(data), (256,))]
        start = torch.randn_like(end)
        t = ((torch.arange(256) + torch.rand(1)) / 256)[torch.randperm(256), None]
        between = (1 - (1 - SIGMA) * t) * start + t * end
        loss = (field(t, between) - (end - (1 - SIGMA) * start)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(field.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(field)
    return average.module


def reference(field: MLP, rows: np.ndarray) -> np.ndarray:
    """log p in float64 by an 8th-order method at tolerance 1e-11, with the closed-form divergence."""
    field = field.double()
    z = torch.tensor(rows)

    def augmented(t: torch.Tensor, y: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return field.with_divergence(t, y[0])

    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        z, ell = odeint(augmented, (z, z.new_zeros(len(z), 1)), ends, rtol=1e-11, atol=1e-11, method="dopri8")
    return log_density(z[-1].numpy(), ell[-1, :, 0].numpy())


def log_density(z: np.ndarray, ell: np.ndarray) -> np.ndarray:
    """log N(z; 0, I) + ℓ, where z is at the base and ℓ = ∫ tr(∂f/∂z) dt from the data to the base."""
    z = z.astype(np.float64)
    return -0.5 * (z * z).sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi) + ell


@cache
def load(dim: int, steps: int = 3000) -> Network:
    """The network of that dimension, trained at first use and kept."""
    path = HERE / ".cache" / f"network_{dim}.safetensors"
    if not path.exists():
        print(f"training the {dim}-dimensional network on {DATA[dim]}", flush=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        x = table(dim)
        rows = x[:ROWS].copy()
        field = train(dim, x[ROWS:], steps)
        weights = {name: value.float().numpy() for name, value in field.state_dict().items()}
        path.parent.mkdir(exist_ok=True)
        save_file({**weights, "rows": rows, "log_density": reference(field, rows)}, path)
        torch.set_num_threads(threads)
    tensors = load_file(path)
    return Network(dim, rows=tensors.pop("rows"), log_density=tensors.pop("log_density"), weights=tensors)


if __name__ == "__main__":
    for dim in HIDDEN:
        network = load(dim)
        gaussian = -0.5 * np.linalg.slogdet(2 * np.pi * np.e * np.cov(table(dim)[ROWS:].T))[1]
        mean = network.log_density.mean()
        print(f"D = {dim}: held-out log p {mean:.2f} nats a row, a Gaussian about {gaussian:.2f}")
