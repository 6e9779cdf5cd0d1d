"""Publishing to a store at a URL: whole or not at all, and one winner for a number."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.s3 import S3, environment, s3

from pushforward.errors import Conflict, PublishFailed
from pushforward.publish.place import Place, place_at
from pushforward.store.remote import Remote

BUNDLED = Path(__file__).parents[2] / "model_store"


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3() as server, environment(server.variables):
        yield server


@pytest.fixture
def url(server: S3, tmp_path: Path) -> str:
    name = "".join(letter for letter in tmp_path.name.lower() if letter.isalnum())[-60:] + "b"
    server.create_bucket(name)
    return f"s3://{name}/models"


def drafted(tmp_path: Path, who: str, number: int) -> Path:
    """A version that is complete; the files of two publishers are alike, but for their weights."""
    folder = tmp_path / who / "moons" / str(number)
    shutil.copytree(BUNDLED / "moons" / "1", folder)
    (folder / "weights.safetensors").write_text(who)
    (folder / "manifest.json").write_text(f"{who}'s")
    return folder


def numbered(place: Place) -> int:
    with place.next_number("moons") as number:
        return number


def test_the_manifest_goes_last_and_one_that_is_interrupted_leaves_nothing(
    server: S3, url: str, tmp_path: Path
) -> None:
    place_at(url).put(drafted(tmp_path, "ann", 1))
    puts = [line.split()[6] for line in server.requests if f"PUT /{url[5:]}/" in line]
    assert puts[-1].endswith("/moons/1/manifest.json")
    assert len(set(puts)) == len(server.content(url, "moons/1")) == 15
    half, weights = drafted(tmp_path, "bob", 2), "weights.safetensors"
    (half / weights).unlink()
    (half / weights).symlink_to("/proc/self/mem")  # which is a file, and cannot be read
    with pytest.raises(OSError, match="Input/output error"):
        place_at(url).put(half)
    assert server.content(url, "moons/2") == {}


def test_who_comes_second_gets_a_conflict_and_then_the_next_number(
    server: S3, url: str, tmp_path: Path
) -> None:
    ann, bob = place_at(url), place_at(url)
    assert (numbered(ann), numbered(bob)) == (1, 1)
    ann.put(drafted(tmp_path, "ann", 1))
    with pytest.raises(Conflict, match=r"moons/1 is taken.*publish again"):
        bob.put(drafted(tmp_path, "bob", 1))
    assert numbered(bob) == 2
    bob.put(drafted(tmp_path, "bob", 2))
    for number, who in ((1, b"ann"), (2, b"bob")):
        assert server.content(url, f"moons/{number}")["weights.safetensors"] == who


def test_of_two_who_publish_at_once_one_wins_with_all_its_files(
    server: S3, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bob, create = place_at(url), place_at(url), Remote.create
    theirs, refused = drafted(tmp_path, "bob", 1), []

    def interrupted(remote: Remote, path: str, content: bytes) -> None:
        create(remote, path, content)
        if not refused:  # before the second file of the first, all of the second's
            refused.append(path)
            with pytest.raises(Conflict, match="is taken"):
                bob.put(theirs)
            assert numbered(bob) == 2

    monkeypatch.setattr(Remote, "create", interrupted)
    ann.put(drafted(tmp_path, "ann", 1))
    assert refused == ["moons/1/MODEL_CARD.md"]
    stored = server.content(url, "moons/1")
    assert stored["weights.safetensors"] == b"ann"
    assert stored["manifest.json"] == b"ann's"
    assert len(stored) == 15


def test_an_answer_that_was_lost_is_no_conflict_with_oneself(
    server: S3, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Remote.create

    def twice(remote: Remote, path: str, content: bytes) -> None:
        create(remote, path, content)
        if not path.endswith("MODEL_CARD.md"):
            create(remote, path, content)

    monkeypatch.setattr(Remote, "create", twice)
    place_at(url).put(drafted(tmp_path, "ann", 1))
    assert server.content(url, "moons/1")["manifest.json"] == b"ann's"


def test_a_store_that_is_not_there_cannot_be_published_to(server: S3, tmp_path: Path) -> None:
    with pytest.raises(PublishFailed, match="bucket does not exist"):
        numbered(place_at("s3://there-is-no-such-bucket/models"))
    with pytest.raises(PublishFailed, match="bucket does not exist"):
        place_at("s3://there-is-no-such-bucket/models").put(drafted(tmp_path, "ann", 1))


def test_a_folder_by_its_url_is_published_to_as_well(tmp_path: Path) -> None:
    place = place_at(f"file://{tmp_path}/store")
    assert numbered(place) == 1
    place.put(drafted(tmp_path, "ann", 1))
    assert numbered(place) == 2
    with pytest.raises(Conflict):
        place.put(drafted(tmp_path, "bob", 1))
    assert (tmp_path / "store/moons/1/weights.safetensors").read_text() == "ann"
