from collections.abc import Callable, Iterator

import httpx
import pytest
from tests.server import Server, Start, gone, servers, until


@pytest.fixture(scope="session")
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts servers, by default of ``store``, and sees to it that none is left over."""
    with servers(lambda: request.getfixturevalue("store")) as start:
        yield start


@pytest.fixture(scope="session")
def server(start: Start) -> Server:
    """One server for all tests that leave it as it was."""
    return start()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(name="until")
def until_fixture() -> Callable[[Callable[[], bool]], bool]:
    return until


@pytest.fixture(name="gone")
def gone_fixture() -> Callable[[int], bool]:
    return gone
