"""The model card: what a version is, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pushforward.store.manifest import Certificate, Solver

__all__ = ["model_card"]

Scalar = str | int | float | bool | None


def model_card(
    name: str,
    description: str,
    features: Sequence[str],
    context_features: Sequence[str],
    solver: Solver,
    certificate: Certificate,
    metrics: Mapping[str, float],
    data: Mapping[str, Scalar],
    training: Mapping[str, Scalar],
    more: str,
) -> str:
    """The Markdown of ``MODEL_CARD.md``; ``more`` holds the author's own sections."""
    given = f", given {len(context_features)}: {_list(context_features)}" if context_features else ""
    lines = [
        f"# {name}",
        "",
        description or "A continuous normalizing flow.",
        "",
        f"Density of {len(features)} features: {_list(features)}{given}.",
        "",
    ]
    for title, table in (("Data", data), ("Training", training), ("Quality", metrics)):
        if table:
            lines += [f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {key.replace('_', ' ')} | {_value(value)} |" for key, value in table.items()]
            lines.append("")
    lines += [
        "## Certificate",
        "",
        f"Error of log p by default ({solver.method}, rtol = atol = {solver.rtol:g}, {solver.precision}), "
        f"in nats, against {certificate.reference}.",
        "",
        "| median | 99% | 99.9% | largest | within 0.001 | steps, mean | steps, largest |",
        "|---|---|---|---|---|---|---|",
        f"| {certificate.p50:.1e} | {certificate.p99:.1e} | {certificate.p999:.1e} | {certificate.max:.1e} | "
        f"{certificate.share_within_1e3:.2%} | {certificate.steps_mean:.1f} | {certificate.steps_max} |",
        "",
        f"Measured on {certificate.created_on}.",
        "",
    ]
    return "\n".join(lines) + (f"\n{more.strip()}\n" if more.strip() else "")


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _value(value: Scalar) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
