"""The package slot-attention with its attention step replaced: its own results and gradients, and back again."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setemb_kernels.integrations import patch_slot_attention, slot_attention

package: Any = pytest.importorskip("slot_attention", reason="the package slot-attention is not installed")


def run(module: nn.Module, tokens: Tensor, **options: Any) -> list[Tensor]:
    """Results and gradients of everything, of one seed."""
    torch.manual_seed(3)
    inputs = tokens.clone().requires_grad_()
    out = module(inputs, **options)
    outs = out if isinstance(out, tuple) else (out,)
    loss = sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outs)
    leaves = [inputs, *module.parameters()]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*(o.detach() for o in outs), *(g for g in gradients if g is not None)]


MODULES = {
    "SlotAttention": lambda: package.SlotAttention(5, 16, iters=3),
    "MultiHeadSlotAttention": lambda: package.MultiHeadSlotAttention(5, 16, heads=2, dim_head=8, iters=3),
    "SlotAttentionExperimental": lambda: package.SlotAttentionExperimental(5, 16, iters=2),
    "OrthoSlotWrapper": lambda: package.OrthoSlotWrapper(package.SlotAttention(5, 16)),
    "AdaptiveSlotWrapper": lambda: package.AdaptiveSlotWrapper(package.MultiHeadSlotAttention(5, 16)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, tokens = MODULES[name]().double(), torch.randn(3, 20, 16, dtype=torch.float64)
    theirs = run(module, tokens)
    calls = []
    own = slot_attention.slot_attention
    monkeypatch.setattr(slot_attention, "slot_attention", lambda *a, **k: calls.append(1) or own(*a, **k))
    with patch_slot_attention():
        ours = run(module, tokens)
    assert calls and len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    after = run(module, tokens)
    assert all(torch.equal(a, b) for a, b in zip(after, theirs, strict=True))


def test_another_number_of_slots() -> None:
    module, tokens = package.SlotAttention(5, 16), torch.randn(3, 20, 16)
    theirs = run(module, tokens, num_slots=2)
    with patch_slot_attention():
        ours = run(module, tokens, num_slots=2)
    assert ours[0].shape == (3, 2, 16)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_says_what_it_replaced_and_puts_it_back() -> None:
    own = package.SlotAttention.forward
    with patch_slot_attention() as replaced:
        assert replaced == [
            "slot_attention.multi_head_slot_attention.MultiHeadSlotAttention.forward",
            "slot_attention.slot_attention.SlotAttention.forward",
            "slot_attention.slot_attention_experimental.WeightedAttention.forward",
        ]
        assert package.SlotAttention.forward is not own
    assert package.SlotAttention.forward is own


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("slot_attention")
    monkeypatch.setitem(__import__("sys").modules, "slot_attention.slot_attention_experimental", None)
    with pytest.raises(ImportError, match=r"slot-attention >= 1.5 is needed: cannot import"):
        patch_slot_attention()
