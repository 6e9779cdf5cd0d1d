"""A server from its start to its end, workers included."""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tests.api.conftest import ENDLESS, SAMPLE, SLOW, rows_running
from tests.server import until

from pushforward.store.catalog import Catalog


def in_background(server: Any, body: dict[str, Any]) -> tuple[threading.Thread, list[httpx.Response]]:
    """Sends a request and comes back when the worker is busy with it."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        # A server that is killed answers nothing; the test that kills it knows.
        with server.client() as client, contextlib.suppress(httpx.TransportError):
            answers.append(client.post(SAMPLE, json=body, timeout=None))

    thread = threading.Thread(target=ask)
    thread.start()
    assert until(lambda: rows_running(server) > 0)
    return thread, answers


def test_readiness_waits_for_the_models_and_liveness_does_not(start: Any) -> None:
    server = start(ready=False)
    with server.client() as client:
        assert client.get("/health/live").json() == {"status": "live"}
        early = client.get("/health/ready")
        if early.status_code == 503:
            assert early.headers["retry-after"] == "1"
            assert early.json()["detail"] == "The workers are starting."
        ready = server.wait_for("worker ready")
        assert (ready["models"], ready["failed"]) == (4, 0)  # the newest of each, and the labelled
        assert client.get("/health/ready").json() == {"status": "ready"}
    assert server.stop() == 0


def test_models_may_be_loaded_when_first_asked_for(start: Any) -> None:
    server = start("--load", "first-use", ready=False)
    assert server.wait_for("worker ready")["models"] == 0
    with server.client() as client:
        assert client.post("/v1/models/pair/log_density", json={"x": [[0, 0]]}).status_code == 200
    assert server.wait_for("model loaded")["model"] == "pair"
    server.stop()


def test_a_request_taken_before_the_signal_is_answered_and_the_exit_is_clean(
    start: Any, gone: Callable[[int], bool]
) -> None:
    server = start()
    worker = server.worker()
    thread, answers = in_background(server, SLOW)
    assert server.stop(signal.SIGTERM) == 0
    thread.join()
    assert answers[0].status_code == 200
    assert len(answers[0].json()["x"]) == SLOW["n"]
    assert gone(worker)


def test_interrupting_the_whole_process_group_is_as_clean(start: Any, gone: Callable[[int], bool]) -> None:
    server = start()
    worker = server.worker()
    thread, answers = in_background(server, SLOW)
    os.kill(worker, signal.SIGINT)  # as Ctrl-C on a terminal sends it to both
    os.kill(worker, signal.SIGTERM)
    assert server.stop(signal.SIGINT) == 0
    thread.join()
    assert answers[0].status_code == 200
    assert gone(worker)


def test_a_worker_that_is_killed_is_replaced_and_costs_only_time(start: Any, server: Any) -> None:
    broken = start()
    with server.client() as client:
        expected = client.post(SAMPLE, json=SLOW, timeout=None).content
    thread, answers = in_background(broken, SLOW)
    old = broken.worker()
    os.kill(old, signal.SIGKILL)
    thread.join()
    assert answers[0].status_code == 200
    assert answers[0].content == expected
    assert broken.worker() != old
    died = broken.wait_for("worker lost")
    assert (died["exit"], died["worker"]) == (-9, old)
    broken.stop()


def test_a_request_that_takes_three_workers_down_is_given_up_and_the_server_goes_on(start: Any) -> None:
    server = start()
    thread, answers = in_background(server, ENDLESS)
    for _ in range(3):
        os.kill(server.worker(), signal.SIGKILL)
        server.wait_for("worker ready")
    thread.join()
    told = answers[0].json()
    assert (answers[0].status_code, told["code"]) == (500, "internal-error")
    assert "lost 3 times" in told["detail"]
    with server.client() as client:
        answer = client.post("/v1/models/pair/log_density", json={"x": [[0, 0]]})
        assert np.isfinite(answer.json()["log_density"]).all()
    server.stop()


def test_a_worker_does_not_outlive_a_server_that_is_killed(start: Any, gone: Callable[[int], bool]) -> None:
    server = start()
    worker = server.worker()
    thread, answers = in_background(server, ENDLESS)
    server.stop(signal.SIGKILL)
    assert gone(worker)
    thread.join()
    assert not answers


def test_a_request_leaves_one_line_in_the_log(start: Any) -> None:
    server = start()
    with server.client() as client:
        headers = {"x-request-id": "mine"}
        client.post("/v1/models/pair/versions/old/log_density", json={"x": [[0, 0]] * 3}, headers=headers)
        line = server.wait_for("request")
        client.post("/v1/models/pair/log_density", json={"x": [[0]]})
        refused = server.wait_for("request")
    assert {name: line[name] for name in ("request", "method", "status", "model", "version", "rows")} == {
        "request": "mine",
        "method": "POST",
        "status": 200,
        "model": "pair",
        "version": 1,
        "rows": 3,
    }
    assert line["steps"] > 0
    assert line["nfe"] > line["steps"]
    assert line["wall_ms"] > 0
    assert refused["status"] == 422
    assert "a row must have 2" in refused["error"]
    server.stop()


def test_a_new_version_and_a_moved_label_are_followed_when_they_are_ready(
    start: Any, store: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store / "pair" / "1", copy / "pair" / "1")
    server = start(at=copy)
    with server.client() as client:

        def version() -> int:
            return int(client.post("/v1/models/pair/log_density", json={"x": [[0, 0]]}).json()["version"])

        assert version() == 1
        shutil.copytree(store / "pair" / "2", copy / "pair" / ".2")
        (copy / "pair" / ".2").rename(copy / "pair" / "2")
        assert until(lambda: version() == 2)
        for number in (1, 2, 1, 2, 1):
            Catalog(copy).set_label("pair", "stable", number)
            assert until(lambda number=number: version() == number)  # type: ignore[misc]
    server.stop()
