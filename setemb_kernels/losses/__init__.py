"""Contrastive losses over sets whose memory does not grow with the square of the batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from setemb_kernels import _check
from setemb_kernels.losses import infonce, sigmoid, triplet
from setemb_kernels.measure import Measure, check_bias
from setemb_kernels.ops.set_similarity.op import Kind

__all__ = ["set_infonce_loss", "set_sigmoid_loss", "set_triplet_loss"]


def set_triplet_loss(
    x: Tensor,
    y: Tensor,
    *,
    kind: Kind = "smooth_chamfer",
    alpha: float | Tensor = 16.0,
    match_bias: float | Tensor = 0.0,
    reduction: Literal["sum", "mean"] = "sum",
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    margin: float = 0.2,
    negatives: Literal["hardest", "semi-hard", "all"] = "hardest",
) -> Tensor:
    r"""Hinge loss of positive pairs of sets against negatives, both ways, over their similarities s.

    .. math::
        \frac{1}{|P|} \sum_{(n,m) \in P} \Big( [\mathrm{margin} + \max_{m'} s_{nm'} - s_{nm}]_+
                                             + [\mathrm{margin} + \max_{n'} s_{n'm} - s_{nm}]_+ \Big)

    where m' runs over the negatives of row n and n' over those of column m. The similarities are made a tile at a time
    and never stored; the forward keeps N + M indices, and the backward visits winners and positives only.

    Args:
        x: ``[N, K, D]`` float32, bfloat16, float16 or float64.
        y: ``[M, L, D]`` of the same dtype and device.
        kind: of similarity, one of `set_similarity`: smooth_chamfer, chamfer, maxsim, soft_maxsim, max, mean,
            match_probability.
        alpha: sharpness of the similarity (of match_probability: its scale); may require a gradient.
        match_bias: the bias of match_probability; may require a gradient.
        reduction: of maxsim and soft_maxsim, "sum" or "mean".
        x_mask: bool ``[N, K]``, True = valid.
        y_mask: bool ``[M, L]``.
        x_group: integer ``[N]``. Sets of x and y with equal ids are positives of each other, all others negatives.
            Without ids set i of x belongs to set i of y.
        y_group: integer ``[M]``.
        margin: >= 0.
        negatives: "hardest", as above; among equals the one of the lowest index. "semi-hard": the hardest of those less
            similar than the positive itself; nothing where there is none. "all": the mean of the hinges over all
            negatives in place of the hinge of the maximum. The last two take a second pass in the backward.

    Returns:
        A float32 (float64 for float64) scalar, 0 without positive pairs. A pair without negatives costs nothing. A
        second derivative raises.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Source: Faghri et al., "VSE++", BMVC 2018; semi-hard: Schroff et al., "FaceNet", CVPR 2015.
    """
    sets, similarity = check_sets(x, y, kind, alpha, match_bias, reduction, x_mask, y_mask, x_group, y_group)
    check_triplet(margin, negatives)
    loss: Tensor = triplet.OP(*sets, *similarity, float(margin), negatives)[0]
    return loss


def set_infonce_loss(
    x: Tensor,
    y: Tensor,
    *,
    kind: Kind = "smooth_chamfer",
    alpha: float | Tensor = 16.0,
    match_bias: float | Tensor = 0.0,
    reduction: Literal["sum", "mean"] = "sum",
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    symmetric: bool = True,
) -> Tensor:
    r"""InfoNCE of positive pairs of sets against negatives, over their similarities s.

    .. math::
        \frac{1}{|P|} \sum_{(n,m) \in P} \tfrac12 \Big(
            -\log \frac{e^{s_{nm}/\tau}}{e^{s_{nm}/\tau} + \sum_{m'} e^{s_{nm'}/\tau}}
            -\log \frac{e^{s_{nm}/\tau}}{e^{s_{nm}/\tau} + \sum_{n'} e^{s_{n'm}/\tau}} \Big)

    where m' runs over the negatives of row n and n' over those of column m: other positives do not compete. Without
    groups this is the usual symmetric cross-entropy. The similarities are made a tile at a time, again in the backward,
    and never stored; the forward keeps ``2 (N + M)`` numbers.

    Args:
        temperature: a finite number > 0, or a 0-dim tensor that may require a gradient.
        symmetric: else only the first of the two terms, rows against columns, in full.

    The other arguments, the result and the errors are those of `set_triplet_loss`.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018.
    """
    sets, similarity = check_sets(x, y, kind, alpha, match_bias, reduction, x_mask, y_mask, x_group, y_group)
    loss: Tensor = infonce.OP(*sets, check_infonce(temperature, symmetric, x.device), *similarity, symmetric)[0]
    return loss


def set_sigmoid_loss(
    x: Tensor,
    y: Tensor,
    *,
    kind: Kind = "smooth_chamfer",
    alpha: float | Tensor = 16.0,
    match_bias: float | Tensor = 0.0,
    reduction: Literal["sum", "mean"] = "sum",
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
) -> Tensor:
    r"""Every pair of sets classified by itself: positive or not, from its similarity s.

    .. math:: \frac{1}{N} \sum_{n, m} \log(1 + e^{-t_{nm} (\mathrm{scale}\; s_{nm} + \mathrm{bias})})

    with t = 1 for positive pairs and -1 for others. The similarities are made a tile at a time, again in the backward,
    and never stored.

    Args:
        scale: a finite number > 0, or a 0-dim tensor that may require a gradient.
        bias: a finite number, or such a tensor.

    The other arguments, the result and the errors are those of `set_triplet_loss`.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023.
    """
    sets, similarity = check_sets(x, y, kind, alpha, match_bias, reduction, x_mask, y_mask, x_group, y_group)
    loss: Tensor = sigmoid.OP(*sets, *check_sigmoid(scale, bias, x.device), *similarity)[0]
    return loss


def check_sets(
    x: Tensor,
    y: Tensor,
    kind: str,
    alpha: float | Tensor,
    match_bias: float | Tensor,
    reduction: str,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    x_group: Tensor | None,
    y_group: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], tuple[str, bool]]:
    """What all losses take first, checked: the tensors of `tiles.Sets`, and what says which similarity it is."""
    _check.similar_sets(x, y, x_mask, y_mask)
    for name, group, sets_name, sets in (("x_group", x_group, "x", x), ("y_group", y_group, "y", y)):
        _check.group(name, group, sets_name, sets)
    if (x_group is None) != (y_group is None):
        missing = "x_group" if x_group is None else "y_group"
        raise ValueError(f"{missing}: expected ids as for the other side, got None")
    measure = Measure.of(kind, alpha, match_bias, reduction, x.device)
    return (x, y, measure.alpha, measure.bias, x_mask, y_mask, x_group, y_group), (measure.kind, measure.mean)


def check_triplet(margin: float, negatives: str) -> None:
    """What the triplet loss alone takes."""
    _check.not_negative_and_finite("margin", margin)
    if negatives not in triplet.KINDS:
        raise ValueError(f"negatives: expected one of {', '.join(triplet.KINDS)}, got {negatives!r}")


def check_infonce(temperature: float | Tensor, symmetric: bool, device: torch.device) -> Tensor:
    """What InfoNCE alone takes; the temperature as a tensor."""
    _check.boolean("symmetric", symmetric)
    return _check.sharpness("temperature", temperature, device)


def check_sigmoid(scale: float | Tensor, bias: float | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the sigmoid loss alone takes, as tensors."""
    return _check.sharpness("scale", scale, device), check_bias("bias", bias, device)
