"""Times of calls on a device: medians and spreads over rounds in which all calls take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
Context = Callable[[], AbstractContextManager[Any]]

MIN_ROUNDS, MAX_ROUNDS = 5, 100


class Clock(Protocol):
    """What time is read from."""

    source: str

    def mark(self) -> Any:
        """A point in the device's work."""

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two points, after `synchronize`."""

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""

    def clear_cache(self) -> None:
        """Drive what an earlier call left there out of the device's cache."""


class HostClock:
    """The processor's own clock, for work on the CPU."""

    source = "time.perf_counter"

    def mark(self) -> float:
        return time.perf_counter()

    def milliseconds(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def synchronize(self) -> None:
        pass

    def clear_cache(self) -> None:
        pass


class CudaClock:
    """CUDA events on the current stream. Clearing the cache also gives the host time to run ahead of the device, so
    that the launch of a short kernel is not what is measured."""

    source = "CUDA events"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._scratch = torch.empty(max(256 << 20, 3 * cache) // 4, dtype=torch.int32, device="cuda")

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def clear_cache(self) -> None:
        self._scratch.zero_()


@dataclass(frozen=True)
class Times:
    """Of one call, in ms."""

    median: float
    spread: float
    """(third - first quartile) / median."""
    rounds: int

    @staticmethod
    def of(values: Sequence[float]) -> Times:
        median = statistics.median(values)
        if len(values) > 1:
            first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        else:
            first = third = median
        return Times(median, (third - first) / median if median else 0.0, len(values))


def take_turns(
    clock: Clock, calls: Mapping[str, Sequence[Call]], seconds: float, contexts: Mapping[str, Context] | None = None
) -> dict[str, Times]:
    """Time each of `calls`, which have all run before: round after round, in turn, for about so many `seconds`.

    Each name comes with the same call on several sets of inputs, taken one after the other, and maybe with a context
    that it runs in. To enter one takes the host as long as to launch a kernel: it is entered before the cache is
    cleared, and left after the call's end is marked.
    """
    contexts = dict.fromkeys(calls, nullcontext) | dict(contexts or {})
    start = clock.mark()
    for name, each in calls.items():
        with contexts[name]():
            each[0]()
    end = clock.mark()
    clock.synchronize()
    once = max(clock.milliseconds(start, end) * 1e-3, 1e-6)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / once)))
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    for n in range(rounds):
        for name, each in calls.items():
            with contexts[name]():
                clock.clear_cache()
                start = clock.mark()
                each[n % len(each)]()
                marks[name].append((start, clock.mark()))
    clock.synchronize()
    return {name: Times.of([clock.milliseconds(*pair) for pair in pairs]) for name, pairs in marks.items()}
