"""Worker processes on this machine: started, given chunks, watched, and replaced when they die or stall.

A worker owes a sign of life while it holds chunks: its loop sends a ``Beat`` as long as it makes progress.
One that is silent for too long is killed, which is the same as if it had died: another takes its place, its
chunks are handed out again (see ``leases``), and whatever it might still have said can no longer be heard. A
worker that holds nothing is asked for a beat now and then, for which it solves a golden row: so it is found
stuck or wrong before a request finds it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from pushforward.broker.base import ATTEMPTS, merge_models
from pushforward.broker.leases import Holder, Lease, Leases
from pushforward.broker.process import Process
from pushforward.errors import PushforwardError, Unavailable, from_code
from pushforward.logs import fields
from pushforward.messages import (
    UNSOUND,
    Beat,
    Cancel,
    Failed,
    FromWorker,
    Load,
    ModelState,
    Probe,
    Ready,
    Result,
    Setup,
    Unload,
    Work,
)
from pushforward.metrics import EngineCollector
from pushforward.tracing import trace_field

__all__ = ["LocalBroker"]

log = logging.getLogger(__name__)

_LEAVING = "The server is shutting down."
_MAX_DELAY_S = 5.0
_BOOT_S = 60.0  # a new process may be silent for this long
_GRACE_S = 1.0  # after a deadline, for the account of it to arrive of the worker that has the chunk
_LOOK_S = 0.25  # between two looks for deadlines that workers have let pass
_STEPS = 20  # steps that a worker may be silent for, whatever ``stall_s`` is


@dataclass(eq=False)
class _Worker:
    """A place for a worker process, and the process that has it now."""

    number: int
    setup: str
    process: Process | None = None
    holder: Holder[_Worker] | None = None
    heard: float = 0.0  # when it last made progress, or began to owe some
    longest_step_s: float = 0.0
    probed: bool = False
    failures: int = 0  # processes that have died one after the other before they were ready
    cause: str = "died"
    models: dict[tuple[str, int], ModelState] = field(default_factory=dict)

    @property
    def owes(self) -> bool:
        """Whether it should be making progress."""
        return self.holder is not None and (self.probed or bool(self.holder.leases) or not self.holder.ready)


class LocalBroker:
    """Solves chunks in worker processes.

    Args:
        setups: what each worker is to be.
        stall_s: seconds of silence, beyond twenty of its steps, after which a worker that owes progress is
            replaced.
        collector: is told what the workers do.
    """

    def __init__(
        self,
        setups: Sequence[Setup],
        stall_s: float = 10.0,
        collector: EngineCollector | None = None,
    ) -> None:
        self._stall_s = stall_s
        self._collector = collector or EngineCollector()
        self._leases: Leases[_Worker] = Leases(bulk_window=2 * max(setup.slots for setup in setups))
        self._answers: dict[str, asyncio.Future[Result]] = {}
        self._workers = [
            _Worker(number, msgspec.json.encode(setup).decode()) for number, setup in enumerate(setups)
        ]
        self._models: dict[tuple[str, int], ModelState] = {}
        self._orders: dict[tuple[str, int], Load | Unload] = {}  # for workers that start later
        self._tasks: list[asyncio.Task[None]] = []
        self._exit: int | None = None
        self._closing = self._closed = False

    @property
    def workers(self) -> list[int]:
        """Process ids of the workers there are."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    @property
    def size(self) -> int:
        """How many workers there are to be."""
        return len(self._workers)

    @property
    def in_flight(self) -> int:
        """Chunks that have not been answered."""
        return len(self._leases)

    def spawn(self) -> None:
        """Start the processes; possible before there is an event loop, so that they can load meanwhile."""
        for worker in self._workers:
            worker.process = Process(worker.setup)

    async def start(self) -> None:
        """Connect to the workers, starting those that ``spawn`` has not, and watch them from now on."""
        self._tasks = [asyncio.create_task(self._keep(worker)) for worker in self._workers]
        self._tasks += [asyncio.create_task(self._keep_deadlines()), asyncio.create_task(self._keep_watch())]

    async def admit(self, rows: int, nbytes: int) -> None:
        """See ``Broker.admit``: no other process holds anything."""

    async def submit(self, work: Work) -> Result:
        """Have a chunk solved; see ``Broker.submit``."""
        if self._closed:
            raise Unavailable(_LEAVING)
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        lease = self._leases.add(work)
        lease.queued = time.monotonic()
        self._answers[work.id] = answer
        self._hand_out()
        try:
            return await answer
        finally:
            del self._answers[work.id]
            holder = self._leases.settle(lease)
            if holder is not None:  # nobody waits any more, but the rows are there
                self._send(holder.worker, Cancel(work.id))
                if not holder.leases:  # or a stuck worker would get away with chunks that are soon cancelled
                    self._probe(holder.worker)
            self._hand_out()

    def unavailable(self) -> str | None:
        """Why work sent now would have to wait; None when it would not."""
        if self._closing:
            return _LEAVING
        ready = [worker for worker in self._workers if worker.holder is not None and worker.holder.ready]
        if not ready:
            if any(worker.failures for worker in self._workers):
                return "The workers died and are being replaced."
            return "The workers are starting."
        now = time.monotonic()
        if all(worker.owes and now - worker.heard > self._limit_s(worker) / 2 for worker in ready):
            return "The workers hold rows and make no steps."
        return None

    def models(self) -> Mapping[tuple[str, int], ModelState]:
        """See ``Broker.models``; a new mapping whenever something has changed."""
        return self._models

    def load(self, model: str, version: int) -> None:
        """See ``Broker.load``."""
        self._order(Load(model, version))

    def unload(self, model: str, version: int) -> None:
        """See ``Broker.unload``."""
        self._order(Unload(model, version))

    def drain(self) -> None:
        """See ``Broker.drain``."""
        self._closing = True

    async def close(self) -> None:
        """Let go of the workers; chunks still in flight fail with ``Unavailable``."""
        self.drain()
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Unavailable(_LEAVING))
        await asyncio.gather(
            *(worker.process.end() for worker in self._workers if worker.process is not None)
        )

    # ------------------------------------------------------------------------------ workers come and go

    async def _keep(self, worker: _Worker) -> None:
        """Have a process in this place at all times."""
        while True:
            if worker.failures > 1:  # the last ones died before they were ready: do not spin
                await asyncio.sleep(min(_MAX_DELAY_S, 0.1 * 2**worker.failures))
            if worker.process is None:
                try:
                    worker.process = Process(worker.setup)
                except OSError:
                    worker.failures += 1
                    log.exception("worker cannot be started")
                    continue
            process = worker.process
            worker.holder = holder = Holder(worker)
            self._leases.holders.append(holder)
            worker.heard, worker.probed, worker.cause = time.monotonic() + _BOOT_S, False, "died"
            worker.longest_step_s = 0.0
            await process.connect(functools.partial(self._receive, worker))
            for order in self._orders.values():
                process.send(order)
            await process.lost()
            self._exit = await process.end()
            self._bury(worker, holder, process.pid)

    def _bury(self, worker: _Worker, holder: Holder[_Worker], pid: int) -> None:
        if self._exit == UNSOUND:
            worker.cause = "unsound"
        worker.failures = 1 if holder.ready else worker.failures + 1
        worker.process = worker.holder = None
        worker.models = {}
        again, spent = self._leases.lost(holder)
        log.error(
            "worker lost",
            extra=fields(
                worker=pid, cause=worker.cause, exit=self._exit, again=len(again), given_up=len(spent)
            ),
        )
        self._collector.gone(str(worker.number))
        self._collector.restarts[worker.cause] += 1
        self._collector.redeliveries += len(again)
        for lease in spent:
            self._fail(lease.work.id, _convicted(lease, self._exit))
        self._merge_models()
        self._hand_out()

    async def _keep_watch(self) -> None:
        """Replace workers that owe progress and make none."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(min(1.0, self._stall_s / 4))
            now, before = time.monotonic(), looked
            looked = now
            if now - before > self._stall_s / 2:
                continue  # this process was held up: what workers have said meanwhile is still to be read
            for worker in self._workers:
                silence = now - worker.heard
                if worker.process is None or worker.holder is None:
                    continue
                if worker.owes:
                    if silence > self._limit_s(worker):
                        worker.cause = "stuck"
                        worker.process.kill()
                elif silence > self._stall_s:
                    worker.heard = now
                    self._probe(worker)

    def _probe(self, worker: _Worker) -> None:
        """Ask for a sign of life, which is owed from now on."""
        if not worker.probed:
            worker.probed = True
            self._send(worker, Probe())

    def _limit_s(self, worker: _Worker) -> float:
        """How long a worker may owe progress: a batch whose steps are long must not be taken for stuck."""
        return max(self._stall_s, _STEPS * worker.longest_step_s)

    async def _keep_deadlines(self) -> None:
        """Give up chunks whose worker is silent about a deadline that has passed."""
        while True:
            await asyncio.sleep(_LOOK_S)
            now = time.time()
            for lease in self._leases:
                latest = now if lease.holder is None else now - _GRACE_S
                if lease.work.deadline is not None and lease.work.deadline < latest:
                    self._fail(lease.work.id, TimeoutError())

    # ------------------------------------------------------------------------------ chunks out, answers in

    def _hand_out(self) -> None:
        while (lease := self._leases.next()) is not None:
            assert lease.holder is not None
            worker = lease.holder.worker
            if len(lease.holder.leases) == 1 and not worker.probed:
                worker.heard = time.monotonic()  # it owes progress from now on
            if lease.attempts == ATTEMPTS:
                self._collector.quarantined += 1
                log.warning(
                    "chunk in quarantine", extra=fields(chunk=lease.work.id, **trace_field(lease.work.trace))
                )
            lease.handed_out = time.monotonic()
            self._send(worker, msgspec.structs.replace(lease.work, fence=lease.attempts))

    def _send(self, worker: _Worker, message: Work | Cancel | Probe | Load | Unload) -> None:
        if worker.process is not None:
            worker.process.send(message)

    def _receive(self, worker: _Worker, message: FromWorker) -> None:
        worker.heard = time.monotonic()
        match message:
            case Result() | Failed():
                lease = self._leases.find(message.id)
                if lease is None or lease.holder is not worker.holder or lease.attempts != message.fence:
                    return  # the caller has gone, or another has the chunk now
                self._leases.settle(lease)
                self._hand_out()
                if isinstance(message, Failed):
                    self._fail(message.id, from_code(message.code, message.message, message.detail))
                else:
                    answer = self._answers[message.id]
                    if not answer.done():
                        waited = lease.handed_out - lease.queued
                        answer.set_result(msgspec.structs.replace(message, queue_s=message.queue_s + waited))
            case Beat():
                worker.probed = False
                worker.longest_step_s = message.counts.longest_step_s()
                self._collector.add(str(worker.number), message)
            case ModelState():
                self._hear_of(worker, message)
            case Ready():
                assert worker.holder is not None
                worker.holder.ready = True
                worker.failures = 0
                extra = fields(
                    worker=worker.process.pid if worker.process else None,
                    models=len(worker.holder.models),
                    failed=sum(news.state == "failed" for news in worker.models.values()),
                    load_s=round(message.seconds, 3),
                )
                log.info("worker ready", extra=extra)
                self._hand_out()

    def _fail(self, id: str, error: Exception) -> None:
        answer = self._answers.get(id)
        if answer is not None and not answer.done():
            answer.set_exception(error)

    # ------------------------------------------------------------------------------ versions

    def _order(self, order: Load | Unload) -> None:
        self._orders[order.model, order.version] = order
        self._merge_models()
        for worker in self._workers:
            self._send(worker, order)

    def _hear_of(self, worker: _Worker, news: ModelState) -> None:
        key = news.model, news.version
        assert worker.holder is not None
        worker.models[key] = news
        (worker.holder.models.add if news.state == "ready" else worker.holder.models.discard)(key)
        told = {"worker": worker.number, "model": news.model, "version": news.version}
        if news.state == "failed":
            log.error("model failed to load", extra=fields(**told, reason=news.reason))
        elif news.state == "ready":
            log.info("model loaded", extra=fields(**told, load_s=round(news.seconds, 3)))
        elif news.state == "unloaded":
            log.info("model unloaded", extra=fields(**told))
        self._merge_models()

    def _merge_models(self) -> None:
        said = [worker.models for worker in self._workers]
        self._models = merge_models(self._models, said, self._orders.values())


def _convicted(lease: Lease[_Worker], code: int | None) -> PushforwardError:
    return PushforwardError(
        f"The worker process was lost {ATTEMPTS} times while it held these rows, the last time with nothing "
        "else; they are not tried again.",
        detail={"attempts": ATTEMPTS, "exit": code, "rows": len(lease.work.rows)},
    )
