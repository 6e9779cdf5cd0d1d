"""A server of a store in S3: versions and labels are noticed, and an outage is not felt."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.e2e.bank import Bank, copy_models
from tests.e2e.traffic import Traffic
from tests.redis_server import queue
from tests.s3 import S3, s3
from tests.server import Server, servers, until

from pushforward.publish.place import place_at
from pushforward.store.opening import opened

URL = "s3://bucket/models"


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    copy_models(tmp_path / "store")
    with s3() as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PUSHFORWARD_CACHE", str(tmp_path / "cache"))
        server.remove_buckets()
        server.create_bucket("bucket")
        server.upload(tmp_path / "store", "bucket", "models")
        yield server


@pytest.fixture
def start(cloud: S3) -> Iterator[Callable[..., Server]]:
    with servers(lambda: URL) as start:
        yield start


def wait_for_version(traffic: Traffic, number: int) -> None:
    traffic.wait_until(lambda report: report.versions["moons", number] > 0)
    moment = time.monotonic()
    traffic.wait_until(lambda report: report.after(moment).versions["moons", number] >= 10)


def label(name: str, version: int, tmp_path: Path) -> None:
    opened(URL, tmp_path / "other", 100).set_label("moons", name, version)


def test_versions_labels_and_an_outage(
    cloud: S3, start: Callable[..., Server], bank: Bank, later: dict[int, Path], tmp_path: Path
) -> None:
    server = start(watch_s=0.2)
    with Traffic(server.url, bank) as traffic:
        traffic.wait_for_answers(20)
        place_at(URL).put(later[2])
        wait_for_version(traffic, 2)
        label("stable", 1, tmp_path)
        wait_for_version(traffic, 1)

        cloud.stop()
        assert "Could not connect" in server.wait_for("store cannot be read")["reason"]
        traffic.wait_for_answers(50)
        os.kill(server.worker(), signal.SIGKILL)  # another takes its place, from the cache
        server.wait_for("worker ready")
        traffic.wait_for_answers(50)
        with server.client() as client:
            assert client.get("/health/ready").status_code == 200
        cloud.start()
        server.wait_for("store can be read again")
        place_at(URL).put(later[3])
        label("stable", 3, tmp_path)
        wait_for_version(traffic, 3)
    traffic.report().assert_clean()
    assert [line["event"] for line in server.log].count("store cannot be read") == 1


def test_workers_behind_a_queue_have_the_store_and_a_cache_of_their_own(
    cloud: S3, start: Callable[..., Server], bank: Bank, later: dict[int, Path], tmp_path: Path
) -> None:
    (tmp_path / "queue").mkdir()
    with queue(tmp_path / "queue", "valkey") as broker:
        places = {"broker": broker.url, "watch_s": 0.2}

        def work() -> Server:
            return start("--lease-s", "2", command="worker", cache=tmp_path / "worker", **places)

        worker, server = work(), start(ready=False, **places)
        with server.client() as client:
            assert until(lambda: client.get("/health/ready").status_code == 200)
        with Traffic(server.url, bank, rate=10) as traffic:
            place_at(URL).put(later[2])
            wait_for_version(traffic, 2)
            cloud.stop()
            server.wait_for("store cannot be read")
            worker.process.kill()
            work()  # from its cache alone
            traffic.wait_for_answers(50)
            cloud.start()
            place_at(URL).put(later[3])
            wait_for_version(traffic, 3)
        traffic.report().assert_clean()


def test_a_version_that_cannot_be_fetched_is_a_failed_one_and_comes_by_itself(
    cloud: S3, start: Callable[..., Server], later: dict[int, Path], tmp_path: Path
) -> None:
    program = "programs/decode.onnx"
    server = start(watch_s=0.2)
    with server.client() as client:

        def states() -> dict[int, tuple[str, str]]:
            (moons,) = (each for each in client.get("/v1/models").json()["models"] if each["name"] == "moons")
            return {each["version"]: (each["state"], each["reason"]) for each in moons["versions"]}

        half = tmp_path / "half"
        shutil.copytree(later[2], half, ignore=shutil.ignore_patterns("decode.onnx"))
        cloud.upload(half, "bucket", "models/moons/2")
        assert until(lambda: f"moons/2/{program} is missing" in states().get(2, ("", ""))[1])
        assert states()[1] == ("ready", "")
        refused = client.post("/v1/models/moons/versions/2/sample", json={})
        assert (refused.status_code, refused.json()["code"]) == (503, "invalid-model")
        cloud.upload(later[2], "bucket", "models/moons/2")
        assert until(lambda: states()[2] == ("ready", ""))

        # one that is known, but was never fetched, while the store is away
        assert client.post("/v1/models/moons/versions/2/unload").status_code == 202
        (folder,) = (tmp_path / "cache").glob("*/moons/2")
        (folder / program).write_bytes(b"damaged")
        cloud.stop()
        server.wait_for("store cannot be read")
        client.post("/v1/models/moons/versions/2/load")
        assert until(lambda: "cannot be listed" in states()[2][1])
        refused = client.post("/v1/models/moons/versions/2/sample", json={})
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert client.post("/v1/models/moons/anomaly", json={"x": [[0, 0]]}).json()["version"] == 1
        warm = start()  # from the cache; version 2 is what it would serve
        with warm.client() as other:
            answer = other.post("/v1/models/moons/anomaly", json={"x": [[0, 0]]})
            assert (answer.status_code, answer.json()["version"]) == (200, 1)
        cloud.start()
        assert until(lambda: states()[2] == ("ready", ""))
        answer = client.post("/v1/models/moons/anomaly", json={"x": [[0, 0]]})
        assert (answer.status_code, answer.json()["version"]) == (200, 2)
