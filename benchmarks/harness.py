"""Rows: ours beside its peers, measured in turn in one run, so that a noisy machine slows all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

Function = Callable[[], Any]


@dataclass
class Row:
    """One line of the table."""

    op: str
    name: str
    limit: float | None
    """`ours` may take at most this many times `floor`."""
    floor: str
    """What the floor is: "product", "three products"."""
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Median of each, "floor" and "ours" among them."""
    spread: dict[str, float] = field(default_factory=dict)
    """(third - first quartile) / median."""
    ratio: float = 0.0
    """Median over the rounds of ours / floor, both from the same round."""
    teraflops: float = 0.0
    """The floor's operations over our time."""
    memory_mib: float | None = None
    limit_mib: float | None = None
    batches: dict[str, int] = field(default_factory=dict)
    """The largest batch that fits: ours and others'; ours has to be 16 times eager's."""
    sections: dict[str, dict[str, float]] = field(default_factory=dict)
    """Milliseconds of each part, by column: where the time goes."""

    @property
    def met(self) -> bool:
        if self.batches:
            return self.batches["ours"] >= 16 * self.batches["eager"]
        if self.memory_mib is not None and self.limit_mib is not None:
            return self.memory_mib <= self.limit_mib
        return self.limit is None or self.ratio <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {k: _round(v) for k, v in asdict(self).items() if v not in (None, {})} | {"met": self.met}


ROWS: list[Row] = []


def measure(
    benchmark: BenchmarkFixture,
    row: Row,
    ours: Function,
    floor: Function,
    peers: dict[str, Function],
    *,
    operations: float,
    device: str = "cpu",
    rounds: int = 9,
    peer_rounds: int = 3,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Row:
    """Time `ours` with pytest-benchmark; before each of its rounds the floor, before the first ones the peers.

    `around`, entered and left outside of the measured time, is what makes ours of what it calls.
    """
    entered = ExitStack()
    times: dict[str, list[float]] = {"floor": [], "ours": []} | {name: [] for name in peers}

    def timed(name: str, function: Function) -> None:
        times[name].append(_time(function, device))

    def others() -> None:
        if len(times["floor"]) < peer_rounds:
            for name, function in peers.items():
                timed(name, function)
        timed("floor", floor)
        entered.enter_context(around())

    def synchronous() -> None:
        ours()
        if device != "cpu":
            torch.cuda.synchronize()

    for function in (floor, *peers.values()):
        function()  # compiles, allocates
    with around():
        ours()
    gc.collect()
    benchmark.pedantic(synchronous, setup=others, teardown=entered.close, rounds=rounds, iterations=1)
    times["ours"] = list(benchmark.stats.stats.data)
    row.milliseconds = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    row.spread = {name: _spread(values) for name, values in times.items()}
    row.ratio = statistics.median(o / f for o, f in zip(times["ours"], times["floor"], strict=True))
    row.teraflops = operations / (row.milliseconds["ours"] * 1e-3) / 1e12
    benchmark.extra_info.update(row.as_dict())
    ROWS.append(row)
    return row


def _time(function: Function, device: str) -> float:
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _spread(values: list[float]) -> float:
    if len(values) < 4:
        return (max(values) - min(values)) / statistics.median(values)
    first, _, third = statistics.quantiles(values, n=4)
    return (third - first) / statistics.median(values)


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _round(v) for k, v in value.items()}
    return value
