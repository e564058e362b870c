"""Image encoders. Each returns local features, a global vector and a mask, which `SetPrediction` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from setemb.modules.dropout import Dropout
from setemb.modules.linear import Linear

Pooling = Literal["max", "mean"]


class ResidualMLP(nn.Module):
    """``h = MLP(f) + f``, ``MLP`` = Linear(dim -> hidden), batch norm over tokens, ReLU, Linear(hidden -> dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, dim]`` -> ``[n, dim]``."""
        return self.fc2(self.norm(self.fc1(x)).relu()) + x


class RegionEncoder(nn.Module):
    """Local features of regions or grid cells, and their maximum as the global vector.

    ``f = Linear(x)``, ``local = Dropout(MLP(f) + f)``, ``global = max over valid tokens of local``. The global vector
    of an image without a valid token is 0.

    Args:
        dim_in: features of a region.
        dim: features of ``local`` and ``global``.
        hidden: width of the MLP, by default ``dim // 2``.
        dropout: on ``local``.
        input_dropout: on the input features.
        pooling: "max", by default and as published, or "mean".

    Source: Kim, Kim, Kwak, CVPR 2023, section 3.1 (the image head of VSE-infinity, Chen et al. 2021).
    """

    default_pooling: Pooling = "max"

    def __init__(
        self,
        dim_in: int,
        dim: int,
        hidden: int | None = None,
        dropout: float = 0.1,
        input_dropout: float = 0.0,
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__()
        pooling = self.default_pooling if pooling is None else pooling
        if pooling not in ("max", "mean"):
            raise ValueError(f'pooling must be "max" or "mean", got {pooling!r}')
        self.dim_in, self.dim_local, self.dim_global, self.pooling = dim_in, dim, dim, pooling
        self.input_dropout = Dropout(input_dropout)
        self.fc = Linear(dim_in, dim)
        self.mlp = ResidualMLP(dim, hidden or max(dim // 2, 1))
        self.dropout = Dropout(dropout)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """``[B, T, dim_in]``, bool ``[B, T]`` -> local ``[B, T, dim]``, global ``[B, dim]``, the mask."""
        if features.ndim != 3 or features.shape[2] != self.dim_in:
            raise ValueError(f"features must have shape [B, T, {self.dim_in}], got {list(features.shape)}")
        if mask is not None and mask.shape != features.shape[:2]:
            raise ValueError(f"mask must have shape {list(features.shape[:2])}, got {list(mask.shape)}")
        # Only valid tokens are computed: padding must not reach the batch norm's statistics.
        tokens = features.flatten(0, 1) if mask is None else features[mask]
        tokens = self.dropout(self.mlp(self.fc(self.input_dropout(tokens))))
        if mask is None:
            local = tokens.unflatten(0, features.shape[:2])
        else:
            local = tokens.new_zeros(*mask.shape, tokens.shape[1])
            local[mask] = tokens
        return local, pool(local, mask, self.pooling), mask


class PictureEncoder(nn.Module):
    """Pictures through a backbone; a `RegionEncoder` takes the cells of its last feature map as regions.

    Args:
        backbone: ``[B, 3, H, W]`` -> ``[B, channels, h, w]``, and ``[B, pooled]`` where it pools by itself.
        channels: of the feature map.
        dim, **regions: as in `RegionEncoder`.
        frozen: do not train the backbone; it then also stays in evaluation mode.
        mean, std: numbers a colour: pictures of uint8 become ``(x / 255 - mean) / std``.
        cell_drop: share of the cells left out in training, the same number for each picture; at least one stays.
        pooled: features of the backbone's own pooled vector, which then is ``global``; 0: it has none.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        dim: int,
        frozen: bool = True,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        cell_drop: float = 0.0,
        pooled: int = 0,
        **regions: object,
    ) -> None:
        super().__init__()
        if not 0 <= cell_drop < 1:
            raise ValueError(f"cell_drop must lie in [0, 1), got {cell_drop}")
        self.backbone = backbone.requires_grad_(not frozen)
        self.frozen, self.cell_drop = frozen, cell_drop
        self.regions = RegionEncoder(channels, dim, **regions)  # type: ignore[arg-type]
        self.pooled = pooled
        self.dim_local, self.dim_global = dim, pooled or dim
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)
        self.train(self.training)

    def train(self, mode: bool = True) -> PictureEncoder:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, pictures: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """uint8 or float ``[B, 3, H, W]`` -> local ``[B, h w, dim]`` (cells in row order), global ``[B, dim_global]``,
        None.

        Raises:
            ValueError: another shape; a mask.
        """
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures must have shape [B, 3, H, W], got {list(pictures.shape)}")
        if mask is not None:
            raise ValueError("pictures have no mask, got one")
        if pictures.dtype == torch.uint8:
            pictures = (pictures.float() / 255 - self.mean) / self.std
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found = self.backbone(pictures)
            cells, pooled = found if self.pooled else (found, None)
            cells = cells.flatten(2).transpose(1, 2)
        kept = max(1, round(cells.shape[1] * (1 - self.cell_drop)))
        if self.training and kept < cells.shape[1]:
            chosen = torch.rand(cells.shape[:2], device=cells.device).argsort(1)[:, :kept].sort(1).values
            cells = cells.take_along_dim(chosen[..., None], 1)
        local, global_, _ = self.regions(cells)
        return local, global_ if pooled is None else pooled, None


def pool(local: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Maximum or mean over the valid tokens of ``[B, T, D]``; 0 where there is none."""
    if mask is None:
        mask = local.new_ones(local.shape[:2], dtype=torch.bool)
    valid = mask[..., None]
    if pooling == "mean":
        return torch.where(valid, local, 0).sum(1) / valid.sum(1).clamp(min=1)
    if local.shape[1] == 0:
        return local.sum(1)
    highest = local.masked_fill(~valid, -torch.inf).amax(1)
    return torch.where(valid.any(1), highest, 0)
