"""Functions run on several ranks of gloo at once, and what they returned."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PRELOAD = ["setemb_kernels.distributed", "tests.kernels.losses.test_distributed"]


def run(target: Callable[..., Any], size: int, folder: Path, *args: Any, tcp: bool = False, stuck: int = -1) -> Any:
    """What ``target(rank, *args)`` returned on each of ``size`` ranks; None where a rank was killed.

    Args:
        folder: an empty one.
        tcp: keep the store in rank 0's process, else in a file.
        stuck: a rank that is ended when all others are done.
    """
    context = multiprocessing.get_context("forkserver")  # torch is imported once
    context.set_forkserver_preload(_PRELOAD)
    store = f"tcp://127.0.0.1:{_free_port()}" if tcp else f"file://{folder / 'store'}"
    name = (target.__module__, target.__qualname__)
    processes: list[BaseProcess] = []
    for rank in range(size):
        process = context.Process(target=_work, args=(name, rank, size, store, folder, args), daemon=True)
        process.start()
        processes.append(process)
    try:
        until = time.monotonic() + 60
        for rank, process in enumerate(processes):
            if rank != stuck:
                process.join(max(0.0, until - time.monotonic()))
                assert process.exitcode is not None, f"rank {rank} does not end"
    finally:
        for process in processes:
            process.kill()
            process.join()
    results = []
    for rank, process in enumerate(processes):
        path = folder / f"{rank}.pt"
        assert path.exists() or process.exitcode == -9, f"rank {rank} ended with {process.exitcode}"
        results.append(torch.load(path, weights_only=False) if path.exists() else None)
    return results


def _work(name: tuple[str, str], rank: int, size: int, store: str, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    result = getattr(importlib.import_module(name[0]), name[1])(rank, *args)
    torch.save(result, folder / f"{rank}.part")
    (folder / f"{rank}.part").rename(folder / f"{rank}.pt")
    # Not through the destructors: those of a group that has lost a rank may wait for it.
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
