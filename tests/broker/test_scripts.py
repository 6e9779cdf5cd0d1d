"""The queue's scripts against real servers, one call at a time: leases, fences, redelivery, limits."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from redis.exceptions import OutOfMemoryError
from tests.redis_server import PROGRAMS, queue

from pushforward.broker.base import ATTEMPTS
from pushforward.broker.redis.link import PREFIX, scripts
from pushforward.broker.redis.words import Announcement, encode_announcement

LEASE_MS = 60_000
SAID = encode_announcement(Announcement("w", None, ["moons/1"], []))


class Scripts:
    def __init__(self, client: Any) -> None:
        self.client = client
        self._scripts = {name: client.register_script(text) for name, text in scripts().items()}

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._scripts[name](keys=[PREFIX], args=arguments)

    def submit_one(self, id: str, stream: str = "interactive:any", rows: int = 1, left_ms: Any = "") -> Any:
        return self.submit(id, stream, stream.partition(":")[0], rows, "api", left_ms, 600_000, f"<{id}>")

    def take_from(self, worker: str, *streams: str, room: int = 100, bulk: int = 100) -> list[Any]:
        return self.take(worker, room, bulk, 0, *(streams or ("again", "interactive:any", "bulk:any")))

    def replies(self) -> list[dict[bytes, bytes]]:
        return [told for _, told in self.client.xrange(f"{PREFIX}reply:api")]

    def keys(self) -> set[str]:
        """What is there of chunks."""
        found = {key.decode().removeprefix(PREFIX) for key in self.client.keys(f"{PREFIX}*")}
        return {key for key in found if key.startswith(("job:", "in:"))}


@pytest.fixture(scope="module", params=list(PROGRAMS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with queue(tmp_path_factory.mktemp("queue"), request.param) as server:
        yield server


@pytest.fixture
def q(server: Any) -> Iterator[Scripts]:
    with server.client() as client:
        client.flushall()
        client.config_set("maxmemory", 0)
        made = Scripts(client)
        made.reserve("api", 0, 0, 0, 0, 100, 1000, 0, 0, 60_000)
        yield made


def test_a_chunk_goes_from_its_queue_to_a_worker_and_its_answer_back(q: Scripts) -> None:
    assert q.submit_one("a") == 1
    assert q.take_from("w") == [[b"a", 1, b"", b"<a>"]]
    assert q.take_from("v") == []
    assert q.finish("w", "a", 1, "answer", "") == 1
    assert q.replies() == [{b"id": b"a", b"body": b"answer"}]
    assert q.keys() == set()
    assert q.client.xlen(f"{PREFIX}interactive:any") == 0
    assert q.client.xpending(f"{PREFIX}interactive:any", "workers")["pending"] == 0


def test_a_chunk_that_is_there_already_is_not_queued_twice(q: Scripts) -> None:
    assert [q.submit_one("a"), q.submit_one("a")] == [1, 0]
    assert len(q.take_from("w")) == 1
    assert q.submit_one("a") == 0
    assert q.take_from("v") == []


def test_chunks_come_in_the_order_of_streams_and_while_there_is_room(q: Scripts) -> None:
    for number in range(3):
        q.submit_one(f"b{number}", "bulk:any", rows=40)
        q.submit_one(f"i{number}", "interactive:any", rows=40)
    ids = [id for id, *_ in q.take_from("w", room=50, bulk=1)]
    assert ids == [b"i0", b"i1", b"b0"]
    assert [id for id, *_ in q.take_from("w", room=0, bulk=1000)] == [b"b1", b"b2"]
    assert [id for id, *_ in q.take_from("w", room=1, bulk=0)] == [b"i2"]


def test_what_was_read_already_is_leased_by_the_same_call(q: Scripts) -> None:
    q.submit_one("a")
    ((_, ((entry, told),)),) = q.client.xreadgroup("workers", "w", {f"{PREFIX}interactive:any": ">"}, count=1)
    q.submit_one("b")
    taken = q.take("w", 10, 10, 1, "interactive:any", entry, told[b"id"], "interactive:any")
    assert [id for id, *_ in taken] == [b"a", b"b"]


def test_deadlines_are_kept_by_the_clock_of_the_queue(q: Scripts) -> None:
    q.submit_one("soon", left_ms=1)
    q.submit_one("later", left_ms=50_000)
    time.sleep(0.02)
    ((id, _, left, _),) = q.take_from("w")
    assert id == b"later"
    assert 0 < float(left) <= 50_000
    assert q.keys() == {"job:later", "in:later"}


def test_a_lease_that_ran_out_goes_to_another_under_the_next_fence(q: Scripts) -> None:
    q.submit_one("a")
    q.take_from("w")
    assert q.reap("v", LEASE_MS, ATTEMPTS) == [0, 0, 0]
    q.client.delete(f"{PREFIX}reaper")
    assert q.reap("v", 0, ATTEMPTS) == [1, 0, 0]
    assert q.finish("w", "a", 1, "late", "") == 0  # before another has it …
    assert q.take_from("v") == [[b"a", 2, b"", b"<a>"]]
    assert q.finish("w", "a", 1, "late", "") == 0  # … and after
    assert q.beat("w", LEASE_MS, SAID, 1, "a", 1)[0] == [b"a"]
    assert q.finish("v", "a", 2, "answer", "") == 1
    assert q.finish("v", "a", 2, "answer", "") == 0  # twice
    assert [told[b"body"] for told in q.replies()] == [b"answer"]


def test_a_beat_renews_the_lease_and_tells_what_was_lost(q: Scripts) -> None:
    q.submit_one("a")
    q.submit_one("c")
    q.take_from("w")
    stream = f"{PREFIX}interactive:any"
    entries = [entry for entry, _ in q.client.xrange(stream)]
    # as if they had been taken so long ago
    q.client.xclaim(stream, "workers", "w", 0, entries, idle=LEASE_MS)
    assert q.beat("w", LEASE_MS, SAID, 1, "a", 1, "b", 1) == [[b"b"], [], 0]
    assert q.reap("v", LEASE_MS, ATTEMPTS) == [1, 0, 0]
    assert [id for id, *_ in q.take_from("v")] == [b"c"]  # of which nothing was said
    assert q.look() == [[SAID], []]


def test_the_last_attempt_is_made_alone_and_then_the_chunk_is_given_up(q: Scripts) -> None:
    q.submit_one("a")
    q.take_from("w")
    for attempt in range(2, ATTEMPTS + 1):
        q.client.delete(f"{PREFIX}reaper")
        last = attempt == ATTEMPTS
        assert q.reap("v", 0, ATTEMPTS) == [not last, last, 0]
        if last:
            assert q.take_from("w") == []  # not beside others
            assert q.beat("w", LEASE_MS, SAID, 1) == [[], [], 1]  # to become empty for it …
            assert q.beat("v", LEASE_MS, SAID, 1) == [[], [], 0]  # … which one is enough for
            assert [id for id, *_ in q.take_from("w", "alone")] == [b"a"]
            assert q.beat("w", LEASE_MS, SAID, 1, "a", attempt)[0] == []
        else:
            q.take_from("w")
    q.client.delete(f"{PREFIX}reaper")
    assert q.reap("v", 0, ATTEMPTS) == [0, 0, 1]
    assert q.replies() == [{b"id": b"a", b"spent": b"%d" % ATTEMPTS}]
    ((_, dead),) = q.client.xrange(f"{PREFIX}dead")
    assert (dead[b"id"], dead[b"worker"], dead[b"body"]) == (b"a", b"w", b"<a>")
    assert q.keys() == set()


def test_a_chunk_that_was_read_and_never_leased_is_not_lost(q: Scripts) -> None:
    q.submit_one("a")
    q.client.xreadgroup("workers", "w", {f"{PREFIX}interactive:any": ">"}, count=1)
    assert q.reap("v", 0, ATTEMPTS) == [1, 0, 0]
    assert [fence for _, fence, *_ in q.take_from("v")] == [1]


def test_what_a_worker_hands_back_does_not_count_as_an_attempt(q: Scripts) -> None:
    q.submit_one("a")
    for _ in range(ATTEMPTS + 2):
        assert [fence for _, fence, *_ in q.take_from("w")] == [1]
        q.release("w")
    assert q.finish("w", "a", 1, "late", "") == 0
    assert q.look() == [[], []]


@pytest.mark.parametrize("leased", [False, True])
def test_a_cancelled_chunk_leaves_nothing_behind(q: Scripts, leased: bool) -> None:
    q.submit_one("a")
    with q.client.pubsub() as channel:
        channel.subscribe(f"{PREFIX}cancelled:w")
        assert channel.get_message(timeout=60)["type"] == "subscribe"
        if leased:
            q.take_from("w")
        q.cancel("a", "unknown")
        message = channel.get_message(timeout=60 if leased else 0.05)
        assert (message["data"] if leased else message) == (b"a" if leased else None)
    assert q.keys() == set()
    assert q.take_from("w") == []
    assert q.finish("w", "a", 1, "answer", "") == 0
    assert q.replies() == []


def test_chunks_of_a_process_that_has_gone_are_not_solved(q: Scripts) -> None:
    q.submit_one("a")
    q.submit_one("b")
    q.take_from("w", room=1)
    q.client.delete(f"{PREFIX}api:api")
    assert q.take_from("w") == []
    assert q.finish("w", "a", 1, "answer", "") == 1  # which nobody hears
    assert q.replies() == []
    assert q.keys() == set()


def test_an_audit_tells_what_is_missing_and_frees_what_nobody_reads(q: Scripts) -> None:
    q.submit_one("read", "interactive:moons/1")
    q.submit_one("orphan", "bulk:moons/2")
    q.submit_one("any", "bulk:any")
    assert q.audit(1, "moons/1", "read", "lost", "orphan", "any") == [b"lost"]
    assert [id for id, *_ in q.take_from("w", "bulk:any")] == [b"any", b"orphan"]
    assert q.audit(0, "read", "orphan") == []
    assert [id for id, *_ in q.take_from("w", "interactive:any")] == [b"read"]


def test_workers_that_have_gone_are_forgotten(q: Scripts) -> None:
    q.submit_one("a")
    q.take_from("w")
    q.beat("w", 1, SAID, 1)
    time.sleep(0.01)
    q.reap("v", LEASE_MS, ATTEMPTS)
    assert q.client.smembers(f"{PREFIX}workers") == set()
    consumers = q.client.xinfo_consumers(f"{PREFIX}interactive:any", "workers")
    assert [each["name"] for each in consumers] == [b"w"]  # which holds a chunk
    for _ in range(20):  # one stream at a time
        q.client.delete(f"{PREFIX}reaper")
        q.reap("v", 0, ATTEMPTS)
    consumers = q.client.xinfo_consumers(f"{PREFIX}interactive:any", "workers")
    assert b"w" not in [each["name"] for each in consumers]  # the reaper itself may be one


def test_streams_that_nobody_reads_are_forgotten_when_they_are_empty(q: Scripts) -> None:
    q.beat("w", LEASE_MS, SAID, 1)
    q.make("bulk:any", "bulk:moons/1", "bulk:moons/2", "bulk:moons/3")
    q.submit_one("a", "bulk:moons/2")
    for _ in range(60):  # one at a time
        q.client.delete(f"{PREFIX}reaper")
        q.reap("v", LEASE_MS, ATTEMPTS)
    streams = q.client.smembers(f"{PREFIX}streams")
    assert streams == {b"bulk:any", b"bulk:moons/1", b"bulk:moons/2"}
    assert all(q.client.exists(PREFIX.encode() + stream) for stream in streams)
    assert not q.client.exists(f"{PREFIX}bulk:moons/3")
    q.submit_one("b", "bulk:moons/3")
    assert [id for id, *_ in q.take_from("w", "bulk:moons/2", "bulk:moons/3")] == [b"a", b"b"]


def test_a_stream_that_was_deleted_is_made_again(q: Scripts) -> None:
    q.submit_one("a")
    q.client.delete(f"{PREFIX}interactive:any")
    q.submit_one("b")
    assert [id for id, *_ in q.take_from("w")] == [b"b"]


def test_last_attempts_are_made_one_by_one(q: Scripts) -> None:
    for id in "ab":
        q.submit_one(id)
    q.take_from("w")
    for _ in range(2, ATTEMPTS + 1):
        q.client.delete(f"{PREFIX}reaper")
        q.reap("v", 0, ATTEMPTS)
        q.take_from("w")
    assert [id for id, *_ in q.take_from("w", "alone")] == [b"a"]
    ((_, ((entry, told),)),) = q.client.xreadgroup("workers", "w", {f"{PREFIX}alone": ">"}, count=1)
    q.submit_one("c")
    assert [id for id, *_ in q.take("w", 9, 9, 1, "alone", entry, told[b"id"], "alone")] == [b"b"]
    assert q.beat("v", LEASE_MS, SAID, 0)[2] == 0  # one that takes nothing
    assert q.beat("v", LEASE_MS, SAID, 1)[2] == 1


def test_a_worker_that_leaves_hands_back_all_but_what_it_keeps(q: Scripts) -> None:
    for id in "abc":
        q.submit_one(id)
    q.beat("w", LEASE_MS, SAID, 1)
    q.take_from("w", room=2)
    q.client.xreadgroup("workers", "w", {f"{PREFIX}interactive:any": ">"}, count=1)
    q.release("w", "a")
    assert [(id, fence) for id, fence, *_ in q.take_from("v")] == [(b"b", 1), (b"c", 1)]
    assert q.finish("w", "b", 1, "late", "") == 0
    assert q.finish("w", "a", 1, "answer", "") == 1
    assert q.look()[0] == [SAID]
    q.release("w")
    assert q.look()[0] == []


def test_answers_do_not_outlive_the_process_they_are_for(q: Scripts) -> None:
    q.submit_one("a")
    q.take_from("w")
    q.finish("w", "a", 1, "answer", "")
    assert q.client.pttl(f"{PREFIX}api:api") + 1000 > q.client.pttl(f"{PREFIX}reply:api") > 0


def test_orders_are_there_for_workers_that_come_later(q: Scripts) -> None:
    q.order("moons/1", "unload")
    unload = q.look()[1]
    q.order("moons/1", "load")
    version, load = q.beat("w", LEASE_MS, SAID, 1)[1]
    assert (version, load[:5]) == (b"moons/1", b"load:")
    assert q.look()[1] == [version, load] != unload


def test_limits_hold_for_all_processes_together_and_not_for_those_that_have_gone(q: Scripts) -> None:
    def reserve(api: str, held: int, asked: int, life_ms: int = 60_000) -> list[Any]:
        return q.reserve(api, held, 10 * held, asked, 10 * asked, 100, 10_000, 5.0, 50.0, life_ms)

    assert reserve("one", 0, 60)[:2] == [1, 60]
    assert reserve("two", 0, 50)[:2] == [0, 60]
    assert reserve("two", 0, 40) == [1, 100, 1000, b"10", b"100"]
    assert reserve("one", 60, 1)[:2] == [0, 100]
    assert reserve("one", 30, 30)[:2] == [1, 100]  # 30 have left since
    assert reserve("two", 40, 0, life_ms=1)[:2] == [1, 100]
    time.sleep(0.01)
    assert reserve("one", 60, 40)[:2] == [1, 100]


def test_bytes_are_bounded_like_rows(q: Scripts) -> None:
    assert q.reserve("one", 0, 0, 1, 1001, 100, 1000, 0, 0, LEASE_MS)[0] == 0
    assert q.reserve("one", 0, 0, 1, 1000, 100, 1000, 0, 0, LEASE_MS)[0] == 1


def test_a_queue_without_memory_takes_nothing_more_and_still_gives_answers(q: Scripts) -> None:
    q.submit_one("a")
    q.submit_one("b")
    q.client.config_set("maxmemory", 1)
    with pytest.raises(OutOfMemoryError):
        q.submit_one("c")
    assert len(q.take_from("w")) == 2
    assert q.beat("w", LEASE_MS, SAID, 1, "a", 1)[0] == []
    assert q.finish("w", "a", 1, "answer", "") == 1
    assert q.reserve("api", 1, 1, 1, 1, 100, 1000, 0, 0, LEASE_MS)[0] == 1
    q.cancel("b")
    assert [told[b"id"] for told in q.replies()] == [b"a"]
    assert q.keys() == set()
