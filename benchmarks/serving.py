"""Log-densities over HTTP: Pushforward beside the strongest services found, all up at once, loaded in turns.

One client with one row (p50, p99), and 32 clients with 16 rows each (rows a second), in rounds A B C D,
A B C D, …; the 30-dimensional network, rtol = atol = 1e-5.  Before anything is timed, every service must
agree with the float64 reference on all rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import load
import measure
import ours
from networks import Network
from networks import load as load_network

DIM, TOLERANCE = 30, 1e-5
CLIENTS, ROWS = 32, 16
RIVALS = Path(__file__).parent / "rivals"


@dataclass
class Service:
    """A command that serves on a port, and how to ask it."""

    name: str
    port: int
    command: list[str]
    path: str = "/log_density"
    options: dict[str, object] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        self.process = subprocess.Popen(self.command, start_new_session=True)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with code {self.process.returncode}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name} does not answer on port {self.port}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def cpu_seconds(self) -> float:
        """Processor time that its processes have used so far."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                if self.process and int(fields[2]) == self.process.pid:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it with all the processes it has started."""
        for number in (signal.SIGCONT, signal.SIGTERM):
            self.signal(number)
        time.sleep(0.5)
        self.signal(signal.SIGKILL)
        if self.process:
            self.process.wait()

    def body(self, rows: np.ndarray) -> str:
        """The JSON body for rows."""
        return json.dumps({"x": rows.round(6).tolist(), **self.options})

    def ask(self, rows: np.ndarray) -> np.ndarray:
        """log p of rows."""
        answer = load.Connection(self.port)(load.request(self.path, self.body(rows).encode()))
        return np.array(json.loads(answer)["log_density"], dtype=float)

    def load(self, rows: np.ndarray, each: int, clients: int, duration: float) -> dict[str, float]:
        """Load it from another process with distinct requests of ``each`` rows; the others stand still."""
        bodies = [self.body(rows[i : i + each]) for i in range(0, len(rows) - each + 1, each)]
        task = {
            "port": self.port,
            "path": self.path,
            "bodies": bodies,
            "clients": clients,
            "duration": duration,
        }
        self.signal(signal.SIGCONT)
        command, before = [sys.executable, load.__file__], self.cpu_seconds()
        done = subprocess.run(command, input=json.dumps(task).encode(), stdout=subprocess.PIPE, check=True)
        cpu = self.cpu_seconds() - before
        self.signal(signal.SIGSTOP)  # idle servers that poll would take time from the others
        answer = json.loads(done.stdout)
        p50, p99 = np.quantile(answer["times"], [0.5, 0.99])
        rows_done = len(answer["times"]) * each
        return {"p50": p50, "p99": p99, "rate": answer["rate"] * each, "cpu": cpu / rows_done}


def services() -> list[Service]:
    """The rivals and Pushforward."""
    python, ports = sys.executable, iter(range(18431, 18440))
    found = []
    for trace in ("autodiff", "closed form"):
        port = next(ports)
        command = [python, str(RIVALS / "fastapi_diffrax.py"), "--port", str(port), "--trace", trace]
        found.append(Service(f"FastAPI, diffrax, {trace} trace", port, command))
    port = next(ports)
    command = [python, str(RIVALS / "litserve_torchdiffeq.py"), "--port", str(port)]
    found.append(Service("LitServe, torchdiffeq", port, command))
    ours.published(DIM)
    command = [
        python,
        "-c",
        "from pushforward.cli import main; main()",
        "serve",
        "--store",
        str(ours.store()),
    ]
    port = next(ports)
    command += ["--port", str(port), "--log-level", "warning"]
    path = f"/v1/models/{ours.name(DIM)}/log_density"
    found.append(Service("Pushforward", port, command, path, tolerances(TOLERANCE)))
    return found


def tolerances(tolerance: float) -> dict[str, object]:
    """What a request to Pushforward sets."""
    return {"rtol": tolerance, "atol": tolerance, "logp_atol": tolerance * ours.logp_ratio(DIM)}


def at_equal_error(service: Service, network: Network, target: float) -> Service:
    """The same running service, asked for the loosest tolerance that still has that p99 error."""
    for tolerance in 10.0 ** np.arange(-3, -6, -0.25):
        options = tolerances(float(tolerance))
        candidate = replace(service, name=f"{service.name}, equal error", options=options)
        if np.quantile(errors(candidate, network), 0.99) <= target:
            return candidate
    raise RuntimeError(f"{service.name} does not reach a p99 error of {target}")


def errors(service: Service, network: Network) -> np.ndarray:
    """|log p − reference| for all rows, in requests of 16."""
    answers = [service.ask(network.rows[i : i + ROWS]) for i in range(0, len(network.rows), ROWS)]
    return np.abs(np.concatenate(answers) - network.log_density)


def main() -> None:
    """Start all, verify, load in turns, report."""
    quick = measure.arguments(__doc__).quick
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the services end with this process
    network = load_network(DIM)
    rounds, duration = (2, 1.0) if quick else (7, 3.0)
    contenders = services()
    try:
        for service in contenders:
            service.start()
        error = {s.name: float(np.quantile(errors(s, network), 0.99)) for s in contenders}
        assert all(e < 1e-2 for e in error.values()), f"the services disagree: {error}"
        contenders.append(at_equal_error(contenders[-1], network, min(list(error.values())[:-1])))
        error[contenders[-1].name] = float(np.quantile(errors(contenders[-1], network), 0.99))
        for service in contenders:
            service.signal(signal.SIGSTOP)
        runs: dict[str, dict[str, list[dict[str, float]]]] = {
            s.name: {"one": [], "many": []} for s in contenders
        }
        for _ in range(rounds):
            for service in contenders:
                runs[service.name]["one"].append(service.load(network.rows, 1, 1, duration))
            for service in contenders:
                runs[service.name]["many"].append(service.load(network.rows, ROWS, CLIENTS, duration))
    finally:
        for service in contenders:
            service.stop()

    def values(name: str, load: str, what: str) -> np.ndarray:
        return np.array([run[what] for run in runs[name][load]])

    rows, best = [], contenders[-1].name
    for service in contenders:
        name = service.name
        row = {
            "service": name,
            "tolerance": float(service.options.get("rtol", TOLERANCE)),
            "p99 error": error[name],
        }
        row |= {f"{q} ms": float(np.median(values(name, "one", q))) * 1e3 for q in ("p50", "p99")}
        row["CPU ms"] = float(np.median(values(name, "one", "cpu"))) * 1e3
        row["rows/s"] = float(np.median(values(name, "many", "rate")))
        row["rows/CPU-s"] = float(np.median(1 / values(name, "many", "cpu")))
        row["p50 / Pushforward's"] = float(np.median(values(name, "one", "p50") / values(best, "one", "p50")))
        row["Pushforward's rows/s / its"] = float(
            np.median(values(best, "many", "rate") / values(name, "many", "rate"))
        )
        rows.append(row)
    measure.show(rows)
    measure.save("serving", rows, quick=quick, tolerance=TOLERANCE)


if __name__ == "__main__":
    main()
