"""The folder of an index: its description, which is replaced as a whole, and files that are never changed.

``index.json`` names the files that make up the present revision. A writer puts new files beside those that are there,
and then a new ``index.json`` in place of the old one: that rename is the moment at which the revision changes. Readers
map the files that they have found named, and keep them whatever happens to the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from filelock import FileLock, Timeout

from setemb.checkpoint import BESIDE, write_file
from setemb.index.segments import Block, Segment, SegmentWriter, read_segment

FORMAT = "setemb-index"
VERSION = 2
LOCK_SECONDS = 60.0
"""How long a writer waits for another."""

_OURS = re.compile(
    rf"(segment|model|new)-[0-9a-f]{{16}}|deleted-[0-9a-f]{{16}}\.npy|\.lock|index\.json|\.index\.json{BESIDE}"
)
_VERSION_1 = ("vectors.npy", "pictures.npy", "items.jsonl", "model")


def token() -> str:
    return uuid.uuid4().hex[:16]


def read_description(folder: Path) -> dict[str, Any]:
    """What ``index.json`` says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was altered, or is of another format or version; naming the file.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"no index: {path} is missing")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        found = (description["format"], description["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was cut short or altered, or is no description of an index: {error!r}") from error
    if found != (FORMAT, VERSION):
        again = "; build the index again" if found == (FORMAT, 1) else ""
        raise ValueError(
            f"{path} has format {found[0]!r} version {found[1]!r}, expected {FORMAT!r} version {VERSION}{again}"
        )
    stated = description.pop("sha256", None)
    if stated != _own_checksum(description):
        raise ValueError(f"{path} was altered: its checksum is {_own_checksum(description)}, expected {stated}")
    return cast("dict[str, Any]", description)


def read_segments(folder: Path, description: Mapping[str, Any], contents: bool) -> list[Segment]:
    """Maps what a description names. Sizes and headers are always checked, contents only if asked for.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    for name, entry in description["files"].items():
        _verify(folder / name, entry, contents)
    result = []
    for entry in description["segments"]:
        segment = read_segment(
            folder / entry["folder"],
            entry["sets"],
            entry["vectors"],
            description["features"],
            description["dtype"],
            # not by what is there: a writer may be removing it
            mask=f"{entry['folder']}/mask.npy" in description["files"],
            pictures=f"{entry['folder']}/pictures.npy" in description["files"],
        )
        if entry["deleted"] is not None:
            path = folder / entry["deleted"]
            try:
                segment.deleted = np.load(path, allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise ValueError(f"{path} was altered: {error}") from error
            d = segment.deleted
            if d.dtype != np.int64 or d.ndim != 1 or (np.diff(d, prepend=-1, append=entry["sets"]) <= 0).any():
                raise ValueError(f"{path} was altered: it does not hold rows of {entry['folder']} in order")
        result.append(segment)
    return result


def _verify(path: Path, entry: Mapping[str, Any], contents: bool) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"the index is incomplete: {path} is missing")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path} was cut short or altered: {path.stat().st_size} bytes, expected {entry['bytes']}")
    if contents and (found := _sha256(path)) != entry["sha256"]:
        raise ValueError(f"{path} was altered: its SHA-256 is {found}, expected {entry['sha256']}")


@contextmanager
def writing(folder: Path) -> Iterator[Revision]:
    """The only writer of a folder, which is made if needed; nothing changes before `Revision.commit`.

    Raises:
        FileExistsError: the folder exists and is no index (it would be lost).
        TimeoutError: another process is writing.
    """
    if folder.exists() and not _may_be_written(folder):
        raise FileExistsError(f"{folder} exists and is not an index: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=LOCK_SECONDS):
            revision = Revision(folder)
            try:
                yield revision
            except BaseException:
                revision.forget()
                raise
    except Timeout as error:
        raise TimeoutError(f"{folder}: another process has been writing for {LOCK_SECONDS:g} s") from error


class Revision:
    """What a writer adds to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.present: dict[str, Any] | None = read_description(folder)
        except (FileNotFoundError, ValueError):  # none, or one of another version: it will be replaced
            self.present = None
        self.files: dict[str, dict[str, Any]] = {}
        self._new: list[Path] = []

    def beside(self) -> Path:
        """A name for something new, not yet part of the index; see `keep`."""
        path = self.folder / f"new-{token()}"
        self._new.append(path)
        return path

    def keep(self, path: Path, kind: str, listed: bool = True) -> str:
        """Flushes what was written and gives it its name, which is returned; its files are ``listed`` and checked."""
        name = f"{kind}-{token()}"
        for file in sorted(path.iterdir()):
            if listed:
                self._list(f"{name}/{file.name}", file)
            _flush(file)
        _flush(path)
        os.rename(path, self.folder / name)
        self._new.append(self.folder / name)
        return name

    def keep_deleted(self, rows: np.ndarray) -> str:
        name = f"deleted-{token()}.npy"
        path = self.beside()
        with path.open("wb") as file:
            np.lib.format.write_array(file, rows, allow_pickle=False)
        self._list(name, path)
        self.files[name]["rows"] = len(rows)
        _flush(path)
        os.rename(path, self.folder / name)
        self._new.append(self.folder / name)
        return name

    def keep_listed(self, names: list[str]) -> None:
        """Files of the present revision that stay part of the index."""
        assert self.present is not None
        for name, entry in self.present["files"].items():
            if name in names or name.partition("/")[0] in names:
                self.files[name] = entry

    def commit(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """Makes this the revision that is read, and removes what belongs to none; returns its description."""
        number = 1 if self.present is None else self.present["revision"] + 1
        whole = {
            "format": FORMAT,
            "version": VERSION,
            "revision": number,
            "token": token(),
            **description,
            "files": dict(sorted(self.files.items())),
        }
        _flush(self.folder)
        text = json.dumps(whole | {"sha256": _own_checksum(whole)}, indent=1)
        self._new.clear()  # from here on they may be in use
        write_file(self.folder / "index.json", (text + "\n").encode())
        used = {Path(name).parts[0] for name in self.files} | {whole.get("model")}
        for path in self.folder.iterdir():
            ours = _OURS.fullmatch(path.name) and path.name not in ("index.json", ".lock", *used)
            if ours or (self.present is None and path.name in _VERSION_1):
                _remove(path)
        return whole

    def _list(self, name: str, path: Path) -> None:
        self.files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}

    def forget(self) -> None:
        for path in self._new:
            _remove(path)


def write_segments(revision: Revision, blocks: Iterable[Block], dtype: str) -> list[dict[str, Any]]:
    """Writes sets as they come, as one segment; where they grow, a further one for those of more vectors."""
    entries: list[dict[str, Any]] = []
    writer: SegmentWriter | None = None

    def close() -> None:
        if writer is not None:
            writer.close()
            name = revision.keep(writer.folder, "segment")
            entries.append({"folder": name, "sets": writer.count, "vectors": writer.size, "deleted": None})

    for block in blocks:
        size, features = block.vectors.shape[1:]
        if writer is None or size > writer.size:
            close()
            picture = None if block.pictures is None else block.pictures.shape[1:]
            writer = SegmentWriter(revision.beside(), size, features, dtype, picture)
        writer.append(block)
    close()
    return entries


def _may_be_written(folder: Path) -> bool:
    """Whether it is an index, of whatever version, or holds nothing but what a writer of one has left."""
    if not folder.is_dir():
        return False
    try:
        return bool(json.loads((folder / "index.json").read_bytes())["format"] == FORMAT)
    except FileNotFoundError:
        return all(_OURS.fullmatch(path.name) for path in folder.iterdir())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """To the disk, so that a power cut does not take what is named later."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _own_checksum(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
