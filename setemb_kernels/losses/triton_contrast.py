"""The backward pass of InfoNCE and the sigmoid loss on a GPU, in Triton: `contrast` says what it is, and
`triton_contrast_kernels` has the kernel.

What `ops.smooth_chamfer.triton` does from an upstream gradient, with another kernel in the place of `weights_kernel`:
from the scores of a tile it makes the similarities, what the loss makes of those, and W. Else the similarities and
their gradients pass through memory, and scores are made once more. Of 16-bit sets; in float32 scores lie in memory
anyway.

The log-sum-exps come from the forward's kernel, which rounds a similarity otherwise than this one: a gradient is off by
about |z| 2^-22 of itself, z the logits. That is nothing for unit vectors; from |z| = 10^6 on tiles are more exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from setemb_kernels import _triton
from setemb_kernels.losses.triton_contrast_kernels import contrast_kernel
from setemb_kernels.ops.smooth_chamfer import triton as smooth_chamfer
from setemb_kernels.ops.smooth_chamfer import triton_config as sizes
from setemb_kernels.ops.smooth_chamfer import triton_packing as packing
from setemb_kernels.ops.smooth_chamfer.triton_plan import chunk_of, plan_of

if TYPE_CHECKING:
    from setemb_kernels.losses.contrast import Contrast
    from setemb_kernels.losses.tiles import Sets


def backward(sets: Sets, loss: Contrast, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and y in float32, one that is not needed empty ``[0]``, and the sums of `contrast` ``[2]``.

    Memory beyond inputs and outputs: packed copies of x and y, at most `ops.smooth_chamfer.triton.WORKSPACE_BYTES`, and
    what y has in float32.
    """
    x, y, masks = sets.x, sets.y, (sets.x_mask, sets.y_mask)
    scale, bias, weight, rows, columns = loss
    factor = weight * scale
    shares = [v[1].max() for v in (rows, columns) if v is not None]
    most = torch.stack(shares).sum() if shares else 1  # of |h|: a positive's is no more than the sums R and C it is in
    with torch.cuda.device_of(x):
        alpha = smooth_chamfer.as_argument(sets.alpha)
        plan = plan_of(x, y, *masks, alpha, is_loss=True)
        operands = plan.pack(x, y, *masks)
        operands.stats[packing.GRADIENT.value] = 2 * (factor * most).abs()  # z of the forward is rounded otherwise
        ids = (
            None if sets.x_group is None else sets.x_group.long(),
            None if sets.y_group is None else sets.y_group.long(),
        )
        state = [None if v is None else v.contiguous() for v in (*ids, rows, columns)]
        numbers, parts = torch.stack((scale, bias, factor)), []

        def make(scores: Tensor | None, chunk: Tensor | None, across: slice, down: slice) -> None:
            assert chunk is not None
            for config, launch in plan.launches(contrast_kernel, across, down):
                parts.append(numbers.new_empty(2 if rows is None else 1, launch.programs))
                known = operands.x_valid, operands.y_valid, operands.stats
                target = chunk_of(chunk, config)
                launch(*plan.rows_of(operands, config), *known, target, parts[-1], *state, numbers, alpha)

        by_x, by_y = (
            v.new_empty(v.shape if need else 0, dtype=torch.float32) for v, need in ((x, need_x), (y, need_y))
        )
        smooth_chamfer.add_chunks(make, plan, operands, masks, by_x if need_x else None, by_y if need_y else None)
        sums = torch.cat(parts, 1).sum(1, dtype=torch.float64) * weight
    return by_x, by_y, torch.nn.functional.pad(sums, (0, 2 - len(sums)))


# --- ahead of time


def configs(
    K: int, L: int, D: int, dtype: torch.dtype, arch: int, masked: bool = False, groups: bool = False
) -> Iterator[_triton.Build]:
    """The kernels of all losses for such sets on such a chip."""
    slots_x, slots_y = _triton.next_power_of_two(K), _triton.next_power_of_two(L)
    is_masked = masked or (slots_x, slots_y) != (K, L)
    for shifted, config in sizes.variants(
        K, L, D, dtype, arch, masked=is_masked, backward=True, alone=False, is_loss=True
    ):
        for absent in ((), ("columns",), ("rows", "columns")):
            name = _triton.NAMES[dtype]
            types: dict[str, Any] = dict.fromkeys(("x", "y", "chunk"), f"*{name}") | {"alpha": "fp32"}
            types |= dict.fromkeys(("stats", "sums", "rows", "columns", "loss"), "*fp32")
            types |= {"x_valid": "*i8", "y_valid": "*i8", "x_ids": "*i64", "y_ids": "*i64"}
            if config.bulk:
                types |= {
                    key: f"tensordesc<{name}[{rows},{columns}]>"
                    for key, rows, columns in (
                        ("x", config.rows, config.block_d),
                        ("y", config.columns, config.block_d),
                        ("chunk", config.rows, config.part),
                    )
                }
            constants: dict[str, Any] = {"K": slots_x, "L": slots_y, "GROUP": sizes.group(slots_x)}
            constants |= {"SHIFTED": shifted, "ALONE": False, "MASKED": is_masked, "ALPHA_ON_DEVICE": False}
            constants |= dict.fromkeys(absent)
            if not is_masked:
                constants |= {"x_valid": None, "y_valid": None}
            if not groups:
                constants |= {"x_ids": None, "y_ids": None}
            yield _triton.build(contrast_kernel, types, constants, config.launch(), {"features"}, True)
