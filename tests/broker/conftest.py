from pathlib import Path

import numpy as np
import pytest

from pushforward.messages import Setup, Work


@pytest.fixture
def setup(store: Path) -> Setup:
    return Setup(str(store), [("pair", 1)], slots=64, log_level="warning", log_format="text")


def work(name: str, rows: int = 3, **changes: object) -> Work:
    """A chunk for the model "pair"; more rows or a smaller tolerance make it take longer."""
    fields = {
        "id": name,
        "model": "pair",
        "version": 1,
        "kind": "encode",
        "density": True,
        "precision": "float64",
        "rows": np.random.default_rng(0).normal(size=(rows, 2)),
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
