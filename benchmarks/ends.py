"""The two ends of a queue with nothing beyond them: no HTTP in front, no engine behind.

Run as a program it is one of them: ``ends.py answer URL`` answers every chunk at once until it is told to
end; ``ends.py ask`` reads {url, rows, dim, outstanding, duration, processes} on standard input, keeps so many
chunks outstanding, and writes {chunks, seconds, p50, cpu}: the median of a chunk's seconds, and the
processor seconds of itself and of the ``processes`` ({name: [pid …]}) in that time.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import uvloop

from pushforward.broker.local import LocalBroker
from pushforward.broker.redis.back import Puller
from pushforward.broker.redis.front import RedisBroker
from pushforward.messages import ModelState, Result, Work
from pushforward.metrics import EngineCollector

MODEL = "nothing", 1
_WARM_S = 0.5


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Instant:
    """Solves every row in no time."""

    async def submit(self, work: Work) -> Result:
        count = len(work.rows)
        numbers, steps = np.zeros(count), np.zeros(count, np.int32)
        status = np.zeros(count, np.uint8)
        return Result(
            work.id, work.rows, numbers, numbers, steps, steps, steps, status, numbers, fence=work.fence
        )

    def models(self) -> dict[tuple[str, int], ModelState]:
        return {MODEL: ModelState(*MODEL, "ready")}

    def unavailable(self) -> None:
        return None


async def answer(url: str, rows: int) -> None:
    """Pull chunks of a queue and answer them, until SIGTERM."""
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    puller = Puller(url, cast(LocalBroker, Instant()), rows, 5.0, EngineCollector())
    await puller.start()
    await told.wait()
    await puller.drain(5.0)


class _Holdings:
    """What is held: rows of chunks that are out."""

    max_rows, max_bytes = 400_000, 1 << 30

    def __init__(self) -> None:
        self.rows = self.nbytes = 0

    def rates(self) -> tuple[float, float]:
        return 1000.0, 1e6


async def ask(
    url: str, rows: int, dim: int, outstanding: int, duration: float, processes: dict[str, list[int]]
) -> dict[str, Any]:
    """Keep chunks outstanding, each admitted as a request of its own."""
    holdings = _Holdings()
    broker = RedisBroker(url, holdings)
    await broker.start()
    while broker.unavailable() is not None:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    chunk = Work(
        id="",
        model=MODEL[0],
        version=MODEL[1],
        kind="encode",
        density=True,
        precision="float32",
        rows=np.random.default_rng(0).normal(size=(rows, dim)),
        context=None,
        rtol=1e-5,
        atol=1e-5,
        logp_atol=1e-4,
        max_steps=1000,
    )
    times: list[float] = []
    running = True

    async def one_client(number: int) -> None:
        own = 0
        while running:
            own, start = own + 1, time.perf_counter()
            holdings.rows, holdings.nbytes = holdings.rows + rows, holdings.nbytes + 8 * rows * dim
            await broker.admit(rows, 8 * rows * dim)
            work = msgspec.structs.replace(chunk, id=f"{number}-{own}/0", deadline=time.time() + 30)
            result = await broker.submit(work)
            assert len(result.status) == rows
            holdings.rows, holdings.nbytes = holdings.rows - rows, holdings.nbytes - 8 * rows * dim
            times.append(time.perf_counter() - start)

    def used() -> dict[str, float]:
        others = {name: sum(map(cpu_seconds, pids)) for name, pids in processes.items()}
        return {"asks": time.process_time(), **others}

    clients = [asyncio.create_task(one_client(number)) for number in range(outstanding)]
    await asyncio.sleep(_WARM_S)
    cpu, before, start = used(), len(times), time.perf_counter()
    await asyncio.sleep(duration)
    cpu = {name: seconds - cpu[name] for name, seconds in used().items()}
    elapsed, measured = time.perf_counter() - start, times[before:]
    running = False
    await asyncio.gather(*clients)
    await broker.close()
    p50 = float(np.median(measured))
    return {"chunks": len(measured), "seconds": elapsed, "p50": p50, "cpu": cpu}


if __name__ == "__main__":
    if sys.argv[1] == "answer":
        uvloop.run(answer(sys.argv[2], 8192))
    else:
        json.dump(uvloop.run(ask(**json.load(sys.stdin))), sys.stdout)
