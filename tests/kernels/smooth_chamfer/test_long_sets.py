"""Long sets: padded ones that smooth_chamfer's kernels for a GPU do not take, which those of set_similarity stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.functional import normalize

from setemb_kernels import measure, set_infonce_loss, set_similarity, smooth_chamfer
from setemb_kernels.ops.smooth_chamfer import op


def sets(n: int, k: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, k, 8, dtype=torch.float64, generator=generator), dim=-1).to(dtype)


def stored(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    z = alpha * torch.einsum("nkd,mld->nmkl", x, y)
    return (z.logsumexp(3).mean(2) + z.logsumexp(2).mean(2)) / (2 * alpha)


@pytest.fixture(params=[False, True], ids=["its kernels", "streamed"])
def streamed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are on a CPU, and as they would be on a GPU."""
    if request.param:
        for module in (op, measure):
            monkeypatch.setattr(module, "streams", lambda x, y: True)


@pytest.mark.parametrize(("N", "K", "M", "L"), [(6, 300, 5, 200), (2, 700, 30, 1), (9, 40, 4, 30)])
def test_long_sets(N: int, K: int, M: int, L: int, streamed: None) -> None:
    x, y, alpha = sets(N, K, 0), sets(M, L, 1), torch.tensor(5.0, dtype=torch.float64)
    weight = torch.randn(N, M, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    masks = {"x_mask": torch.arange(K).expand(N, K) < K - 1, "y_mask": None}
    results = []
    for function in (
        lambda x, y, a: smooth_chamfer(x, y, alpha=a, **masks),
        lambda x, y, a: stored(x[:, :-1], y, a),
    ):
        leaves = [v.detach().requires_grad_() for v in (x, y, alpha)]
        s = function(*leaves)
        results.append((s.detach(), *torch.autograd.grad((s * weight).sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("K", "L", "dtype", "chosen", "streams"),
    [
        (256, 128, torch.bfloat16, "automatic", False),
        (257, 1, torch.bfloat16, "automatic", True),
        (129, 129, torch.float32, "automatic", True),
        (129, 129, torch.float32, "triton", True),
        (129, 129, torch.float32, "cuda", False),  # which says what it can't
        (129, 129, torch.float32, "reference", False),
        (300, 300, torch.float64, "automatic", False),
    ],
)
def test_on_a_gpu(
    K: int, L: int, dtype: torch.dtype, chosen: str, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op.BACKENDS, "chosen", chosen)
    with FakeTensorMode():
        x, y = (torch.empty(2, k, 8, dtype=dtype, device="cuda") for k in (K, L))
        assert op.streams(x, y) == streams


def test_losses(streamed: None) -> None:
    results = []
    for function in (set_infonce_loss, lambda x, y: stored_infonce(x, y)):
        x, y = sets(6, 300, 0).requires_grad_(), sets(6, 200, 1).requires_grad_()
        loss = function(x, y)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, y))))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def stored_infonce(x: Tensor, y: Tensor) -> Tensor:
    z = stored(x, y, torch.tensor(16.0, dtype=torch.float64)) / 0.05
    pairs = torch.arange(len(x))
    return (torch.nn.functional.cross_entropy(z, pairs) + torch.nn.functional.cross_entropy(z.T, pairs)) / 2


@pytest.mark.parametrize("kind", ["smooth_chamfer", "chamfer", "maxsim", "soft_maxsim", "max", "match_probability"])
def test_8192_vectors(kind: str) -> None:
    """A document of that many with a page of 1,030 patches, its scores by 512 rows at a time in float64."""
    x, y = sets(1, 8192, 0, torch.float32).requires_grad_(), sets(1, 1030, 1, torch.float32)
    ends = {"x_offsets": torch.tensor([0, 8192]), "y_offsets": torch.tensor([0, 1030])}
    s = set_similarity(x[0], y[0], kind, alpha=8.0, scale=2.0, bias=-0.5, **ends)  # type: ignore[arg-type]
    (got,) = torch.autograd.grad(s, x)
    expected, gradient = by_rows(x.detach()[0].double(), y[0].double(), kind)
    assert s.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(got[0].double(), gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())


def by_rows(x: Tensor, y: Tensor, kind: str) -> tuple[float, Tensor]:
    """The similarity of two sets, alpha 8, scale 2 and bias -0.5, and its gradient for x."""
    scores = [block @ y.T for block in x.split(512)]
    both, K, L = kind in ("smooth_chamfer", "chamfer"), len(x), len(y)
    if kind == "match_probability":
        p = [torch.sigmoid(2 * c - 0.5) for c in scores]
        by_c = torch.cat([2 * v * (1 - v) @ y for v in p])
        return sum(v.sum().item() for v in p) / (K * L), by_c / (K * L)
    if kind in ("soft_maxsim", "smooth_chamfer"):
        rows = torch.cat([(8 * c).logsumexp(1) for c in scores])
        columns = torch.stack([(8 * c).logsumexp(0) for c in scores]).logsumexp(0)
        of_rows = torch.cat([(8 * c).softmax(1) @ y for c in scores])
        of_columns = torch.cat([(8 * c - columns).exp() @ y for c in scores])
        total, other = rows.sum().item() / 8, columns.sum().item() / 8
    else:
        best = torch.cat([c.argmax(1) for c in scores])
        rows, of_rows = (x * y[best]).sum(1), y[best]
        (columns, where) = torch.cat(scores).max(0)
        of_columns = torch.zeros_like(x).index_add_(0, where, y)  # what each has chosen
        total, other = rows.sum().item(), columns.sum().item()
        if kind == "max":
            first = int(rows.argmax())
            return rows.max().item(), torch.where(torch.arange(K)[:, None] == first, of_rows, 0)
    return ((total / K + other / L) / 2, (of_rows / K + of_columns / L) / 2) if both else (total, of_rows)
