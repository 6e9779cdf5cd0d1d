"""An S3 server on loopback that can go away and come back with what it held."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import botocore.session
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer
from tests.server import free_port

ACCESS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}


class S3:
    """The server.

    Attributes:
        requests: a line for each that it answered.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._port = free_port()
        self._log = logging.getLogger("werkzeug")
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self.requests.append(record.getMessage())  # type: ignore[method-assign]
        self.start()

    def start(self) -> None:
        self._log.setLevel(logging.INFO)
        self._log.propagate = False
        self._log.handlers = [self._handler]
        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs in its environment to use it."""
        return ACCESS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}"}

    def client(self, service: str) -> Any:
        return botocore.session.get_session().create_client(
            service,
            endpoint_url=self.variables["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="tests",
            aws_secret_access_key="tests",
        )

    def put(self, bucket: str, key: str, content: bytes) -> None:
        """As if it had been uploaded, in no time."""
        self._held.put_object(bucket, key, content)

    def remove(self, bucket: str, path: str) -> None:
        """Delete an object, and those that are under it."""
        for key in list(self._held.buckets[bucket].keys):
            if f"{key}/".startswith(f"{path}/"):
                self._held.delete_object(bucket, key)

    def content(self, url: str, path: str) -> dict[str, bytes]:
        """What is under a path of a store, by its path from there."""
        bucket, _, prefix = f"{url}/{path}/".removeprefix("s3://").partition("/")
        keys = self._held.buckets[bucket].keys
        return {key.removeprefix(prefix): keys[key].value for key in list(keys) if key.startswith(prefix)}

    def remove_buckets(self) -> None:
        """Forget what another server of this process held."""
        self._held.reset()

    def create_bucket(self, name: str) -> None:
        self._held.create_bucket(name, "us-east-1")

    def upload(self, folder: Path, bucket: str, prefix: str) -> None:
        """The files under a folder, manifests last."""
        files = (path for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: (path.name == "manifest.json", path)):
            self.put(bucket, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    @property
    def _held(self) -> Any:
        return s3_backends["123456789012"]["aws"]


@contextmanager
def s3() -> Iterator[S3]:
    server = S3()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that count while the block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
