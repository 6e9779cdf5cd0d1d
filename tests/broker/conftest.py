import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.poison import poison

from pushforward.messages import Setup, Work

BUNDLED = Path(__file__).parents[2] / "model_store"
# Far below what float32 resolves, steps are tiny: no machine is done with these rows while a test runs.
ENDLESS = {"rows": 8_000, "rtol": 1e-12, "atol": 1e-12, "logp_atol": 1e-12, "max_steps": 1_000_000}


def setup_for(store: Path, **changes: object) -> Setup:
    fields = {
        "store": str(store),
        "versions": "moons/1",
        "load": "start",
        "watch_s": 0.1,
        "model_memory_mb": None,
        "device": "cpu",
        "slots": 64,
        "step_budget_ms": 1.5,
        "log_level": "warning",
        "log_format": "text",
    }
    return Setup(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def own_store(tmp_path: Path) -> Path:
    """A store with moons/1, to be changed."""
    shutil.copytree(BUNDLED / "moons" / "1", tmp_path / "store" / "moons" / "1")
    return tmp_path / "store"


@pytest.fixture
def setup() -> Setup:
    return setup_for(BUNDLED)


@pytest.fixture(params=["raise", "hang"])
def poisoned(request: pytest.FixtureRequest, own_store: Path) -> Setup:
    """Workers whose step fails, or never ends, for a row at 1e9."""
    poison(own_store / "moons" / "1", request.param)
    return setup_for(own_store)


def work(name: str, rows: int | np.ndarray = 3, **changes: object) -> Work:
    """A chunk for the model "moons"; more rows or a smaller tolerance make it take longer."""
    if isinstance(rows, int):
        rows = np.random.default_rng(0).normal(size=(rows, 2))
    fields = {
        "id": name,
        "model": "moons",
        "version": 1,
        "kind": "encode",
        "density": True,
        "precision": "float32",  # its programs are there once a version is loaded
        "rows": rows,
        "context": None,
        "rtol": 1e-5,
        "atol": 1e-5,
        "logp_atol": 1e-5,
        "max_steps": 1000,
    }
    return Work(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(name="work")
def work_fixture() -> object:
    return work
