"""What every test shares: one thread for tensor work, repeatable random numbers, the checkout."""

import os
from pathlib import Path

# Tests run beside worker processes.  OpenMP reads this when torch or scikit-learn is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

# The same examples on every run, and no verdict that depends on how busy the machine is.
hypothesis.settings.register_profile(
    "project",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("project")


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder of the checkout, which holds pyproject.toml and model_store."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts every test from the same seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the models of ``tests.published``; tests that change it work on a copy."""
    from tests.published import publish_models

    root = tmp_path_factory.mktemp("store") / "models"
    publish_models(root)
    return root
