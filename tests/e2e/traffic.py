"""Traffic in the background: many requests of many kinds, every answer compared with the one it gets alone.

with Traffic(server.url, bank) as traffic:
    with traffic.mark("kill -9"):
        os.kill(server.worker(), signal.SIGKILL)
traffic.report().assert_clean()
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
from tests.e2e.bank import Bank, Template

LOST_S = 240.0  # without an answer for so long, a request is lost
BROKEN = ("ConnectError", "ReadError", "RemoteProtocolError", "WriteError")  # by the end of a server
AFTER_S = 5.0  # how long after an event answers are still looked at for the time to recover


@dataclass
class Sent:
    """A request, and what became of it. Times are ``time.monotonic``, in seconds."""

    id: str
    url: str
    template: Template
    begun: float
    sent: float | None = None
    """When its last byte had been handed to the operating system."""
    ended: float | None = None
    outcome: str = "under way"
    """Then ``right``, ``wrong``, ``hung up``, ``lost``, another answer's status, or the name of an error."""
    version: int | None = None
    told: str = ""


@dataclass(frozen=True)
class Mark:
    """Something that was done to the server meanwhile."""

    name: str
    begun: float
    ended: float


@dataclass
class Report:
    """What became of all requests."""

    requests: Sequence[Sent]
    marks: Sequence[Mark] = ()
    doubled: Sequence[str] = ()

    @property
    def outcomes(self) -> Counter[str]:
        """How many requests ended how."""
        return Counter(request.outcome for request in self.requests)

    @property
    def versions(self) -> Counter[tuple[str, int]]:
        """How many right answers each version of a model gave."""
        return Counter((r.template.model, r.version) for r in self.requests if r.version is not None)

    def before(self, moment: float) -> Report:
        """Of the requests alone that had been sent by then."""
        return Report([r for r in self.requests if r.sent is not None and r.sent < moment])

    def after(self, moment: float) -> Report:
        """Of the requests alone that were begun afterwards."""
        return Report([r for r in self.requests if r.begun > moment])

    def to(self, url: str) -> Report:
        """Of the requests alone that one server was sent."""
        return Report([r for r in self.requests if r.url == url])

    @property
    def all_sent(self) -> bool:
        """Whether no request is still on its way to a server."""
        return all(r.sent is not None or r.ended is not None for r in self.requests)

    def ended(self, outcome: str) -> Sequence[Sent]:
        """The requests that ended so."""
        return [request for request in self.requests if request.outcome == outcome]

    def latency_ms(self, share: float, *outcomes: str) -> float:
        """This quantile of the times to an answer, milliseconds; NaN without any."""
        times = sorted(
            1000 * (r.ended - r.begun)
            for r in self.requests
            if r.ended is not None and r.outcome in (outcomes or ("right",))
        )
        return times[min(len(times) - 1, int(share * len(times)))] if times else float("nan")

    def gap_s(self, mark: Mark) -> float:
        """The longest time without a right answer, from the event until some seconds after it."""
        end = mark.ended + AFTER_S
        times = [r.ended for r in self.requests if r.outcome == "right" and r.ended is not None]
        times = [mark.begun, *sorted(t for t in times if mark.begun < t < end)]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)

    def assert_clean(self, *allowed: str) -> None:
        """Hold that every request was answered, once and right, or hung up, or ended as is allowed here."""
        expected = {"right", "hung up", *allowed}
        others = [request for request in self.requests if request.outcome not in expected]
        first = "".join(f"\n{r.outcome}: {_title(r.template)} {r.told[:500]}" for r in others[:5])
        assert not others, f"{self}{first}"
        assert not self.doubled, f"answered twice: {self.doubled}"
        assert self.outcomes["right"], "nothing was answered"

    def __str__(self) -> str:
        lines = [
            f"{len(self.requests)} requests: "
            + ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common()),
            f"right answers took {self.latency_ms(0.5):.0f} ms (p50), {self.latency_ms(0.99):.0f} ms (p99)",
        ]
        for name, times in Counter(mark.name for mark in self.marks).items():
            gaps = sorted(self.gap_s(mark) for mark in self.marks if mark.name == name)
            lines.append(
                f"{name}, {times} times: the longest time without an answer was {gaps[-1]:.2f} s, "
                f"{gaps[len(gaps) // 2]:.2f} s in the median"
            )
        return "\n".join(lines)


class Traffic:
    """Sends requests of a bank at random moments until it is told to stop, in a thread of its own.

    Args:
        url: of the server; or of several, of which each request goes to one, and which may change.
        bank: what to send, and the answers.
        rate: requests a second; ``default_rate`` unless given.
        hang_up: share of the requests whose client closes the connection on the way; those are large ones.
        bulk: share of the requests that are sent with priority "bulk".
        only: which of the bank's requests to send; all of them unless given.
        most: requests under way at once; beyond, no further ones are sent until some are answered, so that
            a machine that is busy with other things gets as many as it can do.
        seed: of the choices; the moments depend on the machine too.
    """

    default_rate = 40.0

    def __init__(
        self,
        url: str | Sequence[str],
        bank: Bank,
        *,
        rate: float | None = None,
        hang_up: float = 0.0,
        bulk: float = 0.0,
        only: Sequence[Template] | None = None,
        most: int = 24,
        seed: int = 0,
    ) -> None:
        self._urls = [url] if isinstance(url, str) else url
        self._rate = self.default_rate if rate is None else rate
        self._hang_up, self._bulk, self._most = hang_up, bulk, most
        self._templates = bank.templates if only is None else only
        self._heavy = bank.heavy
        self._draw = random.Random(seed)
        self._requests: list[Sent] = []
        self._marks: list[Mark] = []
        self._answered: set[str] = set()
        self._doubled: list[str] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._drive()), name="traffic")

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        self.wait_for_answers(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Send no more, and wait for what is under way."""
        self._stopping.set()
        self._thread.join()

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """Note when something is done to the server."""
        begun = time.monotonic()
        yield
        self._marks.append(Mark(name, begun, time.monotonic()))

    def wait_until(self, what: Callable[[Report], bool]) -> None:
        """Wait until something can be said of the requests so far."""
        end = time.monotonic() + LOST_S
        while not what(self.report()):
            assert time.monotonic() < end, f"this did not come true: {self.report()}{self._unanswered()}"
            assert self._thread.is_alive(), "the traffic has ended"
            time.sleep(0.02)

    def wait_for_answers(self, count: int) -> None:
        """Wait until so many more requests have been answered right."""
        goal = self.report().outcomes["right"] + count
        self.wait_until(lambda report: report.outcomes["right"] >= goal)

    def settle(self) -> None:
        """Wait until every request that is under way now has been answered; others go on."""
        under_way = [request for request in self._requests if request.ended is None]
        self.wait_until(lambda _: all(request.ended is not None for request in under_way))

    def report(self) -> Report:
        """What has become of the requests so far."""
        return Report(list(self._requests), list(self._marks), list(self._doubled))

    def _unanswered(self) -> str:
        counts = Counter(_title(r.template) for r in self._requests if r.outcome in ("under way", "lost"))
        return "".join(f"\n{count} of {title}" for title, count in counts.most_common(5))

    async def _drive(self) -> None:
        under_way: set[asyncio.Task[None]] = set()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        async with httpx.AsyncClient(timeout=LOST_S, limits=limits) as client:
            due = time.monotonic()
            while not self._stopping.is_set():
                due = max(due + self._draw.expovariate(self._rate), time.monotonic() - 1)
                await asyncio.sleep(max(0, due - time.monotonic()))
                while len(under_way) >= self._most:
                    await asyncio.wait(set(under_way), return_when=asyncio.FIRST_COMPLETED)
                task = asyncio.create_task(self._ask(client))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            await asyncio.gather(*under_way)

    async def _ask(self, client: httpx.AsyncClient) -> None:
        draw = self._draw
        hang_up = draw.random() < self._hang_up
        templates = self._heavy if hang_up else self._templates
        (template,) = draw.choices(templates, [each.weight for each in templates])
        body = {"timeout_ms": int(1000 * LOST_S), **template.body}
        if draw.random() < self._bulk:
            body["priority"] = "bulk"
        url = self._urls[len(self._requests) % len(self._urls)]
        request = Sent(f"traffic-{len(self._requests)}", url, template, time.monotonic())
        self._requests.append(request)
        call = self._post(client, request, body)
        try:
            await (asyncio.wait_for(call, draw.uniform(0.002, 0.05)) if hang_up else call)
        except TimeoutError:
            request.outcome = "hung up"
        except httpx.TimeoutException:
            request.outcome = "lost"
        except httpx.HTTPError as error:
            request.outcome, request.told = type(error).__name__, str(error)
        request.ended = request.ended or time.monotonic()

    async def _post(self, client: httpx.AsyncClient, request: Sent, body: dict[str, Any]) -> None:
        async def trace(event: str, _: dict[str, Any]) -> None:
            if event == "http11.send_request_body.complete":
                request.sent = time.monotonic()

        template = request.template
        answer = await client.post(
            f"{request.url}/v1/models/{template.model}/{template.operation}",
            json=body,
            headers={"x-request-id": request.id},
            extensions={"trace": trace},
        )
        request.ended = time.monotonic()
        id = answer.headers["x-request-id"]
        (self._doubled.append if id in self._answered else self._answered.add)(id)
        outcome, request.told = await asyncio.to_thread(_judged, request, answer)
        request.version = answer.json()["version"] if outcome == "right" else None
        request.outcome = outcome


def _judged(request: Sent, answer: httpx.Response) -> tuple[str, str]:
    """The outcome of an answered request, and what is to be said about it."""
    if answer.headers["x-request-id"] != request.id:
        return "wrong", f"the answer is that of {answer.headers['x-request-id']}"
    unavailable = answer.status_code == 503 and answer.json()["code"] == "unavailable"
    if unavailable and not 1 <= int(answer.headers.get("retry-after", 0)) <= 3600:
        return "wrong", f"503 with Retry-After {answer.headers.get('retry-after')}: {answer.text}"
    if answer.status_code != 200:
        return str(answer.status_code), answer.text
    return ("right", "") if request.template.right(answer.json()) else ("wrong", answer.text)


def _title(template: Template) -> str:
    return f"{template.model}/{template.operation} {json.dumps(dict(template.body))[:200]}"
