"""Which rank has died, found out by those that wait for it.

A rank whose exchange fails writes into the store of the process group for whom it waits, and gives the others a moment
to do the same. Following from each rank to the one it waits for leads to a rank that waits for nobody: the dead one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from torch._C._distributed_c10d import Store

_KEY = "setemb/waits_for/"
_POLL = 0.05
_STORE = "the store of the process group, which it or its launcher holds,"


class Found(NamedTuple):
    """A rank that takes no part any more, and how that shows."""

    rank: int | None
    """None: every rank waits for another."""
    why: str


def find(store: Store, rank: int, waits_for: int, *, late: bool, patience: float, wake: Callable[[], None]) -> Found:
    """Ask the store, from ``rank``, which could not exchange with ``waits_for``.

    Args:
        store: of the process group.
        rank: the asking one.
        waits_for: its neighbour.
        late: the exchange took too long; else it failed, as it does when a process ends.
        patience: seconds for the others to say that they wait, where some rank was late: they need not have begun to
            wait at the same moment. Ended processes show within a second.
        wake: called once the store has this rank's entry, lets the neighbours' exchanges fail, too.
    """
    found: list[Found] = []

    def ask() -> None:
        began = time.monotonic()
        try:
            store.set(f"{_KEY}{rank}", f"{waits_for} {int(late)}")
            wake()
            while True:
                chain, any_late = _follow(store, rank, waits_for)
                found.append(_judge(chain))
                if time.monotonic() > began + min(0.9 * patience, math.inf if late or any_late else 1.0):
                    return
                time.sleep(_POLL)
        except RuntimeError as error:  # of a store that has answered, its rank has asked as well, and left
            found.append(found[-1] if found else Found(0, f"{_STORE} is gone: {first_line(error)}"))

    # A thread, because a store whose process is stopped does not answer, and has no time-out for that.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return found[-1] if found else Found(0, f"{_STORE} is silent")


def _follow(store: Store, rank: int, waits_for: int) -> tuple[list[int], bool]:
    """From each rank to the one it waits for, until one waits for nobody or comes a second time; was any late?"""
    chain, any_late = [rank, waits_for], False
    while chain[-1] not in chain[:-1] and store.check([f"{_KEY}{chain[-1]}"]):
        following, late = store.get(f"{_KEY}{chain[-1]}").split()
        chain.append(int(following))
        any_late |= late == b"1"
    return chain, any_late


def _judge(chain: list[int]) -> Found:
    if chain[-1] in chain[:-1]:
        return Found(None, "every rank waits for another: do all call the same losses in the same order?")
    return Found(chain[-1], "it has died, raised an error or is stuck")


def first_line(error: Exception) -> str:
    """Of an error whose other lines are a trace."""
    return str(error).partition("\n")[0]
