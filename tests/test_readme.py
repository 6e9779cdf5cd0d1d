"""Runs the code blocks of the README in order, as a reader would, and compares what they print.

``bash`` and ``python`` blocks are run, in a folder that looks like a fresh checkout whose ``.venv`` is set
up; blocks of any other kind are not.  A server that a block starts stays up for the blocks after it.  A
``json`` or ``text`` block is what the one before it prints: in JSON, fractions agree to 1e-3, and ``…`` is
anything (as a value, as a key for further keys, as a last element for further elements).
"""

import doctest
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server import free_port

ELLIPSIS = "…"
SERVER = re.compile(r"(make|pushforward|\.venv/bin/pushforward) serve\b")
FENCE = re.compile(r"^```(bash|python|json|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    line: int
    language: str
    code: str
    printed_as: str | None = None
    printed: str = ""


def blocks(text: str) -> list[Block]:
    found: list[Block] = []
    for match in FENCE.finditer(text):
        language, content = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        if language in {"bash", "python"}:
            found.append(Block(line, language, content))
        else:
            assert found, f"line {line}: no block before this one prints it"
            assert found[-1].printed_as is None, f"line {line}: line {found[-1].line} has printed already"
            found[-1].printed_as, found[-1].printed = language, content
    return found


def agree(printed: Any, promised: Any) -> bool:
    """Whether a JSON value is the promised one, up to rounding and what the promise leaves open."""
    if promised == ELLIPSIS:
        return True
    if isinstance(promised, dict) and isinstance(printed, dict):
        named = promised.keys() - {ELLIPSIS}
        keys_agree = named <= printed.keys() if ELLIPSIS in promised else named == printed.keys()
        return keys_agree and all(agree(printed[key], promised[key]) for key in named)
    if isinstance(promised, list) and isinstance(printed, list):
        if promised[-1:] == [ELLIPSIS]:
            promised = promised[:-1]
            printed = printed[: len(promised)]
        return len(printed) == len(promised) and all(map(agree, printed, promised))
    if isinstance(promised, float) and isinstance(printed, float):
        return printed == pytest.approx(promised, rel=1e-3, abs=1e-3)
    return type(printed) is type(promised) and printed == promised


def as_promised(printed: str, block: Block) -> bool:
    if block.printed_as is None:
        return True
    if block.printed_as == "json":
        return agree(json.loads(printed), json.loads(block.printed))
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(block.printed.replace(ELLIPSIS, "..."), printed, options)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def folder(checkout: Path, tmp_path: Path) -> Path:
    """A checkout to run in: links to everything but the models, which blocks may add to."""
    for path in checkout.iterdir():
        if path.name not in {".git", ".venv", "model_store"}:
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(checkout / "model_store", tmp_path / "model_store")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory, checkout: Path, port: int) -> dict[str, str]:
    """The environment of a reader who has activated .venv, and has curl."""
    tools = tmp_path_factory.mktemp("bin")
    if shutil.which("curl") is None:
        curl = tools / "curl"
        curl.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{checkout / "tests" / "curl.py"}" "$@"\n')
        curl.chmod(0o755)
    # A reader's shell has nothing of a make that runs these tests, such as the ARGS it was given.
    of_make = re.compile(r"MAKE|MFLAGS$|ARGS$|VENV$")
    ours = {name: value for name, value in os.environ.items() if not of_make.match(name)}
    path = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ["PATH"], str(tools)])
    return ours | {"PATH": path, "PUSHFORWARD_PORT": str(port)}


@contextmanager
def server(command: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Runs a command that serves until it is stopped; returns when it is ready for requests."""
    # Whoever runs this has set up the environment already.
    command = command.replace("make serve", "make --assume-old=.venv/.serving serve")
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, env=environment, start_new_session=True
    )
    try:
        ready = f"http://127.0.0.1:{environment['PUSHFORWARD_PORT']}/health/ready"
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, f"{command!r} ended with status {process.returncode}"
            assert time.monotonic() < deadline, f"{command!r} was not ready within five minutes"
            try:
                if httpx.get(ready).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def run(block: Block, folder: Path, environment: dict[str, str], servers: ExitStack) -> str:
    port = environment["PUSHFORWARD_PORT"]  # 8000 may be taken
    code = re.sub(r"(127\.0\.0\.1:|localhost:|--port )8000\b", rf"\g<1>{port}", block.code)
    if block.language == "bash":
        lines = []
        for line in code.splitlines():
            command = line.split(" #")[0].strip()
            if SERVER.match(command):
                servers.close()
                servers.enter_context(server(command, folder, environment))
            elif command == "make test":  # this is what make test runs, so it is only asked for its plan
                lines.append("make --dry-run test > /dev/null")
            else:
                lines.append(line)
        arguments = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
    else:
        arguments = [sys.executable, "-c", code]
    done = subprocess.run(arguments, check=False, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"README.md, line {block.line} ends with {done.returncode}\n{done.stderr}"
    return done.stdout


def test_the_readme_does_what_it_says(
    checkout: Path, folder: Path, environment: dict[str, str], port: int
) -> None:
    found = blocks((checkout / "README.md").read_text())
    assert found
    with ExitStack() as servers:
        for block in found:
            printed = run(block, folder, environment, servers)
            assert as_promised(printed, block), f"README.md, line {block.line} prints\n{printed}"


def test_what_counts_as_agreement() -> None:
    promise = {"x": [[1.25, 2.5], ELLIPSIS], "status": "ok", ELLIPSIS: ELLIPSIS}
    answer = {"x": [[1.2501, 2.5], [7.0, 7.0]], "status": "ok", "steps": 7}
    assert agree(answer, promise)
    assert not agree(answer | {"status": "max_steps"}, promise)
    assert not agree(answer | {"x": [[1.26, 2.5]]}, promise)
    assert not agree(answer | {"x": [[1.25]]}, promise)
    assert not agree(answer, {"x": ELLIPSIS, "status": "ok"})
    assert not agree({"is_anomaly": 1}, {"is_anomaly": True})
