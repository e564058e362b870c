"""What `test_triton` runs in a process of its own: the losses and search, made of tiles from the Triton kernels.

On a GPU these serve anyway. Interpreted, they take the place of the compiled kernels of the CPU, for this process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

pytest.importorskip("triton")

from setemb_kernels import set_infonce_loss, set_rank, set_topk
from setemb_kernels.losses import (
    contrast,
    pairs,
    tiles,
    torch_tiles,
    triplet,
    triton_contrast,
    triton_pairs,
    triton_tiles,
)
from setemb_kernels.measure import Measure
from setemb_kernels.ops.smooth_chamfer import mixed, reference, triton_config
from setemb_kernels.ops.smooth_chamfer import triton as backend
from tests.kernels.guarded_memory import guarded_memory  # noqa: F401
from tests.kernels.losses import contrast_cases
from tests.kernels.losses.cases import CASES, LOSSES, Case, check, cut_finely

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
INTERPRETED_PAIRS = (
    ("more rows than columns", torch.float16),
    ("one vector a set", torch.float32),
    ("one group: no negatives", torch.float16),
)
NEAR = dict.fromkeys(("rtol", "atol"), 2e-6 if DEVICE == "cpu" else 1e-5)
"""How near plain torch in float32 is; a GPU's exponential and logarithm are approximate."""
calls = 0


@pytest.fixture(autouse=True, scope="module")
def triton_serves() -> Iterator[None]:
    """For the whole module: the ops of smooth_chamfer are Triton's, and counted."""
    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("setemb", "IMPL") as library:
        for name in ("forward", "backward"):
            patch.setattr(backend, name, counted(getattr(backend, name)))
        if DEVICE == "cpu":
            patch.setattr(tiles, "fused", lambda sets: True)
            patch.setattr(Measure, "has_contrast", lambda *args: False)  # that of the compiled module
            library.impl("smooth_chamfer", forward, "CPU", allow_override=True)
            library.impl("smooth_chamfer_mixed", mixed._decoded, "CPU", allow_override=True)
            library.impl("smooth_chamfer_backward", lambda *args: backend.backward(*args), "CPU", allow_override=True)
        yield


def forward(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    return backend.forward(x, y, alpha, x_mask, y_mask, wide)


def counted(function: Any) -> Any:
    def count(*args: Any) -> Any:
        global calls
        calls += 1
        return function(*args)

    return count


def table() -> Iterator[Any]:
    """Every case and loss in float32 and in 16 bits: of a GPU's two types by turns."""
    for n, case in enumerate(CASES):
        for m, name in enumerate(LOSSES):
            for dtype in (torch.float32, DTYPES[1 + (n + m) % (len(DTYPES) - 1)]):
                yield pytest.param(case, name, dtype, id=f"{case.name}-{name}-{str(dtype)[6:]}")


@pytest.mark.parametrize(("case", "name", "dtype"), list(table()))
def test_loss(case: Case, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, kernels of listed pairs take seconds a case: they have some of the cases."""
    if DEVICE == "cpu" and (case.name, dtype) not in INTERPRETED_PAIRS:
        monkeypatch.setattr(triton_pairs, "serves", lambda sets: False)
    before = calls
    check(LOSSES[name], case, dtype, DEVICE)
    assert calls > before or 0 in (case.N, case.M)


CONTRAST = [  # loss, K, L, groups, masks
    ("infonce", 4, 4, True, False),
    ("infonce, rows", 3, 7, False, True),
    ("infonce", 1, 1, False, False),
    ("infonce", 2, 13, True, True),
    ("sigmoid", 4, 4, True, False),
    ("sigmoid", 16, 3, False, True),
]


@pytest.mark.parametrize("variant", ["bounded", "shifted", "few scores"])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2], ids=str)
@pytest.mark.parametrize(("name", "K", "L", "groups", "masked"), CONTRAST)
def test_contrast(
    name: str, K: int, L: int, groups: bool, masked: bool, dtype: torch.dtype, variant: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Backward in one kernel next to the same in float64, with several chunks of W."""
    x, y, alpha, _, _, *loss = contrast_cases.arguments(name, dtype, K, L, groups=groups, counts=(40, 75))
    alpha = alpha * (16 if variant == "shifted" else 1)
    if variant != "few scores":  # both variants of the kernel are launched, and one serves
        monkeypatch.setattr(triton_config, "LARGEST_ALONE", 0)
    masks: list[Tensor | None] = [None, None]
    if masked:
        generator = torch.Generator().manual_seed(3)
        masks = [torch.rand(v.shape[:2], generator=generator) < 0.7 for v in (x, y)]
        masks[0][::5] = False
        x, y = (v.masked_fill(~mask[..., None], math.nan) for v, mask in zip((x, y), masks, strict=True))
    true_x, true_y, true_sums = contrast_cases.from_reference([x, y, alpha, *masks, *loss])
    there = [None if v is None else v.to(DEVICE) for v in (x, y, *masks, *loss)]
    x, y, x_mask, y_mask, scale, bias, weight, rows, columns, *ids = there
    sets = tiles.Sets(x, y, alpha, alpha, x_mask, y_mask, *ids)
    monkeypatch.setattr(contrast, "FUSED_ON_GPU", True)
    monkeypatch.setattr(backend, "CHUNK_COLUMNS", 256)
    monkeypatch.setattr(backend, "WORKSPACE_BYTES", 1 << 17)
    assert contrast.fused_on_gpu(sets, (True, True, False, False))
    what = contrast.Contrast(scale, bias, weight, rows, columns)
    if groups:  # alpha on the device
        monkeypatch.setattr(backend, "_on_host", lambda v: False)
        sets = sets._replace(alpha=alpha.to(DEVICE))
    found = triton_contrast.backward(sets, what, True, True)
    if groups and variant == "bounded":  # one gradient alone
        x_alone, _, _ = triton_contrast.backward(sets, what, True, False)
        _, y_alone, _ = triton_contrast.backward(sets, what, False, True)
        assert torch.equal(x_alone, found[0]) and torch.equal(y_alone, found[1])
    by_x, by_y, sums = (v.cpu().double() for v in found)
    got, expected = (by_x, by_y, alpha, sums), (true_x, true_y, alpha, true_sums)
    contrast_cases.assert_near(got, expected, contrast_cases.NEAR[dtype])


@pytest.mark.parametrize("name", ["infonce", "infonce, rows", "sigmoid"])
def test_loss_with_contrast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the loss, with sets that have no vector: the same gradients as from tiles of similarities."""
    case = next(case for case in CASES if case.name == "empty sets")
    there = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in case.build(DTYPES[1]).items()}
    there["alpha"] = float(there["alpha"])  # with a gradient for it, tiles serve
    monkeypatch.setattr(triton_config, "LARGEST_ALONE", 0)
    found, served = [], []
    for fused in (False, True):
        monkeypatch.setattr(contrast, "FUSED_ON_GPU", fused)
        x, y = (there[n].detach().clone().requires_grad_() for n in ("x", "y"))
        numbers = {n: torch.tensor(v, requires_grad=True) for n, v in LOSSES[name].scalars.items()}
        LOSSES[name].run(there | {"x": x, "y": y}, numbers).backward()
        found.append([v.grad for v in (x, y, *numbers.values())])
        backward = triton_contrast.backward
        monkeypatch.setattr(triton_contrast, "backward", lambda *a, f=backward: served.append(1) or f(*a))
    assert served == [1]
    for a, b in zip(*found, strict=True):
        size = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * size)


def test_contrast_of_a_loss_near_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 16 bits are scaled by what the gradients are at most, not by what they could be."""
    sets = normalize(torch.randn(16, 4, 64, generator=torch.Generator().manual_seed(0)), dim=-1).to(DEVICE, DTYPES[1])
    monkeypatch.setattr(triton_config, "LARGEST_ALONE", 0)
    found = []
    for fused in (False, True):
        monkeypatch.setattr(contrast, "FUSED_ON_GPU", fused)
        x = sets.detach().clone().requires_grad_()
        loss = set_infonce_loss(x, sets, temperature=0.03)
        (loss * 2.0**24).backward()
        found.append(x.grad)
    assert 0 < loss.item() < 1e-8
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3 * found[0].abs().max().item())


@pytest.mark.parametrize("name", LOSSES)
def test_many_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_finely(monkeypatch)
    monkeypatch.setattr(tiles, "TILE", 11)
    monkeypatch.setattr(triton_pairs, "WEIGHTS", 400)
    if DEVICE == "cpu" and name != "hardest":
        monkeypatch.setattr(triton_pairs, "serves", lambda sets: False)
    before = calls
    check(LOSSES[name], next(case for case in CASES if case.name == "masks"), DTYPES[-1], DEVICE)
    assert calls - before >= 6


@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("shape", [(70, 150), (5, 3)])
def test_tile(shape: tuple[int, int], finite: bool, groups: int) -> None:
    """Each function of a tile next to its specification: several blocks, ties, and what is not finite."""
    generator = torch.Generator().manual_seed(0)
    s = torch.randint(-3, 4, shape, generator=generator) / 3
    if not finite:
        s[:, 1], s[0, 1], s[2], s[0] = -0.0, 0.0, -3e38, 3e38
        s[1, 2], s[3, 1], s[4, 0] = math.inf, -math.inf, math.nan
    x_ids, y_ids = (torch.randint(0, groups, (k,), generator=generator) if groups else None for k in shape)
    lse = [torch.randn(k, generator=generator) for k in shape]
    lse[0][4] = -math.inf
    results = []
    for maths, device in ((torch_tiles, "cpu"), (triton_tiles, DEVICE)):
        there = (None if v is None else v.to(device) for v in (x_ids, y_ids))
        ids = tiles.Ids(*there, 10, 12, shape, torch.device(device))
        winners = [triplet.Winners.of(v.to(device), torch.float32) for v in lse]
        winners[0].value[:3], winners[0].who[:3] = 1.0, torch.tensor([0, 105, 500], device=device)
        rows, columns = (v.clone().to(device) for v in lse)
        row_state, column_state = (torch.stack((v, v.sigmoid()), 1).to(device).T for v in lse)
        scale, weight, bias = (torch.tensor(v, device=device) for v in (20.0, 0.3, -10.0))
        n, m = ids.positive().nonzero(as_tuple=True)
        logits = torch.zeros(len(n), device=device)

        def tile() -> Tensor:
            return s.clone().to(device)  # noqa: B023

        maths.add_candidates(tile(), ids, *winners, (100, 200))
        maths.add_negatives(tile(), ids, scale, rows, columns, (n + 10, m + 12), logits)
        found = [*winners[0], *winners[1], rows, columns, logits, maths.sigmoid_cost(tile(), ids, scale, bias)]
        for symmetric in (True, False):
            columns = column_state if symmetric else None
            found += maths.infonce_gradients(tile(), ids, scale, weight, row_state, columns)
        found += maths.sigmoid_gradients(tile(), ids, scale, bias, weight)
        results.append([v.cpu() for v in found])
    torch.testing.assert_close(*results, equal_nan=True, **NEAR)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("K", "L", "D", "dtype"), [(3, 4, 150, torch.float16), (1, 16, 20, torch.float32)])
def test_listed_pairs(
    K: int, L: int, D: int, dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Next to batched products: sets in no pair and in many, pairs twice, none, without a gradient; any strides; what a
    masked vector holds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(K, 5, D, generator=generator).transpose(0, 1).mul_(D**-0.5)
    y = torch.randn(7, L, 2 * D, generator=generator)[..., ::2].mul_(D**-0.5)
    masks: list[Tensor | None] = [None, None]
    if masked:
        masks = [torch.rand(len(v), v.shape[1], generator=generator) < 0.5 for v in (x, y)]
        for v, mask in zip((x, y), masks, strict=True):
            mask[2] = False
            v[~mask] = math.nan
    rows = torch.tensor([0, 0, 0, 0, 0, 0, 0, 4, 4, 1, -1, 2, 3, 3])
    columns = torch.tensor([5, 5, 1, 2, 6, 4, 0, 1, 2, 3, 3, 1, -1, 0])
    grad = torch.randn(len(rows), generator=generator)
    grad[[3, 10, 12]] = 0
    results = []
    for device, served in (("cpu", False), (DEVICE, True)):
        monkeypatch.setattr(tiles, "fused", lambda sets: served)  # noqa: B023
        tensors = [None if v is None else v.to(device) for v in (x.to(dtype), y.to(dtype), *masks)]
        sets = tiles.Sets(*tensors[:2], torch.tensor(9.0), torch.tensor(0.0), *tensors[2:], None, None)
        n, m, g = (v.to(device) for v in (rows, columns, grad))
        gradients = tiles.Gradients(sets, True, True, True, False)
        gradients.x.add_(1)
        similarity = pairs.similarities(sets, n, m)
        pairs.add_summed(gradients, n.clamp(min=0), m.clamp(min=0), g)
        results.append([v.cpu() for v in (similarity, gradients.x, gradients.y, gradients.alpha)])
    torch.testing.assert_close(*results, **NEAR)


@pytest.mark.parametrize("y_sign", [1.0, -1.0])
@pytest.mark.parametrize("what", ["infinite", "overflowing"])
def test_pairs_that_are_not_finite(what: str, y_sign: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are NaN, as by batched products, and so are their gradients; other pairs are not."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(3, 2, 16, generator=generator), y_sign * torch.rand(3, 2, 16, generator=generator)
    if what == "infinite":
        x[0] = math.inf
    else:
        x[0], y[0] = 1e30 * x[0], 1e30 * y[0]
    rows = torch.arange(3)
    for device, served in (("cpu", False), (DEVICE, True)):
        monkeypatch.setattr(tiles, "fused", lambda sets: served)  # noqa: B023
        sets = tiles.Sets(*(v.to(device) for v in (x, y)), torch.tensor(4.0), torch.tensor(0.0), *4 * [None])
        gradients = tiles.Gradients(sets, True, True, False, False)
        similarity = pairs.similarities(sets, rows.to(device), rows.to(device))
        pairs.add_summed(gradients, rows.to(device), rows.to(device), torch.ones(3, device=device))
        for v in (similarity, gradients.x, gradients.y):
            assert v[0].isnan().any() and v[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=lambda dtype: str(dtype)[6:])
def test_search(dtype: torch.dtype) -> None:
    """Values to float32's digits; each set is nearest to itself."""
    generator = torch.Generator().manual_seed(0)
    x, y = (normalize(torch.randn(n, k, 24, generator=generator), dim=-1) for n, k in ((9, 4), (70, 3)))
    scale = y.abs().amax(2) / 127 if dtype == torch.int8 else None
    stored = y.to(dtype) if scale is None else (y / scale[..., None]).round().to(dtype)
    decoded = stored.double() if scale is None else stored.double() * scale[..., None].double()
    s = reference.forward(x.double(), decoded, torch.tensor(16.0), None, None)
    before = calls
    scales = None if scale is None else scale.to(DEVICE)
    found = set_topk(x.to(DEVICE), stored.to(DEVICE), 7, gallery_scale=scales, chunk=32)
    assert calls > before
    torch.testing.assert_close(found.values.cpu().double(), s.topk(7).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s.gather(1, found.indices.cpu()), found.values.cpu().double(), rtol=1e-6, atol=1e-6)
    own, ids = x.to(DEVICE), torch.arange(9, device=DEVICE)
    ranks = set_rank(own, own, x_group=ids, y_group=ids, chunk=4)
    assert not ranks.x.any() and not ranks.y.any()
