"""FastAPI around a jit-compiled diffrax solve: the strongest service of its kind that we could write.

``POST /log_density`` {"x": [[…]]} → {"log_density": […]}.  Bodies are parsed and written by orjson.  Waiting
requests are solved together (padded to a power of two, compiled before the port opens), few rows inline,
more in a thread, so that the event loop goes on parsing.  uvicorn runs on uvloop and httptools without an
access log.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

from networks import load, log_density
from rivals.jax_solver import TRACES, compiled

INLINE = 8  # rows that are solved in the event loop: handing them to a thread costs more than it gains


class Batcher:
    """Solves all waiting requests together, one batch at a time."""

    def __init__(self, trace: str, dim: int, tolerance: float, most: int) -> None:
        network = load(dim)
        self.run, self.dim, self.tolerance, self.most = compiled(network.weights, trace), dim, tolerance, most
        self.waiting: list[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = []
        self.busy = False
        for power in range(round(math.log2(most)) + 1):
            self.solve(network.rows[np.arange(2**power) % len(network.rows)].astype(np.float32))

    def solve(self, rows: np.ndarray) -> np.ndarray:
        """log p [n] of float32 rows [n, D]."""
        n = len(rows)
        padding = 2 ** math.ceil(math.log2(n)) - n
        if padding:  # with copies of a row, which cost no further steps
            rows = np.concatenate([rows, np.repeat(rows[:1], padding, axis=0)])
        z, ell = self.run(rows, self.tolerance)
        return log_density(np.asarray(z), np.asarray(ell))[:n]

    async def __call__(self, rows: np.ndarray) -> np.ndarray:
        """The same, together with whatever else waits."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[np.ndarray] = loop.create_future()
        self.waiting.append((rows, future))
        if not self.busy:
            self.busy = True
            loop.call_soon(self.flush)
        return await future

    def flush(self) -> None:
        """Start the next batch, if any request waits."""
        batch, total = [], 0
        while self.waiting and total + len(self.waiting[0][0]) <= self.most:
            batch.append(self.waiting.pop(0))
            total += len(batch[-1][0])
        if not batch:
            self.busy = False
            return
        rows = np.concatenate([rows for rows, _ in batch])
        if total <= INLINE:
            self.deliver(batch, self.solve(rows))
        else:
            loop = asyncio.get_running_loop()
            task = loop.run_in_executor(None, self.solve, rows)
            task.add_done_callback(lambda done: self.deliver(batch, done.result()))

    def deliver(self, batch: list[tuple[np.ndarray, asyncio.Future[np.ndarray]]], values: np.ndarray) -> None:
        """Hand out the answers and go on."""
        start = 0
        for rows, future in batch:
            if not future.done():
                future.set_result(values[start : start + len(rows)])
            start += len(rows)
        asyncio.get_running_loop().call_soon(self.flush)


def create_app(trace: str, dim: int, tolerance: float, most: int) -> FastAPI:
    """The service."""
    app = FastAPI()
    solve = Batcher(trace, dim, tolerance, most)

    @app.post("/log_density")
    async def score(request: Request) -> Response:
        rows = np.array(orjson.loads(await request.body())["x"], dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != dim or not 0 < len(rows) <= most or not np.isfinite(rows).all():
            return Response(b'{"detail":"x must be a finite matrix of the right width"}', status_code=422)
        answer = {"log_density": await solve(rows)}
        return Response(
            orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
        )

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--trace", choices=TRACES, required=True)
    parser.add_argument("--dim", type=int, default=30)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--most", type=int, default=512, help="rows in a batch")
    options = parser.parse_args()
    service = create_app(options.trace, options.dim, options.tolerance, options.most)
    uvicorn.run(
        service,
        host="127.0.0.1",
        port=options.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
