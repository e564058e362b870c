"""The losses of a batch that is spread over processes: those of one process, little memory, and dead ranks named."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import setemb_kernels
from setemb_kernels import distributed
from setemb_kernels.losses import pairs, tiles
from tests.kernels.losses import ranks
from tests.kernels.losses.cases import CASES, KINDS, LOSSES, Case, Loss, with_gradients

EQUAL = Case("equal similarities", 12, 12, 1, 1, 4)
OTHERS = ("groups, maxsim mean", "empty sets, chamfer", "groups, match_probability", "more columns than rows, max")
TABLE = {case.name: case for case in [*CASES, EQUAL, *(case for case in KINDS if case.name in OTHERS)]}
SHARDS: dict[int, list[list[float]]] = {
    1: [[1]],
    2: [[1, 1], [0, 1], [3, 1]],
    3: [[1, 1, 1], [2, 0, 5]],
    4: [[1, 1, 1, 1], [0, 3, 1, 0]],
}
"""Sizes of shards, up to a factor, of 1, 2, 3 and 4 ranks. Those of y are of the reversed sizes where they can be."""


def build(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    arguments = case.build(dtype)
    if case is EQUAL:
        arguments |= {name: torch.ones_like(arguments[name]) / 2 for name in ("x", "y")}
    return arguments


def shard(arguments: dict[str, Any], weights: list[float], rank: int) -> dict[str, Any]:
    """A rank's part. Without groups, x and y are split differently too: ids are places in the whole batch."""
    part = dict(arguments)
    for side, sizes in (("x", weights), ("y", weights[::-1])):
        count, total = len(arguments[side]), sum(sizes)
        start, stop = (round(count * sum(sizes[:r]) / total) for r in (rank, rank + 1))
        part |= {name: value[start:stop] for name, value in arguments.items() if name.partition("_")[0] == side}
    return part


def spread(loss: Loss) -> Loss:
    function = getattr(distributed, loss.function.__name__)
    return replace(loss, function=function, options=loss.options | {"timeout": 20.0})


def all_cases(rank: int, size: int) -> dict[tuple[str, str, int], dict[str, Tensor]]:
    results = {}
    for number, weights in enumerate(SHARDS[size]):
        tiles.TILE, pairs.CHUNK_ELEMENTS = (1024, 1 << 20) if number == 0 else (3, 64)
        for case in TABLE.values():
            part = shard(build(case), weights, rank)
            for name in LOSSES:
                loss = spread(LOSSES[name])
                results[case.name, name, number] = with_gradients(loss.run, part, loss.scalars)
    return results


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda size: ranks.run(all_cases, size, tmp_path_factory.mktemp(f"world{size}"), size))


@cache
def of_one_process(case: str, name: str) -> dict[str, Tensor]:
    return with_gradients(LOSSES[name].run, build(TABLE[case]), LOSSES[name].scalars)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("size", SHARDS)
def test_loss_and_gradients_are_those_of_one_process(size: int, case: str, name: str, world: Any) -> None:
    truth = of_one_process(case, name)
    for number in range(len(SHARDS[size])):
        each = [results[case, name, number] for results in world(size)]
        for result in each:
            assert torch.equal(result["loss"], each[0]["loss"])
        whole = {"loss": each[0]["loss"]}
        for key in truth.keys() - {"loss"}:
            parts = [result[key] for result in each]
            whole[key] = torch.cat(parts) if key in ("x.grad", "y.grad") else torch.stack(parts).sum(0)
        for key, value in truth.items():
            terms = 100.0 if key in ("alpha.grad", "temperature.grad") else 1.0  # of sizes up to that, which cancel
            torch.testing.assert_close(whole[key], value, rtol=1e-12, atol=1e-12 * terms)


def batch_of(n: int, dtype: torch.dtype = torch.float64, k: int = 2, d: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x, y = (normalize(torch.randn(n, k, d, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
    return x.to(dtype), y.to(dtype)


FUNCTIONS = {name: getattr(distributed, name) for name in distributed.__all__}


def odds_and_ends(rank: int) -> dict[str, Any]:
    """What is not a number of the table, on 3 ranks of 4 sets each."""
    results: dict[str, Any] = {}
    own = slice(4 * rank, 4 * rank + 4)
    x, y = (v[own] for v in batch_of(12))

    # A mask, and a wish for gradients, on some ranks only.
    mask = torch.ones(12, 2, dtype=torch.bool)
    mask[4:8, 1] = False
    for name, function in FUNCTIONS.items():
        leaf = y.clone().requires_grad_(rank != 2)
        loss = function(x, leaf, y_mask=mask[own] if rank == 1 else None)
        loss.backward()
        results[f"some, {name}"] = loss.detach(), leaf.grad

    # A group of some of the ranks, in which places are other than in the whole.
    group = dist.new_group([0, 2])
    if rank != 1:
        results["group"] = distributed.set_infonce_loss(x, y, group=group)

    for dtype in (torch.float32, torch.bfloat16):
        results[dtype] = distributed.set_infonce_loss(*(v[own] for v in batch_of(12, dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = batch_of(12, torch.float32)[0][own].requires_grad_()
        loss = distributed.set_infonce_loss(leaf, batch_of(12, torch.float32)[1][own])
    loss.backward()
    results["autocast"] = loss.detach(), leaf.grad.dtype

    leaf = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distributed.set_infonce_loss(x, leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()

    with pytest.raises(ValueError, match="negatives: expected one of hardest, semi-hard, all, got 'easy'"):
        distributed.set_triplet_loss(x, y, negatives="easy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout: expected a finite number > 0, got 0"):
        distributed.set_triplet_loss(x, y, timeout=0)
    with pytest.raises(ValueError, match=r"rank 1 computes .*margin=0.1.* rank 0 .*margin=0.2") as error:
        distributed.set_triplet_loss(x, y, margin=0.1 if rank == 1 else 0.2)
    results["mismatch"] = str(error.value)
    return results


def test_masks_gradients_groups_dtypes_and_errors(tmp_path: Path) -> None:
    each = ranks.run(odds_and_ends, 3, tmp_path)
    x, y = batch_of(12)
    mask = torch.ones(12, 2, dtype=torch.bool)
    mask[4:8, 1] = False
    for name in FUNCTIONS:
        leaf = y.clone().requires_grad_()
        loss = getattr(setemb_kernels, name)(x, leaf, y_mask=mask)
        loss.backward()
        for rank, results in enumerate(each):
            value, gradient = results[f"some, {name}"]
            torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
            if rank == 2:
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, leaf.grad[4 * rank : 4 * rank + 4], rtol=1e-12, atol=1e-12)
    infonce = setemb_kernels.set_infonce_loss
    chosen = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    for rank in (0, 2):
        torch.testing.assert_close(each[rank]["group"], infonce(x[chosen], y[chosen]), rtol=1e-12, atol=0)
    for dtype in (torch.float32, torch.bfloat16):
        assert each[0][dtype].dtype == torch.float32
        torch.testing.assert_close(each[0][dtype], infonce(*batch_of(12, dtype)), rtol=1e-5, atol=0)
    loss, dtype = each[0]["autocast"]
    assert dtype == torch.float32
    torch.testing.assert_close(loss, infonce(*batch_of(12, torch.bfloat16)), rtol=1e-5, atol=0)
    assert len({results["mismatch"] for results in each}) == 1


def test_without_processes_it_is_one() -> None:
    x, y = batch_of(12)
    for name, function in FUNCTIONS.items():
        assert torch.equal(function(x, y), getattr(setemb_kernels, name)(x, y))


class Largest(TorchDispatchMode):
    """Keeps the bytes of the largest storage that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.size = max(self.size, value.untyped_storage().nbytes())
        return result


def largest_storage(rank: int, each: int) -> dict[str, int]:
    tiles.TILE, pairs.CHUNK_ELEMENTS = 16, 1 << 10
    x, y = (v[rank * each :][:each].clone().requires_grad_() for v in batch_of(4 * each, k=4, d=64))
    sizes = {}
    for name, function in FUNCTIONS.items():
        with Largest() as largest:
            function(x, y).backward()
        sizes[name] = largest.size
    return sizes


def test_no_rank_ever_holds_the_whole_of_y(tmp_path: Path) -> None:
    each = 32
    shard_bytes = each * 4 * 64 * 8
    for sizes in ranks.run(largest_storage, 4, tmp_path, each):
        for name, size in sizes.items():
            assert shard_bytes <= size < 1.1 * shard_bytes, name  # a block has ids and statistics, too


def lose(rank: int, victim: int, how: str, timeout: float, backward: bool) -> tuple[str, float] | None:
    """Twice the same loss; before the second, or its backward, a rank is lost."""
    x, y = batch_of(5)
    y.requires_grad_()
    distributed.set_infonce_loss(x, y, timeout=timeout).backward()
    loss = distributed.set_infonce_loss(x, y, timeout=timeout) if backward else None
    if rank == victim:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raises":
            return None
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
    start = time.monotonic()
    try:
        if loss is None:
            distributed.set_triplet_loss(x, y, timeout=timeout)
        else:
            loss.backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "no error", 0.0


@pytest.mark.parametrize(
    ("size", "victim", "how", "backward", "tcp"),
    [
        (4, 2, "killed", False, False),
        (4, 1, "killed", False, True),
        (4, 1, "stuck", False, True),
        (3, 1, "killed", True, True),
        (3, 2, "raises", True, False),
        (3, 0, "killed", False, True),
        (3, 0, "stopped", False, True),
        (2, 0, "killed", True, False),
    ],
)
def test_the_others_name_the_dead_rank_in_time(
    size: int, victim: int, how: str, backward: bool, tcp: bool, tmp_path: Path
) -> None:
    timeout = 8.0
    stuck = victim if how in ("stuck", "stopped") else -1
    each = ranks.run(lose, size, tmp_path, victim, how, timeout, backward, tcp=tcp, stuck=stuck)
    for rank, result in enumerate(each):
        if rank != victim:
            message, seconds = result
            name = "set_infonce_loss" if backward else "set_triplet_loss"
            assert message.startswith(f"{name}: rank {victim} takes no part: "), (rank, message)
            assert seconds < 2 * timeout, (rank, message)  # not a hang
