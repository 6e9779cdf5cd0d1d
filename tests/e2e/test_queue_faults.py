"""API processes, workers and the queue between them are killed, stopped and replaced under traffic."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from tests.e2e.bank import Bank, copy_models
from tests.e2e.stack import Stack, owns, stack
from tests.e2e.traffic import BROKEN, Sent, Traffic
from tests.server import Server, until

from pushforward.broker.base import ATTEMPTS
from pushforward.broker.redis.link import PREFIX

MODELS = ("moons", "wine")
AWAY_S = 10.0


@pytest.fixture(scope="session")
def rounds(rounds: int) -> int:
    """Half as often as faults of one server: there are many more of them here."""
    return (rounds + 1) // 2


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    copy_models(folder / "store", MODELS)
    with stack(folder, folder / "store") as made:
        yield made


@contextmanager
def traffic(served: Stack, bank: Bank, rate: float = 8.0) -> Iterator[Traffic]:
    """Requests to all API processes, until nothing is left of them anywhere."""
    only = [template for template in bank.templates if template.model in MODELS]
    with Traffic(served.urls, bank, rate=rate, only=only, hang_up=0.05) as driver:
        yield driver
    print(f"\n{driver.report()}")
    served.at_rest()


def test_workers_that_die_or_stop_cost_only_time(served: Stack, bank: Bank, rounds: int) -> None:
    def ran_out() -> int:
        """How often leases ran out, as the workers say that are there now."""
        lines = (line for worker in served.workers for line in list(worker.log))
        return sum(line["event"] == "leases ran out" for line in lines)

    with traffic(served, bank) as driver:
        for _ in range(rounds):
            with driver.mark("a worker killed"):
                victim = served.busy()
                victim.process.kill()
                served.replace(victim)
            driver.settle()
            assert until(served.ready)
            with driver.mark("a worker stopped until another has its chunks"):
                before, victim = ran_out(), served.busy()
                os.kill(victim.process.pid, signal.SIGSTOP)
                assert until(lambda before=before: ran_out() > before), "nothing was handed out again"
                os.kill(victim.process.pid, signal.SIGCONT)
            driver.settle()
    driver.report().assert_clean()


def test_what_a_dead_api_process_held_is_freed_and_the_other_notices_nothing(
    served: Stack, bank: Bank, rounds: int
) -> None:
    known: list[Sent] = []  # requests that were broken before
    with traffic(served, bank) as driver:
        for number in range(rounds):
            victim, other = (served.apis[(number + turn) % 2] for turn in (0, 1))
            with driver.mark("an API process killed"):
                begun = time.monotonic()
                victim.process.kill()
                served.urls.remove(victim.url)
            driver.settle()
            assert until(lambda: len(served.redis.keys(f"{PREFIX}api:*")) == 1)
            served.replace(victim)
            assert until(served.ready)
            ended = time.monotonic()
            served.urls.append(victim.url)
            broken = [each for name in BROKEN for each in driver.report().ended(name) if each not in known]
            assert all(each.url == victim.url and begun <= each.ended <= ended for each in broken)
            known += broken
            assert not {sent.url for sent in driver.report().after(begun).requests} - {victim.url, other.url}
            victim = served.apis[number % 2]
            with driver.mark("an API process stopped until it is taken for dead"):
                os.kill(victim.process.pid, signal.SIGSTOP)
                assert until(lambda: len(served.redis.keys(f"{PREFIX}api:*")) == 1)
                os.kill(victim.process.pid, signal.SIGCONT)
            driver.settle()
    driver.report().assert_clean(*BROKEN)


@contextmanager
def away(served: Stack, driver: Traffic, name: str) -> Iterator[None]:
    """The queue cannot be used: requests may be refused until it can, with the reason, and no others."""
    before = len(driver.report().ended("503"))
    with driver.mark(name):
        yield
    assert until(served.ready)
    driver.wait_for_answers(10)
    driver.settle()
    back = time.monotonic()
    driver.wait_for_answers(10)
    refused = driver.report().ended("503")[before:]
    assert all(sent.begun < back and "The queue at redis://127.0.0.1" in sent.told for sent in refused)


def test_the_queue_may_be_killed_emptied_paused_cut_off_and_full(
    served: Stack, bank: Bank, rounds: int
) -> None:
    with traffic(served, bank) as driver:
        for _ in range(rounds):
            with away(served, driver, "Redis killed and started again"):
                served.restart_queue(empty=False)
            with away(served, driver, "Redis killed, started again without its data"):
                served.restart_queue(empty=True)
            with away(served, driver, f"Redis paused for {AWAY_S} s"):
                served.queue.signal(signal.SIGSTOP)
                time.sleep(AWAY_S)
                served.queue.signal(signal.SIGCONT)
            refused = len(driver.report().ended("503"))
            with driver.mark("all connections cut"):
                served.redis.client_kill_filter(_type="normal")
            driver.wait_for_answers(20)
            assert len(driver.report().ended("503")) == refused  # they are made again at once
            with away(served, driver, "Redis full until it was noticed"):
                served.redis.config_set("maxmemory", 1)
                driver.wait_until(lambda report, refused=refused: len(report.ended("503")) > refused)
                served.redis.config_set("maxmemory", 0)
            full = driver.report().ended("503")[refused:]
            assert all("no memory left" in sent.told and '"reason":"memory"' in sent.told for sent in full)
    driver.report().assert_clean("503")


def test_a_chunk_that_takes_whole_workers_down_convicts_itself_alone(
    served: Stack, bank: Bank, rounds: int
) -> None:
    def job() -> bytes | None:
        return next((id for id in served.jobs() if served.redis.hget(id, "rows") == b"251"), None)

    def holder() -> Server | None:
        id = job()
        owner = None if id is None else served.redis.hget(id, "owner")
        return next((worker for worker in served.workers if owner and owns(worker, owner)), None)

    answers: list[httpx.Response] = []
    found: list[Server] = []

    def ask() -> None:
        # far more work than what is done before a worker is found and killed
        body: dict[str, Any] = {"n": 251, "seed": 1, "rtol": 1e-13, "atol": 1e-13, "max_steps": 1_000_000}
        body |= {
            "precision": "float64",
            "return_log_density": True,
            "logp_atol": 1e-13,
            "timeout_ms": 240_000,
        }
        answers.append(httpx.post(f"{served.urls[0]}/v1/models/moons/sample", json=body, timeout=240))

    with traffic(served, bank) as driver:
        for _ in range(rounds):
            asking = threading.Thread(target=ask)
            asking.start()
            for attempt in range(ATTEMPTS):
                with driver.mark(f"the worker that has it killed, attempt {attempt + 1}"):
                    assert until(lambda: (victim := holder()) is not None and found.append(victim) is None)
                    victim = found.pop()
                    victim.process.kill()
                    served.replace(victim)
            asking.join()
            answer = answers.pop()
            assert answer.status_code == 500, answer.text
            assert f"lost {ATTEMPTS} times" in answer.json()["detail"]
            ((_, dead),) = served.redis.xrevrange(f"{PREFIX}dead", count=1)
            assert dead[b"attempts"] == b"%d" % ATTEMPTS
    driver.report().assert_clean()


def test_everything_is_replaced_one_after_the_other(served: Stack, bank: Bank, rounds: int) -> None:
    with traffic(served, bank) as driver:
        for old in itertools.chain.from_iterable((*served.workers, *served.apis) for _ in range(rounds)):
            with driver.mark(f"{'an API process' if old.url else 'a worker'} replaced"):
                if old in served.apis:  # as a load balancer does: no more requests, then the signal
                    served.urls.remove(old.url)
                    driver.wait_until(lambda report, old=old: report.to(old.url).all_sent)
                else:
                    assert until(lambda old=old: served.busy() is old)
                assert old.stop() == 0
                served.replace(old)
                assert until(served.ready)
                if old in served.apis or old.url:
                    served.urls.append(old.url)
            driver.wait_for_answers(5)
    driver.report().assert_clean()
