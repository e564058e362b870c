"""The losses over sets as modules: for a Lightning module or a training loop, and for pytorch-metric-learning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from setemb_kernels import _check
from setemb_kernels.losses import (
    check_infonce,
    check_sigmoid,
    check_triplet,
    set_infonce_loss,
    set_sigmoid_loss,
    set_triplet_loss,
)
from setemb_kernels.measure import Measure
from setemb_kernels.ops.set_similarity.op import Kind

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MetricLearningLoss", "SetInfoNCELoss", "SetSigmoidLoss", "SetTripletLoss"]


class Similarity(TypedDict, total=False):
    """Which similarity of sets, beside alpha: arguments of `setemb_kernels.set_infonce_loss` and the other losses."""

    kind: Kind
    match_bias: float | Tensor
    reduction: Literal["sum", "mean"]


class _SetLoss(nn.Module):
    """One of the functions with what stays the same from batch to batch, which is checked here. A number that is an
    `nn.Parameter` is one of the module's."""

    function: Callable[..., Tensor]

    def __init__(self, alpha: float | Tensor, similarity: Similarity) -> None:
        super().__init__()
        for name in similarity.keys() - Similarity.__annotations__.keys():
            raise TypeError(
                f"{name}: not an argument of {type(self).__name__}, which takes {', '.join(Similarity.__annotations__)}"
            )
        self.kind: Kind = similarity.get("kind", "smooth_chamfer")
        self.reduction: Literal["sum", "mean"] = similarity.get("reduction", "sum")
        self.alpha, self.match_bias = alpha, similarity.get("match_bias", 0.0)
        Measure.of(self.kind, alpha, self.match_bias, self.reduction, _device_of(alpha, self.match_bias))

    def options(self) -> dict[str, Any]:
        """Arguments of the function."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_group: Tensor | None = None,
        y_group: Tensor | None = None,
        *,
        x_mask: Tensor | None = None,
        y_mask: Tensor | None = None,
    ) -> Tensor:
        """Sets ``[N, K, D]`` and ``[M, L, D]``; those of equal ids belong together, without ids x[i] and y[i]."""
        groups = {"x_group": x_group, "y_group": y_group}
        masks = {"x_mask": x_mask, "y_mask": y_mask}
        return type(self).function(x, y, **self._similarity(), **groups, **masks, **self.options())

    def _similarity(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("alpha", "kind", "match_bias", "reduction")}

    def extra_repr(self) -> str:
        values = self._similarity() | self.options()
        return ", ".join(f"{k}={v.item() if isinstance(v, Tensor) else v}" for k, v in values.items())


class SetTripletLoss(_SetLoss):
    """`setemb_kernels.set_triplet_loss`, of any kind of similarity: ``SetTripletLoss(kind="maxsim")``."""

    function = staticmethod(set_triplet_loss)

    def __init__(
        self,
        margin: float = 0.2,
        negatives: Literal["hardest", "semi-hard", "all"] = "hardest",
        alpha: float | Tensor = 16.0,
        **similarity: Unpack[Similarity],
    ) -> None:
        super().__init__(alpha, similarity)
        check_triplet(margin, negatives)
        self.margin, self.negatives = margin, negatives

    def options(self) -> dict[str, Any]:
        return {"margin": self.margin, "negatives": self.negatives}


class SetInfoNCELoss(_SetLoss):
    """`setemb_kernels.set_infonce_loss`, of any kind of similarity.

    Args:
        temperature: > 0; with `learnable` where it starts. Its logarithm is the parameter then, ``log_temperature``.
    """

    function = staticmethod(set_infonce_loss)

    def __init__(
        self,
        temperature: float | Tensor = 0.05,
        symmetric: bool = True,
        alpha: float | Tensor = 16.0,
        *,
        learnable: bool = False,
        **similarity: Unpack[Similarity],
    ) -> None:
        super().__init__(alpha, similarity)
        _check.boolean("learnable", learnable)
        start = check_infonce(temperature, symmetric, _device_of(temperature))
        self.log_temperature = nn.Parameter(_logarithm("temperature", start)) if learnable else None
        self._temperature, self.symmetric = None if learnable else temperature, symmetric

    @property
    def temperature(self) -> float | Tensor | None:
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def options(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "symmetric": self.symmetric}


class SetSigmoidLoss(_SetLoss):
    """`setemb_kernels.set_sigmoid_loss`, of any kind of similarity; the logarithm of its scale, ``log_scale``, and its
    ``bias`` are parameters.

    Args:
        scale, bias: where they start, and stay with ``learnable=False``.
    """

    function = staticmethod(set_sigmoid_loss)

    def __init__(
        self,
        scale: float | Tensor = 10.0,
        bias: float | Tensor = -10.0,
        alpha: float | Tensor = 16.0,
        *,
        learnable: bool = True,
        **similarity: Unpack[Similarity],
    ) -> None:
        super().__init__(alpha, similarity)
        _check.boolean("learnable", learnable)
        starts = check_sigmoid(scale, bias, _device_of(scale, bias))
        self.log_scale = nn.Parameter(_logarithm("scale", starts[0]), requires_grad=learnable)
        self.bias = nn.Parameter(torch.tensor(float(starts[1].detach())), requires_grad=learnable)

    def options(self) -> dict[str, Any]:
        return {"scale": self.log_scale.exp(), "bias": self.bias}


class MetricLearningLoss(nn.Module):
    """One of the losses above as pytorch-metric-learning calls its own: ``loss(embeddings, labels, indices_tuple,
    ref_emb, ref_labels)``.

    Embeddings are sets ``[N, K, D]``, compared with `ref_emb` ``[M, L, D]``, the other modality or other views; sets of
    equal labels belong together, without labels those of one place. A batch is never compared with itself, where each
    set would be its own positive, and negatives are chosen by the loss, not by a miner.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        if ref_emb is None:
            raise ValueError("ref_emb: expected the sets to compare with, [M, L, D], got None")
        if indices_tuple is not None:
            raise ValueError(
                "indices_tuple: expected None, as the loss finds its negatives itself; got those of a miner"
            )
        groups = (None if ids is None else ids.to(embeddings.device) for ids in (labels, ref_labels))
        loss: Tensor = self.loss(embeddings, ref_emb, *groups)
        return loss


def _logarithm(name: str, value: Tensor) -> Tensor:
    number = float(value.detach())
    _check.positive_and_finite(name, number)
    return torch.tensor(math.log(number))


def _device_of(*numbers: float | Tensor) -> torch.device:
    """Where numbers are that are not on the CPU; where the sets will be is not known."""
    found = (v.device for v in numbers if isinstance(v, Tensor) and v.device.type != "cpu")
    return next(found, torch.device("cpu"))
