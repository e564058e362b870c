"""What ours is measured against: the same formulas in plain PyTorch, the way they are usually written."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from setemb.config import LossConfig
from setemb.losses import diversity_loss, hardest_triplet_loss
from setemb.model import Batch, SetEmbedder
from setemb.modules import SetOutput, SetPrediction


def eager_slot_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    attention = (q.shape[-1] ** -0.5 * (q @ k.transpose(-1, -2))).softmax(-2)
    if mask is not None:
        attention = attention * mask[:, None, None, :]
    return (attention / (attention.sum(-1, keepdim=True) + 1e-7)) @ v


class ProjectedEachIteration(nn.Module):
    """`SetPrediction` as published: each iteration normalises the tokens and projects all of them anew, with torch's
    own linear layers."""

    def __init__(self, like: SetPrediction) -> None:
        super().__init__()
        self.parts = copy.deepcopy(like)
        use_torch_layers(self.parts)

    def forward(self, local: Tensor, global_: Tensor, mask: Tensor | None = None) -> SetOutput:
        p = self.parts
        attention = p.attention
        x = p.slots.expand(len(local), -1, -1)
        for _ in range(p.iterations):
            slots, context = p.norm_slots(x), p.norm_local(local)
            key_context = context if p.position is None else context + p._positions(context, mask)
            q, k, v = (
                project(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
                for project, tokens in (
                    (attention.to_q, slots),
                    (attention.to_k, key_context),
                    (attention.to_v, context),
                )
            )
            x = x + attention.to_out(eager_slot_attention(q, k, v, mask).transpose(1, 2).flatten(2))
            x = x + p.feedforward(p.norm_feedforward(x))
        slots = p.norm_last(x)
        out = p.norm_global(p.project_global(global_))[:, None] + slots
        return SetOutput(functional.normalize(out, dim=-1), slots, None)


def use_torch_layers(module: nn.Module) -> None:
    """Linear layers and dropout as torch has them."""
    for layer in module.modules():
        for kind in (nn.Linear, nn.Dropout):
            if isinstance(layer, kind):
                layer.__class__ = kind


class PlainEmbedder(nn.Module):
    """A `SetEmbedder` of regions and a GRU, and its training loss, from torch's own operations: every similarity, every
    attention weight and every distance of the regularisers is stored."""

    def __init__(self, like: SetEmbedder) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder = copy.deepcopy(like.image_encoder), copy.deepcopy(like.text_encoder)
        use_torch_layers(self)
        assert isinstance(like.image_sets, SetPrediction) and isinstance(like.text_sets, SetPrediction)
        self.image_sets = ProjectedEachIteration(like.image_sets)
        self.text_sets = ProjectedEachIteration(like.text_sets)
        self.alpha = like.config.alpha

    def loss(self, batch: Batch, config: LossConfig) -> Tensor:
        """After the warm-up, hardest negatives alone."""
        local, global_, mask = self.image_encoder(batch["images"], batch.get("image_mask"))
        images = self.image_sets(local, global_, mask)
        encoder, mask = self.text_encoder, batch["text_mask"]
        words = encoder.dropout(encoder.embed(batch["texts"]))
        packed = nn.utils.rnn.pack_padded_sequence(words, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        texts = self.text_sets(words, encoder.rnn(packed)[1].mean(0), mask)
        sim = eager_similarity(images.embeddings.float(), texts.embeddings.float(), self.alpha)
        positive = batch["image_group"][:, None] == batch["caption_group"]
        diversity = diversity_loss(images.slots) + diversity_loss(texts.slots)
        mmd = eager_mmd(images.embeddings.float().flatten(0, 1), texts.embeddings.float().flatten(0, 1))
        return hardest_triplet_loss(sim, positive, config.margin) + config.diversity * diversity + config.mmd * mmd


def eager_mmd(x: Tensor, y: Tensor) -> Tensor:
    def mean(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-0.5 * torch.cdist(a, b)).mean()

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


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
