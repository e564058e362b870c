"""What `make gpu` measures: the clocks, and rows that are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu.bench import Bench, ContextLostError
from benchmarks.gpu.row import Row
from benchmarks.gpu.table import floor, table
from benchmarks.gpu.timing import HostClock, take_turns


class ScriptedClock:
    """Time goes on by what calls say."""

    source = "made up"

    def __init__(self) -> None:
        self.time, self.cleared, self.waiting = 0.0, 0, False

    def mark(self) -> float:
        self.waiting = True
        return self.time

    def milliseconds(self, start: float, end: float) -> float:
        assert not self.waiting, "read before the device was done"
        return end - start

    def synchronize(self) -> None:
        self.waiting = False

    def clear_cache(self) -> None:
        self.cleared += 1
        self.time += 1000.0


def test_medians_and_spreads() -> None:
    clock = ScriptedClock()
    order = []

    def call(name: str, *times: float) -> Callable[[], None]:
        values = list(times)

        def run() -> None:
            order.append(name)
            clock.time += values.pop(0)

        return run

    calls = {"a": [call("a0", 5, 1, 3, 9), call("a1", 2, 4)], "b": [call("b", *[7.0] * 9)]}
    times = take_turns(clock, calls, 0.001)  # five rounds
    assert order == ["a0", "b", "a0", "b", "a1", "b", "a0", "b", "a1", "b", "a0", "b"]
    a, b = times["a"], times["b"]
    assert (a.median, a.rounds) == (3, 5)  # of 1, 2, 3, 4, 9: quartiles 2 and 4
    assert a.spread == pytest.approx(2 / 3)
    assert (b.median, b.spread) == (7, 0)
    assert clock.cleared == 10


def test_contexts_are_outside_what_is_timed() -> None:
    """Entered before the cache is cleared, so that the host runs ahead; left after the end is marked."""
    done: list[str] = []

    class Clock(ScriptedClock):
        def mark(self) -> float:
            done.append("mark")
            return super().mark()

        def clear_cache(self) -> None:
            done.append("clear")

    @contextmanager
    def context() -> Iterator[None]:
        done.append("enter")
        yield
        done.append("leave")

    take_turns(Clock(), {"a": [lambda: done.append("a")], "b": [lambda: done.append("b")]}, 0.0, {"a": context})
    first = ["mark", "enter", "a", "leave", "b", "mark"]
    a_round = ["enter", "clear", "mark", "a", "mark", "leave", "clear", "mark", "b", "mark"]
    assert done == [*first, *(5 * a_round)]


def made_up_row(**changes: Any) -> Row:
    values: dict[str, Any] = {"op": "op", "name": "size", "products": 1, "operations": 4.0, "bytes": 2.0}
    values |= {"make": lambda: (torch.ones(2),), "product": lambda inputs: lambda: inputs[0]}
    values |= {name: lambda inputs: lambda: 2 * inputs[0] for name in ("ours", "eager")}
    return Row(**(values | changes))


def bench(row: Row, **options: Any) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    Bench(
        "cpu",
        True,
        lines.append,
        HostClock(),
        done=[("set_triplet_loss largest batch K4 D1024 bfloat16", "plain")],
        **options,
    ).run([row])
    return [line for line in lines if "row" in line]


def fails(error: Exception) -> Callable[[Any], Callable[[], Any]]:
    def prepare(inputs: Any) -> Callable[[], Any]:
        def run() -> Any:
            raise error

        return run

    return prepare


def test_an_implementation_that_fails_costs_its_own_figure() -> None:
    (line,) = bench(made_up_row(ours=fails(ValueError("no such size\nat all"))))
    assert set(line["milliseconds"]) == {"product", "eager"}
    assert list(line["failed"].values()) == ["ValueError: no such size"]
    (line,) = bench(made_up_row(eager=fails(torch.OutOfMemoryError("tried to allocate"))))
    assert line["failed"] == {"eager": "out of memory"}


def test_an_error_of_the_device_ends_the_process() -> None:
    with pytest.raises(ContextLostError):
        bench(made_up_row(eager=fails(RuntimeError("CUDA error: an illegal memory access was encountered"))))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when")]
)
def test_a_batch_that_does_not_fit(error: Exception) -> None:
    def fails_from_32(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if len(x) >= 32:
            raise error
        return (x * y).float().sum()

    seconds = gpu_rows._step(fails_from_32, 16, "cpu")
    assert seconds is not None and seconds > 0
    assert gpu_rows._step(fails_from_32, 32, "cpu") is None
    with pytest.raises(RuntimeError, match="illegal"):
        gpu_rows._step(lambda x, y: fails(RuntimeError("CUDA error: illegal"))(None)(), 16, "cpu")


def test_a_wrong_result_shows() -> None:
    (line,) = bench(made_up_row(ours=lambda inputs: lambda: 3 * inputs[0]))
    (ours,) = set(line["difference"]) - {"eager"}
    assert line["difference"][ours] == pytest.approx(0.5)
    (nan,) = bench(made_up_row(ours=lambda inputs: lambda: torch.nan * inputs[0]))
    assert nan["difference"][ours] is None
    for content in (line, nan):
        assert "!" in table({"stages": [], "rows": [content]})


def test_rows_that_come_too_late_say_so() -> None:
    (line,) = bench(made_up_row(), until=0.0)
    assert line["failed"] == {"all": "no time left"}
    assert bench(made_up_row(), skip=[("op size", "eager")])[0]["failed"] == {"eager": "ended the process"}


def test_rows_that_are_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled pass has its share of the time, the large rows last; what is late is measured after it."""
    now, lines = [0.0], list[dict[str, Any]]()
    compiled = {"compiled": lambda inputs: lambda: 2 * inputs[0]}
    table = [
        made_up_row(name="a", large=True, **compiled),
        made_up_row(name="b", **compiled),
        made_up_row(name="c", **compiled),
    ]
    asked: list[float] = []

    def measure(row: Row, phase: str, seconds: float) -> dict[str, Any]:
        now[0] += 45 if phase == "plain" else 8
        asked.append(seconds)
        return {"row": row.key, "phase": phase}

    def run(until: float) -> list[tuple[str, ...]]:
        now[0], lines[:], asked[:] = 0.0, [], []
        done = [("set_triplet_loss largest batch K4 D1024 bfloat16", "plain")]
        all_of_it = Bench("cpu", True, lines.append, HostClock(), done=done, until=until, now=lambda: now[0])
        monkeypatch.setattr(all_of_it, "measure", measure)
        all_of_it.run(table)
        return [(line["row"][3:], line["phase"], *line.get("failed", {}).values()) for line in lines if "row" in line]

    first, second = [("a", "plain"), ("b", "plain")], [(name, "compiled") for name in "bca"]
    assert run(150.0) == [*first, *second, ("c", "plain")]
    assert run(100.0) == [*first, *second[:2], ("c", "plain", "no time left"), ("a", "compiled", "no time left")]
    assert all(0.15 <= seconds <= 0.6 for seconds in asked)
    assert asked[-1] == pytest.approx(0.2 * 2 / 2)


def test_compiled_beforehand() -> None:
    """Ours and the compiled, each once; of large rows not the compiled; a failure costs its own."""
    calls: list[str] = []

    def says(name: str) -> Callable[[Any], Callable[[], Any]]:
        return lambda inputs: lambda: calls.append(name)

    ways = {"ours": says("ours"), "compiled": says("compiled"), "eager": says("eager"), "product": says("product")}
    table = [made_up_row(name="one", **ways), made_up_row(name="large", large=True, **ways)]
    table.append(made_up_row(name="bad", ours=fails(ValueError("no such size")), compiled=says("after")))
    lines: list[dict[str, Any]] = []
    Bench("cpu", True, lines.append, HostClock()).compile_only(table)
    assert calls == ["ours", "compiled", "ours", "after"]
    assert [line["compiled"] for line in lines] == ["op one", "op large", "op bad"]
    assert [list(line["failed"].values()) for line in lines] == [[], [], ["ValueError: no such size"]]


def test_floor_is_the_larger_of_operations_and_bytes() -> None:
    ceilings = {"bfloat16_operations_per_second": 1e3, "copy_bytes_per_second": 1e3}
    assert floor({"operations": 4.0, "bytes": 2.0}, ceilings) == pytest.approx(4.0)
    assert floor({"operations": 4.0, "bytes": 9.0}, ceilings) == pytest.approx(9.0)
    assert floor({"operations": 4.0, "bytes": 9.0}, {}) is None


# --- the machine, and tests
