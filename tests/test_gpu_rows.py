"""The rows of `make gpu`: what they count is what their code does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.row import Row
from benchmarks.gpu.rows import rows

QUICK = list(rows("cpu", quick=True))
FULL = list(rows("cuda", quick=False))


def size_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("row", QUICK, ids=lambda row: row.key)
def test_operations_are_those_of_the_products(row: Row) -> None:
    call = row.product(row.make())
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == row.operations
    assert row.operations % row.products == 0


HERE = [row for row in QUICK if " hardest " not in row.key]
"""Whose kernels the CPU has; of the other see below."""


@pytest.mark.parametrize("row", HERE, ids=lambda row: row.key)
def test_bytes_are_those_of_inputs_and_results(row: Row) -> None:
    inputs = row.make()
    if row.op in ("smooth_chamfer", "set_similarity"):  # offsets are nothing beside the sets
        x, y, upstream, _ = inputs
        out = row.ours(inputs)()
        expected = size_of(x, y, out) if upstream is None else size_of(x, y, upstream, *out)
    elif row.op == "slot_attention":
        q, k, v, grad, _ = inputs
        out = row.ours(inputs)()
        # the backward reads the update as well
        expected = size_of(q, k, v, out) if torch.is_tensor(out) else size_of(q, k, v, grad, grad, *out)
    elif row.op == "set_topk":
        _, gallery, scale = inputs
        expected = size_of(gallery, *([] if scale is None else [scale]))  # queries and results are nothing beside it
    elif row.op == "set_rank":
        expected = size_of(*inputs, *row.ours(inputs)())
    else:
        x, y = inputs
        expected = 2 * size_of(x, y)
    assert row.bytes == expected


def test_bytes_of_the_hardest_are_those_of_eager() -> None:
    (row,) = (row for row in QUICK if " hardest " in row.key)
    inputs = row.make()
    with pytest.raises(NotImplementedError, match="no such kernel"):
        row.ours(inputs)()
    values, who, *_ = out = row.eager(inputs)()
    assert values.dtype == torch.bfloat16 and who.dtype == torch.int64
    in_float32 = sum(t.numel() * (4 if t.is_floating_point() else 8) for t in out)  # as the kernel gives them
    assert row.bytes == size_of(*inputs) + in_float32
    own = torch.arange(len(who))
    assert (who != own).all()


def test_tf32_is_allowed_within_its_rows_alone() -> None:
    (row,) = (row for row in QUICK if row.key == "smooth_chamfer forward 20x20 K4 D16 tf32")
    matmul, seen = torch.backends.cuda.matmul, list[str]()
    before = matmul.fp32_precision
    inputs = row.make()
    for prepare in (row.ours, row.product, row.eager):
        call = prepare(inputs)
        with Watch(lambda: seen.append(matmul.fp32_precision)):
            call()
        assert matmul.fp32_precision == before and torch.get_float32_matmul_precision() == "highest"
    assert set(seen) == {"tf32"}


class Watch(TorchDispatchMode):
    """Calls back at each operation."""

    def __init__(self, callback: Callable[[], None]) -> None:
        super().__init__()
        self.callback = callback

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.callback()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("row", QUICK, ids=lambda row: row.key)
def test_inputs_are_fresh(row: Row) -> None:
    first, second = row.make(), row.make()
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert not torch.equal(a, b) and a.any()


def test_each_row_at_full_size_has_a_quick_one() -> None:
    """The dry run runs the code of all."""
    kinds = [
        {(row.op, row.name.split(" ")[0] if row.op != "set_topk" else row.products) for row in t} for t in (QUICK, FULL)
    ]
    assert kinds[0] == kinds[1]
    assert {"smooth_chamfer", "set_similarity", "slot_attention", "set_topk"} < {row.op for row in FULL}
    assert "forward 8192x8192 K4 D1024 bfloat16" in {row.name for row in FULL}
    assert len({row.key for row in FULL}) == len(FULL)
