"""Which rank has died, found out by those that wait for it.

A rank whose exchange fails writes into the store of the process group for whom it waits, and gives the others a moment
to do the same. Following from each rank to the one it waits for leads to a rank that waits for nobody: the dead one.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from torch._C._distributed_c10d import Store

_KEY = "setemb/waits_for/"
_POLL = 0.05


class Found(NamedTuple):
    """A rank that takes no part any more, and how that shows."""

    rank: int | None
    """None: every rank waits for another."""
    why: str


def find(store: Store, rank: int, waits_for: int, moment: float) -> Found:
    """Ask the store, from ``rank``, which could not exchange with ``waits_for``, for ``moment`` seconds."""
    found: list[Found] = []

    def ask() -> None:
        try:
            found.append(_follow(store, rank, waits_for, time.monotonic() + moment))
        except RuntimeError as error:
            why = f"the store of the process group, which it or its launcher holds, is gone: {first_line(error)}"
            found.append(Found(0, why))

    # A thread, because a store whose process is stopped does not answer, and has no time-out for that.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(moment + 2)
    return found[0] if found else Found(0, "the store of the process group, which it or its launcher holds, is silent")


def _follow(store: Store, rank: int, waits_for: int, until: float) -> Found:
    store.set(f"{_KEY}{rank}", str(waits_for))
    while True:
        seen, last = {rank}, waits_for
        while last not in seen and store.check([f"{_KEY}{last}"]):
            seen.add(last)
            last = int(store.get(f"{_KEY}{last}"))
        if time.monotonic() > until:
            break
        time.sleep(_POLL)
    if last in seen:
        return Found(None, "every rank waits for another: do all call the same losses in the same order?")
    return Found(last, "it has died, raised an error or is stuck")


def first_line(error: Exception) -> str:
    """Of an error whose other lines are a trace."""
    return str(error).partition("\n")[0]
