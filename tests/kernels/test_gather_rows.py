"""Packing by a mask: `setemb::gather_rows`, compiled and in torch."""

from __future__ import annotations

import pytest
import torch

from setemb_kernels.ops.gather_rows import gather_rows, in_torch, masked_rows, pays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [(0, 3), (7, 0), (9, 5), (3000, 129)])
def test_masked_rows(size: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(size, generator=generator).to(dtype).requires_grad_()
    keep, zero = (torch.rand(size[0], generator=generator) < chance for chance in (0.6, 0.2))
    for cut in (None, zero):
        expected = rows[keep] if cut is None else (rows * ~cut[:, None])[keep]
        packed = masked_rows(rows, keep, cut)
        assert torch.equal(packed, expected)
        upstream = torch.randn(packed.shape, generator=generator).to(dtype)
        got, wanted = (torch.autograd.grad(v, rows, upstream)[0] for v in (packed, expected))
        assert torch.equal(got, wanted)


def test_same_in_torch_and_traced() -> None:
    rows, back = torch.randn(6, 4, requires_grad=True), torch.tensor([-1, 1, 2, -1, -1, 0])
    places = torch.tensor([5, 1, 2, -1])
    assert torch.equal(gather_rows(rows, places, back), in_torch(rows, places, back))
    torch.library.opcheck(torch.ops.setemb.gather_rows.default, (rows, places, back))
    with torch._subclasses.FakeTensorMode():
        assert not pays(torch.ones(3, dtype=torch.bool))


def test_places_out_of_range() -> None:
    for place in (-2, 6):
        with pytest.raises(ValueError, match="places: expected -1"):
            gather_rows(torch.randn(6, 4), torch.tensor([place]), torch.zeros(6, dtype=torch.int64))
