"""What `test_triton` runs in a process of its own: the case table, and what only this backend has.

On a GPU, or interpreted: then in float32 and float16, as numpy has no bfloat16. Inputs inside larger buffers of NaN
("sliced") and `guarded_memory` show accesses out of bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from setemb_kernels import _device  # noqa: E402
from setemb_kernels.ops.slot_attention import reference, triton_fused, triton_shared  # noqa: E402
from setemb_kernels.ops.slot_attention import triton as backend  # noqa: E402
from tests.kernels.compiled import compiled  # noqa: E402
from tests.kernels.guarded_memory import guarded_memory  # noqa: E402, F401
from tests.kernels.slot_attention.cases import CASES, Case, Inputs, Results, cases, check, reference_results, through  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
TABLE = [pytest.param(case, dtype, id=f"{case.name}-{str(dtype)[6:]}") for dtype in DTYPES for case in cases(dtype)]
NAMED = {case.name: case for case in CASES}
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


@pytest.fixture(autouse=True)
def no_kept_launches() -> Iterator[None]:
    """Which tests with other tile sizes would meet, or leave."""
    triton_fused._plan.cache_clear()
    yield
    triton_fused._plan.cache_clear()


def run(i: Inputs) -> Results:
    return through(backend, i)


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_table(case: Case, dtype: torch.dtype) -> None:
    check(run, case, dtype, DEVICE)


@BOTH
@pytest.mark.parametrize(
    "case",
    [
        Case("several blocks of heads", 2, 5, 24, 40, 20, 36, shared=True, bias=True, mask="random"),
        Case("several blocks of heads, few slots", 1, 35, 2, 20, 16, 16, shared=True, mask="tail"),
        Case("128 slots", 1, 2, 128, 40, 16, 24),
        Case("most slots", 1, 2, 250, 34, 16, 24, shared=True, bias=True),
        Case("several blocks of features", 1, 2, 4, 70, 300, 150, shared=True, mask="random"),
        Case("one tile of tokens, many features", 2, 2, 4, 36, 600, 530, shared=True, mask="tail", bias=True),
        Case("features of two tiles", 2, 1, 7, 130, 200, 130, mask="random"),
        Case("classic normalisation of what no token chose", 2, 2, 4, 33, 24, 24, norm=300.0, eps=0.0, token_eps=1e-8),
        Case("token_eps above 1", 2, 2, 4, 33, 24, 24, eps=0.0, token_eps=3.0),
    ],
    ids=lambda case: case.name,
)
def test_tiles(case: Case, dtype: torch.dtype) -> None:
    """What tiles and ranges of this backend call for."""
    check(run, case, dtype, DEVICE)


@BOTH
@pytest.mark.parametrize("name", ["many tokens", "bias, shared, masked", "heads first", "all masked, no eps", "Dv 1"])
def test_splits(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More programs than a small call has by itself: each takes a part of the tokens."""
    monkeypatch.setattr(_device, "processors", lambda x: (32, 90))
    monkeypatch.setattr(triton_shared, "SPLIT_TOKENS", 1)
    check(run, replace(NAMED[name], T=300 if name == "many tokens" else 140), dtype, DEVICE)


@pytest.fixture
def two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the sums over tokens do not fit in registers."""
    monkeypatch.setattr(triton_fused, "config_of", lambda *sizes: None)


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(
    "name", ["bias, shared, masked", "heads first", "all masked, no eps", "Dv 1", "paper, absorbed"]
)
def test_weights_through_memory(name: str) -> None:
    """W and dz in 16 bits in a workspace, for sets of which `triton_fused` serves others."""
    check(run, NAMED[name], torch.float16, DEVICE)


@pytest.mark.usefixtures("two_passes")
def test_splits_of_weights_through_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "processors", lambda x: (32, 90))
    monkeypatch.setattr(triton_shared, "SPLIT_TOKENS", 1)
    check(run, replace(NAMED["bias, shared, masked"], T=140), torch.float16, DEVICE)


def test_keys_that_are_values() -> None:
    """One gradient, of both products."""
    i = Case("", 2, 3, 4, 70, 40, 40, shared=True, bias=True, mask="random").build(torch.float16, DEVICE)
    out, total = backend.forward(i.q, i.k, None, *i[3:-1])
    arguments = (i.grad, i.q, i.k, None, i.bias, i.mask, out, total, i.scale, i.token_eps)
    grad_q, grad_k, nothing, grad_bias = backend.backward(*arguments, True, True, True, True)
    apart = backend.backward(*arguments[:3], i.k, *arguments[4:], True, True, True, True)
    assert nothing.shape == (0,)
    torch.testing.assert_close(grad_q, apart[0], rtol=0, atol=0)
    torch.testing.assert_close(grad_bias, apart[3], rtol=0, atol=0)
    torch.testing.assert_close(grad_k.float(), apart[1].float() + apart[2].float(), rtol=2e-3, atol=2e-3)


@BOTH
@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("name", ["mask, shared", "bias", "heads first"])
def test_few_items_at_a_time(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = NAMED[name]
    item = case.H * case.K * 48 * dtype.itemsize
    monkeypatch.setattr(backend, "WORKSPACE_BYTES", 5 * item)  # two items in the backward pass
    check(run, case, dtype, DEVICE)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("needed", range(4))
def test_each_gradient_alone(needed: int, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if split:
        monkeypatch.setattr(_device, "processors", lambda x: (32, 90))
        monkeypatch.setattr(triton_shared, "SPLIT_TOKENS", 1)
    i = replace(NAMED["bias, shared, masked"], T=140).build(torch.float16, DEVICE)
    out, total = backend.forward(*i[:-1])
    arguments = (i.grad, *i[:5], out, total, i.scale, i.token_eps)
    every = backend.backward(*arguments, True, True, True, True)
    some = backend.backward(*arguments, *(n == needed for n in range(4)))
    for n, (got, expected) in enumerate(zip(some, every, strict=True)):
        assert got.shape == (expected.shape if n == needed else (0,))
        if n == needed:
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert all(t.shape == (0,) for t in backend.backward(*arguments, False, False, False, False))


@pytest.mark.parametrize("name", ["heads first", "transposed", "paper"])
def test_memory_order(name: str) -> None:
    """As that of the reference, which is what tracing is told."""
    i = NAMED[name].build(torch.float32, DEVICE)
    out, total = backend.forward(*i[:-1])
    grad_q, grad_k, grad_v, _ = backend.backward(
        i.grad, *i[:5], out, total, i.scale, i.token_eps, True, True, True, False
    )
    assert out.stride() == reference.empty_like_slots(i.q, i.v.shape[3]).stride()
    assert grad_q.stride() == reference.empty_like_slots(i.q, i.q.shape[3]).stride()
    assert grad_k.is_contiguous() and grad_v.is_contiguous() and total.is_contiguous()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, reference.forward(*i[:-1])[1])


@pytest.mark.parametrize("name", ["paper", "paper, absorbed"])
@pytest.mark.parametrize("where", ["q", "k", "v", "grad"])
def test_nan_stays_with_its_item(name: str, where: str) -> None:
    clean = NAMED[name].build(torch.float32, DEVICE)
    tokens = torch.ones(5, clean.k.shape[2], dtype=torch.bool, device=DEVICE)
    tokens[:, -1] = False
    i = clean._replace(mask=tokens, **{where: getattr(clean, where).clone()})
    getattr(i, where)[3, 0, 2, 5] = float("nan")
    results, expected = run(i), run(clean._replace(mask=tokens))
    others = torch.arange(5) != 3
    for n, (got, truth) in enumerate(zip(results, expected, strict=True)):
        torch.testing.assert_close(got[others], truth[others], rtol=0, atol=0)
        if n in (2, 3):  # those of k and v
            assert (got[:, :, -1] == 0).all()
    assert any(got[3].isnan().any() for got in results)


@pytest.mark.parametrize(("grad", "v", "q", "scale"), [(12, 3, 0, -12), (-12, -6, -8, 8)])
def test_logit_gradients_out_of_range(grad: int, v: int, q: int, scale: int) -> None:
    """In float16, where the gradients of logits would overflow or vanish, but those of the inputs don't."""
    i = Case("", 2, 2, 4, 3, 16, 64).build(torch.float16, DEVICE)
    i = i._replace(grad=i.grad * 2.0**grad, v=i.v * 2.0**v, q=i.q * 2.0**q, scale=2.0**scale)
    _check_rows(i, range(4))


def test_slot_that_hardly_any_token_chose() -> None:
    """Its mean is one of weights that float16 would round to 0. (Its gradients of q and bias are differences.)"""
    i = Case("", 2, 2, 4, 40, 16, 20, bias=True, eps=0.0).build(torch.float16, DEVICE)
    assert i.bias is not None
    i.bias[:, :, 1] = -18
    _check_rows(i, (0, 3))


def _check_rows(i: Inputs, which: Iterable[int]) -> None:
    """Compare with the reference slot by slot, or token by token: an error may be small beside another's values."""
    double = Inputs(*(t.double() if isinstance(t, torch.Tensor) else t for t in i))
    results, truths = run(i), reference_results(double)
    for n in which:
        size = truths[n].abs().amax((0, 1, 3), keepdim=True)
        assert ((results[n].double() - truths[n]).abs() <= size * 2**-7).all()


def test_too_many_slots() -> None:
    q, k = torch.zeros(1, 1, 257, 4, device=DEVICE), torch.zeros(1, 1, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="q: expected at most 256 slots on a GPU, got 257"):
        backend.forward(q, k, k, None, None, 1.0, 1e-7, 0.0)


if DEVICE == "cuda":

    def test_other_lengths_compile_nothing() -> None:
        case = Case("lengths", 3, 1, 4, 40, 64, 64, mask="tail")
        run(case.build(torch.float16, DEVICE))
        kernels = triton_fused.kernels.fused_forward_kernel, triton_fused.kernels.fused_backward_kernel
        before = compiled(*kernels)
        for B, T in ((1, 7), (16, 48), (5, 63)):
            run(replace(case, B=B, T=T).build(torch.float16, DEVICE))
        assert compiled(*kernels) == before > 0
