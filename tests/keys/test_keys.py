"""Keys, where they are kept, and what they may ask for."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.redis_server import PROGRAMS, queue

from pushforward.errors import (
    Forbidden,
    LimitExceeded,
    PushforwardError,
    QuotaExceeded,
    Unauthorized,
    Unavailable,
    UsageError,
)
from pushforward.keys import Key, Keyring, Keys, check_keys, new_key, open_keys
from pushforward.keys.quota import LocalQuotas
from pushforward.keys.redis import RedisKeys


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def ring_of(path: Path, clock: Callable[[], float] = time.monotonic) -> Keyring:
    return Keyring(open_keys(str(path)), clock)


def run(test: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(test, 60))  # type: ignore[arg-type]


def kept(path: Path, *keys: Key) -> Path:
    async def add() -> None:
        for key in keys:
            await open_keys(str(path)).add(key)

    run(add())
    return path


def near_misses(token: str) -> list[bytes | None]:
    """What is not the key, but close to it."""
    digit = {"0": "1"}.get(token[-1], "0")
    prefix, number, secret = token.split("_")
    return [
        None,
        b"",
        b"pf_",
        number.encode(),
        secret.encode(),
        token[:-1].encode(),
        token[:-1].encode() + digit.encode(),
        token.encode() + b"0",
        token.upper().encode(),
        f"{prefix}_{number}_".encode(),
        f"{prefix}_{number}_{'0' * 48}".encode(),
        f"{prefix}_{'0' * 12}_{secret}".encode(),
        f"{prefix}_{number}_{secret}\0".encode(),
        f"{prefix}_{number}_{secret}\n".encode(),
        token.replace("_", "-").encode(),
        token.encode("utf-16"),
        b"\xff" * 64,
        b"pf_" + b"9" * 1_000_000,
    ]


def test_a_key_opens_what_its_scopes_say_and_nothing_else_does(tmp_path: Path) -> None:
    key, token = new_key("billing", ["infer", "metrics"])
    over, old = new_key("old", ["infer"], expires=datetime.now(UTC) - timedelta(seconds=1))
    ring = ring_of(kept(tmp_path / "keys.json", key, over))

    async def test() -> None:
        with pytest.raises(Unavailable):  # nobody is let in before the keys are known
            ring.identify(token.encode(), "infer")
        await ring.start()
        assert ring.identify(token.encode(), "infer") == key
        assert ring.identify(token.encode(), "metrics") == key
        with pytest.raises(Forbidden, match="has not the scope 'admin': it has infer, metrics"):
            ring.identify(token.encode(), "admin")
        with pytest.raises(Unauthorized, match="expired at"):
            ring.identify(old.encode(), "infer")
        for wrong in near_misses(token):
            with pytest.raises(Unauthorized) as refused:
                ring.identify(wrong, "infer")
            assert token.rpartition("_")[2] not in refused.value.message
        await ring.close()

    run(test())


def test_a_file_holds_no_secret_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    key, token = new_key("a", ["infer"])
    path = kept(tmp_path / "keys.json", key)
    secret = token.rpartition("_")[2]
    assert len(bytes.fromhex(secret)) * 8 >= 160
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["keys.json"]  # no temporary file is left
    assert len({new_key("a", ["infer"])[1] for _ in range(1000)}) == 1000


def test_keys_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path, keys = tmp_path / "keys.json", [new_key(str(number), ["infer"])[0] for number in range(20)]

    async def add_all() -> None:
        await asyncio.gather(*(asyncio.to_thread(kept, path, key) for key in keys))

    run(add_all())
    assert {key["id"] for key in json.loads(path.read_text())["keys"]} == {key.id for key in keys}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"There are no keys at .*keys\.json: make the first with `pushforward keys create`"),
        ("", "is not a file of keys"),
        ("{}", "is not a file of keys"),
        ('{"keys": [{"id": "x"}]}', "is not a file of keys"),
        ('{"keys": [], "more": 1}', "is not a file of keys"),
        ("\udcff", "is not a file of keys"),
    ],
)
def test_a_file_that_is_none_stops_the_start(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "keys.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=says):
        check_keys(str(path))


def test_a_file_that_anyone_can_write_stops_the_start(tmp_path: Path) -> None:
    path = kept(tmp_path / "keys.json", new_key("a", ["infer"])[0])
    path.chmod(0o666)
    with pytest.raises(UsageError, match=r"Anyone can write to .*chmod it to 0600"):
        check_keys(str(path))


@pytest.mark.parametrize("harm", ["gone", "cut", "garbage"])
def test_keys_that_cannot_be_read_are_believed_for_five_minutes(tmp_path: Path, harm: str) -> None:
    key, token = new_key("a", ["infer"])
    path, clock = kept(tmp_path / "keys.json", key), Clock()
    whole, ring = path.read_bytes(), ring_of(path, clock)

    async def test() -> None:
        await ring.start()
        if harm == "gone":
            path.unlink()
        else:
            path.write_bytes(whole[:-20] if harm == "cut" else b"\0" * 100)
        for _ in range(3):
            await ring._look()
        clock.now += 299
        assert ring.identify(token.encode(), "infer") == key
        with pytest.raises(Unauthorized):  # and the door is not open
            ring.identify(token.encode()[:-1] + b"x", "infer")
        clock.now += 2
        assert ring.unavailable() == "The API keys cannot be read now."
        with pytest.raises(Unavailable):
            ring.identify(token.encode(), "infer")
        path.write_bytes(whole)
        await ring._look()
        assert ring.identify(token.encode(), "infer") == key
        await ring.close()

    run(test())


def test_rows_per_second_are_saved_up_to_the_burst() -> None:
    clock = Clock()
    quotas, key = LocalQuotas(clock), new_key("a", ["infer"], rows_per_second=10, burst_rows=50)[0]
    quotas.count(key, 50)
    with pytest.raises(QuotaExceeded) as refused:
        quotas.count(key, 5)
    assert refused.value.detail == {
        "reason": "rows_per_second",
        "asked": 5,
        "allowed": 0,
        "limit": 10,
        "retry_after": 1,
    }
    clock.now += 3
    with pytest.raises(QuotaExceeded) as refused:
        quotas.count(key, 50)
    assert (refused.value.detail["allowed"], refused.value.detail["retry_after"]) == (30, 2)
    quotas.count(key, 30)
    clock.now += 1000
    quotas.count(key, 50)
    with pytest.raises(
        LimitExceeded, match=r"needs 51 rows, and its key may ask for 50 at once \(burst_rows\)"
    ):
        quotas.count(key, 51)


def test_rows_in_flight_are_given_back() -> None:
    quotas, key = LocalQuotas(), new_key("a", ["infer"], rows_in_flight=10)[0]
    quotas.count(key, 6)
    with pytest.raises(QuotaExceeded) as refused:
        quotas.count(key, 5)
    assert (refused.value.detail["reason"], refused.value.detail["allowed"]) == ("rows_in_flight", 4)
    quotas.count(key, 4)
    quotas.give_back(key, 6, "")
    quotas.count(key, 6)
    for rows in (4, 6):
        quotas.give_back(key, rows, "")
    assert quotas._in_flight == {}
    with pytest.raises(LimitExceeded, match="rows_in_flight"):
        quotas.count(key, 11)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_redis_keeps_keys_and_counts_for_all_servers(tmp_path: Path, kind: str) -> None:
    key, token = new_key("a", ["infer"], rows_per_second=0.001, burst_rows=1000, rows_in_flight=100)

    async def test(url: str) -> None:
        here, there, operator = (RedisKeys(url) for _ in range(3))
        rings = [Keyring(here), Keyring(there)]
        for ring in rings:
            await ring.start()
        await operator.add(key)
        for ring in rings:
            await ring._look()
            assert ring.identify(token.encode(), "infer") == key
        # a hundred calls of both servers at once: as many rows get in as may be in flight
        taken = await asyncio.gather(
            *(
                place.quotas.take(key, 4, f"{id(place)}-{n}", 60)
                for n in range(50)
                for place in (here, there)
            ),
            return_exceptions=True,
        )
        refused = [error for error in taken if error is not None]
        assert len(refused) == 75
        assert {error.detail["reason"] for error in refused} == {"rows_in_flight"}  # type: ignore[union-attr]
        for number in range(50):
            for place in (here, there):
                place.quotas.give_back(key, 4, f"{id(place)}-{number}")
        await asyncio.gather(*here.quotas._returns, *there.quotas._returns)
        # those of a server that died are in flight until their deadline
        await here.quotas.take(key, 100, "lost", 2)
        with pytest.raises(QuotaExceeded):
            await there.quotas.take(key, 1, "b", 60)
        while True:
            with contextlib.suppress(QuotaExceeded):
                await there.quotas.take(key, 100, "c", 60)
                break
            await asyncio.sleep(0.1)
        there.quotas.give_back(key, 100, "c")
        await asyncio.gather(*there.quotas._returns)
        # 100 + 100 + 100 of 1000 tokens are gone, and hardly any has come since
        for number in range(7):
            await here.quotas.take(key, 100, str(number), 0.001)
            await asyncio.sleep(0.01)
        with pytest.raises(QuotaExceeded) as over:
            await there.quotas.take(key, 1, "d", 60)
        assert over.value.detail["reason"] == "rows_per_second"
        with pytest.raises(LimitExceeded):
            await there.quotas.take(key, 101, "e", 60)
        assert await operator.remove(key.id) == key
        assert await operator.remove(key.id) is None
        for ring in rings:
            await ring._look()
            with pytest.raises(Unauthorized):
                ring.identify(token.encode(), "infer")
            await ring.close()
        await operator.close()

    with queue(tmp_path, kind) as server:
        run(test(server.url))


def test_while_redis_is_away_known_keys_count_and_quotas_are_counted_here(tmp_path: Path) -> None:
    key, token = new_key("a", ["infer"], rows_in_flight=10)

    async def test(server: Any) -> None:
        ring, keys = Keyring(RedisKeys(server.url)), RedisKeys(server.url)
        await keys.add(key)
        await ring.start()
        server.kill()
        await ring._look()
        assert ring.identify(token.encode(), "infer") == key
        async with ring.counted(key, 8, 60):
            with pytest.raises(QuotaExceeded):
                async with ring.counted(key, 3, 60):
                    pass
        async with ring.counted(key, 10, 60):
            pass
        with pytest.raises(Unavailable, match="cannot be reached"):
            await keys.add(key)
        fresh = Keyring(RedisKeys(server.url))  # a server that starts now lets nobody in
        await fresh.start()
        with pytest.raises(Unavailable):
            fresh.identify(token.encode(), "infer")
        for one in (ring, fresh):
            await one.close()
        await keys.close()

    with queue(tmp_path) as server:
        run(test(server))


def test_what_is_no_key_in_redis_is_not_believed(tmp_path: Path) -> None:
    async def test(server: Any) -> None:
        keys: Keys = RedisKeys(server.url)
        with server.client() as client:
            client.hset("{pushforward}:keys", "x", b'{"id": "x"}')
        with pytest.raises(UsageError, match="are not keys"):
            await keys.read()
        await keys.close()

    with queue(tmp_path) as server:
        run(test(server))


def test_only_the_owner_can_write_where_the_folder_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "missing"
    with pytest.raises(PushforwardError, match="cannot be written: No such file"):
        kept(folder / "keys.json", new_key("a", ["infer"])[0])
    assert not os.path.exists(folder)
