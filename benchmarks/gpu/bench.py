"""Measures the rows, in a process of its own: a kernel that fails may take the process with it.

python -m benchmarks.gpu.bench --results FILE --until SECONDS [--device cpu] [--quick] [--skip KEY NAME]...
python -m benchmarks.gpu.bench --results FILE --compile-only PART OF [--device cpu] [--quick]

Each row is one line of FILE (JSON), written when it is done; before each implementation's first call stands a line
that says so, so that whoever started this process knows what ended it. Two passes: first everything but
`torch.compile`, which takes its time, then that, with the product measured beside it once more.

With `--compile-only` nothing is measured: every OF-th row is called once, so that several such processes leave the
caches of Triton and of torch.compile filled for the one that measures.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import machine
from benchmarks.gpu.implementations import absent, ours, serves
from benchmarks.gpu.row import Row
from benchmarks.gpu.rows import largest_batch, rows
from benchmarks.gpu.stages import read_lines
from benchmarks.gpu.timing import Call, Clock, Context, CudaClock, HostClock, Times, take_turns

LEAST_SECONDS_A_ROW, SECONDS_A_ROW = 0.15, 0.6
"""Spent on the timed rounds of one row: `TIMED` of what there is for each row that is left, within these bounds. The
rest of a row's time goes to making inputs and to first calls."""
TIMED = 0.2
PLAIN_SHARE = 0.6
"""Of the time, for the pass without torch.compile; its rows that do not begin by then come after the compiled ones."""
BEYOND_CACHE = 3
"""All sets of inputs of a row take so many times the cache of the device, as far as that takes `MOST_SETS` of them."""
MOST_SETS = 16
LARGEST = "set_triplet_loss largest batch K4 D1024 bfloat16"


class ContextLostError(Exception):
    """The device does not work on in this process."""


class Bench:
    """Measures rows one after the other and writes down what came of each."""

    def __init__(
        self,
        device: str,
        quick: bool,
        write: Callable[[dict[str, Any]], None],
        clock: Clock,
        skip: Iterable[tuple[str, str]] = (),
        done: Iterable[tuple[str, str]] = (),
        until: float = math.inf,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.device, self.quick, self.write, self.clock = device, quick, write, clock
        self.skip, self.done, self.until, self.now = set(skip), set(done), until, now
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0

    def run(self, table: Iterable[Row]) -> None:
        """Both passes, and the largest batch between them; first a line that names all rows."""
        table = list(table)
        self.write({"plan": [[row.op, row.name] for row in table]})
        compiled = sorted((row for row in table if row.compiled is not None), key=lambda row: row.large)
        share = self.until if math.isinf(self.until) else self.now() + PLAIN_SHARE * (self.until - self.now())
        self._pass("plain", table, share)
        if (LARGEST, "plain") not in self.done and self.now() < self.until:
            self._largest()
        self._pass("compiled", compiled, self.until)
        self._pass("plain", table, self.until)
        for phase, planned in (("plain", table), ("compiled", compiled)):
            for row in planned:
                if (row.key, phase) not in self.done:
                    line = {"row": row.key, "phase": phase, "op": row.op, "name": row.name}
                    self.write(line | {"failed": {"all": "no time left"}})

    def _pass(self, phase: str, table: list[Row], until: float) -> None:
        """Measure those rows that are not done, as long as there is time to begin."""
        left = [row for row in table if (row.key, phase) not in self.done]
        for n, row in enumerate(left):
            now = self.now()
            if now >= until:
                return
            seconds = TIMED * (until - now) / (len(left) - n)
            self.write(self.measure(row, phase, min(max(LEAST_SECONDS_A_ROW, seconds), SECONDS_A_ROW)))
            self.done.add((row.key, phase))
            self._let_go()

    def compile_only(self, table: Iterable[Row]) -> None:
        """Call once what compiles at its first call; of large rows ours alone, as several processes do this at once."""
        choices = {name: context for name, context in ours(self.device).items() if name != "cuda"}
        for row in table:
            makers: dict[str, tuple[Callable[..., Call], Context]] = {
                name: (row.ours, context) for name, context in choices.items() if serves(name, row.op)
            }
            if row.compiled is not None and not row.large:
                makers["compiled"] = (row.compiled, nullcontext)
            start, failed = self.now(), {}
            for name, (maker, context) in makers.items():
                try:
                    with context():
                        maker(row.make())()
                    self.clock.synchronize()
                except Exception as error:
                    failed[name] = _reason(error)
                    if _lost(error):
                        raise ContextLostError(failed[name]) from error
                self._let_go()
            torch._dynamo.reset()
            self.write({"compiled": row.key, "failed": failed, "seconds": self.now() - start})

    def measure(self, row: Row, phase: str, seconds: float = SECONDS_A_ROW) -> dict[str, Any]:
        """One line: medians and spreads of those that ran, and why others did not."""
        makers: dict[str, tuple[Callable[..., Call], Context]] = {"product": (row.product, nullcontext)}
        failed = {}
        if phase == "compiled":
            assert row.compiled is not None
            torch._dynamo.reset()  # rows share a function: torch compiles it for so many sizes and no more
            makers["compiled"] = (row.compiled, nullcontext)
            first = [n for n in ours(self.device) if serves(n, row.op)][:1]
            makers |= {n: (row.ours, ours(self.device)[n]) for n in first}
        else:
            makers |= {n: (row.ours, context) for n, context in ours(self.device).items() if serves(n, row.op)}
            makers["eager"] = (row.eager, nullcontext)
            failed |= {n: reason for n, reason in absent(self.device).items() if serves(n, row.op)}
        sets = self._inputs(row)
        calls, results = {}, {}
        for name, (maker, context) in makers.items():
            if (row.key, name) in self.skip:
                failed[name] = "ended the process"
                continue
            self.write({"begin": row.key, "phase": phase, "implementation": name})
            try:
                with context():
                    each = [maker(inputs) for inputs in sets]
                    out = each[0]()
                self.clock.synchronize()
                if name not in ("product", "compiled"):
                    results[name] = row.result(out).detach().float().cpu()
                calls[name] = each
            except Exception as error:
                failed[name] = _reason(error)
                if _lost(error):
                    raise ContextLostError(failed[name]) from error
            out = None
            self._let_go()
        base = row.result(row.judge(sets[0])()).detach().float().cpu() if row.judge and results else None
        self._let_go()
        contexts = {name: context for name, (_, context) in makers.items()}
        times: dict[str, Times] = {}
        if calls:
            times = take_turns(self.clock, calls, 0.02 if self.quick else seconds, contexts)
        return {
            "row": row.key,
            "phase": phase,
            "op": row.op,
            "name": row.name,
            "products": row.products,
            "operations": row.operations,
            "bytes": row.bytes,
            "milliseconds": {name: t.median for name, t in times.items()},
            "spread": {name: t.spread for name, t in times.items()},
            "rounds": {name: t.rounds for name, t in times.items()},
            "difference": _differences(results, base),
            "failed": failed,
            "input_sets": len(sets),
            "clocks": machine.clocks() if self.device == "cuda" else {},
        }

    def _inputs(self, row: Row) -> list[Any]:
        """Sets of fresh random inputs that together go beyond the cache."""
        first = row.make()
        size = sum(t.numel() * t.element_size() for t in first if isinstance(t, torch.Tensor))
        count = min(MOST_SETS, max(2 if self.quick else 1, math.ceil(BEYOND_CACHE * self.cache / max(1, size))))
        return [first, *(row.make() for _ in range(count - 1))]

    def _largest(self) -> None:
        self.write({"begin": LARGEST, "phase": "plain", "implementation": "all"})
        if (LARGEST, "all") in self.skip:
            line: dict[str, Any] = {"failed": {"all": "ended the process"}}
        else:
            batches, seconds = largest_batch(self.device, self.quick)
            line = {"batches": batches, "step_seconds": seconds, "failed": {}}
        op, name = LARGEST.split(" ", 1)
        self.write({"row": LARGEST, "phase": "plain", "op": op, "name": name} | line)
        self._let_go()

    def _let_go(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _differences(results: dict[str, torch.Tensor], base: torch.Tensor | None) -> dict[str, float | None]:
    """``|result - base| / |base|`` of each; without base that of eager, or of the first. None: not a number."""
    if not results:
        return {}
    if base is None:
        base = results.get("eager", next(iter(results.values())))
    found = {}
    for name, result in results.items():
        ratio = float((result - base).norm() / base.norm().clamp(min=1e-30))
        found[name] = ratio if math.isfinite(ratio) else None
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def _lost(error: Exception) -> bool:
    """After an error on the device, every later call of the process fails."""
    accelerator = getattr(torch, "AcceleratorError", ())
    return isinstance(error, accelerator) or "CUDA error" in str(error)


def ceilings(clock: Clock, device: str, quick: bool) -> dict[str, float]:
    """What the device does at best: bytes a second of a copy (read and written), operations a second of a product."""
    n, size = (64, 1 << 12) if quick else (8192, 1 << 30)
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    source, target = torch.randint(0, 255, (2, size), dtype=torch.uint8, device=device)
    calls: dict[str, list[Call]] = {"product": [lambda: a @ b], "copy": [lambda: target.copy_(source)]}
    for each in calls.values():
        each[0]()
    clock.synchronize()
    times = take_turns(clock, calls, 0.01 if quick else 0.2)
    return {
        "copy_bytes_per_second": 2 * size / (times["copy"].median * 1e-3),
        "bfloat16_operations_per_second": 2.0 * n**3 / (times["product"].median * 1e-3),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--until", type=float, default=math.inf, help="seconds since 1970: no row begins later")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compile-only", nargs=2, type=int, metavar=("PART", "OF"))
    parser.add_argument("--skip", nargs=2, action="append", default=[], metavar=("ROW", "IMPLEMENTATION"))
    args = parser.parse_args(arguments)
    clock: Clock = CudaClock() if args.device == "cuda" else HostClock()
    with args.results.open("a") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        lines = read_lines(args.results)
        done = [(line["row"], line["phase"]) for line in lines if "row" in line]
        if not args.compile_only and not any("ceilings" in line for line in lines):
            write({"ceilings": ceilings(clock, args.device, args.quick), "clock": clock.source})
        bench = Bench(args.device, args.quick, write, clock, map(tuple, args.skip), done, args.until)
        table = rows(args.device, args.quick)
        try:
            if args.compile_only:
                part, of = args.compile_only
                bench.compile_only(islice(table, part, None, of))
            else:
                bench.run(table)
        except ContextLostError as error:
            print(f"the device is lost to this process: {error}", file=sys.stderr)
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
