"""Slot attention modules: two ways to the same numbers, the classic body's published numbers, masks, tracing."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import setemb.modules.set_prediction
from setemb.modules import SetPrediction, SlotAttention
from setemb.modules.slot_attention import absorbs, merges


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


MASK = torch.tensor([[True] * 9, [True] * 4 + [False] * 5, [False] * 9])


def gradients(out: Tensor, module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    leaves = [*inputs, *module.parameters()]
    return list(torch.autograd.grad(out, leaves, normal(*out.shape, dtype=out.dtype, seed=7)))


def test_the_way_of_fewer_operations() -> None:
    assert absorbs(4, 4, 36, 1024, 512, 4)  # the published module: 17 against 52 GFLOP an iteration at batch 128
    assert absorbs(4, 1, 64, 1024, 1024, 4)
    assert not absorbs(64, 4, 36, 64, 16, 4)
    assert not absorbs(4, 8, 4096, 1024, 8, 4)
    assert merges(640 * 4 * 4, 4, 1024, 300, 512)  # texts of the published recipe
    assert not merges(16, 4, 1024, 300, 512)  # a single text: the products of weights cost more than they save
    assert not merges(10**6, 4, 1024, 1024, 512)  # its images
    assert not merges(10**6, 4, 256, 300, 64)


@pytest.mark.parametrize("position", [None, "sine"])
@pytest.mark.parametrize("padding", ["exact", "dive"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_absorbed_and_projected_give_the_same_numbers(mask, padding, position):
    torch.manual_seed(0)
    modules = [
        SetPrediction(10, 16, 16, 3, 3, heads=2, dim_head=5, position=position, padding=padding, absorbed=absorbed)
        for absorbed in (False, True)
    ]
    modules[1].load_state_dict(modules[0].state_dict())
    results = []
    for module in modules:
        module.double().eval()
        local, global_ = normal(3, 9, 10).requires_grad_(), normal(3, 16, seed=1).requires_grad_()
        out = module(local, global_, mask, return_attention=True)
        results.append([out.embeddings, out.slots, out.attention, *gradients(out.embeddings, module, local, global_)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # products by torch's own, and by oneDNN
@pytest.mark.parametrize("mask", [False, True])
def test_merged_weights_give_the_same_numbers(mask, dtype):
    """Where tokens are narrow next to the heads; values and gradients, of a batch that is large enough to pay."""
    torch.manual_seed(0)
    projected, merged = (SetPrediction(6, 16, 16, 3, 3, heads=2, dim_head=40, absorbed=a) for a in (False, True))
    merged.load_state_dict(projected.state_dict())
    local, global_ = torch.randn(30, 7, 6, dtype=dtype), torch.randn(30, 16, dtype=dtype)
    valid = torch.arange(7) < torch.randint(0, 8, (30, 1)) if mask else None
    upstream, results = torch.randn(30, 3, 16, dtype=dtype), []
    real = setemb.modules.set_prediction.attend_merged
    with mock.patch.object(setemb.modules.set_prediction, "attend_merged", side_effect=real) as used:
        for module in (projected, merged):
            module.to(dtype).eval()
            leaves = [local.clone().requires_grad_(), global_.clone().requires_grad_(), *module.parameters()]
            out = module(*leaves[:2], valid).embeddings
            results.append([out, *torch.autograd.grad(out, leaves, upstream)])
            assert used.call_count == (3 if module is merged else 0)
        assert merged(local, global_, valid, return_attention=True).attention.shape == (30, 2, 3, 7)
        assert used.call_count == 5
    rtol, atol = (1e-9, 1e-11) if dtype == torch.float64 else (1e-4, 2e-5)
    torch.testing.assert_close(results[1], results[0], rtol=rtol, atol=atol)


def test_layers_with_hooks_are_not_merged():
    module = SetPrediction(6, 16, 16, 3, 3, heads=2, dim_head=40, absorbed=True).eval()
    seen = []
    module.attention.to_out.register_forward_hook(lambda *_: seen.append(1))
    module(torch.randn(30, 7, 6), torch.randn(30, 16))
    assert len(seen) == 3


@pytest.mark.parametrize("tokens", [3, 64], ids=["projected", "absorbed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_classic_body_loads_the_package_and_gives_its_numbers(tokens, dtype, tolerance):
    package = pytest.importorskip("slot_attention", reason="the package slot-attention is not installed")
    torch.manual_seed(0)
    theirs = package.SlotAttention(4, 32, iters=4).to(dtype)
    ours = SlotAttention(4, 32, iterations=4).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    assert absorbs(4, 1, tokens, 32, 32, 4) == (tokens == 64)
    results = []
    for module in (theirs, ours):
        inputs = normal(5, tokens, 32, dtype=dtype).requires_grad_()
        torch.manual_seed(1)
        out = module(inputs)
        parameters = dict(module.named_parameters())
        grads = torch.autograd.grad(out, [inputs, *(parameters[n] for n in sorted(parameters))], torch.ones_like(out))
        results.append((out, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(a.detach().abs().max())))


def classic(x: Tensor, mask: Tensor | None, module: SlotAttention) -> Tensor:
    torch.manual_seed(3)
    slots = module(x, mask=mask)
    assert isinstance(slots, Tensor)
    return slots


@pytest.mark.parametrize("tokens", [3, 20], ids=["projected", "absorbed"])
def test_classic_body_ignores_what_is_masked(tokens):
    torch.manual_seed(0)
    module = SlotAttention(4, 8, iterations=3).double()
    assert absorbs(4, 1, tokens, 8, 8, 3) == (tokens == 20)
    x = normal(2, tokens, 8)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[:, -1] = False
    x[:, -1] = float("nan")
    torch.testing.assert_close(classic(x, mask, module), classic(x[:, :-1], None, module), rtol=1e-12, atol=1e-12)
    mask[1] = False  # an item without tokens, among others
    x[1] = float("nan")
    out = classic(x, mask, module)
    assert out.isfinite().all()
    slots = classic(x, mask & False, module)
    torch.testing.assert_close(out[1], slots[1])


def test_classic_body_returns_attention_and_takes_another_number_of_slots():
    module = SlotAttention(4, 8)
    slots, attention = module(torch.randn(2, 9, 8), num_slots=6, mask=MASK[:2], return_attention=True)
    assert slots.shape == (2, 6, 8)
    torch.testing.assert_close(attention.sum(1), MASK[:2].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(2, 9)}, r"inputs must have shape \[B, T, 8\]"),
        ({"mask": torch.ones(2, 8).bool()}, r"mask must have shape \[2, 9\], got \[2, 8\]"),
        ({"num_slots": 0}, "num_slots must be at least 1, got 0"),
    ],
)
def test_classic_body_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        SlotAttention(4, 8)(**{"inputs": torch.zeros(2, 9, 8), **change})


@pytest.mark.parametrize("absorbed", [False, True])
def test_all_iterations_compile_into_one_graph(absorbed):
    torch._dynamo.reset()
    module = SetPrediction(24, 16, 16, 3, 2, heads=2, dim_head=8, position="sine", absorbed=absorbed).eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, T in ((5, 7), (3, 11), (4, 6)):
        local, global_ = normal(B, T, 24, dtype=torch.float32), normal(B, 16, dtype=torch.float32, seed=1)
        mask = torch.arange(T) < torch.arange(1, B + 1)[:, None]
        results = []
        for run in (module, compiled):
            x = local.clone().requires_grad_()
            out = run(x, global_, mask).embeddings
            results.append((out, *gradients(out, module, x)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_classic_body_compiles_into_one_graph():
    torch._dynamo.reset()
    module = SlotAttention(3, 16)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (30, 41):
        x = normal(2, T, 16, dtype=torch.float32)
        results = []
        for run in (module, compiled):
            torch.manual_seed(2)
            results.append(run(x))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("absorbed", [False, True])
def test_autocast(absorbed):
    torch.manual_seed(0)
    module = SetPrediction(24, 16, 16, 3, 2, heads=2, dim_head=8, absorbed=absorbed).eval()
    local, global_ = normal(5, 12, 24, dtype=torch.float32), normal(5, 16, dtype=torch.float32, seed=1)
    plain = module(local, global_).embeddings
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = module(local, global_).embeddings
    half.float().sum().backward()
    assert (nn.functional.cosine_similarity(half.float(), plain, dim=-1) > 0.999).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("absorbed", [False, True])
def test_autocast_leaves_float64_alone(absorbed):
    torch.manual_seed(0)
    module = SetPrediction(24, 16, 16, 3, 2, heads=2, dim_head=8, absorbed=absorbed).double().eval()
    local, global_ = normal(5, 12, 24), normal(5, 16, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(local, global_).embeddings
    assert torch.equal(out, module(local, global_).embeddings)


def test_no_items():
    module = SetPrediction(8, 8, 8, absorbed=True)
    local = torch.zeros(0, 5, 8, requires_grad=True)
    out = module(local, torch.zeros(0, 8)).embeddings
    assert out.shape == (0, 4, 8)
    out.sum().backward()
    assert local.grad.shape == (0, 5, 8)
