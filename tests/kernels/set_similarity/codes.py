"""The cases of set_similarity with sets stored as codes, on every backend against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from setemb_kernels.ops.set_similarity.layout import PackedSets
from tests.kernels.judge import judge, on_cpu
from tests.kernels.set_similarity.cases import Case, Inputs, _eager_in_another_order, reference_results

CODES = (torch.int8, torch.float8_e4m3fn)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

Run = Callable[[PackedSets, PackedSets, Inputs], Tensor]


def encoded(v: Tensor, offsets: Tensor, dtype: torch.dtype, scaled: bool = True) -> PackedSets:
    """Codes of the rows, each with its scale, or as they are."""
    v = v.nan_to_num(0)
    scale = (v.abs().amax(1) if v.shape[1] else v.new_ones(len(v))) / LARGEST[dtype]
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny) if scaled else torch.ones_like(scale)
    codes = v / scale[:, None]
    codes = codes.round().clamp(-128, 127) if dtype == torch.int8 else codes
    return PackedSets(codes.to(dtype), offsets, scale if scaled else None)


def check(
    run: Run,
    case: Case,
    kind: str,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    device: str = "cpu",
    scaled: bool = True,
) -> None:
    """The similarity of codes is that of the decoded vectors, in float32."""
    i = case.build(kind, torch.float32, device)
    sides = []
    for v, offsets, dtype in ((i.x, i.x_offsets, x_dtype), (i.y, i.y_offsets, y_dtype)):
        floating = PackedSets(v.nan_to_num(0).to(dtype), offsets)
        sides.append(encoded(v * (1 if scaled else 50), offsets, dtype, scaled) if dtype in CODES else floating)
    got = run(*sides, i).cpu()
    x, y = (side.decoded(torch.float32).rows for side in sides)
    i = on_cpu(i)
    plain = i._replace(x=x.cpu(), y=y.cpu())
    truth = reference_results(plain.to(torch.float64))[0]
    eager = [_eager_in_another_order(plain, order)[0] for order in range(3)]
    assert got.dtype == torch.float32
    none = torch.zeros_like(truth, dtype=torch.bool) if i.candidates is None else i.candidates < 0
    assert got[none].eq(-torch.inf).all()
    got, truth, ours, *eager = (s.masked_fill(none, 0) for s in (got, truth, reference_results(plain)[0], *eager))
    judge(f"{case.name}, {kind}, {x_dtype}, {y_dtype}", got, truth, eager, ours, torch.float32, saturates=True)
