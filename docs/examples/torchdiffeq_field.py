"""Bring your own field: train a continuous normalizing flow in plain torchdiffeq, publish it, and check what
is served.

    .venv/bin/python docs/examples/torchdiffeq_field.py model_store

Nothing in the first half knows of Pushforward: it is maximum likelihood with the trace by autograd, as in
torchdiffeq's own example.  The second half is one call.  It takes about a minute.
"""

import math
import sys

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torchdiffeq import odeint

# ---- train, anywhere ----


class Field(nn.Module):
    """f(t, z) on the plane: what torchdiffeq calls an ODE function."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 2))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(torch.cat([z, t * torch.ones_like(z[:, :1])], 1))


class WithTrace(nn.Module):
    """The same with d log p / dt = −tr ∂f/∂z beside it, by one backward pass per dimension."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z = state[0].requires_grad_(True)
        with torch.enable_grad():
            dz = self.field(t, z)
            trace = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
        return dz, -trace


def log_density(field: Field, x: Tensor) -> Tensor:
    """log p(x) [n]: from the data at t = 1 back to the standard normal at t = 0."""
    times = torch.tensor([1.0, 0.0])
    z, change = odeint(
        WithTrace(field), (x, torch.zeros(len(x))), times, method="rk4", options={"step_size": 0.25}
    )
    base = -0.5 * (z[-1] ** 2).sum(1) - math.log(2 * math.pi)
    return base - change[-1]


def rows(n: int, seed: int) -> Tensor:
    return torch.tensor(make_moons(n, noise=0.1, random_state=seed)[0], dtype=torch.float32)


def train(steps: int = 200) -> Field:
    torch.manual_seed(0)
    field, data = Field(), rows(2000, seed=0)
    optimiser = torch.optim.Adam(field.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = -log_density(field, data[torch.randint(len(data), (128,))]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return field


# ---- publish ----


def main(store: str) -> None:
    from pushforward.publish import publish

    field, held_out = train(), rows(1000, seed=1)
    with torch.enable_grad():
        held_out_log_density = float(log_density(field, held_out).mean())
    manifest = publish(
        field,
        store=store,
        name="my_moons",
        calibration=held_out,
        features=["x", "y"],
        description="Two moons, trained by maximum likelihood in torchdiffeq.",
        data={"source": "sklearn.datasets.make_moons", "licence": "BSD-3-Clause"},
        metrics={"held_out_log_density": held_out_log_density},
        advance=print,
    )
    certificate = manifest.certificate
    print(f"{manifest.name}/{manifest.version}: divergence in {manifest.divergence.replace('_', ' ')},")
    print(f"log p within {certificate.p999:.0e} nats for 99.9% of {certificate.rows} rows,")
    print(f"{certificate.steps_mean:.1f} steps a row.")


if __name__ == "__main__":
    main(sys.argv[1])
