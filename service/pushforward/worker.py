"""The worker process: an engine at the end of a socket.

    python -m pushforward.worker FD SETUP

One loop: take messages (waiting only when no row runs), make one engine step, send the answers that are
finished, and now and then a ``Beat`` that says so. Versions are loaded and let go by the keeper's thread
meanwhile; a chunk whose version is not there yet is parked. It ends when its socket does.
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
from pushforward.loading import LoadedModel
from pushforward.messages import (
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
from pushforward.store.opening import catalog_of

__all__ = ["Channel", "Worker", "main"]

log = logging.getLogger("pushforward.worker")  # __name__ is "__main__" here

_LOOK_S = 0.0002  # between two looks at the socket: the step of one row is so short that a look would be felt
_BEAT_S = 0.1  # between two signs of progress
_READ_BYTES = 1 << 16  # a larger buffer would be mapped and unmapped at every read


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
        self._engine = Engine(self._model, slots=setup.slots, step_budget_s=setup.step_budget_ms / 1000)
        self._parked: dict[tuple[str, int], list[Work]] = {}  # chunks whose version is being loaded
        self._fences: dict[str, int] = {}  # of the chunks in the engine
        self._ready = False
        self._told = 0.0  # when the last beat was sent
        self._untold = False  # whether anything has happened since

    def run(self) -> None:
        """Answer chunks until the channel ends."""
        self._channel.listen_to(self._keeper.fileno())
        self._keeper.start()
        try:
            self._loop(time.monotonic())
        finally:
            self._keeper.close()

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
                for answer in self._engine.step():
                    self._channel.send(_result(answer, self._fences.pop(answer.id)))
                if not self._engine.busy:
                    self._let_go()
                self._untold = True
            if now - self._told >= _BEAT_S and (self._untold or not self._ready):
                self._beat()

    def _patience_s(self) -> float | None:
        """How long to wait for a message: not at all with rows in flight, for ever with nothing to tell."""
        if self._engine.busy:
            return 0.0
        return _BEAT_S if self._untold or not self._ready else None

    def _take(self, message: ToWorker) -> None:
        match message:
            case Work():
                if self._keeper.get(message.model, message.version) is not None:
                    self._submit(message)
                else:
                    self._parked.setdefault((message.model, message.version), []).append(message)
                    self._keeper.want(message.model, message.version)
            case Cancel():
                self._engine.cancel(message.id)
                self._fences.pop(message.id, None)
                for works in self._parked.values():
                    works[:] = [work for work in works if work.id != message.id]
            case Load():
                self._keeper.load(message.model, message.version)
            case Unload():
                self._keeper.unload(message.model, message.version)
            case Probe():
                self._beat()

    def _submit(self, work: Work) -> None:
        try:
            self._engine.submit(_chunk(work))
        except PushforwardError as error:
            self._fail(work, error)
        else:
            self._fences[work.id] = work.fence

    def _fail(self, work: Work, error: PushforwardError) -> None:
        self._channel.send(Failed(work.id, error.code, error.message, error.detail, work.fence))

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

    def _model(self, name: str, version: int) -> LoadedModel:
        model = self._keeper.get(name, version)
        assert model is not None  # looked up before submitting
        return model

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
        except Exception:
            # An engine in an unknown state must not answer anybody: the parent starts another.
            log.exception("worker failed")
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
