"""The worker process, spoken to as its parent speaks to it: frames over a socket."""

import itertools
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.poison import rot

from pushforward.engine.request import Status
from pushforward.messages import (
    UNSOUND,
    Beat,
    Cancel,
    Counts,
    Failed,
    FrameReader,
    FromWorker,
    ModelState,
    Probe,
    Ready,
    Result,
    Setup,
    Work,
    decode_from_worker,
    frame,
)

PATIENCE_S = 60
BUNDLED = Path(__file__).parents[1] / "model_store"


class Parent:
    """The other end of a worker."""

    def __init__(self, store: Path, versions: str, load: str) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(PATIENCE_S)
        setup = Setup(str(store), versions, load, 0.1, None, "cpu", 16, 4.0, "info", "json")
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "pushforward.worker",
                    str(theirs.fileno()),
                    msgspec.json.encode(setup).decode(),
                ],
                pass_fds=[theirs.fileno()],
                stderr=subprocess.PIPE,
                text=True,
            )
        self.frames = FrameReader()
        self.unread: list[FromWorker] = []

    def next(self, *kinds: type) -> FromWorker:
        """The next message, but for beats and news of models; or the next of one of the kinds."""
        while True:
            while not self.unread:
                data = self.socket.recv(1 << 16)
                assert data, "the worker closed the socket"
                self.unread += map(decode_from_worker, self.frames.feed(data))
            message = self.unread.pop(0)
            if isinstance(message, kinds or (Ready, Result, Failed)):
                return message

    def leave(self) -> tuple[int, str]:
        """Closes the socket; the worker's exit status and log."""
        self.socket.close()
        _, log = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, log


def work(
    id: str, rows: int = 2, *, model: str = "moons", version: int = 1, deadline: float | None = None
) -> Work:
    x = np.random.default_rng(1).normal(size=(rows, 2))
    return Work(
        id,
        model,
        version,
        "encode",
        True,
        "float32",
        x,
        None,
        1e-5,
        1e-5,
        1e-5,
        1000,
        deadline=deadline,
        fence=7,
    )


@pytest.fixture
def hire() -> Iterator[Callable[..., Parent]]:
    parents = []

    def hire(versions: str = "moons/1", load: str = "start", at: Path = BUNDLED) -> Parent:
        parents.append(Parent(at, versions, load))
        return parents[-1]

    yield hire
    for parent in parents:
        parent.socket.close()
        if parent.process.poll() is None:
            parent.process.communicate(timeout=PATIENCE_S)


def test_it_loads_what_it_is_told_and_says_what_failed(hire: Callable[..., Parent]) -> None:
    parent = hire("moons/1,moon/1")
    states = {}
    while not isinstance(message := parent.next(ModelState, Ready), Ready):
        states[message.model, message.version] = message
    assert states["moons", 1].state == "ready"
    assert states["moon", 1].state == "failed"
    assert "no model 'moon'" in states["moon", 1].reason
    assert message.seconds > 0
    assert parent.leave()[0] == 0


def test_chunks_are_answered_as_they_finish_and_errors_in_between(hire: Callable[..., Parent]) -> None:
    parent = hire()
    assert isinstance(parent.next(), Ready)
    parent.socket.sendall(
        frame(work("many", 200)) + frame(work("none", model="moon")) + frame(work("few", 1))
    )
    answers = {}
    while len(answers) < 3:
        message = parent.next()
        assert isinstance(message, Result | Failed)
        assert message.fence == 7
        answers[message.id] = message
    failed = answers["none"]
    assert isinstance(failed, Failed)
    assert failed.code == "not-found"
    assert "no model 'moon'" in failed.message
    assert list(answers).index("few") < list(answers).index("many")
    assert [len(answers[id].status) for id in ("few", "many")] == [1, 200]  # type: ignore[union-attr]


def test_a_chunk_waits_for_its_version_to_be_loaded(hire: Callable[..., Parent]) -> None:
    parent = hire(load="first-use")
    assert isinstance(parent.next(), Ready)
    parent.socket.sendall(frame(work("a")) + frame(work("gone")) + frame(Cancel("gone")) + frame(work("b")))
    assert [parent.next().id for _ in range(2)] == ["a", "b"]  # type: ignore[union-attr]


def test_it_says_how_far_it_is_while_it_works_and_when_it_is_asked(hire: Callable[..., Parent]) -> None:
    parent = hire()
    assert isinstance(parent.next(), Ready)
    parent.socket.sendall(frame(Probe()))
    idle = parent.next(Beat)
    assert isinstance(idle, Beat)
    assert (idle.running, idle.waiting) == (0, 0)
    parent.socket.sendall(frame(work("a", 500)))
    beats = [parent.next(Beat)]
    while beats[-1].running or beats[-1].waiting or not beats[-1].steps:  # type: ignore[union-attr]
        beats.append(parent.next(Beat))
    assert sum(sum(beat.counts.status.values()) for beat in beats) == 500  # type: ignore[union-attr]
    assert sum(sum(beat.counts.step_seconds) for beat in beats) == beats[-1].steps - idle.steps  # type: ignore[union-attr]


def test_without_rows_it_proves_itself_by_a_golden_row_that_counts_nowhere(
    hire: Callable[..., Parent],
) -> None:
    parent = hire("moons/1,wine/1")
    assert isinstance(parent.next(), Ready)
    steps = [0]
    for _ in range(3):
        parent.socket.sendall(frame(Probe()))
        beat = parent.next(Beat)
        assert isinstance(beat, Beat)
        assert beat.steps > steps[-1]
        assert (beat.running, beat.waiting, beat.counts) == (0, 0, Counts())
        steps.append(beat.steps)
    first, second, third = (later - sooner for sooner, later in itertools.pairwise(steps))
    assert first != second  # they take turns
    assert first == third


def test_rows_that_come_while_it_proves_itself_are_served_and_counted(hire: Callable[..., Parent]) -> None:
    parent = hire()
    assert isinstance(parent.next(), Ready)
    parent.socket.sendall(frame(Probe()) + frame(work("a", 5)) + frame(Probe()))
    kinds: list[type] = []
    counts = Counter[int]()
    while sum(counts.values()) < 5:
        message = parent.next(Beat, Result)
        kinds.append(type(message))
        if isinstance(message, Beat):
            counts.update(message.counts.status)
    assert kinds.count(Result) == 1
    assert counts == {Status.OK: 5}


def test_with_nothing_loaded_its_loop_is_all_it_has_to_prove(hire: Callable[..., Parent]) -> None:
    parent = hire(load="first-use")
    assert isinstance(parent.next(), Ready)
    parent.socket.sendall(frame(Probe()))
    assert parent.next(Beat) == Beat(0, 0, 0, Counts())


def test_weights_that_have_changed_in_memory_end_it_before_a_request_meets_them(
    hire: Callable[..., Parent],
) -> None:
    parent = hire()
    assert isinstance(parent.next(), Ready)
    assert rot(parent.process.pid, BUNDLED / "moons" / "1")
    parent.socket.sendall(frame(Probe()))
    _, log = parent.process.communicate(timeout=PATIENCE_S)
    assert parent.process.returncode == UNSOUND
    assert '"event":"worker unsound"' in log
    assert "A golden row of moons/1 does not give the bits" in log


def test_messages_may_arrive_in_pieces(hire: Callable[..., Parent]) -> None:
    parent = hire()
    data = frame(work("a", 20))
    assert isinstance(parent.next(), Ready)
    for first in range(0, len(data), 50):
        parent.socket.sendall(data[first : first + 50])
    result = parent.next()
    assert isinstance(result, Result)
    assert result.status.tolist() == [Status.OK] * 20


def test_a_reader_that_is_slow_does_not_lose_anything(hire: Callable[..., Parent]) -> None:
    parent = hire()
    parent.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for number in range(40):
        parent.socket.sendall(frame(work(str(number), 100)))
    assert isinstance(parent.next(), Ready)
    assert {parent.next().id for _ in range(40)} == {str(number) for number in range(40)}  # type: ignore[union-attr]


def test_cancelled_rows_are_not_answered(hire: Callable[..., Parent]) -> None:
    parent = hire()
    assert isinstance(parent.next(), Ready)
    parent.socket.sendall(frame(work("gone", 5000)) + frame(Cancel("gone")) + frame(Cancel("never was")))
    parent.socket.sendall(frame(work("next")))
    result = parent.next()
    assert isinstance(result, Result)
    assert result.id == "next"


def test_a_deadline_is_wall_clock_time(hire: Callable[..., Parent]) -> None:
    parent = hire()
    assert isinstance(parent.next(), Ready)
    parent.socket.sendall(frame(work("late", deadline=1.0)))
    result = parent.next()
    assert isinstance(result, Result)
    assert result.status.tolist() == [Status.DEADLINE] * 2


def test_signals_do_not_end_it_and_the_end_of_its_socket_does(hire: Callable[..., Parent]) -> None:
    parent = hire()
    assert isinstance(parent.next(), Ready)
    parent.process.send_signal(signal.SIGTERM)
    parent.process.send_signal(signal.SIGINT)
    parent.socket.sendall(frame(work("a")))
    assert isinstance(parent.next(), Result)
    parent.socket.sendall(frame(work("unfinished", 5000)))
    assert parent.leave()[0] == 0


def test_nonsense_ends_it_with_a_word_in_the_log(hire: Callable[..., Parent]) -> None:
    parent = hire()
    assert isinstance(parent.next(), Ready)
    parent.socket.sendall(b"\x03\x00\x00\x00abc")
    _, log = parent.process.communicate(timeout=PATIENCE_S)
    assert parent.process.returncode == 1
    assert '"event":"worker failed"' in log
