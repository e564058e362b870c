"""Training losses over a similarity matrix of images and captions, and the two regularisers of the sets.

In all of them ``image_ids`` says which pairs belong together: int ``[C]``, for each caption the row of its image, or
bool ``[B, C]``, True where image and caption are a positive pair (several images a caption, several captions an
image). Other pairs are negatives.

Sources: Kim, Kim, Kwak, CVPR 2023, section 3.4; InfoNCE: van den Oord et al. 2018.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from setemb.modules.linear import product
from setemb_kernels.distributed.ring import Ring


def hardest_triplet_loss(sim: Tensor, image_ids: Tensor, margin: float = 0.2, hardest_fraction: float = 1.0) -> Tensor:
    r"""Hinge loss of every positive pair against its negatives, both ways.

    .. math::
        \frac{1}{|P|} \sum_{(i,c) \in P} \Big( \max_{c' \notin P_i} [m + s_{ic'} - s_{ic}]_+
                                             + \max_{i' \notin P_c} [m + s_{i'c} - s_{ic}]_+ \Big)

    ``hardest_fraction`` f blends: f times the above plus (1 - f) times the same with the mean over the negatives in
    place of the maximum. Hardest negatives from the first step on can collapse all similarities into one value (the
    loss then stays at 2 m); a warm-up from 0 to 1 avoids it.

    Args:
        sim: ``[B, C]`` similarities, images in rows; 16-bit types are computed in float32.
        image_ids: see the module.
        margin: m >= 0.
        hardest_fraction: f in [0, 1].

    Returns:
        A scalar; 0 where there is no positive pair, and no term where a pair has no negative.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    positive = positive_pairs(sim, image_ids)
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    if not 0 <= hardest_fraction <= 1:
        raise ValueError(f"hardest_fraction must lie in [0, 1], got {hardest_fraction}")
    sim = _at_least_float32(sim)
    loss = sim.new_zeros(())
    if hardest_fraction > 0:
        negatives = sim.masked_fill(positive, -math.inf)
        for hardest in (negatives.amax(1, keepdim=True), negatives.amax(0, keepdim=True)):
            loss = loss + hardest_fraction * _mean_over((margin + hardest - sim).clamp(min=0), positive)
    if hardest_fraction < 1:
        rows, columns = positive.nonzero(as_tuple=True)
        own = sim[rows, columns][:, None]
        for others, allowed in ((sim[rows], ~positive[rows]), (sim.T[columns], ~positive.T[columns])):
            cost = _mean_over((margin + others - own).clamp(min=0), allowed, dim=1)
            loss = loss + (1 - hardest_fraction) * cost.sum() / max(len(rows), 1)
    return loss


def info_nce_loss(sim: Tensor, image_ids: Tensor, temperature: float = 0.05) -> Tensor:
    r"""Symmetric InfoNCE of every positive pair against its negatives; other positives do not compete with it.

    .. math::
        \frac{1}{|P|} \sum_{(i,c) \in P} \tfrac12 \Big(
            -\log \frac{e^{s_{ic}/\tau}}{e^{s_{ic}/\tau} + \sum_{c' \notin P_i} e^{s_{ic'}/\tau}}
            -\log \frac{e^{s_{ic}/\tau}}{e^{s_{ic}/\tau} + \sum_{i' \notin P_c} e^{s_{i'c}/\tau}} \Big)

    Args and errors as in `hardest_triplet_loss`; ``temperature`` > 0.
    """
    positive = positive_pairs(sim, image_ids)
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    logits = _at_least_float32(sim) / temperature
    lowest = torch.finfo(logits.dtype).min  # not -inf: the gradient of logsumexp over nothing but -inf is NaN
    negatives = logits.masked_fill(positive, lowest)
    loss = logits.new_zeros(())
    for others in (negatives.logsumexp(1, keepdim=True), negatives.logsumexp(0, keepdim=True)):
        loss = loss + 0.5 * _mean_over(functional.softplus(others - logits, threshold=40), positive)
    return loss


def diversity_loss(slots: Tensor) -> Tensor:
    """Mean over pairs of an item's slots of ``exp(-2 |e_i - e_j|^2)``, slots ``[B, K, D]`` scaled to unit norm.

    1 where the slots of every item coincide; 0 for K = 1.
    """
    if slots.ndim != 3:
        raise ValueError(f"slots must have shape [B, K, D], got {list(slots.shape)}")
    i, j = torch.triu_indices(slots.shape[1], slots.shape[1], 1, device=slots.device)
    if len(i) == 0 or len(slots) == 0:
        return slots.sum() * 0
    e = functional.normalize(_at_least_float32(slots), dim=-1)
    return torch.exp(-2 * (e[:, i] - e[:, j]).square().sum(-1)).mean()


def mmd_loss(x: Tensor, y: Tensor, gamma: float = 0.5, *, distributed: bool = False) -> Tensor:
    """Squared maximum mean discrepancy of two clouds of vectors.

    With the kernel ``k = exp(-gamma |x - y|)`` (the distance is not squared):
    ``mean k(x, x) + mean k(y, y) - 2 mean k(x, y)``, a vector with itself included. Made a tile at a time: its memory
    does not grow with the square of the batch. It has no second derivative.

    Args:
        x: ``[..., D]``, flattened to ``[n, D]``.
        y: ``[..., D]``, flattened to ``[m, D]``.
        distributed: x and y are shards of clouds that are spread over the default process group. All ranks get the
            value for the whole clouds, and the gradients of that for their own shards.
    """
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x and y must have shapes [..., D] of one D, got {list(x.shape)} and {list(y.shape)}")
    x, y = _at_least_float32(x).flatten(0, -2), _at_least_float32(y).flatten(0, -2)
    ring = Ring("mmd_loss", None, TIMEOUT, x.device, alone=not distributed)
    with torch.autocast(x.device.type, enabled=False):  # differences of close numbers
        value: Tensor = _Discrepancy.apply(torch.cat((x, y)), len(x), gamma, ring)
    return value


TIMEOUT = 300.0
"""Seconds that processes wait for each other."""

_TILE = 1024


class _Discrepancy(torch.autograd.Function):
    """``sum_ij w_i w_j k(z_i, z_j)`` over both clouds, z, with weights w of 1 / n for x and -1 / m for y.

    Its gradient for z_i is ``-2 gamma w_i sum_j w_j (z_i - z_j) k(z_i, z_j) / |z_i - z_j|``, made in the same pass.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, n: int, gamma: float, ring: Ring) -> Tensor:
        features = z.shape[1]
        own = torch.tensor([n, len(z) - n], device=z.device)
        counts = torch.stack(ring.gather(own, [(2,)] * ring.size)).tolist()
        totals = [sum(column) for column in zip(*counts, strict=True)]

        def weights(rank: int) -> Tensor:
            x, y = counts[rank]
            return torch.cat((z.new_full((x,), 1 / max(totals[0], 1)), z.new_full((y,), -1 / max(totals[1], 1))))

        w = weights(ring.rank)
        value = torch.zeros((), dtype=torch.float64, device=z.device)
        gradient = torch.zeros_like(z)
        for owner, block in ring.blocks(z.flatten(), [sum(c) * features for c in counts]):
            others, v = block.view(-1, features), weights(owner)
            for i in _pieces(len(z)):
                for j in _pieces(len(others)):
                    mine = owner == ring.rank
                    if mine and j.start < i.start:  # symmetric: made with the tile (j, i)
                        continue
                    a, b = z[i], others[j]
                    square = product(-2 * a, b, b.square().sum(1)).add_(a.square().sum(1)[:, None])
                    # The gradient of a vector's distance to itself is 0, not that of sqrt at 0.
                    near = square <= 1e-12
                    if mine and i == j:
                        near.fill_diagonal_(True)
                    distance = square.masked_fill_(near, 0).sqrt_()
                    kernel = torch.exp(-gamma * distance)
                    twice = mine and i != j
                    value += (1 + twice) * (w[i].double() @ (kernel @ v[j]).double())
                    slope = kernel.div_(distance.masked_fill_(near, math.inf))
                    gradient[i] += (slope @ v[j])[:, None] * a - product(slope, (v[j, None] * b).mT)
                    if twice:
                        gradient[j] += (w[i] @ slope)[:, None] * b - product(slope.mT, (w[i, None] * a).mT)
        ctx.save_for_backward(gradient.mul_((-2 * gamma * w)[:, None]))
        return ring.total(value).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None, None


def _pieces(count: int) -> list[slice]:
    return [slice(start, min(start + _TILE, count)) for start in range(0, count, _TILE)]


def positive_pairs(sim: Tensor, image_ids: Tensor) -> Tensor:
    """bool ``[B, C]``, True where image and caption belong together; ``image_ids`` as the module describes it."""
    if sim.ndim != 2 or not sim.is_floating_point():
        raise ValueError(f"sim must be a floating-point matrix [images, captions], got {sim.dtype} {list(sim.shape)}")
    if image_ids.dtype == torch.bool:
        if image_ids.shape != sim.shape:
            raise ValueError(f"image_ids must have the shape of sim {list(sim.shape)}, got {list(image_ids.shape)}")
        return image_ids
    if image_ids.is_floating_point() or image_ids.is_complex():
        raise TypeError(f"image_ids must be of an integer type or bool, got {image_ids.dtype}")
    if image_ids.shape != sim.shape[1:]:
        raise ValueError(f"image_ids must have shape [{sim.shape[1]}] (one a caption), got {list(image_ids.shape)}")
    return torch.arange(sim.shape[0], device=sim.device)[:, None] == image_ids


def _mean_over(values: Tensor, where: Tensor, dim: int | None = None) -> Tensor:
    """Mean of values where True; 0 where there are none. `torch.where` and not a product: 0 * inf is NaN."""
    total = torch.where(where, values, 0).sum(dim)
    return total / where.sum(dim).clamp(min=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
