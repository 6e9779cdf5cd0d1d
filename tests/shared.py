"""Folders that take long to fill, filled once a run, whichever of its processes is the first to ask."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pushforward

VARIABLE = "TEST_RUN_FOLDER"  # the run's own folder: conftest.py makes it, and removes it when the run ends


def once(name: str, fill: Callable[[Path], object]) -> Path:
    """The folder of this name, whole: the first to ask fills it, others wait until it is there."""
    folder = Path(os.environ[VARIABLE]) / name
    with _lock_of(name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            staging = folder.with_name(f"{name}.{os.getpid()}")
            staging.mkdir()
            fill(staging)
            staging.rename(folder)
    return folder


def being_filled(name: str) -> bool:
    """Whether another process is at it just now."""
    with _lock_of(name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lock_of(name: str) -> Path:
    return Path(os.environ[VARIABLE]) / f"{name}.lock"


def python(program: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that can import the project and its tests."""
    paths = [str(Path(pushforward.__file__).parents[1]), str(Path(__file__).parents[1])]
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def side_by_side(program: str, arguments: Sequence[Sequence[str]]) -> None:
    """Run a program once for each list of arguments, all at the same time, and wait until all are done."""
    processes = [python(program, *each) for each in arguments]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
