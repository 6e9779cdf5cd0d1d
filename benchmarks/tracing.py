"""What tracing costs a request: two servers, one that traces and one that does not, loaded in turns.

One client with one row of `moons` (p50, p99), and 32 clients with 16 rows each (rows a second); then the
processor time of the servers per request. Ratios are taken within a round, then their median.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

import measure
from serving import CLIENTS, ROWS, Service

STORE = Path(__file__).parents[1] / "model_store"
VARIANTS = {
    "off": [],
    "off again": [],  # what of a ratio is noise
    "1 % sampled": ["--tracing"],
    "every request": ["--tracing"],
}
SAMPLER = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"}


class Sink(BaseHTTPRequestHandler):
    """A collector that keeps nothing."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    """Start all, load in turns, report."""
    quick = measure.arguments(__doc__).quick
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sink = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{sink.server_port}"
    rounds, duration = (3, 1.0) if quick else (15, 2.0)
    rows = np.random.default_rng(0).normal(size=(256, 2))
    run = [sys.executable, "-c", "from pushforward.cli import main; main()", "serve", "--store", str(STORE)]
    run += ["--log-level", "warning", "--versions", "moons/1"]
    services = []
    for port, (name, flags) in enumerate(VARIANTS.items(), 18451):
        command = [*run, "--port", str(port), *flags]
        if name == "1 % sampled":
            command = ["env", *(f"{key}={value}" for key, value in SAMPLER.items()), *command]
        services.append(Service(name, port, command, "/v1/models/moons/log_density"))
    results: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    try:
        for service in services:
            service.start()
            service.ask(rows[:1])
            service.signal(signal.SIGSTOP)
        for _ in range(rounds):
            for service in services:
                one = service.load(rows, 1, 1, duration)
                many = service.load(rows, ROWS, CLIENTS, duration)
                results[service.name].append([one["p50"], one["p99"], one["cpu"], many["rate"], many["cpu"]])
    finally:
        for service in services:
            service.stop()
        sink.shutdown()
    off = np.array(results["off"])
    table = []
    for name, values in results.items():
        found, ratios = np.median(values, axis=0), np.median(np.array(values) / off, axis=0)
        row: dict[str, object] = {"tracing": name}
        row |= {"p50 ms": found[0] * 1e3, "p99 ms": found[1] * 1e3, "cpu ms": found[2] * 1e3}
        row |= {"rows/s": found[3], "p50 ×": ratios[0], "p99 ×": ratios[1], "cpu ×": ratios[2]}
        row |= {"rows/s ×": ratios[3]}
        table.append(row)
    measure.show(table)
    measure.save("tracing", table, quick=quick)


if __name__ == "__main__":
    main()
