"""Which similarity of sets: checked once, then computed and differentiated a part at a time, below autograd.

What losses, search and ranks call.

All pairs of smooth-Chamfer go to ``setemb::smooth_chamfer``, unless sets are long; a mean over all pairs of vectors is
the dot product of the means, which is smooth-Chamfer of sets of one vector; everything else goes to
``setemb::set_similarity``.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from setemb_kernels import _check
from setemb_kernels._direct import ops
from setemb_kernels.backends import compiled_serves
from setemb_kernels.ops.set_similarity import reference
from setemb_kernels.ops.set_similarity.op import Kind
from setemb_kernels.ops.smooth_chamfer.op import streams

MOST_BATCHED_SCORES = 1024
"""Of a pair of sets, for `_batched`."""


class Measure(NamedTuple):
    """A similarity of sets; see `setemb_kernels.set_similarity`."""

    kind: str
    mean: bool
    """The reduction of maxsim and soft_maxsim."""
    alpha: Tensor
    """Of match_probability its scale."""
    bias: Tensor

    @classmethod
    def of(
        cls, kind: str, alpha: float | Tensor, match_bias: float | Tensor, reduction: str, device: torch.device
    ) -> Measure:
        """Checked arguments of a public function.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
        if reduction == "mean" and kind not in ("maxsim", "soft_maxsim"):
            raise ValueError(f"reduction: expected 'sum' for {kind}, which has one form, got 'mean'")
        bias = check_bias("match_bias", match_bias, device)
        return cls(kind, reduction == "mean", _check.sharpness("alpha", alpha, device), bias)

    def forward(
        self, x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, paired: bool = False
    ) -> Tensor:
        """``[N, M]``, or ``[N]`` where set i of x meets set i of y alone; of 16-bit sets in float32."""
        if self.kind == "mean":
            (x, _, x_mask), (y, _, y_mask) = _means(x, x_mask), _means(y, y_mask)
        s: Tensor
        if self.kind in ("smooth_chamfer", "mean") and not paired and not streams(x, y):
            s = ops.smooth_chamfer(x, y, self._sharpness(), x_mask, y_mask, True)
            return s
        if paired and _batched(x, y):
            return reference.paired_forward(x, y, x_mask, y_mask, *self._packed_arguments())
        a, b = _packed(x, x_mask), _packed(y, y_mask)
        who, kind = _each(len(x), x.device) if paired else None, self._packed_kind()
        s = ops.set_similarity(
            a.rows, a.offsets, b.rows, b.offsets, who, self._sharpness(), self.bias, kind, self.mean, True
        )
        return s.squeeze(1) if paired else s

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        x_mask: Tensor | None,
        y_mask: Tensor | None,
        needs: tuple[bool, bool, bool, bool],
        paired: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, y, alpha and bias; empty ``[0]`` where not needed, of 16-bit means in float32."""
        need_x, need_y, need_alpha, need_bias = needs
        if self.kind == "mean":
            (a, x_share, some_x), (b, y_share, some_y) = _means(x, x_mask), _means(y, y_mask)
            dot = Measure("smooth_chamfer", False, self._sharpness(), self.bias)
            by_a, by_b, *_ = dot.backward(grad, a, b, some_x, some_y, (need_x, need_y, False, False), paired)
            nothing = self.alpha.new_zeros(() if need_alpha else 0), self.bias.new_zeros(() if need_bias else 0)
            return by_a * x_share if need_x else by_a, by_b * y_share if need_y else by_b, *nothing
        if self.kind == "smooth_chamfer" and not paired and not streams(x, y):
            found = ops.smooth_chamfer_backward(grad, x, y, self.alpha, x_mask, y_mask, need_x, need_y, need_alpha)
            return *found, self.bias.new_zeros(() if need_bias else 0)
        if paired and _batched(x, y):
            return reference.paired_backward(grad, x, y, x_mask, y_mask, *self._packed_arguments(), *needs)
        a_rows, b_rows = _packed(x, x_mask), _packed(y, y_mask)
        who = _each(len(x), x.device) if paired else None
        by_x, by_y, by_alpha, by_bias = ops.set_similarity_backward(
            grad[:, None] if paired else grad,
            *(a_rows.rows, a_rows.offsets, b_rows.rows, b_rows.offsets, who),
            *(self._sharpness(), self.bias, self._packed_kind(), self.mean, *needs),
        )
        return a_rows.unpack(by_x) if need_x else by_x, b_rows.unpack(by_y) if need_y else by_y, by_alpha, by_bias

    def has_contrast(self, x: Tensor, y: Tensor) -> bool:
        """Whether `contrast_backward` serves such sets."""
        return compiled_serves(x) and (self.kind == "mean" or (self.kind == "smooth_chamfer" and not streams(x, y)))

    def contrast_backward(
        self,
        x: Tensor,
        y: Tensor,
        x_mask: Tensor | None,
        y_mask: Tensor | None,
        loss: tuple[Tensor | None, ...],
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x and y, empty ``[0]`` where not needed, and of alpha, and the sums of `losses.contrast`.

        ``loss`` is what the op takes of a loss.
        """
        if self.kind == "smooth_chamfer":
            found: tuple[Tensor, Tensor, Tensor, Tensor] = ops.smooth_chamfer_contrast_backward(
                x, y, self.alpha, x_mask, y_mask, *loss, *needs
            )
            return found
        need_x, need_y, _ = needs
        (a, x_share, some_x), (b, y_share, some_y) = _means(x, x_mask), _means(y, y_mask)
        by_a, by_b, by_alpha, sums = ops.smooth_chamfer_contrast_backward(
            a, b, self._sharpness(), some_x, some_y, *loss, need_x, need_y, False
        )
        return by_a * x_share if need_x else by_a, by_b * y_share if need_y else by_b, by_alpha, sums

    def _packed_arguments(self) -> tuple[Tensor, Tensor, str, bool]:
        return self._sharpness(), self.bias, self._packed_kind(), self.mean

    def _packed_kind(self) -> str:
        """The closest of the only pair of vectors is their dot product, too."""
        return "max" if self.kind == "mean" else self.kind

    def _sharpness(self) -> Tensor:
        return torch.ones_like(self.alpha) if self.kind == "mean" else self.alpha


def _batched(x: Tensor, y: Tensor) -> bool:
    """Whether pairs, one set of x with one of y each, are made by batched products with their scores stored: on a GPU,
    where a program of its own for each pair of small sets leaves most of its tile empty, and waits."""
    return x.device.type == "cuda" and x.shape[1] * y.shape[1] <= MOST_BATCHED_SCORES


def check_bias(name: str, bias: float | Tensor, device: torch.device) -> Tensor:
    """`bias`, a finite number, as a 0-dim tensor."""
    return _check.real(name, bias, device)


class _Packed(NamedTuple):
    rows: Tensor  # [N K, D], the valid ones first
    offsets: Tensor  # [N + 1]
    where: Tensor | None  # [N K] which of the padded vectors each row is; None: in their order
    shape: tuple[int, ...]

    def unpack(self, by_rows: Tensor) -> Tensor:
        if self.where is None:
            return by_rows.view(self.shape)
        # Rows beyond the last offset are copies of vector 0 and have gradient 0.
        return torch.zeros_like(by_rows).index_add_(0, self.where, by_rows).view(self.shape)


def _packed(v: Tensor, mask: Tensor | None) -> _Packed:
    N, K, _ = v.shape
    rows = v.flatten(0, 1)
    if mask is None:
        return _Packed(rows, torch.arange(N + 1, device=v.device) * K, None, tuple(v.shape))
    where = torch.nonzero_static(mask.flatten(), size=N * K, fill_value=0).squeeze(1)
    counts = mask.sum(1)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return _Packed(rows[where], offsets, where, tuple(v.shape))


def _each(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)[:, None]


def _means(v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean vectors ``[N, 1, D]``, the share ``[N, K, 1]`` that each vector has in them, and which sets have any
    ``[N, 1]``."""
    wide = v if v.dtype == torch.float64 else v.float()
    if mask is None:
        share = wide.new_full((*v.shape[:2], 1), 1 / max(v.shape[1], 1))
        some = None if v.shape[1] else torch.zeros(len(v), 1, dtype=torch.bool, device=v.device)
    else:
        share = (mask.to(wide) / mask.sum(1, keepdim=True).clamp(min=1))[..., None]
        wide, some = torch.where(mask[..., None], wide, 0), mask.any(1, keepdim=True)
    return (wide * share).sum(1, keepdim=True), share, some
