"""The backward pass of InfoNCE and sigmoid as one op, against the same from tiles of similarities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from setemb_kernels import set_infonce_loss
from setemb_kernels.backends import build_info
from setemb_kernels.losses import contrast
from tests.kernels.losses.contrast_cases import NEAR, arguments, assert_near, sets

pytestmark = pytest.mark.skipif(build_info() is None, reason="the compiled CPU module is not built here")

CONTRAST = torch.ops.setemb.smooth_chamfer_contrast_backward


@pytest.mark.parametrize("groups", [True, False], ids=["groups", "diagonal"])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("loss", ["infonce", "infonce, rows", "sigmoid"])
@pytest.mark.parametrize(("K", "L"), [(3, 4), (1, 1), (20, 2)])
def test_several_blocks(loss: str, dtype: torch.dtype, groups: bool, K: int, L: int) -> None:
    args = arguments(loss, dtype, K, L, groups=groups)
    assert_near(CONTRAST(*args, True, True, True), contrast.backward_by_tiles(*args, True, True, True), NEAR[dtype])


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_masks(loss: str) -> None:
    args = arguments(loss, torch.float64)
    generator = torch.Generator().manual_seed(3)
    for place, v in ((3, args[0]), (4, args[1])):
        args[place] = torch.rand(v.shape[:2], generator=generator) < 0.7
        args[place][::5] = False
        v[~args[place]] = torch.nan
    assert_near(CONTRAST(*args, True, True, True), contrast.backward_by_tiles(*args, True, True, True), 1e-12)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_not_needed(dtype: torch.dtype, needs: tuple[bool, ...]) -> None:
    args = arguments("infonce", dtype)
    whole, some = CONTRAST(*args, True, True, True), CONTRAST(*args, *needs)
    for a, b, need in zip(whole, some, (*needs, True), strict=True):
        if need:
            assert torch.equal(a, b)
        else:
            assert b.numel() == 0 or not b.any()


@pytest.mark.parametrize("norm", [1e18, 1e-18])
def test_range(norm: float) -> None:
    """Scores out of the range of float32: those that can be are right, and the rest is finite or infinite, not NaN."""
    args = arguments("infonce", torch.float32, norm=norm)
    wide = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in args]
    x, y, _, _ = CONTRAST(*args, True, True, False)
    true_x, true_y, _, _ = contrast.backward_by_tiles(*wide, True, True, False)
    for a, b in ((x, true_x), (y, true_y)):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-5 * b.abs().max().item())


def test_upstream_near_the_largest_number() -> None:
    """Sums over many pairs that leave the range of float32 on the way."""
    args = arguments("infonce", torch.float32, weight=1e38)
    expected = contrast.backward_by_tiles(*arguments("infonce", torch.float64, weight=1e38), True, True, True)
    for a, b in zip(CONTRAST(*args, True, True, True)[:2], expected[:2], strict=True):
        fits, beyond = b.abs() < 3.3e38, b.abs() > 3.5e38
        assert fits.any() and beyond.any() and a[beyond].isinf().all()
        torch.testing.assert_close(a[fits].double(), b[fits], rtol=1e-3, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-9])
def test_small_temperature(temperature: float) -> None:
    """A loss compares similarities with log-sum-exps of the forward, also where alpha wants a gradient: they have to be
    rounded alike."""
    results = []
    for need_alpha, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.float64)):
        x, y = (sets(64, 3, 32, torch.float32, seed).to(dtype).requires_grad_() for seed in (0, 1))
        alpha = torch.tensor(16.0, dtype=dtype, requires_grad=need_alpha)
        set_infonce_loss(x, y, alpha=alpha, temperature=temperature).backward()
        results.append((x.grad, y.grad))
    for got, same, expected in zip(*results, strict=True):
        assert got is not None and same is not None and expected is not None
        size = expected.abs().max().item()
        for gradient in (got, same):
            assert (gradient.double() - expected).abs().max().item() < 2e-4 * size


def test_nan_reaches_its_row_and_column() -> None:
    """And no other: pairs are judged one by one."""
    args = arguments("sigmoid", torch.float32)
    args[0][11, 1, 3] = torch.nan
    got, expected = CONTRAST(*args, True, True, True), contrast.backward_by_tiles(*args, True, True, True)
    assert got[0].isnan().flatten(1).any(1).nonzero().flatten().tolist() == [11]
    assert_near(got, expected, 2e-5)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_same_on_any_number_of_threads(loss: str) -> None:
    args, before, results = arguments(loss, torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(CONTRAST(*args, True, True, True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("N", "M", "K", "L"), [(0, 3, 2, 2), (3, 0, 2, 2), (3, 4, 0, 2), (3, 4, 2, 0)])
def test_nothing(N: int, M: int, K: int, L: int) -> None:
    x, y = torch.zeros(N, K, 5), torch.zeros(M, L, 5)
    numbers = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.1)
    args = (x, y, torch.tensor(3.0), None, None, *numbers, None, None, None, None)
    for found in (CONTRAST(*args, True, True, True), contrast.backward_by_tiles(*args, True, True, True)):
        assert found[0].shape == x.shape and found[1].shape == y.shape and not any(v.any() for v in found[:3])
        pairs = N * M if K * L == 0 else 0  # of an empty set with any the similarity is 0
        diagonal = min(N, M) if pairs else 0
        by_bias = 0.1 * (pairs / 2 - diagonal)
        assert found[3].tolist() == [0, pytest.approx(by_bias)]


def test_opcheck() -> None:
    for loss in ("infonce", "sigmoid"):
        args = arguments(loss, torch.bfloat16)
        torch.library.opcheck(
            CONTRAST.default, (*args, True, False, True), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (8, torch.zeros(2, 74), r"rows: expected \[2, sets\]"),
        (9, torch.zeros(2, 290).double(), r"columns: expected \[2, sets\]"),
        (10, torch.zeros(75, dtype=torch.int32), "x_group: expected an int64 for each set"),
        (11, None, "ids of both sides or of none"),
        (8, None, "columns only beside rows"),
    ],
)
def test_errors(place: int, value: Tensor | None, message: str) -> None:
    """Of the compiled kernel, which reads memory by these shapes."""
    args = arguments("infonce", torch.float32)
    args[place] = value
    with pytest.raises(ValueError, match=message):
        CONTRAST(*args, True, True, True)


def test_a_loss_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the compiled module serves, and no tile of similarities is made for a backward pass."""
    calls = []
    monkeypatch.setattr(contrast, "_add_tiles", lambda *args: calls.append(args))
    x, y = (sets(30, 4, 16, torch.float32, seed).requires_grad_() for seed in (0, 1))
    set_infonce_loss(x, y).backward()
    assert not calls and x.grad is not None and x.grad.any()
