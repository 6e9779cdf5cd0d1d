"""Finding, labelling and verifying the versions in a model store.

    <root>/<name>/<version>/manifest.json …      a version: an immutable folder named by a positive integer
    <root>/<name>/labels.json                    {"stable": 3, "canary": 4}

Nothing outside the root can be reached: names are matched against plain patterns before they touch the
file system, and links inside the store are not followed. Whatever begins with a dot is ignored: that is
where publishing keeps its unfinished work.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pushforward.errors import InvalidInput, InvalidModel, NotFound, PublishFailed
from pushforward.store.manifest import (
    MANIFEST,
    Manifest,
    check_name,
    is_name,
    read_small_file,
    sha256_file,
    shown,
)

__all__ = ["DEFAULT_LABEL", "LABELS", "LABELS_MAX_BYTES", "Catalog", "ModelVersion"]

DEFAULT_LABEL = "stable"
LABELS = "labels.json"
LABELS_MAX_BYTES = 1 << 16
_LABELS = TypeAdapter(dict[str, int])
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")  # [0-9]: \d would let other scripts' digits through


@dataclass(frozen=True)
class ModelVersion:
    """A version that was found: what it says it is, and where it lies."""

    manifest: Manifest
    folder: Path


class Catalog:
    """The models of one store.

    Args:
        root: the folder of the store; it need not exist until it is asked for something.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def open(self) -> None:
        """Look whether there is a store.

        Raises:
            NotFound: when there is none.
        """
        self.models()

    def followed(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """Keep up with the store while the block runs: a folder is read anew whenever it is asked."""
        return contextlib.nullcontext()

    def fetch(self, found: ModelVersion, *paths: str) -> None:
        """Have files of a version, all unless given, in its folder: here they are."""

    def models(self) -> list[str]:
        """Names of the models that have at least one version, sorted.

        Raises:
            NotFound: when there is no store at the root.
        """
        try:
            return [name for name in _folders(self.root) if is_name(name) and self._numbers(name)]
        except OSError as error:
            raise NotFound(
                f"There is no model store at {self.root.absolute().name} ({error.strerror}): "
                "name another with --store, or make one by publishing a model with `pushforward train`."
            ) from None

    def versions(self, name: str) -> list[int]:
        """Version numbers of a model, ascending.

        Raises:
            NotFound: for an unknown model, listing the names that come close.
        """
        numbers = self._numbers(name) if is_name(name) else []  # not a path before it has matched
        if not numbers:
            known = self.models()
            near = difflib.get_close_matches(name[:100].lower(), known, n=5, cutoff=0.5) or known[:20]
            there = f"there is {', '.join(near)}" if near else "the store is empty"
            raise NotFound(f"There is no model {shown(name)}: {there}.", known=near)
        return numbers

    def labels(self, name: str) -> dict[str, int]:
        """Label → version of a model, sorted by label.

        Raises:
            NotFound: for an unknown model.
            InvalidModel: when the model's labels.json is broken.
        """
        self.versions(name)
        path, file = self.root / name / LABELS, f"{name}/{LABELS}"
        if not os.path.lexists(path):
            return {}
        try:
            labels = _LABELS.validate_json(read_small_file(path, LABELS_MAX_BYTES, file), strict=True)
        except ValidationError as error:
            what = error.errors()[0]["msg"]
            raise InvalidModel(f"{file} is not an object of label → version: {what}.", file=file) from None
        for label, version in labels.items():
            if not _is_label(label) or version < 1:
                raise InvalidModel(f"{file} has {shown(label)}: {version}, which is not a label.", file=file)
        return dict(sorted(labels.items()))

    def resolve(self, name: str, version: str | int | None = None) -> ModelVersion:
        """Find a version and read its manifest.

        Args:
            name: the model.
            version: a number, a label, or None for the label "stable" if it is set, else the newest.

        Raises:
            NotFound: for an unknown model, version or label, listing what exists.
            InvalidModel: when the manifest is broken or belongs to another folder.
        """
        folder = self.root / name / str(self.candidates(name, version)[0])
        return ModelVersion(_read(folder), folder)

    def candidates(self, name: str, version: str | int | None = None) -> list[int]:
        """The version numbers that a request may mean, best first.

        Args:
            name: the model.
            version: a number or a label means one version; None means the label "stable" if it is set, else
                every version from the newest on.

        Raises:
            NotFound: for an unknown model, version or label, listing what exists.
            InvalidModel: when the model's labels.json is needed and broken.
        """
        numbers = self.versions(name)
        # Labels begin with a letter, so a text is a number or a label; "03" is neither.
        wanted = DEFAULT_LABEL if version is None else str(version)
        number = int(wanted) if _NUMBER.fullmatch(wanted) else None
        if number in numbers:
            return [int(wanted)]
        labels = self.labels(name)
        if version is None and DEFAULT_LABEL not in labels:
            return numbers[::-1]
        number = labels.get(wanted, number)
        if number is None or number not in numbers:
            known = [*map(str, numbers), *labels]
            what = f"{shown(wanted)} (which is {number})" if wanted in labels else shown(wanted)
            raise NotFound(
                f"Model {name} has no version or label {what}: it has {', '.join(known)}.", known=known
            )
        return [number]

    def set_label(self, name: str, label: str, version: str | int) -> None:
        """Make a label of a model point at a version, atomically.

        Args:
            name: the model.
            label: a name that begins with a letter, such as "stable".
            version: a number, or another label to copy.

        Raises:
            InvalidInput: when the label is no name, or could be taken for a version number.
            NotFound: for an unknown model or version.
            InvalidModel: when that version's manifest is broken.
            PublishFailed: when the store cannot be written.
        """
        if not _is_label(check_name(label, "label", "label")):
            raise InvalidInput(f"The label {shown(label)} must begin with a letter.", where="label")
        number = self.resolve(name, version).manifest.version
        with self._changing_labels(name) as labels:
            labels[label] = number

    def remove_label(self, name: str, label: str) -> None:
        """Remove a label of a model, atomically.

        Raises:
            NotFound: for an unknown model or label.
            PublishFailed: when the store cannot be written.
        """
        with self._changing_labels(name) as labels:
            if label not in labels:
                there = ", ".join(labels) or "none"
                raise NotFound(f"Model {name} has no label {shown(label)}: it has {there}.", known=labels)
            del labels[label]

    @staticmethod
    def verify(folder: Path) -> Manifest:
        """Check that a version's folder holds exactly the files of its manifest, byte for byte.

        Args:
            folder: ``…/<name>/<version>``.

        Returns:
            The manifest.

        Raises:
            InvalidModel: naming the first file that is missing, unexpected, a link, of another size, or of
                another hash; or the manifest when it is broken or belongs to another folder.
        """
        folder = folder.absolute()
        manifest = _read(folder)
        version = f"{manifest.name}/{manifest.version}"
        try:
            found = _plain_files(folder, version, {*manifest.files, MANIFEST})
            for path, entry in sorted(manifest.files.items()):
                fault = None
                if path not in found:
                    fault = "is missing"
                elif found[path] != entry.bytes:
                    fault = f"has {found[path]} bytes, but its manifest says {entry.bytes}"
                elif sha256_file(folder / path) != entry.sha256:
                    fault = "was changed: its SHA-256 is not that of its manifest"
                if fault:
                    raise InvalidModel(f"{version}/{path} {fault}.", file=f"{version}/{path}")
        except OSError as error:
            file = f"{version}/{Path(error.filename or folder).relative_to(folder)}"
            raise InvalidModel(f"{file} cannot be read: {error.strerror}.", file=file) from None
        return manifest

    def _numbers(self, name: str) -> list[int]:
        try:
            return sorted(int(entry) for entry in _folders(self.root / name) if _NUMBER.fullmatch(entry))
        except OSError:
            return []

    @contextlib.contextmanager
    def _changing_labels(self, name: str) -> Iterator[dict[str, int]]:
        """Read, change and replace labels.json while no other process does the same."""
        self.versions(name)
        folder = self.root / name
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                labels = self.labels(name)
                yield labels
                _replace(folder / LABELS, json.dumps(dict(sorted(labels.items())), indent=2) + "\n")
                os.fsync(descriptor)  # the rename is durable only once its directory is
            finally:
                os.close(descriptor)
        except OSError as error:
            raise PublishFailed(f"The labels of {name} could not be written: {error.strerror}.") from error


def _replace(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fchmod(descriptor, 0o644)  # the 0600 of mkstemp would lock out a server under another user
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _is_label(text: str) -> bool:
    return is_name(text) and text[0].isalpha()


def _folders(folder: Path) -> list[str]:
    """Names of the real directories in a folder, sorted; a link is not one."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))


def _read(folder: Path) -> Manifest:
    """The manifest of a folder, if that is the folder it belongs to."""
    manifest = Manifest.read(folder / MANIFEST)
    if (manifest.name, str(manifest.version)) != (folder.parent.name, folder.name):
        file = f"{folder.parent.name}/{folder.name}/{MANIFEST}"
        raise InvalidModel(f"{file} is the manifest of {manifest.name}/{manifest.version}.", file=file)
    return manifest


def _plain_files(folder: Path, version: str, expected: set[str]) -> dict[str, int]:
    """Path → size of the files under a folder, which must all be plain and expected."""
    parents = {path[:end] for path in expected for end, letter in enumerate(path) if letter == "/"}
    found: dict[str, int] = {}
    prefixes = [""]
    while prefixes:
        prefix = prefixes.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                path = prefix + entry.name
                file = f"{version}/{path}".encode("ascii", "backslashreplace").decode()
                if path in parents and entry.is_dir(follow_symlinks=False):
                    prefixes.append(path + "/")
                elif path not in expected:
                    raise InvalidModel(f"{file} is not among the files that its manifest lists.", file=file)
                elif not entry.is_file(follow_symlinks=False):
                    raise InvalidModel(f"{file} is not a plain file.", file=file)
                else:
                    found[path] = entry.stat(follow_symlinks=False).st_size
    return found
