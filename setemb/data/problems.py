"""What is wrong with a data set: told as it is found, or collected.

Whatever reads a data set takes a function that is called with each problem, an exception whose text names the file and
the row. Training passes `stop`, which raises it, so that it ends before it begins; ``setemb data check`` collects.
"""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[Exception], None]


def stop(problem: Exception) -> None:
    """The first problem is the last."""
    raise problem


class TooManyError(Exception):
    """Enough is known."""


class Problems:
    """Collects what is wrong, up to a number.

    Args:
        limit: problems that are kept.
        stop: whether looking for more ends there: the next one raises `TooManyError`.
    """

    def __init__(self, limit: int, stop: bool = True) -> None:
        if limit < 1:
            raise ValueError(f"the number of problems must be at least 1, got {limit}")
        self.limit, self.stop, self.found = limit, stop, list[str]()
        self.more = False

    def __call__(self, problem: Exception) -> None:
        if len(self.found) < self.limit:
            self.found.append(str(problem))
            return
        self.more = True
        if self.stop:
            raise TooManyError
