"""What the crash test's processes run: a writer that dies at a point or at a moment, a reader that looks all the time.

An index holds numbers: item i has the vectors of `one` (i), two or three, and the picture `pixels` (i). `state` says of
a folder which numbers it holds, having checked all of it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from setemb.index import SetIndex

D = 8
WRITES_INTO = 99


def one(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.nn.functional.normalize(torch.randn(2 + number % 2, D, generator=generator), dim=-1)


def pixels(number: int) -> np.ndarray:
    return np.full((2, 3, 3), number % 256, np.uint8)


def records(numbers: list[int]) -> list[tuple[str, torch.Tensor, dict[str, Any], np.ndarray]]:
    return [(str(i), one(i), {"number": i}, pixels(i)) for i in numbers]


def state(folder: Path) -> list[int] | None:
    """None: there is no index."""
    try:
        index = SetIndex.load(folder, verify=True)
    except FileNotFoundError as error:
        if "index.json is missing" in str(error):
            return None
        raise
    numbers = [int(id_) for id_ in index.ids]
    for row in range(0, len(numbers), max(1, len(numbers) // 5)):
        item = index.item(row)
        assert item.meta == {"number": numbers[row]}
        torch.testing.assert_close(item.vectors, one(numbers[row]))
        assert np.array_equal(item.picture, pixels(numbers[row]))  # type: ignore[arg-type]
        assert [numbers[row]] == [int(id_) for id_ in index.search(item.vectors[None], 1).ids[0]]
    return numbers


def change(folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    if what == "build":
        SetIndex.build(folder, records(list(range(10, 40))), dtype="float32")
        return
    index = SetIndex.load(folder)
    if what in ("add", "both"):
        first = 1 + max(int(id_) for id_ in index.ids)
        index.add(records([first, first + 1, first + 2]))
    if what in ("delete", "both"):
        index.delete([index.ids[1], index.ids[-1]])
    if what == "compact":
        index.compact()
    else:
        index.save()


def dies_at(folder: Path, what: str, point: int) -> None:
    """Changes the folder, and is killed before the given one of its dealings with the file system.

    A file that is there is never opened to write into: it would be half-written for a moment. That is status 99.
    """
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree"):
            if not any(str(folder) in str(argument) for argument in arguments if isinstance(argument, (str, Path))):
                return
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and os.path.exists(arguments[0]) and not str(arguments[0]).endswith(".lock"):
                os._exit(WRITES_INTO)
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    change(folder, what)


def writes_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)
    for turn in range(1_000_000):
        change(folder, ("add", "both", "compact", "delete", "build")[turn % 5])
