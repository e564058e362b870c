"""Search over ranks of gloo is search in one process: uneven and empty parts, ties, masks, codes, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from setemb.index import SetIndex
from setemb.index.sharded import sharded_search, sharded_topk
from setemb_kernels import set_topk
from tests.kernels.losses.ranks import run

D = 16
PARTS = {1: [[0, 37]], 2: [[0, 30, 37], [0, 0, 37]], 3: [[0, 5, 5, 37], [0, 36, 37, 37]], 4: [[0, 1, 12, 12, 37]]}
"""By the number of ranks: where the parts of 37 sets begin and end."""


def sets(n: int, seed: int, k: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, k, D, generator=generator), dim=-1)


def axes() -> tuple[Tensor, Tensor]:
    """Similarities that are exact, and many of them equal."""
    eye = torch.eye(D)
    order = torch.randint(3, (37,), generator=torch.Generator().manual_seed(0))
    return eye[:2][:, None], eye[order][:, None]


def mask() -> Tensor:
    valid = torch.rand(37, 3, generator=torch.Generator().manual_seed(5)) > 0.3
    valid[:, 0] = True
    return valid


def search(rank: int, bounds: list[int], kind: str, k: int) -> Any:
    part = slice(bounds[rank], bounds[rank + 1])
    if kind == "ties":
        x, y = axes()
        return sharded_topk(x, y[part], k)
    x, y = sets(5, 1), sets(37, 2)
    if kind == "masked codes":
        scale = y.abs().amax(2) / 127
        codes = (y / scale[..., None]).round().to(torch.int8)
        return sharded_topk(x, codes[part], k, gallery_scale=scale[part], gallery_mask=mask()[part], alpha=9.0)
    if kind == "index":
        index = SetIndex(y[part], [f"ä{i}" for i in range(37)][part])
        result = sharded_search(index, x, k)
        return result.scores, result.rows, result.ids
    return sharded_topk(x, y[part], k)


def whole(kind: str, k: int) -> Any:
    return search(0, [0, 37], kind, k)


@pytest.mark.parametrize("kind", ["plain", "ties", "masked codes", "index"])
@pytest.mark.parametrize(("size", "bounds"), [(size, bounds) for size, all_ in PARTS.items() for bounds in all_])
def test_it_is_search_in_one_process(size: int, bounds: list[int], kind: str, tmp_path: Path) -> None:
    for k in (1, 6, 37):
        folder = tmp_path / str(k)
        folder.mkdir()
        expected = whole(kind, k)
        for found in run(search, size, folder, bounds, kind, k):
            assert torch.equal(found[1], expected[1])
            if kind == "ties":
                assert torch.equal(found[0], expected[0])
            else:  # a tile of another size may sum in another order
                torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-6)
            if kind == "index":
                assert found[2] == expected[2]


def test_in_one_process_it_is_set_topk() -> None:
    x, y = sets(5, 1), sets(37, 2)
    expected = set_topk(x, y, 4)
    assert all(torch.equal(a, b) for a, b in zip(sharded_topk(x, y, 4), expected, strict=True))
    index = SetIndex(y, [str(i) for i in range(37)])
    assert sharded_search(index, x, 100).ids == index.search(x, 100).ids


def nothing_valid(rank: int, bounds: list[int]) -> Any:
    """Under "max" a query of which all is masked is at 0 of every set."""
    part = slice(bounds[rank], bounds[rank + 1])
    index = SetIndex(sets(37, 2)[part], [f"ä{i}" for i in range(37)][part], similarity="max")
    result = sharded_search(index, sets(2, 1), 6, query_mask=torch.tensor([[True] * 3, [False] * 3]))
    return result.scores, result.rows, result.ids


def test_a_query_of_nothing_finds_what_it_finds_in_one_process(tmp_path: Path) -> None:
    expected = nothing_valid(0, [0, 37])
    assert (expected[0][1] == 0).all()
    assert expected[1][1].tolist() == list(range(6))
    for found in run(nothing_valid, 3, tmp_path, [0, 2, 2, 37]):
        assert found[2] == expected[2]
        assert torch.equal(found[1], expected[1])


def test_queries_may_be_of_numpy() -> None:
    index = SetIndex(sets(37, 2), [str(i) for i in range(37)])
    assert sharded_search(index, sets(5, 1).numpy(), 4).ids == index.search(sets(5, 1), 4).ids


class Broken(SetIndex):
    def search(self, *arguments: Any, **more: Any) -> Any:
        raise OSError("the disk is gone")


def wrong(rank: int, what: str) -> str:
    x, y = sets(5, 1), sets(10, 2)
    try:
        if what == "k":
            sharded_topk(x, y, 31)
        elif what == "queries":
            sharded_topk(x + rank, y, 3)
        elif what == "count":
            sharded_topk(x, y, 3 + rank)
        elif what == "one":
            sharded_topk(x, y[:, :, : D - rank], 3)
        elif what == "nan":
            sharded_search(SetIndex(y, list("abcdefghij")), x * (torch.nan if rank == 2 else 1), 3)
        elif what == "disk":
            sharded_search((Broken if rank == 1 else SetIndex)(y, list("abcdefghij")), x, 3)
        elif what == "list":
            sharded_search(SetIndex(y, list("abcdefghij")), x.tolist() if rank == 0 else x, 3)  # type: ignore[arg-type]
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("k", ["ValueError: k: expected 1 <= k <= 30, the sets of all ranks, got 31"] * 3),
        ("queries", ["ValueError: queries and k must be the same on all ranks, rank 1 has others"]),
        ("count", ["ValueError: queries and k must be the same on all ranks, rank 1 has others"]),
        ("one", ["RuntimeError: rank 1 failed; it says why", "ValueError: gallery: expected 16"]),
        ("nan", ["RuntimeError: rank 2 failed"] * 2 + ["ValueError: queries must be finite, query 0 is not"]),
        ("disk", [(told := "RuntimeError: rank 1 failed; it says why"), "OSError: the disk is gone", told]),
        ("list", ["TypeError: queries must be a tensor or a numpy array, got list", "RuntimeError: rank 0 failed"]),
    ],
)
def test_all_ranks_are_told(what: str, messages: list[str], tmp_path: Path) -> None:
    found = run(wrong, 3, tmp_path, what)
    assert all(text != "nothing" for text in found)
    for text, message in zip(found, messages, strict=False):
        assert message in text
