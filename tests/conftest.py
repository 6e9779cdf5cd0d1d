"""What every test shares: one thread for tensor work, repeatable random numbers, the checkout."""

import os
import tempfile
from pathlib import Path

# Tests run beside worker processes.  OpenMP reads this when torch or scikit-learn is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
from tests.shared import VARIABLE, once

# The same examples on every run, and no verdict that depends on how busy the machine is.
hypothesis.settings.register_profile(
    "project",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Faults in ``tests/e2e`` are repeated at random moments: by default, a few times."""
    parser.addoption("--rounds", type=int, default=2, help="how often to repeat each fault (default: 2)")
    parser.addoption("--rate", type=float, default=40, help="requests a second meanwhile (default: 40)")


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder that the processes of this run share; those started by it inherit its name."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="pushforward-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ[VARIABLE] = folder.name


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder of the checkout, which holds pyproject.toml and model_store."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts every test from the same seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def store() -> Path:
    """A store with the models of ``tests.published``; tests that change it work on a copy."""
    from tests.published import publish_models

    return once("models", publish_models)
