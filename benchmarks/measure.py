"""Timing that is fair on a shared machine: one core, interleaved rounds, medians, ratios within a round."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / ".cache" / "results"

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")


def arguments(description: str) -> argparse.Namespace:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: a check that it works")
    return parser.parse_args()


def pin_to_one_core() -> None:
    """Give this process, and every thread a library starts in it, one and the same core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def seconds(call: Callable[[], Any], at_least: float = 0.02) -> float:
    """Seconds per call; fast calls are repeated until ``at_least`` seconds have passed."""
    start = time.perf_counter()
    calls = 0
    while True:
        call()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= at_least:
            return elapsed / calls


def paired(calls: dict[str, Callable[[], Any]], rounds: int, at_least: float = 0.02) -> dict[str, np.ndarray]:
    """Time all calls in every round (A B C, A B C, …); seconds per call, one entry a round.

    Noise that lasts longer than a round then falls on all of them alike.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(seconds(call, at_least))
    finally:
        gc.enable()
    return {name: np.array(values) for name, values in times.items()}


def ratio(times: dict[str, np.ndarray], name: str, to: str) -> float:
    """How many times as long ``name`` takes: the median over rounds of the ratio within the round."""
    return float(np.median(times[name] / times[to]))


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def save(name: str, rows: Sequence[dict[str, Any]], quick: bool, **extra: Any) -> None:
    """Keep the results of a benchmark for ``render.py``; those of a quick run are only printed."""
    if quick:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "rows": list(rows), **extra}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as an aligned table."""
    if not rows:
        return
    cells = [[str(key) for key in rows[0]], *[[_text(value) for value in row.values()] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(),
            flush=True,
        )


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
