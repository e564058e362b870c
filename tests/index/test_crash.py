"""A writer that is killed leaves the old index or the new one; readers see one or the other, and keep what they have.

The writers are processes that are really killed (SIGKILL): before each of their dealings with the file system in turn,
and at moments drawn at random. They are forked from a server that has imported torch already.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from setemb.index import SetIndex
from setemb.index import folder as folder_module
from tests.index import crash


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.index.crash"])
    return context


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An index of three segments of which something is deleted."""
    folder = tmp_path / "index"
    index = SetIndex.build(folder, crash.records(list(range(10))))
    for start in (10, 20):
        index.add(crash.records(list(range(start, start + 5))))
        index.save()
    index.delete(["3", "11"])
    index.save()
    return folder


def after(folder: Path, what: str) -> list[int]:
    """What the index holds once changed."""
    copy = folder.with_name("changed")
    shutil.copytree(folder, copy)
    crash.change(copy, what)
    result = crash.state(copy)
    shutil.rmtree(copy)
    assert result is not None
    return result


@pytest.mark.parametrize("what", ["add", "delete", "both", "compact", "build"])
def test_killed_at_every_point(processes: Any, folder: Path, what: str) -> None:
    old, new = crash.state(folder), after(folder, what)
    # a compaction changes nothing that one could ask for: which of the two it is, the description says
    revision = json.loads((folder / "index.json").read_text())["revision"]
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    seen: list[bool] = []
    for point in range(1000):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        process = processes.Process(target=crash.dies_at, args=(folder, what, point))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        now = json.loads((folder / "index.json").read_text())["revision"]
        assert now in (revision, revision + 1)
        assert crash.state(folder) == (old if now == revision else new), point
        seen.append(now != revision)
        if point % 5 == 0 or process.exitcode == 0:
            # what was left lying about is in nobody's way, and goes with the next change
            crash.change(folder, "build")
            assert crash.state(folder) == list(range(10, 40))
            left = sorted(path.name.split("-")[0] for path in folder.iterdir())
            assert left == [".lock", "index.json", "segment"], left
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert seen == sorted(seen) and seen[-1] and not seen[0]
    assert len(seen) > 10


def test_killed_while_it_makes_the_first(processes: Any, tmp_path: Path) -> None:
    seen = set()
    for point in range(1000):
        folder = tmp_path / str(point)
        process = processes.Process(target=crash.dies_at, args=(folder, "build", point))
        process.start()
        process.join(60)
        state = crash.state(folder)
        assert state in (None, list(range(10, 40))), point
        seen.add(state is None)
        crash.change(folder, "build")
        assert crash.state(folder) == list(range(10, 40))
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert seen == {True, False}


def test_killed_at_any_moment(processes: Any, folder: Path) -> None:
    """Whatever the moment, the folder opens, and the next writer goes on."""
    for _ in range(2):  # the first waits for the server
        start = time.monotonic()
        process = processes.Process(target=crash.change, args=(folder, "build"))
        process.start()
        process.join(60)
        once = time.monotonic() - start  # how long a process and one change take here
    rng = random.Random(0)
    revisions = []
    for _ in range(40):
        process = processes.Process(target=crash.writes_for_ever, args=(folder,))
        process.start()
        time.sleep(once * rng.uniform(0.3, 4))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert crash.state(folder) is not None
        revisions.append(json.loads((folder / "index.json").read_text())["revision"])
    assert revisions == sorted(revisions)
    assert len(set(revisions)) > 5, "the writer wrote"


def test_two_read_while_one_writes(processes: Any, folder: Path) -> None:
    """Each load is one revision, whole; what was loaded before stays as it was, though its files are gone."""
    early = SetIndex.load(folder)
    queries = torch.stack([crash.one(i) for i in (4, 20)])
    before = early.search(queries, 8)
    stop = processes.Event()
    counts = [processes.Value("i", 0) for _ in range(2)]
    readers = [processes.Process(target=_reads, args=(folder, stop, count)) for count in counts]
    writer = processes.Process(target=crash.writes_for_ever, args=(folder,))
    for process in (writer, *readers):
        process.start()
    deadline = time.monotonic() + 120
    while min(count.value for count in counts) < 40 and time.monotonic() < deadline:
        time.sleep(0.05)
        assert writer.is_alive()
        assert all(reader.is_alive() for reader in readers)
    stop.set()
    writer.kill()
    for process in (writer, *readers):
        process.join(60)
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert min(count.value for count in counts) >= 40
    again = early.search(queries, 8)
    assert again.ids == before.ids
    assert torch.equal(again.scores, before.scores)
    assert early.item(0).meta == {"number": 0}


@pytest.mark.parametrize("name", ["mask.npy", "pictures.npy", "vectors.npy", "items.jsonl"])
def test_what_a_writer_is_removing_is_not_read_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A reader comes between: of the old segment one file is gone already."""
    folder = tmp_path / "index"
    SetIndex.build(folder, crash.records(list(range(10))))
    real, calls = folder_module.read_segment, 0

    def late(path: Path, *arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            shutil.copytree(path, tmp_path / "old")
            crash.change(folder, "build")
            shutil.copytree(tmp_path / "old", path)
            (path / name).unlink()
        return real(path, *arguments, **more)

    monkeypatch.setattr(folder_module, "read_segment", late)
    assert crash.state(folder) == list(range(10, 40))
    assert calls == 3, "the old segment, the new one by its writer, and again by the reader"


def test_files_that_are_not_listed_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    SetIndex.build(folder, [(str(i), torch.eye(4)[:2]) for i in range(3)])
    (segment,) = folder.glob("segment-*")
    np.save(segment / "mask.npy", np.array([[True, False]] * 3))
    np.save(segment / "pictures.npy", np.zeros((3, 2, 2, 3), np.uint8))
    item = SetIndex.load(folder).item(0)
    assert torch.equal(item.vectors, torch.eye(4)[:2])
    assert item.picture is None


def _reads(folder: Path, stop: Any, count: Any) -> None:
    torch.set_num_threads(1)
    revisions = set()
    while not stop.is_set():
        numbers = crash.state(folder)
        assert numbers is not None
        assert len(numbers) > 10
        revisions.add(json.loads((folder / "index.json").read_text())["revision"])
        with count.get_lock():
            count.value += 1
    assert len(revisions) > 1, "nothing was written meanwhile"
