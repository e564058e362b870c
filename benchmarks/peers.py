"""What ours is measured against: the same formulas in plain PyTorch, the way they are usually written."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from setemb.modules import SetOutput, SetPrediction


def eager_slot_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attention = (q.shape[-1] ** -0.5 * (q @ k.transpose(-1, -2))).softmax(-2)
    return (attention / (attention.sum(-1, keepdim=True) + 1e-7)) @ v


class ProjectedEachIteration(nn.Module):
    """`SetPrediction` as published: each iteration normalises the tokens and projects all of them anew, with torch's
    own linear layers."""

    def __init__(self, like: SetPrediction) -> None:
        super().__init__()
        self.parts = copy.deepcopy(like)
        for module in self.parts.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = nn.Linear

    def forward(self, local: Tensor, global_: Tensor) -> SetOutput:
        p = self.parts
        attention = p.attention
        x = p.slots.expand(len(local), -1, -1)
        for _ in range(p.iterations):
            slots, context = p.norm_slots(x), p.norm_local(local)
            q, k, v = (
                project(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
                for project, tokens in (
                    (attention.to_q, slots),
                    (attention.to_k, context),
                    (attention.to_v, context),
                )
            )
            x = x + attention.to_out(eager_slot_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + p.feedforward(p.norm_feedforward(x))
        slots = p.norm_last(x)
        out = p.norm_global(p.project_global(global_))[:, None] + slots
        return SetOutput(functional.normalize(out, dim=-1), slots, None)


def eager_similarity(x: Tensor, y: Tensor, alpha: float = 16.0) -> Tensor:
    """Smooth-Chamfer of all pairs, as one would write it."""
    z = alpha * torch.einsum("nkd,mld->nmkl", x, y)
    return (z.logsumexp(3).mean(2) + z.logsumexp(2).mean(2)) / (2 * alpha)


def eager_maxsim(x: Tensor, y: Tensor, y_mask: Tensor) -> Tensor:
    """MaxSim of all pairs of padded sets, all vectors of x valid, as one would write it."""
    c = torch.einsum("nkd,mld->nmkl", x, y)
    return c.masked_fill(~y_mask[:, None], -torch.inf).amax(3).sum(2)


def eager_triplet(x: Tensor, y: Tensor) -> Tensor:
    s = eager_similarity(x, y)
    own = s.diagonal()
    negatives = s - torch.diag(torch.full_like(own, 1e4))
    return sum((0.2 + negatives.amax(dim) - own).clamp(min=0).mean() for dim in (1, 0))  # type: ignore[return-value]


def eager_infonce(x: Tensor, y: Tensor) -> Tensor:
    z = eager_similarity(x, y) / 0.05
    own = torch.arange(len(z), device=z.device)
    return (functional.cross_entropy(z, own) + functional.cross_entropy(z.T, own)) / 2


def eager_sigmoid(x: Tensor, y: Tensor) -> Tensor:
    z = 10 * eager_similarity(x, y) - 10
    sign = 2 * torch.eye(len(z), device=z.device) - 1
    return functional.softplus(-sign * z).sum() / len(z)
