"""A lean HTTP/1.1 load generator: keep-alive sockets, prepared requests, answers counted, not parsed.

Run as a program it loads one service and prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import sys
import time
from typing import cast

import uvloop


def request(path: str, body: bytes) -> bytes:
    """One POST of JSON, ready for the socket."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def answer_length(data: bytes | bytearray) -> int:
    """Bytes of the complete answer at the start of ``data``, 0 while it is incomplete."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return 0
    head = bytes(data[:end]).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(f"the service answered {bytes(data[:400])!r}")
    start = head.index(b"content-length:") + 15
    length = end + 4 + int(head[start : (head + b"\r\n").index(b"\r\n", start)])
    return length if len(data) >= length else 0


class Connection:
    """A blocking keep-alive connection: the shortest way there and back."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __call__(self, message: bytes) -> bytes:
        """Send a request, return the body of its answer."""
        self.socket.sendall(message)
        data = b""
        while not answer_length(data):
            part = self.socket.recv(1 << 16)
            if not part:
                raise RuntimeError("the service closed the connection")
            data += part
        return data[data.index(b"\r\n\r\n") + 4 :]


def one_client(port: int, messages: list[bytes], duration: float) -> list[float]:
    """Seconds of each request of one client that sends the next when it has the answer."""
    connection = Connection(port)
    times: list[float] = []
    cycle = itertools.cycle(messages)
    end = time.perf_counter() + duration
    while time.perf_counter() < end:
        message = next(cycle)
        start = time.perf_counter()
        connection(message)
        times.append(time.perf_counter() - start)
    return times


class Client(asyncio.Protocol):
    """One of many: sends the next request as soon as the last is answered, until it is told to stop."""

    def __init__(self, messages: list[bytes], offset: int) -> None:
        self.messages, self.next = messages, offset
        self.buffer = bytearray()
        self.times: list[float] = []
        self.running = True
        loop = asyncio.get_running_loop()
        self.last: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.send()

    def send(self) -> None:
        self.next = (self.next + 1) % len(self.messages)
        self.start = time.perf_counter()
        self.transport.write(self.messages[self.next])

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        try:
            length = answer_length(self.buffer)
        except RuntimeError as error:
            self.fail(error)
            self.transport.close()
            return
        if length:
            del self.buffer[:length]
            self.times.append(time.perf_counter() - self.start)
            if self.running:
                self.send()
            else:
                self.last.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(exc or RuntimeError("the service closed the connection"))

    def fail(self, error: Exception) -> None:
        if not self.last.done():
            self.last.set_exception(error)


async def many_clients(
    port: int, messages: list[bytes], clients: int, duration: float
) -> tuple[float, list[float]]:
    """Requests a second, from the first request to the last answer, and the seconds of each."""
    loop = asyncio.get_running_loop()
    crowd = [Client(messages, i * 7) for i in range(clients)]
    start = time.perf_counter()
    for client in crowd:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
    await asyncio.sleep(duration)
    for client in crowd:
        client.running = False
    await asyncio.gather(*(client.last for client in crowd))
    elapsed = time.perf_counter() - start
    times = [t for client in crowd for t in client.times]
    return len(times) / elapsed, times


def main() -> None:
    """Read {port, path, bodies, clients, duration} on standard input, write {rate, times}."""
    task = json.load(sys.stdin)
    messages = [request(task["path"], body.encode()) for body in task["bodies"]]
    if task["clients"] == 1:
        times = one_client(task["port"], messages, task["duration"])
        rate = len(times) / sum(times)
    else:
        uvloop.install()
        rate, times = asyncio.run(many_clients(task["port"], messages, task["clients"], task["duration"]))
    json.dump({"rate": rate, "times": times}, sys.stdout)


if __name__ == "__main__":
    main()
