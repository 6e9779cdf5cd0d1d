"""Things go wrong while a server is busy: nobody gets a wrong answer, and hardly anybody notices at all."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from tests.e2e.bank import SERVED, Bank
from tests.e2e.soak import usage
from tests.e2e.traffic import BROKEN, LOST_S, Report, Traffic
from tests.poison import poison
from tests.server import PATIENCE_S, Server, free_port, until

OUTCOMES = ("answered", "failed", "cancelled", "expired", "refused")


def at_rest(server: Server) -> bool:
    """Whether nothing is held for anybody."""
    gauges = {
        f"pushforward_{name}" for name in ("requests_in_flight", "queue_rows", "queue_bytes", "rows_running")
    }
    return not any(value for (name, *_), value in server.metrics().items() if name in gauges)


def test_mixed_traffic_gets_the_answers_that_it_gets_alone(start: Callable[..., Server], bank: Bank) -> None:
    with Traffic(start().url, bank, bulk=0.2) as traffic:
        traffic.wait_for_answers(200)
        traffic.wait_until(lambda report: {model for model, _ in report.versions} == set(SERVED))
    traffic.report().assert_clean()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_workers_that_die_cost_only_time(
    number: int, start: Callable[..., Server], bank: Bank, rounds: int
) -> None:
    server, draw = start(), random.Random(number)
    with Traffic(server.url, bank) as traffic:
        for _ in range(rounds):
            with traffic.mark(f"signal {number}"):
                os.kill(server.worker(), number)
                assert server.wait_for("worker lost")["exit"] == -number
            traffic.settle()  # or innocent requests might be there each time, and be taken for guilty
            traffic.wait_for_answers(draw.randint(1, 40))
    print(traffic.report())
    traffic.report().assert_clean()


def test_a_worker_that_hangs_is_replaced_and_costs_only_time(
    start: Callable[..., Server], bank: Bank, rounds: int
) -> None:
    server = start(stall_s=2)
    with Traffic(server.url, bank) as traffic:
        for _ in range(rounds):
            worker = server.worker()
            with traffic.mark("SIGSTOP"):
                os.kill(worker, signal.SIGSTOP)
                assert server.wait_for("worker lost")["cause"] == "stuck"
            assert server.workers() != [worker]
            traffic.settle()
    print(traffic.report())
    traffic.report().assert_clean()


def test_one_of_two_workers_may_die_at_any_time(
    start: Callable[..., Server], bank: Bank, rounds: int
) -> None:
    server, draw = start("--workers", "2"), random.Random(0)
    server.wait_for("worker ready")  # the other one as well
    with Traffic(server.url, bank) as traffic, server.client() as client:
        for _ in range(rounds):
            victim = draw.choice(server.workers())
            with traffic.mark("kill -9"):
                os.kill(victim, signal.SIGKILL)
                server.wait_for("worker lost")
                assert client.get("/health/ready").status_code == 200  # the other one goes on
            assert until(lambda: len(server.workers()) == 2)
            server.wait_for("worker ready")
            traffic.settle()
    print(traffic.report())
    traffic.report().assert_clean()


@pytest.mark.parametrize("what", ["raise", "hang"])
def test_rows_that_make_a_step_fail_or_hang_convict_themselves_alone(
    what: str, start: Callable[..., Server], store: Path, bank: Bank, rounds: int
) -> None:
    poison(store / "moons" / "1", what)  # which leaves the answers of other rows as they were
    server = start(stall_s=2 if what == "hang" else 60)  # a busy machine is not taken for a worker that hangs
    far = {"x": [[1e9, 0.0], [0.5, 0.5]], "timeout_ms": 240_000}
    harmless = [template for template in bank.templates if not template.poison]
    with Traffic(server.url, bank, only=harmless) as traffic, server.client() as client:
        for _ in range(rounds):
            with traffic.mark(f"rows that {what}"):
                told = client.post("/v1/models/moons/log_density", json=far, timeout=LOST_S)
            assert (told.status_code, told.json()["code"]) == (500, "internal-error")
            assert "lost 3 times" in told.json()["detail"]
            traffic.settle()
    print(traffic.report())
    traffic.report().assert_clean()
    assert server.metrics()["pushforward_quarantined_total",] >= rounds


def test_clients_that_hang_up_leave_nothing_behind(
    start: Callable[..., Server], bank: Bank, rounds: int
) -> None:
    server = start()
    with Traffic(server.url, bank) as traffic:
        traffic.wait_for_answers(100)
    assert until(lambda: at_rest(server))
    before = usage(server)
    with Traffic(server.url, bank, hang_up=0.3) as traffic:
        traffic.wait_until(
            lambda report: (
                report.outcomes["hung up"] >= 30 * rounds and report.outcomes["right"] >= 75 * rounds
            )
        )
    print(traffic.report())
    traffic.report().assert_clean()
    assert until(lambda: at_rest(server))
    assert until(lambda: all(usage(server)[name][1] <= files for name, (_, files) in before.items()))
    assert all(usage(server)[name][0] < memory + 50 for name, (memory, _) in before.items())  # megabytes


def test_every_request_is_counted_once_also_when_workers_die(
    start: Callable[..., Server], bank: Bank, rounds: int
) -> None:
    server = start()
    with Traffic(server.url, bank, hang_up=0.3) as traffic:
        for _ in range(rounds):
            with traffic.mark("kill -9"):
                os.kill(server.worker(), signal.SIGKILL)
                server.wait_for("worker lost")
            traffic.settle()
    report = traffic.report()
    print(report)
    report.assert_clean()
    assert until(lambda: at_rest(server))
    told = server.metrics()
    counted = {
        outcome: sum(
            v for key, v in told.items() if key[0] == "pushforward_requests_total" and outcome in key
        )
        for outcome in OUTCOMES
    }
    # a client may hang up before its request has arrived, or just when it is answered
    right, hung_up = report.outcomes["right"], report.outcomes["hung up"]
    assert right <= counted["answered"] <= right + hung_up
    assert right <= sum(counted.values()) <= right + hung_up
    assert counted["failed"] == counted["expired"] == counted["refused"] == 0
    rows = {outcome: told.get(("pushforward_rows_total", outcome), 0) for outcome in OUTCOMES}
    surely, perhaps = (
        sum(request.template.rows for request in report.requests if request.outcome in outcomes)
        for outcomes in (["right"], ["right", "hung up"])
    )
    assert surely <= sum(rows.values()) <= perhaps
    poison = sum(
        len(r.template.poison) for r in report.requests if r.outcome == "right"
    )  # a row each, at least
    assert poison <= rows["failed"] <= surely - rows["answered"] + rows["cancelled"] + rows["failed"]
    assert rows["expired"] == rows["refused"] == 0
    restarts = sum(value for key, value in told.items() if key[0] == "pushforward_worker_restarts_total")
    assert restarts == rounds


def test_what_was_sent_before_the_signal_to_stop_is_answered(
    start: Callable[..., Server], bank: Bank, rounds: int
) -> None:
    draw, asked = random.Random(0), 0
    for _ in range(rounds):
        server = start("--port", str(free_port()))  # which nobody takes when it has gone
        with Traffic(server.url, bank, seed=draw.randrange(1000)) as traffic:
            traffic.wait_for_answers(draw.randint(1, 60))
            moment = time.monotonic()
            assert server.stop(signal.SIGTERM) == 0
        report = traffic.report()
        report.before(moment).assert_clean()
        report.assert_clean(*BROKEN, "503")  # those sent after it
        asked += len(report.before(moment).requests)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health/live")
    print(f"{asked} requests had been sent before {rounds} signals")


def test_who_comes_after_the_signal_is_turned_away_while_the_others_are_served(
    start: Callable[..., Server], bank: Bank
) -> None:
    server = start("--port", str(free_port()), stall_s=600)
    with Traffic(server.url, bank, only=bank.heavy, rate=1000, most=8) as traffic:
        worker = server.worker()
        os.kill(worker, signal.SIGSTOP)  # so that the others are not served before it is tried
        moment = time.monotonic()
        server.process.send_signal(signal.SIGTERM)

        def turned_away() -> bool:
            try:
                httpx.get(f"{server.url}/health/live")
            except httpx.TransportError:
                return server.process.poll() is None
            return False

        try:
            assert until(turned_away)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert server.process.wait(PATIENCE_S) == 0
    traffic.report().before(moment).assert_clean()


def test_overload_is_refused_at_once_and_what_is_taken_is_answered_right(
    start: Callable[..., Server], bank: Bank
) -> None:
    def rate_of(report: Report) -> float:
        ends = [request.ended for request in report.requests if request.outcome == "right"]
        return len(ends) / (max(ends) - min(ends))

    server = start(max_queue_rows=1500)
    with Traffic(server.url, bank, only=bank.heavy, rate=1000, most=4) as traffic:
        traffic.wait_for_answers(10)
    traffic.report().assert_clean()
    capacity = rate_of(traffic.report())
    with Traffic(server.url, bank, only=bank.heavy, rate=5 * capacity, most=10_000) as traffic:
        traffic.wait_until(lambda report: report.outcomes["right"] > 20 and report.outcomes["503"] > 0)
    report = traffic.report()
    report.assert_clean("503")
    print(report)
    print(f"capacity {capacity:.1f} requests/s; at five times that, {rate_of(report):.1f}/s were answered")
    p50, p99 = (report.latency_ms(share, "503") for share in (0.5, 0.99))
    print(f"refusals took {p50:.0f} ms (p50), {p99:.0f} ms (p99)")
