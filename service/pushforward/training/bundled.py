"""The models that come with the project: ``python -m pushforward.training.bundled [--store DIR] [names …]``.

Each is trained from data that scikit-learn ships, or from a generator, and published like any other model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from sklearn import datasets

from pushforward.training.data import Array, Table
from pushforward.training.recipe import Recipe
from pushforward.training.train import Options, Source, train

__all__ = ["BUNDLED", "Bundled", "build"]

GENERATED_ROWS = 40_000
SKLEARN = "BSD-3-Clause, with scikit-learn"


@dataclass(frozen=True)
class Bundled:
    """A model to be trained.

    Attributes:
        table: makes its rows.
        options: of the training.
        source: for the model card.
    """

    table: Callable[[], Table]
    options: Options
    source: Source


def moons(rng: np.random.Generator, n: int) -> Array:
    """Two interleaved half circles of radius 1, with N(0, 0.05²) added."""
    angle, lower = np.pi * rng.random(n), rng.random(n) < 0.5
    x = np.where(lower, 1 - np.cos(angle), np.cos(angle))
    y = np.where(lower, 0.5 - np.sin(angle), np.sin(angle))
    return np.stack([x, y], 1) + rng.normal(scale=0.05, size=(n, 2))


def pinwheel(rng: np.random.Generator, n: int) -> Array:
    """Five Gaussian arms, long along the radius and bent by an angle that grows with it."""
    radial, tangential, bend = 1 + 0.3 * rng.normal(size=n), 0.05 * rng.normal(size=n), 0.25
    angle = 2 * np.pi * rng.integers(0, 5, n) / 5 + bend * np.exp(radial)
    x = radial * np.cos(angle) - tangential * np.sin(angle)
    y = radial * np.sin(angle) + tangential * np.cos(angle)
    return 2 * np.stack([x, y], 1)


def checkerboard(rng: np.random.Generator, n: int) -> Array:
    """Uniform on the eight dark unit squares of [−2, 2]²; its log-density there is −log 8 = −2.079."""
    column = rng.integers(0, 4, n)
    row = 2 * rng.integers(0, 2, n) + column % 2
    return np.stack([column, row], 1) - 2 + rng.random((n, 2))


def eight_gaussians(rng: np.random.Generator, n: int) -> Array:
    """Eight Gaussians of deviation 0.3 on a circle of radius 4; the negative entropy is −2.493 nats."""
    angle = np.pi / 4 * rng.integers(0, 8, n)
    return 4 * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(scale=0.3, size=(n, 2))


def _generated(generator: Callable[[np.random.Generator, int], Array]) -> Callable[[], Table]:
    return lambda: Table(generator(np.random.default_rng(0), GENERATED_ROWS), ("x", "y"))


def build(name: str, store: Path, console: Console | None = None) -> None:
    """Train one of them and publish it."""
    bundled = BUNDLED[name]
    train(bundled.table(), name, store, bundled.options, bundled.source, console=console)


def moons_by_side() -> Table:
    """The two moons, given which one: −1 for the upper, 1 for the lower."""
    rng = np.random.default_rng(0)
    side = np.where(rng.random(GENERATED_ROWS) < 0.5, 1.0, -1.0)
    angle = np.pi * rng.random(GENERATED_ROWS)
    x = np.where(side > 0, 1 - np.cos(angle), np.cos(angle))
    y = np.where(side > 0, 0.5 - np.sin(angle), np.sin(angle))
    rows = np.stack([x, y], 1) + rng.normal(scale=0.05, size=(GENERATED_ROWS, 2))
    return Table(rows, ("x", "y"), side[:, None], ("side",))


def breast_cancer() -> Table:
    """Thirty measurements of cell nuclei; malignant samples are the anomalies."""
    data = datasets.load_breast_cancer()
    return Table(data.data, _names(data.feature_names), anomalous=data.target == 0)


def wine() -> Table:
    """Thirteen measurements of wines of three growers."""
    data = datasets.load_wine()
    return Table(data.data, _names(data.feature_names))


def digits() -> Table:
    """Eight by eight pixels of handwritten digits, integers from 0 to 16."""
    data = datasets.load_digits()
    return Table(data.data, _names(data.feature_names))


def _names(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(name).replace(" ", "_") for name in names)


TWO_D = Recipe(hidden=(128, 128), gate=True, sharpness=6.0, steps=8000, learning_rate=5e-3, noise=0.02)
SMALL = Recipe(hidden=(64, 64), steps=800, average=0.99, noise=0.1)
GENERATED = {"source": "generated", "licence": "none needed"}

BUNDLED: Mapping[str, Bundled] = {
    "moons": Bundled(
        _generated(moons),
        Options(recipe=TWO_D),
        Source("Two interleaved half circles, thin and sharp.", **GENERATED),
    ),
    "pinwheel": Bundled(
        _generated(pinwheel),
        Options(recipe=TWO_D),
        Source("Five bent Gaussian arms that meet near the centre.", **GENERATED),
    ),
    "checkerboard": Bundled(
        _generated(checkerboard),
        Options(recipe=replace(TWO_D, noise=0.03, steps=16000)),
        Source("A uniform density on eight squares: its edges are jumps.", **GENERATED),
    ),
    "eight_gaussians": Bundled(
        _generated(eight_gaussians),
        Options(recipe=TWO_D),
        Source(
            "Eight Gaussians on a circle, with next to nothing between them.",
            **GENERATED,
            notes="The Gaussian mixture it is compared with is the truth here and cannot be beaten. "
            "It is bundled because modes with empty space between them are what flows find hard.",
        ),
    ),
    "moons_by_side": Bundled(
        moons_by_side,
        Options(recipe=replace(TWO_D, steps=4000)),
        Source("A conditional density: a point, given which of the two moons it lies on.", **GENERATED),
    ),
    "breast_cancer": Bundled(
        breast_cancer,
        Options(whiten=True, recipe=replace(SMALL, hidden=(128, 128), noise=0.2)),
        Source(
            "Cell nuclei of benign breast masses; malignant ones are the anomalies.",
            "sklearn.datasets.load_breast_cancer (UCI, Breast Cancer Wisconsin, diagnostic)",
            SKLEARN,
        ),
    ),
    "wine": Bundled(
        wine,
        Options(whiten=True, recipe=SMALL),
        Source("Chemical analysis of Italian wines.", "sklearn.datasets.load_wine (UCI, Wine)", SKLEARN),
    ),
    "digits": Bundled(
        digits,
        Options(
            dequantize=_names(f"pixel_{row}_{column}" for row in range(8) for column in range(8)),
            recipe=Recipe(steps=3000),
        ),
        Source(
            "Handwritten digits of 8 × 8 pixels.",
            "sklearn.datasets.load_digits (UCI, Optical Recognition of Handwritten Digits)",
            SKLEARN,
        ),
    ),
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BUNDLED), metavar="name", help=", ".join(BUNDLED))
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BUNDLED]
    if unknown:
        parser.error(f"there is no bundled model {unknown[0]!r}; there are {', '.join(BUNDLED)}")
    torch.set_num_threads(1)  # the weights are the same bits only with the same number of threads
    console = Console()
    for name in arguments.names:
        console.rule(name)
        build(name, arguments.store, console)


if __name__ == "__main__":
    main()
