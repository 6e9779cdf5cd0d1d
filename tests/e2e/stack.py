"""A queue with API processes before it and workers behind it; each can be killed, stopped and replaced."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from tests.redis_server import Queue, queue
from tests.server import Server, free_port, servers, until

from pushforward.broker.redis.front import SPARE
from pushforward.broker.redis.link import PREFIX
from pushforward.settings import Settings

APIS, WORKERS = 2, 3
LEASE_S = 2.0
IN_HAND = sum(
    Settings.model_fields[limit].default // SPARE for limit in ("max_queue_rows", "max_queue_bytes")
)


class Stack:
    def __init__(self, queue: Queue, start: Callable[..., Server]) -> None:
        self.queue = queue
        self._start = start
        self.redis = queue.client()
        self.urls: list[str] = []
        """Of the API processes that are to be sent requests."""
        self.apis = [self.api(free_port()) for _ in range(APIS)]
        self.workers = [self.worker() for _ in range(WORKERS)]
        self.urls += [api.url for api in self.apis]

    def api(self, port: int | str) -> Server:
        return self._start("--broker", self.queue.url, "--port", str(port), ready=False)

    def worker(self) -> Server:
        flags = ("--broker", self.queue.url, "--workers", "1", "--lease-s", str(LEASE_S), "--drain-s", "0")
        return self._start(*flags, command="worker", ready=False)

    def replace(self, old: Server) -> Server:
        """Start another in the place of one that has ended, or is about to."""
        if old in self.apis:
            new = self.apis[self.apis.index(old)] = self.api(old.url.rpartition(":")[2])
        else:
            new = self.workers[self.workers.index(old)] = self.worker()
        return new

    def busy(self) -> Server:
        """A worker that holds a chunk just now."""
        found: list[Server] = []

        def look() -> bool:
            owners = {owner for id in self.jobs() if (owner := self.redis.hget(id, "owner"))}
            found.extend(worker for worker in self.workers if any(owns(worker, owner) for owner in owners))
            return bool(found)

        assert until(look), "nobody holds anything"
        return found[0]

    def jobs(self) -> list[bytes]:
        return list(self.redis.scan_iter(f"{PREFIX}job:*", 1000))

    def ready(self) -> bool:
        """Whether all API processes would take a request, and all workers chunks."""
        alive = [
            worker for worker in self.workers if self.redis.keys(f"{PREFIX}worker:*-{worker.process.pid}-*")
        ]
        return len(alive) == len(self.workers) and all(map(_ready, self.apis))

    def held(self) -> dict[str, object]:
        """What is there of requests, anywhere."""
        found: dict[str, object] = {}
        for api in self.apis:
            for name in ("requests_in_flight", "queue_rows", "queue_bytes"):
                found[f"{name} of {api.url}"] = api.metrics()[f"pushforward_{name}",]
        for key in self.redis.scan_iter(f"{PREFIX}*", 1000):
            name = key.decode().removeprefix(PREFIX)
            kind = name.partition(":")[0]
            if kind in ("job", "in"):
                found[name] = 1
            elif kind == "api":
                found[name] = sum(map(int, self.redis.hmget(key, "rows", "bytes"))) - IN_HAND
            elif kind in ("interactive", "bulk", "again", "alone", "reply"):
                found[name] = self.redis.xlen(key)
                if kind != "reply":
                    found[f"pending in {name}"] = self.redis.xpending(key, "workers")["pending"]
        return {name: count for name, count in found.items() if count}

    def at_rest(self) -> None:
        """See that all live, and that nothing is held for anybody."""
        assert until(self.ready)
        assert until(lambda: not self.held()), self.held()

    def restart_queue(self, *, empty: bool) -> None:
        self.queue.kill()
        if empty:
            shutil.rmtree(self.queue.folder / "appendonlydir")
        self.queue.start()


def owns(worker: Server, owner: bytes) -> bool:
    """Whether the name that a chunk's owner has is a worker's."""
    return owner.decode().split("-")[-2] == str(worker.process.pid)


def _ready(api: Server) -> bool:
    try:
        return httpx.get(f"{api.url}/health/ready").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def stack(folder: Path, store: Path) -> Iterator[Stack]:
    (folder / "queue").mkdir()
    with queue(folder / "queue", "valkey", "--appendonly", "yes") as server, servers(lambda: store) as start:
        made = Stack(server, start)
        try:
            assert until(made.ready)
            yield made
        finally:
            for each in (*made.apis, *made.workers):
                if each.process.poll() is None:
                    os.kill(each.process.pid, signal.SIGCONT)
            made.redis.close()
