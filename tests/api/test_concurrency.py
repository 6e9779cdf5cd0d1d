"""Many clients at once: every answer is, bit for bit, the one that the same request gets alone."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tests.api.conftest import ENDLESS, SAMPLE

CLIENTS, REQUESTS = 24, 8


def mixed_requests(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Different operations, models, sizes and tolerances, and rows that fail in different ways among them."""
    draw = random.Random(0)

    def rows(n: int) -> list[list[float]]:
        return [[draw.gauss(0, 1.5), draw.gauss(0, 1.5)] for _ in range(n)]

    kinds: list[Callable[[], tuple[str, dict[str, Any]]]] = [
        lambda: ("pair/log_density", {"x": rows(draw.choice([1, 1, 3, 17]))}),
        lambda: ("pair/log_density", {"x": [*rows(2), [1e300, 0.0], *rows(2)]}),
        lambda: ("pair/log_density", {"x": rows(4), "rtol": 10 ** draw.uniform(-9, -2)}),
        lambda: ("pair/log_density", {"x": rows(5), "max_steps": draw.randint(1, 9)}),
        lambda: ("pair/log_density", {"x": rows(3), "precision": "float64"}),
        lambda: ("pair/anomaly", {"x": rows(2), "explain": True}),
        lambda: ("pair/sample", {"n": draw.choice([1, 5, 300]), "seed": draw.randint(0, 99)}),
        lambda: ("pair/transport", {"z": rows(2), "times": [0.25, 0.75]}),
        lambda: ("given/log_density", {"x": rows(3), "context": [[draw.gauss(0, 1)]]}),
        lambda: ("positive/log_density", {"x": [[abs(a), b] for a, b in rows(4)]}),
    ]
    return [draw.choice(kinds)() for _ in range(count)]


@pytest.fixture(scope="session")
def solo(client: httpx.Client) -> list[tuple[str, dict[str, Any], bytes]]:
    answers = []
    for path, body in mixed_requests(40):
        answer = client.post(f"/v1/models/{path}", json=body)
        assert answer.status_code == 200
        answers.append((path, body, answer.content))
    return answers


def test_answers_do_not_depend_on_who_else_asks(
    server: Any, solo: list[tuple[str, dict[str, Any], bytes]]
) -> None:
    async def one_client(number: int, wrong: list[str]) -> int:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
            for _ in range(REQUESTS):
                path, body, expected = draw.choice(solo)
                answer = await client.post(f"/v1/models/{path}", json=body)
                if answer.content != expected:
                    wrong.append(f"{path} {body}: {answer.text} instead of {expected.decode()}")
        return REQUESTS

    async def all_clients() -> tuple[int, list[str]]:
        wrong: list[str] = []
        counts = await asyncio.gather(*(one_client(number, wrong) for number in range(CLIENTS)))
        return sum(counts), wrong

    answered, wrong = asyncio.run(all_clients())
    assert answered == CLIENTS * REQUESTS
    assert not wrong


def test_clients_that_hang_up_disturb_nobody(
    server: Any, solo: list[tuple[str, dict[str, Any], bytes]]
) -> None:
    async def hang_up() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=httpx.Timeout(600, read=0.1)) as client:
            with pytest.raises(httpx.ReadTimeout):  # which begins when all of it is sent
                await client.post(SAMPLE, json=ENDLESS)

    async def stay(number: int) -> bool:
        path, body, expected = solo[number]
        async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
            return (await client.post(f"/v1/models/{path}", json=body)).content == expected

    async def all_clients() -> list[bool]:
        quitters = [asyncio.create_task(hang_up()) for _ in range(6)]
        stayed = await asyncio.gather(*(stay(number) for number in range(20)))
        await asyncio.gather(*quitters)
        return stayed

    assert all(asyncio.run(all_clients()))
