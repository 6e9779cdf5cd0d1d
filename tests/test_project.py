"""Habits that the project promises and that nothing else would hold it to."""

import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pushforward

SERVING_PATH = [
    "pushforward",
    "pushforward.api.app",
    "pushforward.bootstrap",
    "pushforward.cli",
    "pushforward.dataplane",
    "pushforward.engine.engine",
    "pushforward.worker",
]
NEVER_SERVED = {"onnx", "onnxscript", "pyarrow", "scipy", "sklearn", "torch", "torchdiffeq"}


def test_the_newest_version_in_the_changelog_is_the_package_version(checkout: Path) -> None:
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (checkout / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == pushforward.__version__


@pytest.mark.parametrize("module", SERVING_PATH)
def test_the_serving_path_loads_nothing_of_training(module: str) -> None:
    program = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert "pushforward" in loaded
    assert not loaded & NEVER_SERVED


def test_onnx_runtime_tells_nobody_what_it_does(tmp_path: Path) -> None:
    """Where it would, it keeps an id of the machine and what it has yet to send in the cache folder.

    It is silent of itself where a variable says that this is continuous integration: none is handed on.
    """
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    program = "import onnxruntime; onnxruntime.get_available_providers()"
    for first, told in (("", True), ("import pushforward; ", False)):
        home = tmp_path / str(told)
        home.mkdir()
        places = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
        subprocess.run([sys.executable, "-c", first + program], check=True, env=kept | places)
        assert any(home.iterdir()) is told


def test_every_declared_dependency_is_pinned_exactly(checkout: Path) -> None:
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = itertools.chain(project["dependencies"], *extras)
    names = {re.match(r"[a-z0-9-]+", requirement, re.IGNORECASE)[0].lower() for requirement in declared}
    lines = (checkout / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert names - {"pushforward"} <= pins.keys()


def test_the_continuous_integration_script_can_be_executed(checkout: Path) -> None:
    assert os.access(checkout / ".ci" / "run", os.X_OK)
