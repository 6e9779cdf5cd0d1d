"""The two ends of the queue against a real server that is lost, emptied and shared."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import uvloop
from tests.broker.conftest import ENDLESS
from tests.broker.rigs import LEASE_S, Held, Rig, ready, rig, until
from tests.redis_server import Queue, queue

from pushforward.broker.local import LocalBroker
from pushforward.broker.redis import back, front, link
from pushforward.broker.redis.back import Puller
from pushforward.broker.redis.front import RedisBroker
from pushforward.broker.redis.link import PREFIX
from pushforward.engine.request import Status
from pushforward.errors import PushforwardError, Unavailable
from pushforward.messages import Setup
from pushforward.metrics import EngineCollector


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Queue]:
    (tmp_path / "queue").mkdir()
    with queue(tmp_path / "queue", "valkey", "--appendonly", "yes") as made:
        yield made


def run(test: Callable[[], Awaitable[None]]) -> None:
    uvloop.run(asyncio.wait_for(test(), 120))  # as servers and workers do


@contextlib.asynccontextmanager
async def asking(server: Queue, held: Held | None = None) -> AsyncIterator[RedisBroker]:
    """An API process's end of the queue, which has found it."""
    broker = RedisBroker(server.url, held or Held())
    await broker.start()
    await until(lambda: "cannot be reached" not in str(broker.unavailable()))
    try:
        yield broker
    finally:
        await broker.close()


@contextlib.contextmanager
def paused(rig: Rig) -> Iterator[None]:
    """Its worker answers nothing while the block runs."""
    (worker,) = rig.local.workers
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def keys(server: Queue) -> set[str]:
    """What is there of chunks."""
    with server.client() as client:
        found = {key.decode().removeprefix(PREFIX) for key in client.keys(f"{PREFIX}*")}
    return {key for key in found if key.startswith(("job:", "in:"))}


def stream_of(server: Queue, id: str) -> str | None:
    with server.client() as client:
        found = client.hget(f"{PREFIX}job:{id}", "stream")
    return found and found.decode()


# ---------------------------------------------------------------------------------------- admission


def test_the_limit_is_for_all_processes_together_and_a_dead_one_holds_nothing(server: Queue) -> None:
    async def test() -> None:
        one, two = Held(max_rows=100), Held(max_rows=100)
        async with asking(server, one) as first, asking(server, two) as second:
            one.rows = 70
            await first.admit(70, 0)
            two.rows = 40
            with pytest.raises(
                Unavailable, match="holds 70 of 100 rows, and this request needs 40"
            ) as caught:
                await second.admit(40, 0)
            # 10 rows too many, at 10 rows/s of each of the two
            assert (caught.value.retry_after, caught.value.detail["depth"]) == (1, 70)
            two.rows = 30
            await second.admit(30, 0)
            one.rows = two.rows = 0
            await until(lambda: first.rows == second.rows == 0)
            one.rows = 100
            await first.admit(100, 0)
            two.rows = 90
            with pytest.raises(Unavailable) as caught:
                await second.admit(90, 0)
            assert caught.value.retry_after == 5  # 90 rows at 20 rows/s
            for task in first._tasks:  # as if it were killed
                task.cancel()

            async def freed() -> None:
                while True:
                    with contextlib.suppress(Unavailable):
                        return await second.admit(90, 0)
                    await asyncio.sleep(0.2)

            await freed()
            one.rows = two.rows = 0

    run(test)


# ---------------------------------------------------------------------------------------- the server is lost


def test_while_the_server_is_away_requests_are_refused_at_once_with_the_reason(server: Queue) -> None:
    async def test() -> None:
        held = Held(rows=1, nbytes=1)
        async with asking(server, held) as broker:
            server.kill()
            await until(
                lambda: broker.unavailable() is not None and "cannot be reached" in broker.unavailable()
            )
            with pytest.raises(Unavailable, match=rf"{server.url} cannot be reached: .*onnect") as caught:
                await broker.admit(1, 1)
            assert caught.value.retry_after == 1
            server.start()
            await until(lambda: "cannot be reached" not in str(broker.unavailable()))
            await broker.admit(1, 1)
            server.signal(signal.SIGSTOP)
            held.rows += 1
            try:
                with pytest.raises(Unavailable, match="does not answer"):
                    await broker.admit(1, 1)
            finally:
                server.signal(signal.SIGCONT)

    run(test)


@pytest.mark.parametrize("empty", [False, True])
def test_chunks_that_were_taken_in_are_answered_when_it_is_back(
    server: Queue, setup: Setup, work: Any, empty: bool
) -> None:
    async def test() -> None:
        async with asking(server) as broker:
            early = asyncio.create_task(broker.submit(work("early")))
            await until(lambda: keys(server) == {"job:early", "in:early"})
            server.kill()
            await until(lambda: "cannot be reached" in str(broker.unavailable()))
            late = asyncio.create_task(broker.submit(work("late")))
            with pytest.raises(TimeoutError):
                await broker.submit(work("too late", deadline=time.time() + 0.2))
            if empty:
                for file in server.folder.glob("appendonlydir/*"):
                    file.unlink()
            server.start()
            async with rig(setup, server.url):
                for answer in await asyncio.gather(early, late):
                    assert answer.status.tolist() == [Status.OK] * 3
            assert keys(server) == set()

    run(test)


def test_chunks_that_are_cancelled_while_it_is_away_leave_when_it_is_back(server: Queue, work: Any) -> None:
    async def test() -> None:
        async with asking(server) as broker:
            task = asyncio.create_task(broker.submit(work("left")))
            await until(lambda: keys(server) == {"job:left", "in:left"})
            server.signal(signal.SIGSTOP)
            try:
                await until(lambda: "does not answer" in str(broker.unavailable()))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            finally:
                server.signal(signal.SIGCONT)
            await until(lambda: keys(server) == set())

    run(test)


def test_orders_are_told_when_it_is_back_and_again_when_it_has_lost_them(server: Queue) -> None:
    def orders() -> dict[str, str]:
        with server.client() as client:
            found = client.hgetall(f"{PREFIX}orders")
        return {version.decode(): order.decode().partition(":")[0] for version, order in found.items()}

    async def test() -> None:
        async with asking(server) as broker:
            broker.load("moons", 1)
            await until(lambda: orders() == {"moons/1": "load"})
            server.kill()
            await until(lambda: "cannot be reached" in str(broker.unavailable()))
            broker.unload("moons", 1)
            broker.load("moons", 2)
            server.start()
            await until(lambda: orders() == {"moons/1": "unload", "moons/2": "load"})
            with server.client() as client:
                client.flushall()
            await until(lambda: orders() == {"moons/1": "unload", "moons/2": "load"})

    run(test)


def test_a_replica_is_not_taken_for_the_queue(server: Queue, tmp_path: Path) -> None:
    async def test() -> None:
        with queue(tmp_path, "valkey", "--replicaof", "127.0.0.1", str(server.port)) as replica:
            broker = RedisBroker(replica.url, Held())
            await broker.start()
            await until(lambda: "it is a replica" in str(broker.unavailable()))
            with replica.client() as client:
                client.replicaof("NO", "ONE")
            await until(lambda: "cannot be reached" not in str(broker.unavailable()))
            with replica.client() as client:
                client.replicaof("127.0.0.1", server.port)
            await until(lambda: "it is a replica" in str(broker.unavailable()))
            await broker.close()

    run(test)


def test_connections_that_are_cut_are_made_again_unnoticed(
    server: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_ANSWER_S", 60.0)  # not because the machine is busy

    async def test() -> None:
        async with asking(server) as broker:
            with server.client() as client:
                for _ in range(20):
                    client.client_kill_filter(_type="normal")
                    await broker.admit(1, 1)
            assert broker._link.times_found == 1

    run(test)


# ---------------------------------------------------------------------------------------- who is there


def test_results_for_a_process_that_has_gone_are_dropped(server: Queue, setup: Setup, work: Any) -> None:
    async def test() -> None:
        async with rig(setup, server.url, stall_s=600) as made, asking(server) as gone:
            await ready(made.broker)
            with paused(made):
                task = asyncio.create_task(gone.submit(work("orphan")))
                await until(lambda: made.puller is not None and made.puller.holds == 1)
                for each in gone._tasks:  # as if it were killed
                    each.cancel()
                with server.client() as client:
                    client.delete(f"{PREFIX}api:{gone.id}")
            with server.client() as client:
                await until(lambda: keys(server) == set())
                assert not client.exists(f"{PREFIX}reply:{gone.id}")
            assert (await made.broker.submit(work("next"))).status.tolist() == [Status.OK] * 3
            task.cancel()

    run(test)


def test_what_cannot_be_read_is_given_up_and_the_rest_goes_on(server: Queue, setup: Setup, work: Any) -> None:
    async def test() -> None:
        async with rig(setup, server.url, lease_s=1.0, stall_s=600) as made:
            await ready(made.broker)
            with paused(made), server.client() as client:  # another release's words: an answer, and a chunk
                first = asyncio.create_task(made.broker.submit(work("answer")))
                await until(lambda: made.puller.holds == 1)
                client.xadd(f"{PREFIX}reply:{made.broker.id}", {"id": "answer", "body": b"\x01"})
                with pytest.raises(PushforwardError, match="answer cannot be read"):
                    await first
            submit = made.broker._link.call
            keep = "interactive:any", "interactive", 1, made.broker.id, "", 60_000
            await submit("submit", "odd", *keep, b"\x01")
            for number in range(3):
                assert (await made.broker.submit(work(f"{number}"))).status.tolist() == [Status.OK] * 3
            with server.client() as client:
                await until(lambda: client.xlen(f"{PREFIX}dead") == 1)
                ((_, dead),) = client.xrange(f"{PREFIX}dead")
            assert (dead[b"id"], dead[b"body"]) == (b"odd", b"\x01")
            assert (await made.broker.submit(work("next"))).status.tolist() == [Status.OK] * 3

    run(test)


def test_a_worker_that_could_not_solve_them_leaves_chunks_in_the_queue(
    server: Queue, setup: Setup, work: Any
) -> None:
    async def test() -> None:
        local = LocalBroker([setup], collector=EngineCollector())  # never started: it has no process
        puller = Puller(server.url, local, 64, LEASE_S, EngineCollector())
        await puller.start()
        async with asking(server) as broker:
            await until(lambda: broker.unavailable() == "The workers are starting.")
            task = asyncio.create_task(broker.submit(work("a")))
            await until(lambda: keys(server) != set())
            await asyncio.sleep(0.5)
            assert puller.holds == 0
            async with rig(setup, server.url):
                assert (await task).status.tolist() == [Status.OK] * 3
        await puller.drain(0)

    run(test)


def test_a_worker_that_is_full_sees_at_once_when_there_is_room_again(
    server: Queue, setup: Setup, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it has room for bulk chunks all the time, and waits for some beyond the end of this test."""
    monkeypatch.setattr(back, "_WAIT_S", 3600.0)

    async def test() -> None:
        local = LocalBroker([setup], collector=EngineCollector())
        await local.start()
        puller = Puller(server.url, local, 3, 3600.0, EngineCollector())  # a chunk of each class
        await puller.start()
        try:
            async with asking(server) as broker:
                await ready(broker)
                chunks = [work(f"{number}") for number in range(8)]
                for answer in await asyncio.gather(*map(broker.submit, chunks)):
                    assert answer.status.tolist() == [Status.OK] * 3
        finally:
            await puller.drain(0)
            await local.close()

    run(test)


def test_chunks_go_to_workers_that_have_their_version_and_to_any_when_none_has(
    server: Queue, setup: Setup, own_store: Path, work: Any
) -> None:
    async def test() -> None:
        second = own_store / "moons" / "2"
        (own_store / "moons" / "1").rename(second)
        manifest = json.loads((second / "manifest.json").read_text()) | {"version": 2}
        (second / "manifest.json").write_text(json.dumps(manifest))
        two = msgspec.structs.replace(setup, store=str(own_store), versions="moons/2")
        async with asking(server) as broker:
            async with rig(setup, server.url) as one, rig(two, server.url) as other:
                await until(lambda: broker._read == {"moons/1", "moons/2"})
                assert one.puller is not None
                for number in range(20):  # the other worker has no such version, and would fail
                    answer = await broker.submit(work(f"{number}", version=1 + number % 2))
                    assert answer.status.tolist() == [Status.OK] * 3
                assert {"moons/1"} == set(one.puller._reads)
                assert other.puller is not None
                assert {"moons/2"} == set(other.puller._reads)
            await until(lambda: not broker.workers)
            task = asyncio.create_task(broker.submit(work("a", version=1)))
            await until(lambda: stream_of(server, "a") in ("interactive:moons/1", "interactive:any"))
            await until(lambda: stream_of(server, "a") == "interactive:any")  # nobody reads the other
            async with rig(setup, server.url):
                assert (await task).status.tolist() == [Status.OK] * 3

    run(test)


@pytest.mark.parametrize("skew_s", [-3600, 3600])
def test_a_deadline_is_what_is_left_of_it_whatever_the_clock_says(
    server: Queue, setup: Setup, work: Any, monkeypatch: pytest.MonkeyPatch, skew_s: int
) -> None:
    """The API process's clock is an hour off those of the queue and of the worker."""
    clock = SimpleNamespace(time=lambda: time.time() + skew_s, monotonic=time.monotonic)
    monkeypatch.setattr(front, "time", clock)

    async def test() -> None:
        async with rig(setup, server.url) as made:
            await ready(made.broker)
            answer = await made.broker.submit(work("a", deadline=clock.time() + 60))
            assert answer.status.tolist() == [Status.OK] * 3
            endless = work("b", **ENDLESS, deadline=clock.time() + 0.5)
            with contextlib.suppress(TimeoutError):
                assert Status.DEADLINE in (await made.broker.submit(endless)).status.tolist()

    run(test)
