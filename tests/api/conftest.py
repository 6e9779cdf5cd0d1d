"""A server as users start it: a process of its own, with its worker process, on a port of its own."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

PATIENCE_S = 60  # for things that take a moment, on a machine that may be very busy


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str = ""
    log: list[dict[str, Any]] = field(default_factory=list)
    lines: "queue.Queue[dict[str, Any] | None]" = field(default_factory=queue.Queue)

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next line of the log about an event."""
        while True:
            line = self.lines.get(timeout=PATIENCE_S)
            assert line is not None, f"the server ended before {event!r}: {self.log}"
            if line["event"] == event:
                return line

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def worker(self) -> int:
        """The process id of the worker that is there now."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1
        return int(children[0])

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, **options)

    def read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for text in stream:
                line = json.loads(text) if text.startswith("{") else {"event": text.rstrip()}
                self.log.append(line)
                self.lines.put(line)
        self.lines.put(None)


Start = Callable[..., Server]


@pytest.fixture(scope="session")
def start(store: Path) -> Iterator[Start]:
    """Starts servers, and sees to it that none is left over."""
    servers: list[Server] = []
    readers: list[threading.Thread] = []

    def start(*flags: str, at: Path = store, ready: bool = True) -> Server:
        command = [sys.executable, "-m", "pushforward.cli", "serve", "--port", "0", "--store", str(at)]
        process = subprocess.Popen(
            [*command, "--log-format", "json", *flags],
            env={**os.environ, "PYTHONPATH": "service"},
            stderr=subprocess.PIPE,
            text=True,
        )
        server = Server(process)
        servers.append(server)
        readers.append(threading.Thread(target=server.read))
        readers[-1].start()
        server.url = server.wait_for("listening")["url"]
        if ready:
            server.wait_for("worker ready")
        return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()
    for reader in readers:
        reader.join(PATIENCE_S)


@pytest.fixture(scope="session")
def server(start: Start) -> Server:
    """One server for all tests that leave it as it was."""
    return start()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def gone(pid: int) -> bool:
    """Whether a process has ended, waiting a little for it."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(name="gone")
def gone_fixture() -> Callable[[int], bool]:
    return gone
