"""Reproduce the figures of docs/quality.md: ``python benchmarks/quality.py FOLDER [names …]``.

FOLDER holds tables with labelled anomalies (``*.npz`` with X and y, from ADBench) and tables for density
estimation (``uci_*.csv.gz`` with a mask of folds, from uci_datasets).

Anomalies: half of the normal rows, chosen by seed, train; everything is standardised on them; the other half
and all anomalies test; the score is −log p; mean over seeds.  Tables are thinned to 50,000 rows.  Beside
the flow: the distance to the fifth neighbour, and a Gaussian mixture (full covariances, by BIC), on
the same rows.  Densities: fold 0, mean log p of the test rows of the table standardised on its training rows.

One thread; one line per set, as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from pushforward.flows.transforms import Transform
from pushforward.training.data import Array, build_transform
from pushforward.training.evaluate import log_density, mixture_log_density, ranking
from pushforward.training.fit import fit
from pushforward.training.recipe import Recipe

ANOMALIES = {
    "smtp": "34_smtp",
    "thyroid": "38_thyroid",
    "mammography": "23_mammography",
    "pima": "29_Pima",
    "shuttle": "32_shuttle",
    "cardio": "6_cardio",
    "satellite": "30_satellite",
    "letter": "20_letter",
}
DENSITIES = {"red wine": "uci_redwine", "protein": "uci_protein"}
AT_MOST = 50_000


def anomaly_table(path: Path, seed: int) -> list[Array]:
    """Training rows, normal test rows and anomalies of one seed."""
    with np.load(path, allow_pickle=False) as file:
        rows, labels = file["X"].astype(np.float64), file["y"].astype(int)
    rng = np.random.default_rng(seed)
    if len(rows) > AT_MOST:
        keep = rng.permutation(len(rows))[:AT_MOST]
        rows, labels = rows[keep], labels[keep]
    normal = rng.permutation(np.flatnonzero(labels == 0))
    half = len(normal) // 2
    return [rows[normal[:half]], rows[normal[half:]], rows[labels == 1]]


def density_table(folder: Path, stem: str) -> list[Array]:
    """Training and test rows of fold 0, standardised on the training rows."""
    rows = np.loadtxt(folder / f"{stem}.csv.gz", delimiter=",")
    test = np.loadtxt(folder / f"{stem}_test_mask.csv.gz", delimiter=",")[:, 0] == 1
    if stem == "uci_redwine":
        rows = rows[:, :11]  # the twelfth column is a grade of six levels
    train = rows[~test]
    return [(part - train.mean(0)) / train.std(0) for part in (train, rows[test])]


def numbered(rows: Array) -> list[str]:
    """x0, x1, …"""
    return [f"x{index}" for index in range(rows.shape[1])]


def flow_log_density(train: Array, others: list[Array], recipe: Recipe, transform: Transform) -> list[Array]:
    """log p of other rows under a flow fitted to 90 % of the training rows and stopped by the rest."""
    order = np.random.default_rng(recipe.seed).permutation(len(train))
    held_out = max(1, len(train) // 10)
    result = fit(train[order[held_out:]], train[order[:held_out]], transform, recipe=recipe)
    return [log_density(result.flow, rows) for rows in others]


def fifth_neighbour(train: Array, others: list[Array]) -> list[Array]:
    """Minus the distance to the fifth neighbour among the standardised training rows."""
    mean, scale = train.mean(0), train.std(0)
    neighbours = NearestNeighbors(n_neighbors=5).fit((train - mean) / scale)
    return [-neighbours.kneighbors((rows - mean) / scale)[0][:, -1] for rows in others]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=[*ANOMALIES, *DENSITIES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--whiten", action="store_true", help="remove correlations before the flow")
    parser.add_argument("--recipe", default="{}", help='other settings, such as {"noise": 0.1}')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = replace(Recipe(), **json.loads(arguments.recipe))
    for name in arguments.names:
        if name in DENSITIES:
            train, test = density_table(arguments.folder, DENSITIES[name])
            transform = build_transform(train, numbered(train), whiten=arguments.whiten)
            (flow,) = flow_log_density(train, [test], recipe, transform)
            rivals = [mixture_log_density(train, test, transform, components=k).mean() for k in (1, 10)]
            print(
                f"{name}: mean log p {flow.mean():.2f}, Gaussian {rivals[0]:.2f}, mixture {rivals[1]:.2f}",
                flush=True,
            )
            continue
        figures = []
        for seed in range(arguments.seeds):
            train, *tests = anomaly_table(arguments.folder / f"{ANOMALIES[name]}.npz", seed)
            transform = build_transform(train, numbered(train), whiten=arguments.whiten)
            began = time.process_time()
            flow = flow_log_density(train, tests, replace(recipe, seed=seed), transform)
            seconds = time.process_time() - began
            mixture = [mixture_log_density(train, rows, transform, seed=seed) for rows in tests]
            figures.append(
                [*ranking(*flow), *ranking(*fifth_neighbour(train, tests)), *ranking(*mixture), seconds]
            )
        *shares, seconds = np.mean(figures, axis=0)
        flow, neighbour, mixture = (f"{100 * a:.1f} / {100 * b:.1f}" for a, b in np.reshape(shares, (3, 2)))
        print(
            f"{name}: AUROC / AP: flow {flow}, fifth neighbour {neighbour}, mixture {mixture}; "
            f"{seconds:.0f} s of one core for a flow and its scores",
            flush=True,
        )


if __name__ == "__main__":
    main()
