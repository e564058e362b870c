"""Exact search and ranks: those of the whole matrix of similarities, sorted; ties, masks, codes, memory, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from setemb_kernels import retrieval, set_rank, set_similarity, set_topk, smooth_chamfer

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def sets(n: int, k: int, d: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, k, d, generator=generator, dtype=F64), dim=-1).to(dtype)


def mask(n: int, k: int, seed: int) -> Tensor:
    valid = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) > 0.4
    valid[: n // 8] = False  # sets without a vector: similarity 0 to everything
    return valid


def by_sorting(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = s.sort(stable=True, dim=1, descending=True)
    return values[:, :k], indices[:, :k]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize(
    ("N", "M", "K", "L", "k", "chunk"),
    [(5, 40, 4, 4, 7, 16), (33, 70, 2, 3, 70, 32), (1, 1, 1, 1, 1, None), (20, 9, 3, 1, 1, 1), (7, 64, 4, 4, 20, 8)],
)
def test_topk_is_sorting(
    N: int, M: int, K: int, L: int, k: int, chunk: int | None, dtype: torch.dtype, masked: bool
) -> None:
    x, y = sets(N, K, 24, 1, dtype), sets(M, L, 24, 2, dtype)
    x_mask, y_mask = (mask(N, K, 3), mask(M, L, 4)) if masked else (None, None)
    found = set_topk(x, y, k, alpha=9.0, query_mask=x_mask, gallery_mask=y_mask, chunk=chunk)
    compute = F64 if dtype == F64 else F32
    assert found.values.dtype == compute
    s = smooth_chamfer(x.to(compute), y.to(compute), alpha=9.0, x_mask=x_mask, y_mask=y_mask)
    values, _ = by_sorting(s, k)
    tolerance = 1e-14 if compute == F64 else 1e-6
    torch.testing.assert_close(found.values, values, rtol=tolerance, atol=tolerance)
    # Which of two that differ in the last digit comes first depends on the tile; each is where it says.
    torch.testing.assert_close(s.gather(1, found.indices), found.values, rtol=tolerance, atol=tolerance)
    assert all(len(set(row)) == k for row in found.indices.tolist())


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_among_equals_the_lower_index_comes_first(chunk: int) -> None:
    """Vectors of the axes: similarities take three values, and each of them many times."""
    x, y = (torch.eye(4)[torch.tensor(of)][:, None] for of in ([0, 1, 3], [2, 0, 1, 0, 0, 2, 1, 1, 0, 1, 2, 0] * 3))
    s = smooth_chamfer(x, y)
    for k in (1, 2, 5, 12, 36):
        found = set_topk(x, y, k, chunk=chunk)
        values, indices = by_sorting(s, k)
        assert torch.equal(found.indices, indices)
        assert torch.equal(found.values, values)


def test_a_gallery_of_int8_with_a_scale_for_each_vector(tmp_path: Path) -> None:
    x, y = sets(6, 4, 32, 1), sets(50, 4, 32, 2)
    scale = y.abs().amax(2) / 127
    codes = (y / scale[..., None]).round().to(torch.int8)
    decoded = codes.float() * scale[..., None]
    expected = set_topk(x, decoded, 8, chunk=16)
    found = set_topk(x, codes, 8, gallery_scale=scale, chunk=16)
    assert torch.equal(found.values, expected.values) and torch.equal(found.indices, expected.indices)
    np.save(tmp_path / "codes.npy", codes.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "codes.npy", mmap_mode="c"))
    assert torch.equal(set_topk(x, mapped, 8, gallery_scale=scale, chunk=16).indices, found.indices)


def test_what_is_not_a_number_is_never_found() -> None:
    x, y = sets(3, 2, 8, 1), sets(5, 2, 8, 2)
    y[1, 0, 0] = x[2, 0, 0] = torch.nan
    found = set_topk(x, y, 5, chunk=2)
    assert (found.indices[:2, :4].sort(1).values == torch.tensor([0, 2, 3, 4])).all()
    assert (found.indices[:2, 4] == -1).all() and (found.values[:2, 4] == -torch.inf).all()
    assert (found.indices[2] == -1).all()


def test_autocast_and_gradients_do_not_matter() -> None:
    x, y = sets(4, 2, 16, 1).requires_grad_(), sets(30, 2, 16, 2).bfloat16()
    expected = set_topk(x.detach(), y.float(), 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = set_topk(x, y, 5)
        ranks = set_rank(x, y, x_group=torch.arange(4), y_group=torch.arange(30) // 7)
    assert torch.equal(found.values, expected.values) and torch.equal(found.indices, expected.indices)
    assert not found.values.requires_grad
    again = set_rank(x, y.float(), x_group=torch.arange(4), y_group=torch.arange(30) // 7)
    assert torch.equal(ranks.x, again.x) and torch.equal(ranks.y, again.y)


def test_no_queries() -> None:
    found = set_topk(sets(0, 2, 8), sets(5, 2, 8), 3)
    assert found.values.shape == found.indices.shape == (0, 3)


def ranks_by_hand(s: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
    results = []
    for scores, own in ((s, relevant), (s.T, relevant.T)):
        best = scores.masked_fill(~own | scores.isnan(), -torch.inf).amax(1, keepdim=True)
        results.append((~(scores < best) & ~own).sum(1))
    return results[0], results[1]


@pytest.mark.parametrize("chunk", [None, 4, 7])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_rank_is_counting(dtype: torch.dtype, chunk: int | None) -> None:
    x, y = sets(20, 4, 24, 1, dtype), sets(60, 3, 24, 2, dtype)
    x_group, y_group = torch.arange(20) // 2, torch.arange(60).flip(0) // 6
    y_group[7] = -1  # nothing is relevant to it
    x_mask, y_mask = mask(20, 4, 3), mask(60, 3, 4)
    found = set_rank(x, y, x_group=x_group, y_group=y_group, x_mask=x_mask, y_mask=y_mask, chunk=chunk)
    compute = F64 if dtype == F64 else F32
    s = smooth_chamfer(x.to(compute), y.to(compute), x_mask=x_mask, y_mask=y_mask)
    expected = ranks_by_hand(s, x_group[:, None] == y_group)
    assert torch.equal(found.x, expected[0]) and torch.equal(found.y, expected[1])
    assert found.y[7] == 20


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_equals_and_nan_count_against_a_set(chunk: int) -> None:
    x, y = (torch.eye(4)[torch.tensor(of)][:, None] for of in ([0, 1, 0, 2], [0, 1, 1, 2, 0, 3]))
    y[5] = torch.nan
    ids = {"x_group": torch.tensor([0, 1, 2, 3]), "y_group": torch.tensor([0, 1, 2, 3, 0, 3])}
    found = set_rank(x, y, chunk=chunk, **ids)
    expected = ranks_by_hand(smooth_chamfer(x, y), ids["x_group"][:, None] == ids["y_group"])
    assert torch.equal(found.x, expected[0]) and torch.equal(found.y, expected[1])
    assert found.x.tolist() == [1, 2, 5, 0]


MEASURES: dict[str, dict[str, Any]] = {
    "chamfer": {},
    "maxsim": {"reduction": "mean"},
    "soft_maxsim": {"alpha": 5.0},
    "max": {},
    "mean": {},
    "match_probability": {"alpha": 3.0, "match_bias": -0.5},
}


@pytest.mark.parametrize("stored", ["float32", "float64", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", MEASURES)
def test_other_similarities(kind: Any, stored: str) -> None:
    options = MEASURES[kind]
    compute = F64 if stored == "float64" else F32
    x, y = sets(6, 3, 16, 1, compute), sets(40, 4, 16, 2)
    x_mask, y_mask = mask(6, 3, 3), mask(40, 4, 4)
    scale = y.abs().amax(2) / 127 if stored == "int8" else None
    if scale is None:
        gallery = y.to(getattr(torch, stored))
        decoded = gallery.to(compute)
    else:
        gallery = (y / scale[..., None]).round().to(torch.int8)
        decoded = gallery * scale[..., None]
    given = {"scale" if name == "alpha" and kind == "match_probability" else name: v for name, v in options.items()}
    given = {name.removeprefix("match_"): v for name, v in given.items()}
    s = set_similarity(x, decoded, kind, x_mask=x_mask, y_mask=y_mask, **given)
    found = set_topk(
        x, gallery, 9, kind=kind, query_mask=x_mask, gallery_mask=y_mask, gallery_scale=scale, chunk=7, **options
    )
    tolerance = 1e-14 if compute == F64 else 1e-6
    values, _ = by_sorting(s, 9)
    torch.testing.assert_close(found.values, values, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(s.gather(1, found.indices), found.values, rtol=tolerance, atol=tolerance)
    if scale is None:
        ids = {"x_group": torch.arange(6), "y_group": torch.arange(40) % 6}
        ranks = set_rank(x, gallery, kind=kind, x_mask=x_mask, y_mask=y_mask, chunk=11, **ids, **options)
        expected = ranks_by_hand(s, ids["x_group"][:, None] == ids["y_group"])
        assert torch.equal(ranks.x, expected[0]) and torch.equal(ranks.y, expected[1])


GOOD: dict[str, Any] = {"queries": sets(3, 2, 8), "gallery": sets(5, 2, 8), "k": 2}
CODES = {"gallery": torch.zeros(5, 2, 8, dtype=torch.int8)}
NESTED = torch.nested.nested_tensor([torch.ones(2, 8)] * 3, layout=torch.jagged)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.zeros(3, 8)}, ValueError, "queries: expected 3 dimensions"),
        ({"gallery": sets(5, 2, 7)}, ValueError, "gallery: expected 8 features as in queries, got 7"),
        ({"gallery": torch.zeros(5, 2, 8).int()}, TypeError, "gallery: expected .* or int8, got int32"),
        (CODES, ValueError, "gallery_scale: expected a tensor beside a gallery of int8, got None"),
        (CODES | {"gallery_scale": torch.ones(5, 3)}, ValueError, "gallery_scale: expected 2 vectors as in gallery"),
        ({"k": 6}, ValueError, "k: expected 1 <= k <= 5, the sets of gallery, got 6"),
        ({"k": 0}, ValueError, "k: expected 1 <= k <= 5"),
        ({"k": 2.0}, TypeError, "k: expected an int, got float"),
        ({"alpha": 0.0}, ValueError, "alpha: expected a finite number > 0, got 0"),
        ({"query_mask": torch.ones(3, 3).bool()}, ValueError, r"query_mask: expected shape \[3, 2\] as of queries"),
        ({"gallery_mask": torch.ones(5, 2)}, TypeError, "gallery_mask: expected bool"),
        ({"kind": "colbert"}, ValueError, "kind: expected one of smooth_chamfer, .*, got 'colbert'"),
        ({"reduction": "mean"}, ValueError, "reduction: expected 'sum' for smooth_chamfer"),
        ({"kind": "match_probability", "match_bias": torch.inf}, ValueError, "match_bias: expected a finite number"),
        ({"queries": NESTED}, TypeError, "queries: expected a padded tensor .*, got a nested one"),
        ({"gallery": NESTED}, TypeError, "gallery: expected a padded tensor .*, got a nested one"),
        ({"chunk": 0}, ValueError, "chunk: expected at least 1, got 0"),
        ({"chunk": 1.5}, TypeError, "chunk: expected an int or None, got float"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        set_topk(**(GOOD | change))


def test_errors_of_ranks() -> None:
    x, y = sets(3, 2, 8), sets(5, 2, 8)
    ids = {"x_group": torch.arange(3), "y_group": torch.arange(5)}
    with pytest.raises(ValueError, match=r"y_group: expected shape \[5\] as of y, got \[3\]"):
        set_rank(x, y, **(ids | {"y_group": torch.arange(3)}))
    with pytest.raises(TypeError, match="x_group: expected integers, got float32"):
        set_rank(x, y, **(ids | {"x_group": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"y_mask: expected shape \[5, 2\] as of y"):
        set_rank(x, y, y_mask=torch.ones(5, 1).bool(), **ids)


def test_a_tile_is_the_largest_that_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = retrieval.SetTiles.similarity

    def watched(self: Any, rows: slice, columns: slice) -> Tensor:
        s = real(self, rows, columns)
        sizes.append(s.shape)
        return s

    monkeypatch.setattr(retrieval.SetTiles, "similarity", watched)
    set_topk(sets(20, 2, 8), sets(50, 2, 8), 3, chunk=16)
    assert max(n for n, _ in sizes) == 16 and max(m for _, m in sizes) == 16 and len(sizes) == 2 * 4
