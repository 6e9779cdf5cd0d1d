"""A store at a URL is what a folder would be, and stays so when it is damaged, hostile or away."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import moto.settings
import pytest
from tests.s3 import S3, environment, s3

from pushforward.errors import Conflict, InvalidModel, NotFound, PublishFailed, Unavailable, UsageError
from pushforward.store.catalog import Catalog
from pushforward.store.mirror import Mirror
from pushforward.store.opening import opened

BOUND = 1_000_000_000


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3() as server, environment(server.variables):
        yield server


class Store:
    """A store at a URL, with what the catalog of ``conftest`` has."""

    def __init__(self, url: str, catalog: Catalog) -> None:
        self.url = url
        self.add(catalog.root)

    def add(self, folder: Path, at: str = "") -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.write(at + path.relative_to(folder).as_posix(), path.read_bytes())

    def write(self, path: str, content: bytes) -> None:
        fs, base = fsspec.url_to_fs(self.url)
        fs.makedirs(f"{base}/{path}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{base}/{path}", content)

    def read(self, path: str) -> bytes:
        fs, base = fsspec.url_to_fs(self.url, skip_instance_cache=True)
        return fs.cat_file(f"{base}/{path}")

    def remove(self, path: str) -> None:
        fs, base = fsspec.url_to_fs(self.url)
        fs.rm(f"{base}/{path}".rstrip("/"), recursive=True)


class InS3(Store):
    def __init__(self, server: S3, bucket: str, catalog: Catalog) -> None:
        server.create_bucket(bucket)
        self.server, self.bucket = server, bucket
        super().__init__(f"s3://{bucket}/some/models", catalog)

    def write(self, path: str, content: bytes) -> None:
        self.server.put(self.bucket, f"some/models/{path}", content)

    def remove(self, path: str) -> None:
        self.server.remove(self.bucket, f"some/models/{path}".rstrip("/"))


@pytest.fixture
def in_s3(server: S3, tmp_path: Path, catalog: Catalog) -> InS3:
    name = "".join(letter for letter in tmp_path.name.lower() if letter.isalnum())[-60:]
    return InS3(server, f"{name}b", catalog)


@pytest.fixture
def in_folder(tmp_path: Path, catalog: Catalog) -> Store:
    return Store(f"file://{tmp_path}/remote", catalog)


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, catalog: Catalog) -> Store:
    if request.param == "memory":
        return Store(f"memory://{tmp_path}/models", catalog)
    return request.getfixturevalue("in_s3" if request.param == "s3" else "in_folder")


@pytest.fixture
def mirror(store: Store, tmp_path: Path) -> Mirror:
    return mirror_of(store, tmp_path)


def mirror_of(store: Store, tmp_path: Path, bound: int = BOUND) -> Mirror:
    mirror = Mirror(store.url, tmp_path / "cache", bound)
    mirror.open()
    return mirror


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def later(mirror: Mirror) -> None:
    """As if what is in the cache had come there a while ago."""
    for path in [*mirror.root.glob("*/*"), *mirror.root.glob("*/*/*")]:
        os.utime(path, (time.time() - 60,) * 2)


def test_it_has_what_the_store_has_and_files_come_when_they_are_needed(mirror: Mirror) -> None:
    assert {name: mirror.versions(name) for name in mirror.models()} == {"moons": [1, 2, 10], "wine": [1]}
    found = mirror.resolve("moons")
    assert files(found.folder) == ["manifest.json"]
    mirror.fetch(found, "calibration.safetensors")
    assert files(found.folder) == ["calibration.safetensors", "manifest.json"]
    mirror.fetch(found)
    assert mirror.verify(found.folder) == found.manifest
    assert files(mirror.root / "moons" / "1") == ["manifest.json"]


def test_what_is_new_and_what_is_gone_is_noticed(store: Store, mirror: Mirror, write_version) -> None:
    os.utime(mirror.root / "moons", (0, 0))
    store.add(write_version("moons", 11), "moons/11/")
    store.write("moons/labels.json", b'{"stable": 11}')
    mirror.refresh()
    assert mirror.resolve("moons").manifest.version == 11
    assert (mirror.root / "moons").stat().st_mtime_ns > 0  # by which the resolver notices
    store.write("moons/labels.json", b'{"stable": 2, "canary": 11}')
    store.remove("moons/1")
    later(mirror)
    mirror.refresh()
    assert mirror.versions("moons") == [2, 10, 11]
    assert mirror.labels("moons") == {"canary": 11, "stable": 2}
    store.remove("moons/labels.json")
    later(mirror)
    mirror.refresh()
    assert mirror.labels("moons") == {}


def test_a_version_without_its_manifest_is_not_there_yet(in_folder: Store, tmp_path: Path) -> None:
    store, mirror = in_folder, mirror_of(in_folder, tmp_path)
    store.write("moons/12/weights.safetensors", b"on its way")
    mirror.refresh()
    assert mirror.versions("moons") == [1, 2, 10]


def lost(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def changed(path: Path) -> None:
    path.write_bytes(bytes(len(path.read_bytes())))


def linked(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    other = path.parents[3] / ".elsewhere"
    other.write_bytes(content)
    path.symlink_to(other)


@pytest.mark.parametrize("damage", [lost, cut, changed, linked])
def test_a_file_of_the_cache_that_was_damaged_is_fetched_again(
    damage, in_folder: Store, tmp_path: Path
) -> None:
    mirror = mirror_of(in_folder, tmp_path)
    found = mirror.resolve("moons", 2)
    mirror.fetch(found)
    damage(found.folder / "weights.safetensors")
    with pytest.raises(InvalidModel):
        mirror.verify(found.folder)
    mirror.fetch(found)
    mirror.verify(found.folder)


@pytest.mark.parametrize("content", [None, b"other", bytes(300), bytes(400)])
def test_a_file_that_the_store_lost_or_changed_is_refused_until_it_is_mended(
    content: bytes | None, store: Store, mirror: Mirror, catalog: Catalog
) -> None:
    found = mirror.resolve("moons", 2)
    store.remove("moons/2/programs/encode.onnx")
    if content is not None:
        store.write("moons/2/programs/encode.onnx", content)
    mirror.refresh()
    for _ in range(2):
        with pytest.raises(InvalidModel, match=r"moons/2/programs/encode.onnx .*(missing|SHA-256)"):
            mirror.fetch(found)
    assert "programs/encode.onnx" not in files(found.folder)
    os.utime(found.folder, (0, 0))
    store.write("moons/2/programs/encode.onnx", (catalog.root / "moons/2/programs/encode.onnx").read_bytes())
    mirror.refresh()
    assert found.folder.stat().st_mtime_ns > 0  # by which the keeper tries again
    mirror.fetch(found)
    mirror.verify(found.folder)


def test_a_manifest_that_was_mended_is_read_again(in_folder: Store, tmp_path: Path, catalog: Catalog) -> None:
    store, mirror = in_folder, mirror_of(in_folder, tmp_path)
    store.write("wine/1/manifest.json", b"{}")
    mirror.refresh()
    with pytest.raises(InvalidModel, match="not a valid manifest"):
        mirror.resolve("wine")
    store.write("wine/1/manifest.json", (catalog.root / "wine/1/manifest.json").read_bytes())
    mirror.refresh()
    assert mirror.resolve("wine").manifest.version == 1


def test_nothing_hostile_leaves_the_cache(server: S3, in_s3: Store, tmp_path: Path, catalog: Catalog) -> None:

    def put(path: str, content: bytes) -> None:
        server.put(in_s3.bucket, f"some/models/{path}", content)

    good = (catalog.root / "moons/1/manifest.json").read_bytes()
    hostile = [
        "../evil/1",
        "moons/../../evil",
        "/etc/1",
        "moons/../1",
        "Moons/1",
        "mооns/1",  # with Cyrillic letters
        "moons/٣",
        "moons/03",
        "moons/1/2",
        ".locks/1",
        "moons\x01/1",
        "x" * 80 + "/1",
    ]
    for name in hostile:
        put(f"{name}/manifest.json", good)
        put(f"{name}/labels.json", b'{"stable": 1}')
    put("moons/20/manifest.json", good.replace(b"weights.", b"../weights."))
    put("moons/21/manifest.json", b" " * (3 << 20))
    put("moons/22/manifest.json", b"")
    put("wine/labels.json", b" " * (1 << 20))
    mirror = mirror_of(in_s3, tmp_path / "apart")
    outside = [
        path for path in files(tmp_path / "apart") if not path.startswith(f"cache/{mirror.root.name}/")
    ]
    assert outside == []
    assert sorted(path for path in files(mirror.root) if not path.startswith(".")) == [
        "moons/1/manifest.json",
        "moons/10/manifest.json",
        "moons/2/manifest.json",
        "moons/20/manifest.json",
        "moons/21/manifest.json",
        "moons/22/manifest.json",
        "wine/1/manifest.json",
        "wine/labels.json",
    ]
    assert max(path.stat().st_size for path in mirror.root.rglob("*")) <= (1 << 20) + 1
    for number, reason in ((20, "not a valid manifest"), (21, "larger than"), (22, "not a valid manifest")):
        with pytest.raises(InvalidModel, match=reason):
            mirror.resolve("moons", number)
    with pytest.raises(InvalidModel, match="larger than"):
        mirror.labels("wine")


def test_labels_are_changed_in_the_store(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    mirror.set_label("moons", "stable", 1)
    mirror.set_label("moons", "canary", 10)
    mirror.set_label("moons", "stable", "canary")
    mirror.remove_label("moons", "canary")
    with pytest.raises(NotFound, match="no version"):
        mirror.set_label("moons", "stable", 7)
    assert mirror.labels("moons") == {"stable": 10}
    assert json.loads(store.read("moons/labels.json")) == {"stable": 10}
    assert mirror_of(store, tmp_path / "other").labels("moons") == {"stable": 10}


@pytest.mark.parametrize("first", [True, False])
def test_of_two_who_change_labels_at_once_one_is_told(
    first: bool, in_s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirror_of(in_s3, tmp_path)
    if not first:
        mirror.set_label("moons", "stable", 1)
    other, read = mirror_of(in_s3, tmp_path / "other"), mirror.labels
    monkeypatch.setattr(mirror, "labels", lambda name: (other.set_label(name, "canary", 2), read(name))[1])
    with pytest.raises(Conflict, match="by someone else"):
        mirror.set_label("moons", "stable", 10)
    monkeypatch.undo()
    mirror.set_label("moons", "stable", 10)
    assert mirror.labels("moons") == {"canary": 2, "stable": 10}


def test_a_look_is_one_request_and_a_start_from_a_warm_cache_as_well(
    server: S3, in_s3: Store, tmp_path: Path
) -> None:
    mirror = mirror_of(in_s3, tmp_path)
    mirror.fetch(mirror.resolve("moons"))
    server.requests.clear()
    mirror.refresh()
    mirror.fetch(mirror.resolve("moons"))
    mirror_of(in_s3, tmp_path)
    assert [line.split('"')[1].split("?")[1][:11] for line in server.requests] == ["list-type=2"] * 2


def test_an_outage_takes_nothing_away_and_passes(
    server: S3, in_s3: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = mirror_of(in_s3, tmp_path)
    cached, other = mirror.resolve("moons", 1), mirror.resolve("moons", 2)
    mirror.fetch(cached)
    server.stop()
    try:
        with pytest.raises(Unavailable, match="Could not connect"):
            mirror.fetch(other)
        with mirror.followed(0.05):
            wait_for((mirror.root / ".fault").exists)
            with pytest.raises(Unavailable, match="cannot be listed") as at_once:
                mirror.fetch(other)
            assert at_once.value.retry_after is not None
            mirror.fetch(cached)
            mirror.verify(cached.folder)
            again = mirror_of(in_s3, tmp_path)  # as a server that is started meanwhile
            assert again.models() == ["moons", "wine"]
            again.fetch(again.resolve("moons", 1))
            with pytest.raises(Unavailable, match="cannot be listed"):
                mirror_of(in_s3, tmp_path / "empty")
            server.start()
            wait_for(lambda: not (mirror.root / ".fault").exists())
    finally:
        server.stop()
        server.start()
    mirror.fetch(other)
    mirror.verify(other.folder)
    said = [record.message for record in caplog.records if record.name.endswith("mirror")]
    assert said.count("store cannot be read") == 2  # once by the watch, once by the one that was started
    assert said[-1] == "store can be read again"


def test_a_store_that_is_empty_all_of_a_sudden_takes_nothing_away(store: Store, mirror: Mirror) -> None:
    store.remove("")
    later(mirror)
    with pytest.raises(NotFound, match="no models"):
        mirror.refresh()
    assert mirror.versions("moons") == [1, 2, 10]


def test_what_a_download_did_not_finish_is_not_there(
    in_folder: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirror_of(in_folder, tmp_path)
    found, read = mirror.resolve("moons", 1), mirror.remote.read

    def breaks(path: str, start: int, end: int) -> bytes:
        if start > 0:
            raise Unavailable("The connection was lost.")
        return read(path, start, end)

    monkeypatch.setattr("pushforward.store.mirror._PIECE_BYTES", 250)
    with monkeypatch.context() as patch:
        patch.setattr(mirror.remote, "read", breaks)
        with pytest.raises(Unavailable):
            mirror.fetch(found)
    assert "programs/encode.onnx" not in files(found.folder)
    assert files(mirror.root / ".partial") == []
    mirror.fetch(found)  # in pieces
    mirror.verify(found.folder)


class Web(ThreadingHTTPServer):
    """A plain web server for a folder, which can be made to stop in the middle of weights."""

    def __init__(self, folder: Path) -> None:
        self.paths: list[str] = []
        self.stall = False
        self.stalled = threading.Event()
        web = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                web.paths.append(self.path)
                if web.stall and self.path.endswith("weights.safetensors"):
                    self.send_response(200)
                    self.send_header("Content-Length", "200")
                    self.end_headers()
                    self.wfile.write(bytes(100))
                    self.wfile.flush()
                    web.stalled.set()
                    time.sleep(60)
                super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(folder)))
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def web(catalog: Catalog) -> Iterator[Web]:
    server = Web(catalog.root)
    yield server
    server.shutdown()
    server.server_close()


FETCH = """
import sys
from pathlib import Path
from pushforward.store.mirror import Mirror
mirror = Mirror(sys.argv[1], Path(sys.argv[2]), 1_000_000_000)
mirror.open()
mirror.fetch(mirror.resolve("moons", 1))
mirror.verify(mirror.root / "moons" / "1")
"""


def fetching(web: Web, tmp_path: Path) -> "subprocess.Popen[bytes]":
    url = f"http://127.0.0.1:{web.server_port}/"
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url, str(tmp_path / "cache")],
        env=os.environ | {"PYTHONPATH": "service"},
    )


def test_processes_share_a_cache_and_one_of_them_downloads(web: Web, tmp_path: Path) -> None:
    processes = [fetching(web, tmp_path) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert web.paths.count("/moons/1/weights.safetensors") == 1


def test_a_download_that_was_killed_leaves_nothing_that_looks_whole(web: Web, tmp_path: Path) -> None:
    web.stall = True
    process = fetching(web, tmp_path)
    assert web.stalled.wait(60)
    process.kill()
    process.wait()
    (folder,) = (tmp_path / "cache").glob("*/moons/1")
    assert "weights.safetensors" not in files(folder)
    web.stall = False
    assert fetching(web, tmp_path).wait(60) == 0


def test_a_web_server_is_a_store_to_read(web: Web, catalog: Catalog, tmp_path: Path) -> None:
    (catalog.root / "moons" / "labels.json").write_text('{"stable": 1}')
    mirror = Mirror(f"http://127.0.0.1:{web.server_port}/", tmp_path / "cache", BOUND)
    mirror.open()
    assert mirror.resolve("moons").manifest.version == 1
    (catalog.root / "moons" / "labels.json").write_text('{"stable": 2}')  # of the same size
    mirror.refresh()
    assert mirror.resolve("moons").manifest.version == 2
    with pytest.raises(PublishFailed):
        mirror.set_label("moons", "canary", 1)


def test_the_cache_is_bounded_by_giving_up_what_was_not_used_for_longest(
    in_folder: Store, tmp_path: Path
) -> None:
    mirror = mirror_of(in_folder, tmp_path, bound=4500)  # two versions and a bit
    order = [("moons", 1), ("moons", 2), ("moons", 1), ("wine", 1)]
    for step, (name, number) in enumerate(order):
        mirror.fetch(mirror.resolve(name, number))
        lock = mirror.root / ".locks" / f"{name}@{number}"
        os.utime(lock, (time.time() - 100 + step,) * 2)
    whole = [path.parent for path in mirror.root.rglob("weights.safetensors")]
    assert sorted(f"{path.parent.name}/{path.name}" for path in whole) == ["moons/1", "wine/1"]
    assert mirror.versions("moons") == [1, 2, 10]
    mirror.fetch(mirror.resolve("moons", 2))
    mirror.verify(mirror.root / "moons" / "2")


def test_reading_suffices_to_serve_and_errors_say_what_is_not_allowed(
    server: S3, in_s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = in_s3.bucket
    iam = server.client("iam")
    policy = json.loads((Path(__file__).parents[2] / "docs" / "policies" / "read.json").read_text())
    for statement in policy["Statement"]:
        statement["Resource"] = (
            statement["Resource"].replace("BUCKET", bucket).replace("PREFIX", "some/models")
        )
        statement.pop("Condition", None)  # which the server of these tests does not know
    iam.create_user(UserName=bucket[:60])
    iam.put_user_policy(UserName=bucket[:60], PolicyName="read", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=bucket[:60])["AccessKey"]
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    reader = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    with environment(reader):
        mirror = mirror_of(in_s3, tmp_path)
        mirror.fetch(mirror.resolve("moons"))
        mirror.verify(mirror.root / "moons" / "10")
        with pytest.raises(PublishFailed, match=r"cannot be written: Access Denied.*publishing to write"):
            mirror.set_label("moons", "stable", 1)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    with pytest.raises(UsageError, match=r"does not exist in our records.*must allow to list"):
        mirror_of(in_s3, tmp_path)


@pytest.mark.parametrize(
    ("url", "kind", "says"),
    [
        ("nonsense://bucket/models", UsageError, "Protocol not known: nonsense"),
        ("gs://bucket/models", UsageError, "install gcsfs"),
        ("s3://", UsageError, "names no place"),
        ("s3://there-is-no-such-bucket/models", NotFound, "bucket does not exist"),
        ("file:///there/is/no/such/folder", NotFound, "no models at file:///there/is/no/such/folder"),
    ],
)
def test_a_url_that_is_no_store_is_refused(
    url: str, kind: type[Exception], says: str, server: S3, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=says):
        opened(url, tmp_path, 100)


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    for missing, advice in (("s3fs", "Install s3fs"), ("fsspec", "needs fsspec")):
        program = (
            f"import sys; sys.modules[{missing!r}] = None; from pushforward.cli import main; "
            "sys.argv[1:] = ['models', '--store', 's3://bucket/models']; main()"
        )
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": "service", "PUSHFORWARD_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 2, run.stderr
        assert advice in run.stderr
        assert "pushforward[s3]" in run.stderr


def test_credentials_that_are_missing_are_asked_for(
    server: S3, in_s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID"):
        mirror_of(in_s3, tmp_path)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="PUSHFORWARD_CACHE"):
        opened("memory://models", tmp_path / "file" / "cache", 100)


def test_the_cache_is_where_the_desktop_rules_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Mirror("memory://models", None, 1).root.parent == tmp_path / "xdg" / "pushforward"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert Mirror("memory://models", None, 1).root.parent == tmp_path / "home" / ".cache" / "pushforward"


def test_a_url_shows_no_password(tmp_path: Path) -> None:
    with pytest.raises((UsageError, NotFound, Unavailable)) as refused:
        opened("http://user:secret@127.0.0.1:9/models?token=secret", tmp_path, 100)
    assert "secret" not in refused.value.message
    assert "secret" not in "".join(path.name for path in tmp_path.rglob("*"))


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_leftovers_of_killed_processes_are_swept(in_folder: Store, tmp_path: Path) -> None:
    mirror = mirror_of(in_folder, tmp_path)
    (mirror.root / ".partial" / "folder").mkdir()
    (mirror.root / ".partial" / "old").write_text("")
    (mirror.root / ".partial" / "new").write_text("")
    for name in ("folder", "old"):
        os.utime(mirror.root / ".partial" / name, (1, 1))
    mirror_of(in_folder, tmp_path)
    assert [path.name for path in (mirror.root / ".partial").iterdir()] == ["new"]
