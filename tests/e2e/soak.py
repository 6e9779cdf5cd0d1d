"""Traffic for as long as one likes, with clients that hang up; memory and descriptors should not grow.

PYTHONPATH=service:. python -m tests.e2e.soak --minutes 30
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from tests.e2e.bank import Bank, copy_models
from tests.e2e.traffic import Report, Traffic
from tests.server import Server, servers

PAGE = os.sysconf("SC_PAGE_SIZE")


def usage(server: Server, **others: int) -> dict[str, tuple[float, int]]:
    """Of every process: resident memory in megabytes, and open descriptors."""
    pids = {"server": server.process.pid, **others}
    pids |= {f"worker {number}": pid for number, pid in enumerate(server.workers())}
    return {
        name: (
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 1e6,
            len(os.listdir(f"/proc/{pid}/fd")),
        )
        for name, pid in pids.items()
    }


def slopes(samples: list[tuple[float, dict[str, tuple[float, int]]]]) -> dict[str, tuple[float, float]]:
    """Megabytes and descriptors that every process gains an hour, by least squares over the second half."""
    late = samples[len(samples) // 2 :]
    hours = [seconds / 3600 for seconds, _ in late]
    return {
        name: tuple(float(np.polyfit(hours, [at[name][which] for _, at in late], 1)[0]) for which in (0, 1))
        for name in late[-1][1]
    }


def soak(server: Server, bank: Bank, seconds: float, rate: float, every: float = 1.0) -> Report:
    """Run traffic; print what it came to, and how memory and descriptors changed."""
    samples, begun = [], time.monotonic()
    with Traffic(server.url, bank, rate=rate, hang_up=0.3) as traffic:
        while time.monotonic() - begun < seconds:
            time.sleep(every)
            samples.append((time.monotonic() - begun, usage(server, clients=os.getpid())))
    print(traffic.report())
    for seconds, at in samples[:: max(1, len(samples) // 10)]:
        sizes = ", ".join(f"{name} {memory:.1f} MB, {files} files" for name, (memory, files) in at.items())
        print(f"after {seconds:.0f} s: {sizes}")
    first, last = samples[0][1], samples[-1][1]
    for name, (memory, files) in slopes(samples).items():
        print(
            f"{name}: {first[name][0]:.1f} → {last[name][0]:.1f} MB ({memory:+.1f} MB/h in the second half), "
            f"{first[name][1]} → {last[name][1]} descriptors ({files:+.1f}/h)"
        )
    return traffic.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=60, help="requests a second")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        copy_models(store)
        with servers(lambda: store) as start:
            server = start("--workers", str(options.workers))
            soak(server, Bank(store), 60 * options.minutes, options.rate).assert_clean()


if __name__ == "__main__":
    main()
