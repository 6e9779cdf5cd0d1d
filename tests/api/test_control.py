"""The control plane: versions are loaded and unloaded, and their state is told."""

import asyncio
import logging
import shutil
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from pushforward.api.app import build
from pushforward.broker.base import Broker
from pushforward.dataplane import Admission, Dataplane, Limits
from pushforward.engine.request import Chunk, Kind
from pushforward.errors import InvalidModel, NotFound
from pushforward.loading import LoadedModel, load_model, run_chunk
from pushforward.messages import ModelState, Result, Work
from pushforward.metrics import Metrics
from pushforward.store.catalog import Catalog

ALL = 1 << 40


class SoloBroker(Broker):
    """A broker without workers: it loads and solves in threads of this process, one chunk after another."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._loaded: dict[tuple[str, int], LoadedModel] = {}
        self._states: dict[tuple[str, int], ModelState] = {}
        self._loading: set[asyncio.Task[None]] = set()
        self.fault: str | None = None

    async def start(self) -> None:
        pass

    async def admit(self, rows: int, nbytes: int) -> None:
        pass

    async def submit(self, work: Work) -> Result:
        model = self._loaded.get((work.model, work.version))
        if model is None:
            raise NotFound(f"{work.model}/{work.version} is not loaded.")
        names = ("density", "precision", "rows", "context", "rtol", "atol", "logp_atol", "max_steps", "t_end")
        fields: dict[str, Any] = {name: getattr(work, name) for name in names}
        chunk = Chunk(id=work.id, model=work.model, version=work.version, kind=Kind(work.kind), **fields)
        answer = await asyncio.to_thread(run_chunk, model, chunk)
        kept = {name: value for name, value in vars(answer).items() if name in Result.__struct_fields__}
        return Result(**kept)

    def unavailable(self) -> str | None:
        return self.fault

    def models(self) -> Mapping[tuple[str, int], ModelState]:
        return self._states

    def load(self, model: str, version: int) -> None:
        self._states[model, version] = ModelState(model, version, "loading")
        task = asyncio.get_running_loop().create_task(self._load(model, version))
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)

    def unload(self, model: str, version: int) -> None:
        self._loaded.pop((model, version), None)
        self._states[model, version] = ModelState(model, version, "unloaded")

    async def close(self) -> None:
        await asyncio.gather(*self._loading)

    async def _load(self, model: str, version: int) -> None:
        try:
            folder = self._catalog.resolve(model, version).folder
            self._loaded[model, version] = await asyncio.to_thread(load_model, folder)
            self._states[model, version] = ModelState(model, version, "ready")
        except InvalidModel as error:
            self._states[model, version] = ModelState(model, version, "failed", error.message)


@pytest.fixture
def copied(tmp_path: Path, checkout: Path) -> Path:
    """A store whose model moons has a sound version 1 and a broken version 2."""
    source = checkout / "model_store" / "moons" / "1"
    shutil.copytree(source, tmp_path / "moons" / "1")
    shutil.copytree(source, tmp_path / "moons" / "2")
    manifest = tmp_path / "moons" / "2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    program = next((tmp_path / "moons" / "2" / "programs").glob("*.onnx"))
    program.write_bytes(program.read_bytes()[:-1])
    Catalog(tmp_path).set_label("moons", "stable", 1)
    return tmp_path


def serving(store: Path, test: Callable[[httpx.AsyncClient, SoloBroker], Awaitable[None]]) -> None:
    """Run a test against a server in this process."""

    async def run() -> None:
        catalog, admission = Catalog(store), Admission(1000, ALL)
        broker = SoloBroker(catalog)
        limits = Limits(1000, 1000, 60_000, 60_000, chunk_rows=64, interactive_rows=256)
        app = build(Dataplane(catalog, broker, limits, admission), Metrics(admission), 1 << 20)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
            task = asyncio.create_task(server.serve(sockets=[listener]))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            try:
                async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                    await test(client, broker)
            finally:
                server.should_exit = True
                await task

    asyncio.run(asyncio.wait_for(run(), 120))


async def states(client: httpx.AsyncClient) -> list[tuple[int, list[str], str, str]]:
    answer = (await client.get("/v1/models/moons")).json()
    return [
        tuple(one[name] for name in ("version", "labels", "state", "reason")) for one in answer["versions"]
    ]


def test_a_version_is_loaded_used_and_unloaded_by_order(copied: Path) -> None:
    path = "/v1/models/moons/versions"

    async def test(client: httpx.AsyncClient, broker: SoloBroker) -> None:
        assert await states(client) == [(1, ["stable"], "unloaded", ""), (2, [], "unloaded", "")]
        ordered = await client.post(f"{path}/stable/load")
        assert ordered.status_code == 202
        assert ordered.json() == {"model": "moons", "version": 1, "state": "loading", "reason": ""}
        await asyncio.gather(*broker._loading)
        assert (await states(client))[0] == (1, ["stable"], "ready", "")
        answer = await client.post(f"{path}/1/log_density", json={"x": [[0.1, 0.2]]})
        assert answer.json()["status"] == ["ok"]
        ordered = await client.post(f"{path}/1/unload")
        assert (ordered.status_code, ordered.json()["state"]) == (202, "unloaded")
        assert (await client.post(f"{path}/1/log_density", json={"x": [[0.1, 0.2]]})).status_code == 404
        unknown = await client.post(f"{path}/7/load")
        assert (unknown.status_code, unknown.json()["known"]) == (404, ["1", "2", "stable"])
        assert (await client.get(f"{path}/1/load")).status_code == 405

    serving(copied, test)


def test_a_version_that_cannot_be_loaded_says_why_and_the_others_serve(copied: Path) -> None:
    async def test(client: httpx.AsyncClient, broker: SoloBroker) -> None:
        for version in (1, 2):
            assert (await client.post(f"/v1/models/moons/versions/{version}/load")).status_code == 202
        await asyncio.gather(*broker._loading)
        sound, broken = await states(client)
        assert sound[2:] == ("ready", "")
        assert broken[2] == "failed"
        assert "moons/2/programs/" in broken[3]
        (listed,) = (await client.get("/v1/models")).json()["models"]
        assert [one["state"] for one in listed["versions"]] == ["ready", "failed"]
        assert (await client.post("/v1/models/moons/sample", json={"n": 2})).status_code == 200
        told = (await client.get("/metrics")).text
        assert 'pushforward_model_state{model="moons",state="failed",version="2"} 1.0' in told

    serving(copied, test)


def test_readiness_says_why_not_and_liveness_does_not_ask(copied: Path) -> None:
    async def test(client: httpx.AsyncClient, broker: SoloBroker) -> None:
        assert (await client.get("/health/ready")).json() == {"status": "ready"}
        broker.fault = "No worker is left."
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()["detail"]) == (503, "No worker is left.")
        assert (await client.get("/health/live")).json() == {"status": "live"}

    serving(copied, test)


def test_an_order_leaves_a_line_that_says_who_gave_it(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(client: httpx.AsyncClient, broker: SoloBroker) -> None:
        await client.post("/v1/models/moons/versions/1/load", headers={"x-request-id": "mine"})
        await client.post("/v1/models/moons/versions/9/unload")

    with caplog.at_level(logging.INFO, "pushforward.request"):
        serving(copied, test)
    lines: list[Any] = [vars(record)["fields"] for record in caplog.records if record.msg == "request"]
    assert [(line["peer"], line["path"], line["status"]) for line in lines] == [
        ("127.0.0.1", "/v1/models/moons/versions/1/load", 202),
        ("127.0.0.1", "/v1/models/moons/versions/9/unload", 404),
    ]
    assert (lines[0]["request"], lines[0]["model"], lines[0]["version"]) == ("mine", "moons", 1)
