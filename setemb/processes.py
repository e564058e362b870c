"""Training on several processes, which torchrun starts: who and how many we are, and what is told from one to all.

::

    torchrun --nproc-per-node 4 -m setemb train RECIPE data.dir=...

Each process encodes its share of every batch. The losses compare all images with all captions of the whole batch
(`setemb_kernels.distributed`), so the number of processes changes neither the batch nor its gradient. What is drawn at
random differs; and on CPUs batch normalisation takes its statistics from the share of a process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def launched() -> tuple[int, int]:
    """How many processes torchrun has started, and how many of them on this machine; one without it."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return 1, 1
    return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])


def place() -> tuple[int, int]:
    """The rank of this process, and the number of all; of one before the group is made."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def first() -> bool:
    """Whether this process is the one that writes files; known before the group is made."""
    return launched()[0] == 1 or int(os.environ["RANK"]) == 0


def gathered_by_first(own: T, compute: Callable[[list[T]], Any]) -> Any:
    """What ``compute`` makes, in the first process, of what all have; told to all."""
    rank, size = place()
    if size == 1:
        return compute([own])
    everyone: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(own, everyone, dst=0)
    result = [compute(everyone)] if everyone is not None else [None]
    dist.broadcast_object_list(result, src=0)
    return result[0]


def share(count: int, rank: int, size: int) -> slice:
    """Which of ``count`` things are those of a process: parts of nearly equal size, one after another."""
    return slice(rank * count // size, (rank + 1) * count // size)
