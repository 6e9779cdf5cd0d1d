"""All benchmarks one after another, each in a process of its own, then docs/benchmarks.md: ``make bench``."""

from __future__ import annotations

import subprocess
import sys
import time

import measure

SCRIPTS = ("step", "solve", "adjoint", "serving", "company", "broker")


def main() -> None:
    options = sys.argv[1:]
    for script in SCRIPTS:
        print(f"\n{script}", flush=True)
        start = time.monotonic()
        subprocess.run([sys.executable, measure.HERE / f"{script}.py", *options], check=True)
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
    if "--quick" not in options:
        subprocess.run([sys.executable, measure.HERE / "render.py"], check=True)


if __name__ == "__main__":
    main()
