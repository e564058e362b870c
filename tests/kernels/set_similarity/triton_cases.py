"""What `test_triton` runs in a process of its own: the case table, and what only this backend has.

On a GPU every case and kind in float32 and, by turns, in bfloat16 or float16. Interpreted, a program takes
milliseconds: then a few sets of each case, of every kind, in float32 and float16 by turns (numpy has no bfloat16; many
features take too long in float32). Inputs inside larger buffers of NaN ("sliced", "rows of no set") and
`guarded_memory` show accesses out of bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from setemb_kernels import precompile_set_similarity  # noqa: E402
from setemb_kernels.ops.set_similarity import triton as backend  # noqa: E402
from setemb_kernels.ops.set_similarity import (  # noqa: E402
    triton_config,
    triton_gradient_kernels,
    triton_kernels,
    triton_plan,
)
from setemb_kernels.ops.set_similarity.codes import FLOAT8_CAPABILITY  # noqa: E402
from setemb_kernels.ops.set_similarity.layout import PackedSets  # noqa: E402
from tests.kernels.compiled import compiled  # noqa: E402
from tests.kernels.guarded_memory import guarded_memory  # noqa: E402, F401
from tests.kernels.set_similarity.cases import (  # noqa: E402
    CASES,
    KINDS,
    Case,
    Inputs,
    Results,
    cases,
    check,
    check_wide,
    reference_results,
)
from tests.kernels.set_similarity.codes import check as check_codes  # noqa: E402

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16]))
NAMED = {case.name: case for case in CASES}


def few(case: Case) -> Case:
    """The case with as many sets as the interpreter has time for."""
    if not INTERPRETED:
        return case
    return replace(case, N=min(case.N, 2), M=min(case.M, 2))


def table() -> Iterator[Any]:
    for dtype in DTYPES:
        for case, kind in cases(dtype):
            turn = (CASES.index(case) + KINDS.index(kind)) % 2
            if INTERPRETED:
                is_due = case.wide or DTYPES[1 if case.D > 1000 else turn] == dtype
            else:
                is_due = dtype in (torch.float32, DTYPES[1 + turn]) or case.wide
            if is_due:
                yield pytest.param(few(case), kind, dtype, id=f"{case.name}-{kind}-{str(dtype)[6:]}")


def run(i: Inputs, wide: bool = False) -> Results:
    arguments = i[:-1]
    return backend.forward(*arguments, wide), *backend.backward(i.grad, *arguments, True, True, True, True)


@pytest.mark.parametrize(("case", "kind", "dtype"), list(table()))
def test_table(case: Case, kind: str, dtype: torch.dtype) -> None:
    check(run, case, kind, dtype, DEVICE, few=True)


@pytest.mark.parametrize("kind", ["chamfer", "soft_maxsim", "match_probability"])
@pytest.mark.parametrize("name", ["ragged", "candidates, empty sets", "out of the range of float16"])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
def test_16_bit_in_float32_out(name: str, kind: str, dtype: torch.dtype) -> None:
    case = NAMED[name]
    if kind in case.kinds:
        check_wide(lambda i: run(i, wide=True), few(case), kind, dtype, DEVICE)


def run_codes(x: PackedSets, y: PackedSets, i: Inputs) -> Tensor:
    return backend.forward_of_codes(
        x.rows, x.scale, x.offsets, y.rows, y.scale, y.offsets, i.candidates, i.alpha, i.bias, i.kind, i.mean
    )


FLOAT8 = [torch.float8_e4m3fn] if INTERPRETED or torch.cuda.get_device_capability() >= FLOAT8_CAPABILITY else []
CODED = ("odd sizes", "tokens", "D 1031", "candidates, empty sets", "ragged documents", "sliced", "ties", "no y")


@pytest.mark.parametrize("kind", ["chamfer", "maxsim", "soft_maxsim", "max", "match_probability"])
@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("dtype", [torch.int8, *FLOAT8], ids=str)
def test_codes(name: str, kind: str, dtype: torch.dtype) -> None:
    check_codes(run_codes, few(NAMED[name]), kind, dtype, dtype, DEVICE)


@pytest.mark.parametrize("kind", ["maxsim", "soft_maxsim"])
def test_codes_without_scales(kind: str) -> None:
    check_codes(run_codes, few(NAMED["ragged"]), kind, torch.int8, torch.int8, DEVICE, scaled=False)


def test_scales_out_of_proportion() -> None:
    codes, offsets = torch.full((2, 64), 127, dtype=torch.int8, device=DEVICE), torch.arange(3, device=DEVICE)
    one = torch.tensor(1.0, dtype=torch.float64)
    large, small = (torch.full((2,), v, device=DEVICE) for v in (1e36, 1e-36))
    for x_scale, y_scale in ((large, small), (small, large)):
        s = backend.forward_of_codes(codes, x_scale, offsets, codes, y_scale, offsets, None, one, one, "max", False)
        torch.testing.assert_close(s, torch.full_like(s, 64.0 * 127 * 127))


BANDS = Case("bands", 3, 2, (1, 20), (1, 20), 16)
CHOSEN = Case("candidates of both sides", 2, 3, (1, 20), (1, 40), 16, pairs="candidates", empty="y")
BOTH = pytest.mark.parametrize("case", [BANDS, CHOSEN], ids=lambda case: case.name)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_windows(case: Case, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """State for one set at a time, launches of part of the sets, and several bands of them."""
    limits = triton_config.LIMITS._replace(workspace_bytes=1, programs=4, band=2)
    monkeypatch.setattr(triton_config, "LIMITS", limits)
    check(run, case, kind, torch.float32, DEVICE)


@BOTH
@pytest.mark.parametrize("kind", ["chamfer", "max", "match_probability"])
@pytest.mark.parametrize("programs", [0, 8])
def test_splits(case: Case, kind: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs and lists of sets, whole and split over programs, whose sums are added up."""
    monkeypatch.setattr(triton_config, "LIMITS", triton_config.LIMITS._replace(programs_each=programs))
    check(run, replace(case, N=2, M=2, K=(1, 70), L=(1, 50)), kind, torch.float16, DEVICE)


@pytest.mark.parametrize("kind", KINDS)
def test_result_does_not_change(kind: str) -> None:
    i = CHOSEN.build(kind, torch.float32, DEVICE)
    for first, second in zip(run(i), run(i), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["soft_maxsim", "match_probability"])
def test_alpha_and_bias_on_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their values are read by the kernels, through pointers."""
    monkeypatch.setattr(backend, "_on_host", lambda v: False)

    def on_device(i: Inputs) -> Results:
        return run(i._replace(alpha=i.alpha.to(DEVICE), bias=i.bias.to(DEVICE)))

    check(on_device, CHOSEN, kind, torch.float32, DEVICE)


@pytest.mark.parametrize("kind", ["chamfer", "soft_maxsim", "match_probability"])
def test_each_gradient_alone(kind: str) -> None:
    i = CHOSEN.build(kind, torch.float32, DEVICE)
    every = backend.backward(i.grad, *i[:-1], True, True, True, True)
    for needed in range(4):
        needs = [n == needed for n in range(4)]
        some = backend.backward(i.grad, *i[:-1], *needs)
        for need, got, expected in zip(needs, some, every, strict=True):
            assert got.shape == (expected.shape if need else (0,))
            if need:
                torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_with_its_set(kind: str) -> None:
    """In forward and backward, and whether it is of x or of y."""
    i = Case("NaN", 2, 2, (2, 20), (2, 20), 16).build(kind, torch.float32, DEVICE)
    clean = run(i)
    for side, name in enumerate(("x", "y")):
        offsets = (i.x_offsets, i.y_offsets)[side]
        v = (i.x, i.y)[side].clone()
        v[offsets[1] + 1, 5] = float("nan")  # in set 1
        hit = run(i._replace(**{name: v}))
        own, others = hit[0].select(side, 1), torch.arange(hit[0].shape[side]) != 1
        assert own.isnan().all()
        expected = clean[0].movedim(side, 0)[others]
        torch.testing.assert_close(hit[0].movedim(side, 0)[others], expected, rtol=0, atol=0)
        rows = torch.ones(len(v), dtype=torch.bool)
        rows[offsets[1] : offsets[2]] = False
        assert hit[1 + side][rows].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_gradient_stays_with_its_pair(kind: str) -> None:
    i = Case("NaN", 2, 3, (2, 20), (2, 20), 16).build(kind, torch.float32, DEVICE)
    i.grad[1, 2] = float("nan")
    _, *gradients, _, _ = run(i)
    for got, offsets, hit in zip(gradients, (i.x_offsets, i.y_offsets), (1, 2), strict=True):
        rows = torch.zeros(len(got), dtype=torch.bool)
        rows[offsets[hit] : offsets[hit + 1]] = True
        assert got[rows].isnan().any() and got[~rows].isfinite().all()


def test_ties_go_to_the_lowest_index() -> None:
    """Within a tile and beyond: of 150 vectors that are alike the first has the whole gradient."""
    x, y = torch.ones(70, 8, device=DEVICE), torch.ones(150, 8, device=DEVICE)
    offsets = [torch.tensor([0, len(v)], device=DEVICE) for v in (x, y)]
    one, zero = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for kind, of_x in (("maxsim", 70), ("max", 1)):
        sets = (x, offsets[0], y, offsets[1], None, one, zero, kind, False)
        grad_x, grad_y, _, _ = backend.backward(x.new_ones(1, 1), *sets, True, True, False, False)
        assert grad_y[0].eq(of_x).all() and grad_y[1:].eq(0).all()
        assert grad_x[:of_x].eq(1).all() and grad_x[of_x:].eq(0).all()


def test_candidates_of_no_set() -> None:
    """-1 is -inf next to empty sets as well, and where y has no set."""
    x = torch.ones(3, 4, device=DEVICE)
    offsets, none = torch.tensor([0, 0, 3], device=DEVICE), torch.tensor([0], device=DEVICE)
    candidates = torch.full((2, 2), -1, device=DEVICE)
    one = torch.tensor(1.0, dtype=torch.float64)
    for y, y_offsets in ((x, offsets), (x[:0], none)):
        s = backend.forward(x, offsets, y, y_offsets, candidates, one, one, "maxsim", False)
        assert s.eq(-torch.inf).all()


@triton.jit
def owners_kernel(offsets, owners, places, sets, OWN: tl.constexpr):
    block = tl.program_id(0)
    owner, place = triton_gradient_kernels._owner(offsets, sets, block, OWN)
    tl.store(owners + block, owner)
    tl.store(places + block, place)


OWNED = {
    "one set": [40],
    "one empty set": [0],
    "empty sets": [0, 0, 16, 0, 1, 47, 0, 0],
    "whole blocks": [16, 32, 16],
    "ragged": torch.randint(0, 70, (40,), generator=torch.Generator().manual_seed(0)).tolist(),
    "a search of two steps": [3, 0] * 200,
}


@pytest.mark.parametrize("spare", [0, 35])
@pytest.mark.parametrize("name", OWNED)
def test_each_row_is_in_one_block(name: str, spare: int) -> None:
    """Of the set that has it, or, beyond the last set, of none."""
    counts, own = OWNED[name], 16
    offsets = torch.tensor([0, *counts]).cumsum(0)
    rows = int(offsets[-1]) + spare
    blocks = rows // own + len(counts) + 1
    owners, places = (torch.full((blocks,), -1, dtype=torch.int64, device=DEVICE) for _ in range(2))
    owners_kernel[(blocks,)](offsets.to(DEVICE), owners, places, len(counts), OWN=own)
    expected = torch.repeat_interleave(torch.arange(len(counts) + 1), torch.tensor([*counts, spare]))
    found, times = torch.full((rows,), -1), torch.zeros(rows)
    ends = [*offsets[1:].tolist(), rows]
    for owner, place in zip(owners.tolist(), places.tolist(), strict=True):
        first = int(offsets[owner]) + place * own
        block = slice(min(first, ends[owner]), min(first + own, ends[owner]))
        assert place >= 0
        found[block] = owner
        times[block] += 1
    assert times.eq(1).all() and torch.equal(found, expected)


@pytest.mark.parametrize("programs", [0, 8])
@pytest.mark.parametrize("kind", ["maxsim", "max", "chamfer"])
def test_result_within_its_dtype(kind: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by one launch, or added up of parts: saturated, but NaN and what is no candidate stay."""
    monkeypatch.setattr(triton_config, "LIMITS", triton_config.LIMITS._replace(programs_each=programs))
    x = torch.full((60, 16), 200.0, dtype=torch.float16, device=DEVICE)
    y = torch.stack((x[0], -x[0], x[0] * float("nan"), x[0] / 200))
    offsets, y_offsets = torch.tensor([0, 60], device=DEVICE), torch.arange(5, device=DEVICE)
    candidates = torch.tensor([[0, 1, 2, 3, -1]], device=DEVICE)
    one = torch.tensor(1.0, dtype=torch.float64)
    small = 200 * 16 * (60 if kind == "maxsim" else 1)
    small = min(small, 65504)
    for chosen, rest in ((None, []), (candidates, [-torch.inf])):
        s = backend.forward(x, offsets, y, y_offsets, chosen, one, one, kind, False)
        expected = torch.tensor([[65504, -65504, torch.nan, small, *rest]], dtype=torch.float16, device=DEVICE)
        torch.testing.assert_close(s, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["maxsim", "chamfer"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bytes_", [1, 1 << 20])
def test_rows_of_no_set_have_gradient_0(
    bytes_: int, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many launches make the gradient: memory is not filled beforehand where one writes to all of it."""
    monkeypatch.setattr(triton_config, "LIMITS", triton_config.LIMITS._replace(workspace_bytes=bytes_))
    case = Case("rows of no set", 3, 2, (1, 20), (1, 20), 16, empty="x", spare=40)
    i = case.build(kind, dtype, DEVICE)
    _, *gradients, _, _ = run(i)
    for got, expected in zip(gradients, reference_results(i)[1:3], strict=True):
        assert got[-40:].eq(0).all() and got.isfinite().all()
        assert expected.count_nonzero() and got.count_nonzero()


def test_launches_of_a_layout_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of another are others."""
    kept = (
        triton_plan.plan_of,
        triton_plan.similarity_launches,
        triton_plan.state_launch,
        triton_plan.gradient_launch,
        triton_plan._combine_launch,
    )

    def made() -> list[int]:
        return [cache.cache_info().misses for cache in kept]

    case = Case("kept", 3, 2, 7, 9, 24)
    run(case.build("chamfer", torch.float32, DEVICE))
    before = made()
    run(case.build("chamfer", torch.float32, DEVICE, seed=1))
    assert made() == before
    for other in (replace(case, L=10), replace(case, N=4), replace(case, layout="sliced")):
        before = made()
        check(run, other, "chamfer", torch.float32, DEVICE)
        assert all(new > old for new, old in zip(made()[:4], before, strict=False))
    i = case.build("soft_maxsim", torch.float32, DEVICE)
    monkeypatch.setattr(backend, "_on_host", lambda v: False)
    for dtype in (torch.float32, torch.float64):  # of a tensor that the kernel reads
        before = made()
        run(i._replace(alpha=i.alpha.to(DEVICE, dtype), bias=i.bias.to(DEVICE)))
        assert all(new > old for new, old in zip(made()[:4], before, strict=False))


if not INTERPRETED:

    @pytest.mark.parametrize("pairs", ["", "candidates"])
    def test_other_lengths_compile_nothing(pairs: str) -> None:
        case = Case("lengths", 9, 20, (20, 32), (40, 60), 64, pairs=pairs)
        run(case.build("soft_maxsim", torch.float16, DEVICE))
        kernels = triton_kernels.similarity_kernel, triton_kernels.state_kernel, triton_kernels.combine_kernel
        before = compiled(*kernels, triton_gradient_kernels.gradient_kernel)
        for N, M, L in ((7, 16, (35, 64)), (16, 33, (60, 64)), (2, 50, (60, 1000))):
            run(replace(case, N=N, M=M, L=L).build("soft_maxsim", torch.float16, DEVICE))
        assert compiled(*kernels, triton_gradient_kernels.gradient_kernel) == before > 0

    @pytest.mark.parametrize("pairs", ["", "candidates"])
    def test_precompiled_for_all_lengths(pairs: str) -> None:
        alpha = torch.tensor(16.0, requires_grad=True)
        precompile_set_similarity("soft_maxsim", 80, torch.float16, alpha=alpha, candidates=pairs == "candidates")
        kernels = triton_kernels.similarity_kernel, triton_kernels.state_kernel, triton_kernels.combine_kernel
        before = compiled(*kernels, triton_gradient_kernels.gradient_kernel)
        for N, M, K, L in ((1, 1, 4, 9), (7, 16, 20, 64), (16, 33, 60, 5), (300, 200, 3, 30), (2, 50, 100, 1000)):
            case = Case("lengths", N, M, (1, K), (1, L), 80, pairs=pairs)
            run(case.build("soft_maxsim", torch.float16, DEVICE))
        assert compiled(*kernels, triton_gradient_kernels.gradient_kernel) == before > 0


def test_more_vectors_and_features_than_a_tile_has() -> None:
    """D above what a tile holds, rows and features in several blocks each."""
    case = Case("several blocks of features", 2, 2, (60, 80), (60, 80), 300)
    for kind in ("soft_maxsim", "maxsim"):
        check(run, case, kind, torch.float16, DEVICE)
    i = case.build("chamfer", torch.float32, DEVICE)
    torch.testing.assert_close(run(i)[0], reference_results(i)[0])
