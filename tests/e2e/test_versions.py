"""Versions come, go and change places under traffic: every answer is right for the version that it names."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.e2e.bank import Bank, version_of
from tests.e2e.traffic import Report, Traffic
from tests.server import Server, until
from tests.shared import side_by_side


def publish(version: Path, store: Path) -> None:
    """As publishing does it: all at once."""
    hidden = store / "moons" / f".{version.name}"
    shutil.copytree(version, hidden)
    hidden.rename(store / "moons" / version.name)


def label(store: Path, name: str, number: int) -> None:
    arguments = ("models", "label", "moons", name, str(number), "--store", str(store))
    side_by_side("from pushforward.cli import main; main()", [arguments])


def wait_for_version(traffic: Traffic, number: int) -> None:
    """Wait until a version of "moons" answers, and then see that no other does."""
    traffic.wait_until(lambda report: report.requests[-1].begun > 0 and _last(report) == number)
    moment = time.monotonic()
    traffic.wait_until(lambda report: report.after(moment).versions["moons", number] >= 10)
    others = {version for model, version in traffic.report().after(moment).versions if model == "moons"}
    assert others == {number}


def _last(report: Report) -> int | None:
    """The version of "moons" that has answered the request begun last."""
    versions = [r.version for r in report.requests if r.version is not None and r.template.model == "moons"]
    return versions[-1] if versions else None


def test_new_versions_take_over_without_anybody_noticing(
    start: Callable[..., Server], store: Path, bank: Bank, tmp_path: Path, rounds: int
) -> None:
    with Traffic(start(watch_s=0.1).url, bank) as traffic:
        for number in range(2, 2 + rounds):
            version = version_of("moons", number, ("pinwheel", "checkerboard")[number % 2], tmp_path)
            bank.learn(version)
            with traffic.mark("a new version"):
                publish(version, store)
                wait_for_version(traffic, number)
    print(traffic.report())
    traffic.report().assert_clean()


def test_labels_move_without_anybody_noticing(
    start: Callable[..., Server], store: Path, bank: Bank, later: dict[int, Path], rounds: int
) -> None:
    publish(later[2], store)
    with Traffic(start(watch_s=0.1).url, bank) as traffic:
        for _ in range(rounds):
            for number in (1, 2):
                with traffic.mark("a label moves"):
                    label(store, "stable", number)
                    wait_for_version(traffic, number)
    print(traffic.report())
    traffic.report().assert_clean()


def test_a_canary_takes_its_share_and_can_be_sent_home(
    start: Callable[..., Server], store: Path, bank: Bank, later: dict[int, Path], rounds: int
) -> None:
    label(store, "stable", 1)
    with Traffic(start(watch_s=0.1, canary_share=0.5).url, bank) as traffic:
        publish(later[2], store)
        for _ in range(rounds):
            moment = time.monotonic()
            with traffic.mark("a canary"):
                label(store, "canary", 2)
                for number in (2, 1):
                    traffic.wait_until(
                        lambda report, number=number, since=moment: (
                            report.after(since).versions["moons", number] >= 10
                        )
                    )
            with traffic.mark("it is sent home"):
                label(store, "canary", 1)
                wait_for_version(traffic, 1)
    print(traffic.report())
    traffic.report().assert_clean()


def change_program(version: Path) -> None:
    program = version / "programs" / "step_density_float32.onnx"
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content)


def lose_program(version: Path) -> None:
    (version / "programs" / "decode.onnx").unlink()


def cut_manifest(version: Path) -> None:
    manifest = version / "manifest.json"
    manifest.write_text(manifest.read_text()[:200])


@pytest.mark.parametrize("spoil", [change_program, lose_program, cut_manifest])
def test_a_version_that_is_broken_is_never_served_and_the_old_one_stays(
    spoil: Callable[[Path], None],
    start: Callable[..., Server],
    store: Path,
    bank: Bank,
    tmp_path: Path,
    rounds: int,
) -> None:
    server = start(watch_s=0.1)
    with Traffic(server.url, bank) as traffic, server.client() as client:
        for number in range(2, 2 + rounds):
            broken = version_of("moons", number, "pinwheel", tmp_path)
            spoil(broken)
            with traffic.mark("a broken version"):
                publish(broken, store)
                refused = client.post(f"/v1/models/moons/versions/{number}/sample", json={"n": 1})
                assert refused.status_code == 503
                assert refused.json()["code"] == "invalid-model"
                wait_for_version(traffic, 1)
            assert client.get("/health/ready").status_code == 200
        sound = version_of("moons", 2 + rounds, "pinwheel", tmp_path)
        bank.learn(sound)
        publish(sound, store)
        wait_for_version(traffic, 2 + rounds)
    print(traffic.report())
    traffic.report().assert_clean()


def test_rows_of_a_version_that_is_unloaded_are_finished_first(start: Callable[..., Server]) -> None:
    server = start(stall_s=600)
    with server.client() as client, ThreadPoolExecutor(1) as thread:

        def status() -> int:
            return client.post("/v1/models/moons/sample", json={}).status_code

        os.kill(server.worker(), signal.SIGSTOP)  # until it has been sent the rows, and then the order
        answer = thread.submit(client.post, "/v1/models/moons/sample", json={"n": 250})
        assert until(lambda: server.metrics()["pushforward_queue_rows",] == 250)
        assert client.post("/v1/models/moons/versions/1/unload").status_code == 202
        assert until(lambda: status() == 503)
        os.kill(server.worker(), signal.SIGCONT)
        assert answer.result().json()["status"] == ["ok"] * 250
        assert client.post("/v1/models/moons/versions/1/load").status_code == 202
        assert until(lambda: status() == 200)


def test_a_version_may_go_and_come_back_under_traffic(
    start: Callable[..., Server], bank: Bank, rounds: int
) -> None:
    server = start()
    with Traffic(server.url, bank) as traffic, server.client() as client:
        for _ in range(rounds):
            refused = traffic.report().outcomes["503"]
            with traffic.mark("unloaded and loaded again"):
                assert client.post("/v1/models/moons/versions/1/unload").status_code == 202
                traffic.wait_until(lambda report, refused=refused: report.outcomes["503"] > refused)
                assert client.post("/v1/models/moons/versions/1/load").status_code == 202
                assert until(lambda: client.post("/v1/models/moons/sample", json={}).status_code == 200)
            traffic.settle()
            moment = time.monotonic()
            traffic.wait_until(lambda report, since=moment: report.after(since).versions["moons", 1] >= 10)
            traffic.report().after(moment).assert_clean("under way")
    report = traffic.report()
    print(report)
    report.assert_clean(
        "503", "404"
    )  # the latter from a worker that hears of it before the request reaches it
    assert {r.template.model for r in report.requests if r.outcome in ("503", "404")} == {"moons"}
