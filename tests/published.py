"""Three small models, trained and published: what tests of serving serve."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tests.shared import side_by_side

from pushforward.flows.fields import MLP
from pushforward.flows.transforms import Log, Transform
from pushforward.publish import publish

ROWS, STEPS, BATCH = 1200, 300, 256


def publish_models(store: Path) -> None:
    """Publish three models of two features.

    ``pair`` is two blobs, in versions 1 (labelled "old") and 2, which are alike; ``positive`` is their
    exponentials, whose density is 0 where a feature is negative; ``given`` is a Gaussian about its context.
    """
    program = "import sys, tests.published; tests.published.publish_model(*sys.argv[1:])"
    side_by_side(program, [(str(store), name) for name in ("pair", "positive", "given")])
    shutil.copytree(store / "pair" / "1", store / "pair" / "2")
    manifest = store / "pair" / "2" / "manifest.json"  # which no hash covers
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 2}))
    (store / "pair" / "labels.json").write_text('{"old": 1}')


def publish_model(store: str, name: str) -> None:
    """Train and publish one of the three."""
    draw = np.random.default_rng(0)
    side, noise = 2.0 * draw.integers(0, 2, (ROWS, 1)) - 1, draw.normal(size=(ROWS, 2))
    blobs = side * (np.array([1.2, 0.0]) + noise * [0.5, 0.0]) + noise @ np.array([[0.1, 0.8], [0.0, 0.4]])
    shift = draw.normal(size=(ROWS, 1))
    if name == "pair":
        _publish(store, name, blobs, features=["age", "dose"], description="Two blobs.")
    elif name == "positive":
        _publish(store, name, np.exp(blobs), transform=Log(2, [0, 1]), method="bosh3")
    else:
        _publish(store, name, shift + 0.5 * noise, shift, context_features=["shift"], method="bosh3")


def _publish(
    store: str,
    name: str,
    x: NDArray[np.float64],
    context: NDArray[np.float64] | None = None,
    *,
    transform: Transform | None = None,
    **facts: object,
) -> None:
    """Fit by flow matching on two thirds of the rows; publish, calibrated on the others."""
    torch.manual_seed(0)
    field = MLP(2, (32, 32), context_dim=0 if context is None else 1)
    optimiser = torch.optim.Adam(field.parameters(), 3e-3)
    z = torch.from_numpy(x) if transform is None else transform.encode(torch.from_numpy(x))[0]
    z, c = z.float(), None if context is None else torch.from_numpy(context).float()
    fitted = 2 * len(x) // 3
    for _ in range(STEPS):
        rows = torch.randint(fitted, (BATCH,))
        start, t = torch.randn(BATCH, 2), torch.rand(BATCH, 1)
        velocity = field((t), (1 - t) * start + t * z[rows], None if c is None else c[rows])
        optimiser.zero_grad()
        (velocity - (z[rows] - start)).square().mean().backward()
        optimiser.step()
    publish(
        field,
        store=store,
        name=name,
        calibration=x[fitted:],
        calibration_context=None if context is None else context[fitted:],
        transform=transform,
        tolerance=1e-5,
        **facts,  # type: ignore[arg-type]
    )
