"""The losses over sets of a batch that is spread over processes: every x against every y, none ever gathered.

Each rank passes its own shard of x and y, of any length, 0 included. All ranks get the loss of the whole batch, and
each the gradients of that one loss for its own shard: those of a single process, *not* divided by the number of ranks.
So the gradient of a parameter that all ranks share is the **sum** of those of the ranks; this holds for alpha,
temperature, scale and bias too. `torch.nn.parallel.DistributedDataParallel` takes the mean instead. There, multiply
the loss by the number of ranks before the backward::

    loss = set_infonce_loss(images, captions)
    (loss * torch.distributed.get_world_size()).backward()

The sets of y travel round a ring of the ranks, the next ones under way while the present ones are compared; in the
backward their gradients travel with them. A rank stores two shards of y and of its gradient, and a few numbers for each
set of the batch. All ranks must call the same losses in the same order, forward and backward, and pass equal numbers
for alpha and the like; the upstream gradients must be equal too.

Without ids a set's place in the whole batch, the shards one after another, is its id: set i of x belongs to set i of
y.

If a rank dies, the others raise a RuntimeError that names it, at the latest after ``timeout`` seconds. The process
group is of no use after that.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.distributed import ProcessGroup

from setemb_kernels import _check
from setemb_kernels.distributed.function import compute
from setemb_kernels.distributed.losses import InfoNCE, Loss, Sigmoid
from setemb_kernels.distributed.triplets import HardestTriplet, PairsTriplet
from setemb_kernels.losses import check_infonce, check_sets, check_sigmoid, check_triplet
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
    group: ProcessGroup | None = None,
    timeout: float = 300.0,
) -> Tensor:
    """`setemb_kernels.set_triplet_loss` over the shards of all ranks.

    Args:
        negatives: among equals the one of the lowest place in the whole batch. "hardest": the sets travel once forward
            and once backward. "semi-hard" and "all" take a second round forward, and store a few numbers for each
            positive pair of the whole batch on every rank.
        group: the ranks; None: all, or a single process where torch.distributed is not initialised.
        timeout: seconds for one exchange between two ranks, and for finding out which rank is missing if it fails.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected. Of a rank that raises one alone,
            the others say that it takes no part.
        RuntimeError: naming the rank that takes no part any more.
    """
    sets, similarity = check_sets(x, y, kind, alpha, match_bias, reduction, x_mask, y_mask, x_group, y_group)
    check_triplet(margin, negatives)
    _check.positive_and_finite("timeout", timeout)
    margin = float(margin)
    loss: Loss = HardestTriplet(margin) if negatives == "hardest" else PairsTriplet(negatives, margin)
    return compute("set_triplet_loss", loss, (*sets, *similarity), (), group, timeout)


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
    group: ProcessGroup | None = None,
    timeout: float = 300.0,
) -> Tensor:
    """`setemb_kernels.set_infonce_loss` over the shards of all ranks; group, timeout and errors as above."""
    sets, similarity = check_sets(x, y, kind, alpha, match_bias, reduction, x_mask, y_mask, x_group, y_group)
    scalars = (check_infonce(temperature, symmetric, x.device),)
    _check.positive_and_finite("timeout", timeout)
    return compute("set_infonce_loss", InfoNCE(symmetric), (*sets, *similarity), scalars, group, timeout)


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
    group: ProcessGroup | None = None,
    timeout: float = 300.0,
) -> Tensor:
    """`setemb_kernels.set_sigmoid_loss` over the shards of all ranks; group, timeout and errors as above."""
    sets, similarity = check_sets(x, y, kind, alpha, match_bias, reduction, x_mask, y_mask, x_group, y_group)
    _check.positive_and_finite("timeout", timeout)
    scalars = check_sigmoid(scale, bias, x.device)
    return compute("set_sigmoid_loss", Sigmoid(), (*sets, *similarity), scalars, group, timeout)
