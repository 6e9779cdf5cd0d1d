"""The worker process: an engine at the end of a socket.

    python -m pushforward.worker FD SETUP

One loop: take messages (waiting only when no row runs), make one engine step, send the answers that are
finished, and now and then a ``Beat`` that says so. Versions are loaded and let go by the keeper's thread
meanwhile; a chunk whose version is not there yet is parked. It ends when its socket does.

A worker without rows that is asked for a sign of life proves itself first: a golden row of a version it has
loaded must give the bits that it gave then. Chunks that come meanwhile end that; they are proof enough.
"""

from __future__ import annotations

import gc
import logging
import select
import signal
import socket
import sys
import time
from collections import deque
from pathlib import Path

import msgspec

from pushforward import logs
from pushforward.engine.engine import Engine
from pushforward.engine.request import Answer, Chunk, Kind
from pushforward.errors import PushforwardError, from_code
from pushforward.keeper import Keeper
from pushforward.loading import Proof
from pushforward.messages import (
    UNSOUND,
    Beat,
    Cancel,
    Failed,
    FrameReader,
    FromWorker,
    Load,
    Probe,
    Ready,
    Result,
    Setup,
    ToWorker,
    Unload,
    Work,
    decode_to_worker,
    frame,
)
from pushforward.spans import solve
from pushforward.store.opening import catalog_of
from pushforward.tracing import Tracing

__all__ = ["Channel", "Worker", "main"]

log = logging.getLogger("pushforward.worker")  # __name__ is "__main__" here

_LOOK_S = 0.0002  # between two looks at the socket: the step of one row is so short that a look would be felt
_BEAT_S = 0.1  # between two signs of progress
_READ_BYTES = 1 << 16  # a larger buffer would be mapped and unmapped at every read


class Unsound(Exception):
    """The programs of a worker do not compute what they did."""


class Channel:
    """Messages over a stream socket that is never waited for unless asked to."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._frames = FrameReader()
        self._unsent: deque[memoryview] = deque()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self.open = True

    def listen_to(self, descriptor: int) -> None:
        """End a wait when this can be read, too."""
        self._poll.register(descriptor, select.POLLIN)

    def receive(self, patience_s: float | None) -> list[ToWorker]:
        """Messages that have arrived.

        Args:
            patience_s: how long to wait for something to happen: a message, the end of the stream, or room
                for what is unsent; None for as long as it takes.
        """
        if not self._poll.poll(None if patience_s is None else 1000 * patience_s):
            return []
        if self._unsent:
            self._flush()
        messages: list[ToWorker] = []
        while self.open:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.open = bool(data)
            messages += map(decode_to_worker, self._frames.feed(data))
            if len(data) < _READ_BYTES:
                break
        return messages

    def send(self, message: FromWorker) -> None:
        """Send a message, or as much of it as the socket takes; the rest goes with a later ``receive``."""
        self._unsent.append(memoryview(frame(message)))
        self._flush()

    def _flush(self) -> None:
        while self._unsent and self.open:
            data = self._unsent[0]
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                break
            except OSError:  # the other end is gone
                self.open = False
                break
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = data[sent:]
        self._poll.modify(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))


class Worker:
    """The loop of a worker process.

    Args:
        channel: the way to the parent.
        setup: what this worker is to be.
    """

    def __init__(self, channel: Channel, setup: Setup) -> None:
        self._channel = channel
        self._keeper = Keeper(
            catalog_of(setup.store, None if setup.cache is None else Path(setup.cache), setup.cache_mb),
            setup.versions,
            setup.load,
            setup.watch_s,
            setup.model_memory_mb,
            setup.device,
        )
        self._engine = Engine(self._keeper.held, slots=setup.slots, step_budget_s=setup.step_budget_ms / 1000)
        self._parked: dict[tuple[str, int], list[Work]] = {}  # chunks whose version is being loaded
        self._fences: dict[str, int] = {}  # of the chunks in the engine
        self._proof: Proof | None = None  # being solved: then the engine has no other rows
        self._tracing = Tracing() if setup.tracing else None
        self._traced: dict[str, tuple[Work, int]] = {}  # chunks with a span, and when they came, Unix ns
        self._ready = False
        self._told = 0.0  # when the last beat was sent
        self._untold = False  # whether anything has happened since

    def run(self) -> None:
        """Answer chunks until the channel ends."""
        self._channel.listen_to(self._keeper.fileno())
        self._keeper.start()
        try:
            self._loop(time.monotonic())
        except Exception as error:
            for id in list(self._traced):
                self._trace(id, error, time.time_ns())
            raise
        finally:
            self._keeper.close()
            if self._tracing is not None:
                self._tracing.close()

    def _loop(self, started: float) -> None:
        look = 0.0
        while True:
            now = time.monotonic()
            if now >= look or not self._engine.busy:
                for message in self._channel.receive(self._patience_s()):
                    self._take(message)
                if not self._channel.open:
                    return
                self._hear_of_models()
                if not self._ready and self._keeper.initial.is_set():
                    self._ready = True
                    self._channel.send(Ready(time.monotonic() - started))
                    gc.freeze()  # what is there now stays: collections need not look at it again and again
                look = now + _LOOK_S
            if self._engine.busy:
                answers = self._engine.step()
                if self._proof is None:
                    if answers:
                        self._answer(answers)
                    self._untold = True
                elif answers:
                    self._judge(self._proof, answers[0])
                if not self._engine.busy:
                    self._let_go()
            if now - self._told >= _BEAT_S and (self._untold or self._loading):
                self._beat()

    def _answer(self, answers: list[Answer]) -> None:
        left = time.time_ns()
        results = [_result(answer, self._fences.pop(answer.id)) for answer in answers]
        for result in results:
            self._channel.send(result)
        for result in results:
            self._trace(result.id, result, left)

    def _patience_s(self) -> float | None:
        """How long to wait for a message: not at all with rows in flight, for ever with nothing to tell."""
        if self._engine.busy:
            return 0.0
        return _BEAT_S if self._untold or self._loading else None

    @property
    def _loading(self) -> bool:
        """Whether somebody waits for a version: this may take longer than a worker may be silent."""
        return not self._ready or bool(self._parked)

    def _take(self, message: ToWorker) -> None:
        match message:
            case Work():
                if self._tracing is not None and message.trace:
                    self._traced[message.id] = message, time.time_ns()
                if self._keeper.get(message.model, message.version) is not None:
                    self._submit(message)
                else:
                    self._parked.setdefault((message.model, message.version), []).append(message)
                    self._keeper.want(message.model, message.version)
            case Cancel():
                answer = self._engine.cancel(message.id)
                fence = self._fences.pop(message.id, 0)
                result = None if answer is None else _result(answer, fence)
                self._trace(message.id, result, time.time_ns())
                for version, works in list(self._parked.items()):
                    works[:] = [work for work in works if work.id != message.id]
                    if not works:
                        del self._parked[version]
            case Load():
                self._keeper.load(message.model, message.version)
            case Unload():
                self._keeper.unload(message.model, message.version)
            case Probe():
                self._prove()

    def _submit(self, work: Work) -> None:
        if self._proof is not None:
            self._engine.cancel(self._proof.chunk.id)
            self._end_proof()
        try:
            self._engine.submit(_chunk(work))
        except PushforwardError as error:
            self._fail(work, error)
        else:
            self._fences[work.id] = work.fence

    def _fail(self, work: Work, error: PushforwardError) -> None:
        self._channel.send(Failed(work.id, error.code, error.message, error.detail, work.fence))
        self._trace(work.id, error, time.time_ns())

    def _trace(self, id: str, outcome: Result | Exception | None, over_ns: int) -> None:
        """Make the span of a chunk, if it is to have one: nothing waits for that any more."""
        if self._tracing is not None and id in self._traced:
            solve(self._tracing, *self._traced.pop(id), outcome, over_ns)

    def _hear_of_models(self) -> None:
        """Pass on what has become of versions; begin or fail the chunks that waited for them."""
        for news in self._keeper.events():
            self._channel.send(news)
            if news.state not in ("ready", "failed"):
                continue
            for work in self._parked.pop((news.model, news.version), []):
                if news.state == "ready":
                    self._submit(work)
                else:
                    self._fail(work, from_code(news.code, news.reason))
        self._let_go()

    def _let_go(self) -> None:
        """Give back the versions that are to go and have no rows left."""
        for model, version in self._keeper.dropping():
            if not self._engine.rows_of(model, version):
                self._engine.forget(model, version)
                self._keeper.dropped(model, version)

    def _prove(self) -> None:
        """Begin to solve a golden row, unless a beat about other rows is due anyway."""
        if self._engine.busy or self._untold:
            return
        self._proof = self._keeper.proof()
        if self._proof is None:
            self._beat()
        else:
            self._engine.submit(self._proof.chunk)

    def _judge(self, proof: Proof, answer: Answer) -> None:
        if not proof.holds(answer):
            raise Unsound(
                f"A golden row of {proof.chunk.model}/{proof.chunk.version} does not give the bits that it "
                "gave when the version was loaded."
            )
        self._end_proof()

    def _end_proof(self) -> None:
        """Go on, and say so; what was done for a proof is not counted."""
        self._proof, self._untold = None, True
        self._engine.take_counts()

    def _beat(self) -> None:
        engine = self._engine
        self._told, self._untold = time.monotonic(), False
        self._channel.send(Beat(engine.steps, engine.running, engine.waiting, engine.take_counts()))


def _chunk(work: Work) -> Chunk:
    # Deadlines travel as wall-clock time; the engine's clock never jumps.
    deadline = None if work.deadline is None else time.monotonic() + work.deadline - time.time()
    return Chunk(
        id=work.id,
        model=work.model,
        version=work.version,
        kind=Kind(work.kind),
        density=work.density,
        rows=work.rows,
        rtol=work.rtol,
        atol=work.atol,
        logp_atol=work.logp_atol,
        max_steps=work.max_steps,
        precision=work.precision,
        context=work.context,
        t_end=work.t_end,
        deadline=deadline,
        bulk=work.bulk,
        request=work.request,
    )


def _result(answer: Answer, fence: int) -> Result:
    return Result(
        id=answer.id,
        value=answer.value,
        log_density=answer.log_density,
        error_estimate=answer.error_estimate,
        steps=answer.steps,
        accepted=answer.accepted,
        nfe=answer.nfe,
        status=answer.status,
        t=answer.t,
        fence=fence,
        queue_s=answer.queue_s,
        solve_s=answer.solve_s,
    )


def main(descriptor: str, setup: str) -> None:
    """Run the worker on an inherited socket, with a ``Setup`` in JSON."""
    # Told to stop, the parent still needs this process to finish what is in flight: only the socket ends it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    options = msgspec.json.decode(setup, type=Setup)
    logs.configure(options.log_level, options.log_format)
    with socket.socket(fileno=int(descriptor)) as sock:
        try:
            Worker(Channel(sock), options).run()
        except Unsound as error:
            log.error("worker unsound", extra=logs.fields(reason=str(error)))
            sys.exit(UNSOUND)
        except Exception:
            # An engine in an unknown state must not answer anybody: the parent starts another.
            log.exception("worker failed")
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
