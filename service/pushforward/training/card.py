"""The sections that training adds to a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pushforward.training.progress import Check

__all__ = ["Scalar", "scalars", "sections"]

Scalar = str | int | float | bool


def scalars(settings: Mapping[str, object]) -> dict[str, Scalar]:
    """Settings as JSON scalars: sequences become text."""
    return {
        key: value if isinstance(value, str | int | float | bool) else " × ".join(map(str, _items(value)))
        for key, value in settings.items()
    }


def sections(
    data: Mapping[str, str],
    metrics: Mapping[str, float],
    history: Sequence[Check],
    notes: str = "",
) -> str:
    """Markdown: how the model compares, what should be known of it, how training went."""
    flow, gaussian, mixture = (metrics[f"{name}_log_density"] for name in ("held_out", "gaussian", "mixture"))
    lines = [
        "## Comparison",
        "",
        f"Mean log-density of {data['held_out_rows']} held-out rows, in nats per row of the raw data:",
        "",
        "| this model | full-covariance Gaussian | Gaussian mixture (1 to 10 components, by BIC) |",
        "|---:|---:|---:|",
        f"| {flow:.3f} | {gaussian:.3f} | {mixture:.3f} |",
        "",
        f"{_compared('Gaussian', flow - gaussian)} {_compared('mixture', flow - mixture)}",
    ]
    if "auroc" in metrics:
        lines += [
            "",
            f"Against {data['anomalies']} labelled anomalies, which were never trained on, the score −log p "
            f"reaches AUROC {100 * metrics['auroc']:.1f} % and average precision "
            f"{100 * metrics['average_precision']:.1f} %.",
        ]
    lines += [
        "",
        "A random forest that is to tell samples from held-out rows is right in "
        f"{100 * metrics['c2st_accuracy']:.1f} % of cases (50 % if they are alike, ± "
        f"{100 * metrics['c2st_standard_error']:.1f} by chance).",
        "",
        *([notes, ""] if notes else []),
        "## Course of training",
        "",
        "| step | loss | validation log-density |",
        "|---:|---:|---:|",
        *(f"| {check.step} | {check.loss:.4f} | {check.held_out:.3f} |" for check in history),
        "",
    ]
    return "\n".join(lines)


def _compared(rival: str, difference: float) -> str:
    if difference >= 0:
        return f"It is {difference:.3f} nats above the {rival}."
    return f"It is {-difference:.3f} nats below the {rival}."


def _items(value: object) -> Sequence[object]:
    if not isinstance(value, Sequence):
        raise TypeError(f"{value!r} is no JSON scalar and no sequence")
    return value
