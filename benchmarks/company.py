"""What company costs: one-row requests at a steady rate, alone and beside a client that streams 10,000 rows.

Pushforward, and the same programs behind static batching, are loaded in turns, in rounds. One-row requests
are sent by the clock, 50 a second, whether or not earlier ones are answered, and timed from when they were
due (no coordinated omission). Then 32 clients with 16 rows each against the bare engine, and two workers
against one.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

import httpx
import numpy as np

import measure
import ours
import serving
from networks import load as load_network

DIM, TOLERANCE = serving.DIM, serving.TOLERANCE
RATE, BULK_ROWS = 50, 10_000


def services() -> list[serving.Service]:
    """Pushforward with one and with two workers, and static batching."""
    folder, ports = ours.published(DIM), iter(range(18451, 18460))
    command = [sys.executable, "-c", "from pushforward.cli import main; main()", "serve"]
    command += ["--store", str(ours.store()), "--log-level", "warning"]
    path, options = f"/v1/models/{ours.name(DIM)}/log_density", serving.tolerances(TOLERANCE)
    found = []
    for workers in (1, 2):
        port = next(ports)
        flags = ["--port", str(port), "--workers", str(workers)]
        name = f"Pushforward, {workers} worker{'s' * (workers > 1)}"
        found.append(serving.Service(name, port, [*command, *flags], path, options))
    port, script = next(ports), serving.RIVALS / "static_batching.py"
    command = [sys.executable, str(script), "--port", str(port), "--version", str(folder)]
    found.append(serving.Service("static batching", port, command, options=options))
    return found


async def company(service: serving.Service, rows: np.ndarray, duration: float) -> dict[str, float]:
    """Quantiles of one-row requests alone and beside bulk, and bulk rows a second beside them and alone."""
    url = f"http://127.0.0.1:{service.port}{service.path}"
    ones = [service.body(rows[[i]]) for i in range(len(rows))]
    many = service.body(np.resize(rows, (BULK_ROWS, rows.shape[1])))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:

        async def post(body: str) -> None:
            answer = await client.post(url, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 200, answer.text[:300]

        async def one(number: int, due: float) -> float:
            await asyncio.sleep(due - time.perf_counter())
            await post(ones[number % len(ones)])
            return time.perf_counter() - due

        async def interactive() -> np.ndarray:
            start = time.perf_counter() + 0.1
            return np.array(
                await asyncio.gather(*(one(n, start + n / RATE) for n in range(int(duration * RATE))))
            )

        async def bulk(stop: asyncio.Event) -> float:
            start, done = time.perf_counter(), 0
            while not stop.is_set() or not done:
                await post(many)
                done += BULK_ROWS
            return done / (time.perf_counter() - start)

        async def bulk_beside(other: asyncio.Task[object] | None) -> float:
            stop = asyncio.Event()
            streaming = asyncio.create_task(bulk(stop))
            await (other if other is not None else asyncio.sleep(duration))
            stop.set()
            return await streaming

        alone = await interactive()
        bulk_alone = await bulk_beside(None)
        beside = asyncio.create_task(interactive())
        bulk_rate = await bulk_beside(beside)
        times = await beside
    figures = {"bulk alone": bulk_alone, "bulk beside": bulk_rate}
    for name, values in (("alone", alone), ("beside", times)):
        figures |= {f"p{q} {name}": float(np.quantile(values, q / 100)) * 1e3 for q in (50, 99)}
    return figures


def bare_engine(rows: np.ndarray) -> float:
    """Rows a second of the engine by itself, kept at 32 chunks of 16 rows."""
    loaded = ours.model(DIM)
    engine = ours.Engine(lambda name, version: loaded, slots=256)
    logp_atol = TOLERANCE * ours.logp_ratio(DIM)
    chunks = [ours.chunk(rows[i : i + 16], TOLERANCE, logp_atol) for i in range(0, len(rows) - 15, 16)]
    for number in range(32):
        engine.submit(chunks[number % len(chunks)])
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < 2:
        for answer in engine.step():
            done += len(answer.status)
            engine.submit(chunks[done // 16 % len(chunks)])
    return done / elapsed


def main() -> None:
    """Start all, load in turns, report."""
    quick = measure.arguments(__doc__).quick
    network = load_network(DIM)
    rounds, duration = (1, 4.0) if quick else (5, 10.0)
    contenders = services()
    runs: dict[str, list[dict[str, float]]] = {service.name: [] for service in contenders}
    saturated: dict[str, list[float]] = {service.name: [] for service in contenders}
    bare = []
    try:
        for service in contenders:
            service.start()
            serving.errors(service, network)
            service.signal(serving.signal.SIGSTOP)
        for _ in range(rounds):
            for service in contenders:
                service.signal(serving.signal.SIGCONT)
                runs[service.name].append(asyncio.run(company(service, network.rows, duration)))
                service.signal(serving.signal.SIGSTOP)
            for service in contenders:
                figures = service.load(network.rows, serving.ROWS, serving.CLIENTS, 3.0)
                saturated[service.name].append(figures["rate"])
            bare.append(bare_engine(network.rows))
    finally:
        for service in contenders:
            service.stop()
    rows = []
    one = contenders[0].name
    for service in contenders:
        mine = {key: np.array([run[key] for run in runs[service.name]]) for key in runs[service.name][0]}
        rate = np.array(saturated[service.name])
        row: dict[str, object] = {"service": service.name}
        row |= {f"{key} ms": float(np.median(mine[key])) for key in mine if key.startswith("p")}
        row["p99 beside / alone"] = float(np.median(mine["p99 beside"] / mine["p99 alone"]))
        row["bulk rows/s"] = float(np.median(mine["bulk alone"]))
        row["bulk beside / alone"] = float(np.median(mine["bulk beside"] / mine["bulk alone"]))
        row["32 × 16 rows/s"] = float(np.median(rate))
        row["of the bare engine's"] = float(np.median(rate / np.array(bare)))
        row["of one worker's"] = float(np.median(rate / np.array(saturated[one])))
        rows.append(row)
    measure.show(rows)
    measure.save("company", rows, quick=quick, cores=os.cpu_count())


if __name__ == "__main__":
    main()
