"""The worker process: an engine at the end of a socket.

    python -m pushforward.worker FD SETUP

Loads models, says ``Ready``, then turns in one loop: take messages (waiting only when no row runs), make
one engine step, send the answers that are finished. It ends when its socket does.
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
from pushforward.errors import PushforwardError
from pushforward.loading import LoadedModel, load_model
from pushforward.messages import (
    Cancel,
    Failed,
    FrameReader,
    FromWorker,
    Ready,
    Result,
    Setup,
    ToWorker,
    Work,
    decode_to_worker,
    frame,
)
from pushforward.store.catalog import Catalog

__all__ = ["Channel", "Models", "main", "serve"]

log = logging.getLogger("pushforward.worker")  # __name__ is "__main__" here

_LOOK_S = 0.0002  # between two looks at the socket: the step of one row is so short that a look would be felt
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

    def receive(self, *, wait: bool) -> list[ToWorker]:
        """Messages that have arrived.

        Args:
            wait: until something happens: a message, the end of the stream, or room for what is unsent.
        """
        if not self._poll.poll(None if wait else 0):
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


class Models:
    """The models of this process, loaded when they are first asked for."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._loaded: dict[tuple[str, int], LoadedModel] = {}

    def __call__(self, name: str, version: int) -> LoadedModel:
        """The loaded model.

        Raises:
            NotFound: when the store has no such version.
            InvalidModel: when the version does not verify, load, or reproduce its golden rows.
        """
        model = self._loaded.get((name, version))
        if model is None:
            started = time.monotonic()
            model = load_model(self._catalog.resolve(name, version).folder)
            self._loaded[name, version] = model
            seconds = round(time.monotonic() - started, 3)
            log.info("model loaded", extra=logs.fields(model=name, version=version, load_s=seconds))
        return model


def serve(channel: Channel, setup: Setup) -> None:
    """Load what ``setup`` says and answer chunks until the channel ends."""
    models = Models(Catalog(Path(setup.store)))
    channel.send(_load(models, setup))
    gc.freeze()  # what is there now stays: collections need not look at it again and again
    engine = Engine(models, slots=setup.slots)
    look = 0.0
    while True:
        now = time.monotonic()
        if now >= look or not engine.busy:
            for message in channel.receive(wait=not engine.busy):
                _take(message, engine, channel)
            if not channel.open:
                return
            look = now + _LOOK_S
        for answer in engine.step():
            channel.send(_result(answer))


def _load(models: Models, setup: Setup) -> Ready:
    started = time.monotonic()
    loaded: list[tuple[str, int]] = []
    failed: list[tuple[str, int, str]] = []
    for name, version in setup.models:
        try:
            models(name, version)
            loaded.append((name, version))
        except PushforwardError as error:
            failed.append((name, version, error.message))
    return Ready(loaded, failed, time.monotonic() - started)


def _take(message: ToWorker, engine: Engine, channel: Channel) -> None:
    match message:
        case Work():
            try:
                engine.submit(_chunk(message))
            except PushforwardError as error:
                channel.send(Failed(message.id, error.code, error.message, error.detail))
        case Cancel():
            engine.cancel(message.id)


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
    )


def _result(answer: Answer) -> Result:
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
            serve(Channel(sock), options)
        except Exception:
            # An engine in an unknown state must not answer anybody: the parent starts another.
            log.exception("worker failed")
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
