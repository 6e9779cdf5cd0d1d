"""Servers of bundled models, and the requests that they are sent."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.e2e.bank import Bank, copy_models, version_of
from tests.e2e.traffic import Traffic
from tests.server import Server, servers


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    """How often a fault is repeated at other moments."""
    return int(request.config.getoption("--rounds"))


@pytest.fixture(scope="session", autouse=True)
def rate(request: pytest.FixtureRequest) -> None:
    """Requests a second, of traffic that does not say."""
    Traffic.default_rate = float(request.config.getoption("--rate"))


@pytest.fixture(scope="session")
def later(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Versions of "moons" that a test may publish; they have learnt something else, and say so in answers."""
    folder = tmp_path_factory.mktemp("later")
    return {
        number: version_of("moons", number, source, folder)
        for number, source in ((2, "pinwheel"), (3, "checkerboard"))
    }


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory, later: dict[int, Path]) -> Bank:
    store = tmp_path_factory.mktemp("bundled")
    copy_models(store)
    bank = Bank(store)
    for folder in later.values():
        bank.learn(folder)
    return bank


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of the test's own."""
    copy_models(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def start(store: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of the store, and sees to it that none is left over."""
    with servers(lambda: store) as start:
        yield start
