"""LitServe around torchdiffeq, with its own batching, two workers of one thread each on two cores.

``POST /log_density`` {"x": [[…]]} → {"log_density": […]}.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import litserve
import numpy as np
import torch

from networks import load, log_density
from rivals.torch_solvers import TRACES, Field, with_torchdiffeq


class LogDensity(litserve.LitAPI):
    """One batch is one solve of the rows of all its requests."""

    def __init__(self, trace: str, dim: int, tolerance: float, threads: int, **options: Any) -> None:
        super().__init__(api_path="/log_density", **options)
        self.trace, self.dim, self.tolerance, self.threads = trace, dim, tolerance, threads

    def setup(self, device: str) -> None:
        torch.set_num_threads(self.threads)
        network = load(self.dim)
        self.run = with_torchdiffeq(Field(network.weights), self.trace)
        self.predict([network.rows.astype(np.float32)])

    def decode_request(self, request):  # LitServe takes annotations for schemas
        rows = np.array(request["x"], dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.dim or not np.isfinite(rows).all():
            raise ValueError("x must be a finite matrix of the right width")
        return rows

    def batch(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return inputs

    def predict(self, x: Any, **kwargs: Any) -> list[np.ndarray]:
        parts = x if isinstance(x, list) else [x]
        z, ell = self.run(torch.from_numpy(np.concatenate(parts)), self.tolerance)
        values = log_density(z.numpy(), ell.numpy())
        return np.split(values, np.cumsum([len(part) for part in parts])[:-1])

    def unbatch(self, output: list[np.ndarray]) -> list[np.ndarray]:
        return output

    def encode_response(self, output, **kwargs):
        return {"log_density": (output[0] if isinstance(output, list) else output).tolist()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--trace", choices=TRACES, default="batched vjp")
    parser.add_argument("--dim", type=int, default=30)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--batch", type=int, default=32, help="requests in a batch")
    parser.add_argument("--wait", type=float, default=0.001, help="seconds to wait for a full batch; 0 spins")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    api = LogDensity(
        options.trace,
        options.dim,
        options.tolerance,
        options.threads,
        max_batch_size=options.batch,
        batch_timeout=options.wait,
    )
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=options.workers, fast_queue=True)
    server.run(
        host="127.0.0.1", port=options.port, log_level="warning", generate_client_file=False, access_log=False
    )
