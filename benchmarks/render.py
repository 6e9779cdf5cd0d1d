"""Write docs/benchmarks.md from the results of the last runs."""

from __future__ import annotations

import json
from typing import Any

import measure

PAGE = measure.HERE.parent / "docs" / "benchmarks.md"


def number(value: Any) -> str:
    """Three significant digits, thousands in groups; text as it is."""
    if isinstance(value, str) or value is None:
        return value or ""
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{round(value, -1 if value >= 10_000 else 0):,.0f}"


def table(rows: list[dict[str, Any]], columns: list[str] | None = None) -> str:
    """A Markdown table."""
    columns = columns or list(rows[0])
    lines = [columns, ["---"] * len(columns), *([number(row.get(c)) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def wide(rows: list[dict[str, Any]], down: str, across: str, value: str) -> str:
    """A table with one column for each value of ``across``."""
    heads = list(dict.fromkeys(row[across] for row in rows))
    cells: dict[str, dict[str, Any]] = {}
    for row in rows:
        cells.setdefault(row[down], {down: row[down]})[f"{across} = {row[across]}"] = row.get(value)
    return table(list(cells.values()), [down, *(f"{across} = {head}" for head in heads)])


def result(name: str) -> dict[str, Any]:
    """What a benchmark saved."""
    return dict(json.loads((measure.RESULTS / f"{name}.json").read_text()))


def main() -> None:
    """Write the page."""
    names = ("step", "solve", "adjoint", "serving", "company", "broker")
    step, solve, adjoint, serving, company, broker = map(result, names)
    machine = serving["machine"]
    batch, single = ([row for row in solve["rows"] if row["rows"] == n] for n in (256, 1))
    page = f"""# Benchmarks

Written by `make bench`; [how each is measured](../benchmarks/README.md). Machine: {machine["processor"]},
{machine["cores"]} cores, {machine["system"]}. Times are medians, ratios are medians of ratios within a round.

## Over HTTP

All services up on this machine in one run, loaded in turns; those that are not loaded stand still.
One client with one row (p50, p99, processor time of the service), then 32 clients with 16 rows each (rows a
second; rows per second of processor time). "p99 error" is that of the log-densities, in nats.

{table(serving["rows"])}

## Short requests beside long ones

One-row requests, 50 a second by the clock and timed from when they were due, alone and beside a client that
streams requests of 10,000 rows; then 32 clients with 16 rows each, against the bare engine. Static batching
runs the same programs, a window of rows to its end.

{table(company["rows"])}

## Over a queue

A server with workers of its own beside one with Valkey in between, all on this machine, loaded in turns as
above.

{table(broker["rows"])}

The queue by itself, between one process that asks and one that answers at once: µs of processor time per
chunk of each, and of Valkey. Valkey runs scripts on one core; the last column says how many workers of as
many rows a second as the one above keep that core busy.

{table(broker["capacity"])}

## Whole solves at equal error

Log-densities on one core, each solver at its cheapest tolerance with a p99 error of at most
{solve["target"]:g} nats. How many times as long as Pushforward it takes, 256 rows at once:

{wide(batch, "solver", "D", "times Pushforward")}

One row at a time:

{wide(single, "solver", "D", "times Pushforward")}

Milliseconds for 256 rows:

{wide(batch, "solver", "D", "ms")}

Tolerances that were needed (256 rows):

{wide(batch, "solver", "D", "tolerance")}

## One step

The step program in ONNX Runtime against the same torch module, eager and through `torch.compile`.
GFLOP/s count the matrix products of the field and the trace only; the ceiling is a chain of H × H products in
ONNX Runtime.

{table(step["rows"])}

Graph nodes of the step program:

{table(step["graphs"])}

The closed-form trace: whole solves of 256 rows against the same steps without divergence.

{table(step["trace"])}

The engine with all slots taken: time outside ONNX Runtime as a share of the time inside.

{table(step["engine"])}

## Training memory

Peak memory of one maximum-likelihood gradient: constant in the number of steps by the adjoint, linear through
the solver.

![Peak memory against solver steps](figures/adjoint_memory.svg)

{table(adjoint["rows"])}
"""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page)
    print(f"wrote {PAGE.relative_to(measure.HERE.parent)}")


if __name__ == "__main__":
    main()
