"""How good a fitted flow is on rows it never saw: log-density, ranking of anomalies, samples.

All log-densities are in nats per row, in the units of the raw data.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import StratifiedKFold, cross_val_score
from torchdiffeq import odeint

from pushforward.flows.flow import Flow
from pushforward.flows.transforms import Transform
from pushforward.training import objectives
from pushforward.training.data import Array, Parts

__all__ = ["c2st", "figures", "log_density", "mixture_log_density", "ranking", "sample"]

BLOCK = 2048  # rows at once: what a cache can hold
COMPONENTS = 10
C2ST_ROWS = 2000  # the standard error is then under 0.01


def log_density(
    flow: Flow, rows: Array, context: Array | None = None, *, steps: int = 32, double: bool = False
) -> Array:
    """log p(x | c) [n] by the classical Runge–Kutta method in equal steps; serving solves adaptively.

    Args:
        flow: fitted, in float32.
        rows: [n, D] raw rows.
        context: [n, C] raw.
        steps: how many.
        double: integrate in float64.
    """
    dtype = torch.float64 if double else torch.float32
    field = flow.field.to(dtype)
    parts = []
    try:
        with torch.no_grad():
            for start in range(0, len(rows), BLOCK):
                block = slice(start, start + BLOCK)
                z, log_det = flow.transform.encode(torch.from_numpy(np.ascontiguousarray(rows[block])))
                c = None if context is None else torch.from_numpy(context[block]).to(dtype)
                log_p = objectives.log_density(
                    field, z.to(dtype), c, t_base=flow.t_base, t_data=flow.t_data, steps=steps
                )
                parts.append((log_p.double() + log_det)[:, 0].numpy())
    finally:
        flow.field.float()
    return np.concatenate(parts) if parts else np.empty(0)


def sample(flow: Flow, n: int, context: Array | None = None, *, seed: int = 0, steps: int = 32) -> Array:
    """n raw rows [n, D] from the flow; context [n, C]."""
    z = torch.randn((n, flow.dim), generator=torch.Generator().manual_seed(seed))
    c = None if context is None else torch.from_numpy(context).float()
    times = torch.tensor([flow.t_base, flow.t_data])
    options = {"step_size": abs(flow.t_data - flow.t_base) / steps}
    with torch.no_grad():
        path = odeint(lambda t, y: flow.field(t, y, c), z, times, method="rk4", options=options)
        x: Array = flow.transform.decode(path[-1].double())[0].numpy()
    return x


def mixture_log_density(
    train: Array,
    test: Array,
    transform: Transform,
    *,
    context: Array | None = None,
    test_context: Array | None = None,
    components: int = COMPONENTS,
    seed: int = 0,
) -> Array:
    """log p [n] of test rows under a Gaussian mixture with full covariances: what a flow has to beat.

    Of 1 … ``components`` components, the number with the lowest BIC is taken; 1 is the full-covariance
    Gaussian.  The mixture is fitted in the coordinates of the flow, so that it has the benefit of the same
    transform, with 1e-4 added to the diagonals, and reported for raw data.  With context, the mixture
    is fitted to (x, c) jointly, and p(x | c) = p(x, c) / p(c).
    """
    z, _ = transform.encode(torch.from_numpy(np.ascontiguousarray(train)))
    z_test, log_det = transform.encode(torch.from_numpy(np.ascontiguousarray(test)))
    joint, joint_test = z.numpy(), z_test.numpy()
    if context is not None and test_context is not None:
        mean, scale = context.mean(0), context.std(0)
        joint = np.concatenate([joint, (context - mean) / scale], 1)
        joint_test = np.concatenate([joint_test, (test_context - mean) / scale], 1)
    parameters = joint.shape[1] * (joint.shape[1] + 3) // 2
    most = max(1, min(components, len(joint) * joint.shape[1] // parameters))
    fits = [
        GaussianMixture(k, covariance_type="full", reg_covar=1e-4, random_state=seed).fit(joint)
        for k in range(1, most + 1)
    ]
    best = min(fits, key=lambda mixture: mixture.bic(joint))
    log_p: Array = best.score_samples(joint_test)
    if context is not None:
        marginal = GaussianMixture(best.n_components, covariance_type="full")
        dim = transform.dim
        marginal.weights_, marginal.means_ = best.weights_, best.means_[:, dim:]
        marginal.covariances_ = best.covariances_[:, dim:, dim:]
        marginal.precisions_cholesky_ = np.stack(
            [np.linalg.inv(np.linalg.cholesky(covariance)).T for covariance in marginal.covariances_]
        )
        log_p = log_p - marginal.score_samples(joint_test[:, dim:])
    log_p += log_det[:, 0].numpy()
    return log_p


def ranking(normal: Array, anomalous: Array) -> tuple[float, float]:
    """AUROC and average precision of the score −log p, from log-densities of normal and anomalous rows."""
    scores = -np.concatenate([normal, anomalous])
    labels = np.repeat([0, 1], [len(normal), len(anomalous)])
    scores = np.nan_to_num(scores, nan=np.finfo(float).max, posinf=np.finfo(float).max)
    return float(roc_auc_score(labels, scores)), float(average_precision_score(labels, scores))


def c2st(a: Array, b: Array, seed: int = 0) -> tuple[float, float]:
    """Can a classifier tell a from b?  The two-sample test of Lopez-Paz and Oquab 2017, arXiv:1610.06545.

    Returns:
        cross-validated accuracy of a random forest, ½ when the two are alike, and the standard error ½ / √n
        that it has when they are.
    """
    n = min(len(a), len(b))
    rows = np.concatenate([a[:n], b[:n]])
    labels = np.repeat([0, 1], n)
    forest = RandomForestClassifier(100, min_samples_leaf=5, random_state=seed)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    accuracy = float(cross_val_score(forest, rows, labels, cv=folds).mean())
    return accuracy, 0.5 / math.sqrt(2 * n)


def figures(flow: Flow, parts: Parts, train_rows: Array, held_out: Array, seed: int = 0) -> dict[str, float]:
    """The figures of the model card.

    Args:
        flow: fitted.
        parts: of the table.
        train_rows: of ``parts.train``, with dequantisation noise if there is any.
        held_out: of ``parts.held_out``, likewise.
        seed: of the mixture, the samples and the two-sample test.
    """
    context, test_context = parts.train.context, parts.held_out.context

    def rival(components: int) -> float:
        log_p = mixture_log_density(
            train_rows,
            held_out,
            flow.transform,
            context=context,
            test_context=test_context,
            components=components,
            seed=seed,
        )
        return float(log_p.mean())

    metrics = {
        "held_out_log_density": float(log_density(flow, held_out, test_context).mean()),
        "gaussian_log_density": rival(1),
        "mixture_log_density": rival(COMPONENTS),
    }
    if len(parts.anomalies):
        normal = log_density(flow, parts.held_out.rows, test_context)
        anomalous = log_density(flow, parts.anomalies.rows, parts.anomalies.context)
        metrics["auroc"], metrics["average_precision"] = ranking(normal, anomalous)
    drawn, rows = _to_compare(flow, held_out, test_context, seed)
    metrics["c2st_accuracy"], metrics["c2st_standard_error"] = c2st(drawn, rows, seed)
    return metrics


def _to_compare(flow: Flow, held_out: Array, context: Array | None, seed: int) -> tuple[Array, Array]:
    """Samples and held-out rows, equally many.

    With context, both are joined with theirs, and samples get the contexts of the rows that are not compared:
    a context that occurred once on each side would tell a classifier the label of its twin.
    """
    if context is None:
        rows = held_out[:C2ST_ROWS]
        return sample(flow, len(rows), seed=seed), rows
    rows, given = held_out[0::2][:C2ST_ROWS], context[0::2][:C2ST_ROWS]
    others = context[1::2][:C2ST_ROWS]
    drawn = sample(flow, len(others), others, seed=seed)
    return np.concatenate([drawn, others], 1), np.concatenate([rows, given], 1)
