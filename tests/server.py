"""A server as users start it: a process of its own, with its worker process, on a port of its own."""

import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

PATIENCE_S = 60  # for things that take a moment, on a machine that may be very busy


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str = ""
    log: list[dict[str, Any]] = field(default_factory=list)
    lines: "queue.Queue[dict[str, Any] | None]" = field(default_factory=queue.Queue)

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next line of the log about an event."""
        end = time.monotonic() + PATIENCE_S
        while True:
            line = self.lines.get(timeout=max(0, end - time.monotonic()))
            assert line is not None, f"the server ended before {event!r}: {self.log}"
            if line["event"] == event:
                return line

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def workers(self) -> list[int]:
        """The process ids of the workers that are there now."""
        return self.children("pushforward.worker")

    def children(self, program: str) -> list[int]:
        """The process ids of what runs a program for it."""
        found: list[int] = []
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if program.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
        return found

    def worker(self) -> int:
        """That of the only one, as soon as it is there."""
        assert until(lambda: len(self.workers()) == 1), self.workers()
        (worker,) = self.workers()
        return worker

    def memory(self) -> int:
        """Bytes that the HTTP process has resident."""
        return 4096 * int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])

    def keep_up(self) -> None:
        """Wait until whatever was logged so far has been read."""
        mark, first = secrets.token_hex(8), len(self.log)
        with self.client() as client:
            client.get("/health/live", headers={"x-request-id": mark})
        assert until(lambda: any(line.get("request") == mark for line in self.log[first:]))

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, **options)

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Every sample by its name and the values of its labels, in the order of their names."""
        with self.client() as client:
            text = client.get("/metrics").text
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for text in stream:
                line = json.loads(text) if text.startswith("{") else {"event": text.rstrip()}
                self.log.append(line)
                self.lines.put(line)
        self.lines.put(None)


def free_port() -> int:
    """A port that the system gives to nobody who asks for any: it is still free when a server comes back."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


Start = Callable[..., Server]


@contextmanager
def servers(store: Callable[[], Path | str]) -> Iterator[Start]:
    """What starts servers or workers, of ``store()`` unless told otherwise; none is left over afterwards."""
    started: list[Server] = []
    readers: list[threading.Thread] = []

    def start(
        *flags: str, at: Path | None = None, ready: bool = True, command: str = "serve", **settings: object
    ) -> Server:
        serves = command == "serve"
        port = ("--port", "0") if serves else ()
        program = [sys.executable, "-m", "pushforward.cli", command, *port]
        process = subprocess.Popen(
            [*program, "--store", str(at or store()), "--log-format", "json", *flags],
            env=os.environ
            | {"PYTHONPATH": "service"}
            | {f"PUSHFORWARD_{name.upper()}": str(value) for name, value in settings.items()},
            stderr=subprocess.PIPE,
            text=True,
        )
        server = Server(process)
        started.append(server)
        readers.append(threading.Thread(target=server.read))
        readers[-1].start()
        if serves:
            server.url = server.wait_for("listening")["url"]
        if ready:
            server.wait_for("worker ready")
        return server

    try:
        yield start
    finally:
        for server in started:
            if server.process.poll() is None:
                server.stop()
        for reader in readers:
            reader.join(PATIENCE_S)


def until(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true, waiting a little for it."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    """Whether a process has ended, waiting a little for it."""

    def ended() -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        return state == "Z"

    return until(ended)
