"""set_similarity of int8 and float8 codes on the CPU: every case and kind, all forms of sets, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from setemb_kernels import set_similarity
from setemb_kernels.ops.set_similarity import codes as op
from setemb_kernels.ops.set_similarity import reference
from setemb_kernels.ops.set_similarity.layout import PackedSets
from tests.kernels.set_similarity.cases import CASES, Case, Inputs
from tests.kernels.set_similarity.codes import check, encoded

TABLE = [pytest.param(case, kind, id=f"{case.name}-{kind}") for case in CASES for kind in case.kinds]
MIXED = [
    (torch.int8, torch.float32),
    (torch.bfloat16, torch.int8),
    (torch.int8, torch.float8_e4m3fn),
    (torch.float8_e4m3fn, torch.float8_e4m3fn),
    (torch.float32, torch.float8_e4m3fn),
]
PROCESSOR = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
ALL_KINDS = ("smooth_chamfer", "chamfer", "maxsim", "soft_maxsim", "max", "mean", "match_probability")


def run(x: PackedSets, y: PackedSets, i: Inputs) -> Tensor:
    return op.similarity(x, y, i.candidates, i.alpha, i.bias, i.kind, i.mean)


@pytest.mark.parametrize(("case", "kind"), TABLE)
def test_int8(case: Case, kind: str) -> None:
    check(run, case, kind, torch.int8, torch.int8)


@pytest.mark.parametrize(("case", "kind"), [p for p in TABLE if p.values[0].name in ("ragged", "tokens", "D 1031")])
def test_without_scales(case: Case, kind: str) -> None:
    check(run, case, kind, torch.int8, torch.int8, scaled=False)


@pytest.mark.parametrize(("case", "kind"), TABLE)
def test_reference(case: Case, kind: str) -> None:
    def run(x: PackedSets, y: PackedSets, i: Inputs) -> Tensor:
        return reference.forward_of_codes(
            x.rows, x.scale, x.offsets, y.rows, y.scale, y.offsets, i.candidates, i.alpha, i.bias, i.kind, i.mean
        )

    check(run, case, kind, torch.int8, torch.int8)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("name", ["ragged", "candidates, empty sets", "paired", "no y", "many against one"])
@pytest.mark.parametrize("kind", ["chamfer", "soft_maxsim"])
def test_one_side_or_both(
    kind: str, name: str, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no kernel serves, and y goes a few sets at a time."""
    case = next(c for c in CASES if c.name == name)
    check(run, case, kind, *dtypes)
    monkeypatch.setattr(op, "PART_ELEMENTS", 3000)
    check(run, case, kind, *dtypes)


@pytest.mark.parametrize(("case", "kind"), TABLE)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_y_alone(case: Case, kind: str, dtype: torch.dtype) -> None:
    """Decoded as it is read."""
    check(run, case, kind, torch.float32, dtype)


@pytest.mark.skipif("avx512_vnni" not in PROCESSOR, reason="other processors sum in float32")
@pytest.mark.parametrize("features", [1 << 16, (1 << 16) + 1])
def test_int8_is_summed_exactly(features: int) -> None:
    """As far as is said; beyond that sums do not overflow."""
    x, y = (torch.randint(-127, 128, (1, 1, features), generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    for a, b in ((x, y), (x, x), (torch.full_like(x, -128), torch.full_like(x, 127))):
        truth = (a * b).sum().float()
        got = set_similarity(a.to(torch.int8), b.to(torch.int8), "max").squeeze()
        torch.testing.assert_close(got, truth, rtol=0 if features <= 1 << 16 else 1e-4, atol=0)


def test_every_float8_is_decoded() -> None:
    """Each of the 256, in vectors and in what is left beside them; NaN reaches its own set alone."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for width in (1, 16, 21):
        rows = values[:, None].expand(256, width)
        last = torch.zeros(1, width)
        last[0, -1] = 1
        s = set_similarity(last.view(1, 1, width), rows.contiguous().view(256, 1, width), "max")
        torch.testing.assert_close(s[0], values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_padded_masked_packed_and_nested_codes_are_one(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, generator=generator) for shape in ((3, 4, 20), (5, 6, 20)))
    counts = torch.tensor([6, 1, 3, 0, 5])
    mask = torch.arange(6) < counts[:, None]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    codes, x_codes = (encoded(v.flatten(0, 1), offsets, torch.int8) for v in (y, x))
    assert codes.scale is not None and x_codes.scale is not None
    rows, scale = codes.rows[mask.flatten()], codes.scale[mask.flatten()]
    queries = {"x": x_codes.rows.view(3, 4, 20), "x_scale": x_codes.scale.view(3, 4)}
    padded = set_similarity(
        y=codes.rows.view(5, 6, 20), y_scale=codes.scale.view(5, 6), y_mask=mask, kind=kind, **queries
    )
    packed = set_similarity(y=rows, y_scale=scale, y_offsets=offsets, kind=kind, **queries)
    nested = torch.nested.nested_tensor_from_jagged(rows, offsets)
    ragged = set_similarity(y=nested, y_scale=scale, kind=kind, **queries)
    decoded = x_codes.decoded(torch.float64).rows.view(3, 4, 20), rows.double() * scale.double()[:, None]
    truth = set_similarity(*decoded, kind, y_offsets=offsets)
    for s in (padded, packed, ragged):
        torch.testing.assert_close(s, truth.float())
    wide = set_similarity(decoded[0], rows, kind, y_offsets=offsets, y_scale=scale)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, truth)
    y_double = torch.nested.nested_tensor_from_jagged(decoded[1], offsets)
    wide = set_similarity(y=y_double, kind=kind, **queries)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, truth)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(set_similarity(decoded[0].float(), nested, kind, y_scale=scale), truth.float())


def test_scales_out_of_proportion() -> None:
    """No partial product leaves the range of the result."""
    ones = torch.full((2, 1, 64), 127, dtype=torch.int8)
    for x_scale, y_scale in ((1e36, 1e-36), (1e-36, 1e36)):
        scales = {"x_scale": torch.full((2, 1), x_scale), "y_scale": torch.full((2, 1), y_scale)}
        s = set_similarity(ones, ones, "max", **scales)
        torch.testing.assert_close(s, torch.full((2, 2), 64.0 * 127 * 127))


def test_the_op_has_no_gradient() -> None:
    x, one = torch.randn(3, 4, requires_grad=True), torch.tensor(1.0, dtype=torch.float64)
    offsets = torch.tensor([0, 3])
    s = torch.ops.setemb.set_similarity_codes(
        x, None, offsets, torch.ones(3, 4, dtype=torch.int8), None, offsets, None, one, one, "max", False
    )
    with pytest.raises(NotImplementedError, match="is for scoring and has no gradient"):
        s.sum().backward()


def test_opcheck() -> None:
    x, y = (torch.randint(-127, 128, (6, 8), dtype=torch.int8) for _ in range(2))
    offsets, one = torch.tensor([0, 2, 6]), torch.tensor(1.0, dtype=torch.float64)
    args = (x, torch.rand(6), offsets, y, None, offsets, None, one, one, "chamfer", False)
    torch.library.opcheck(torch.ops.setemb.set_similarity_codes.default, args)


def test_compiles_into_one_graph() -> None:
    x, y = (torch.randint(-127, 128, (n, 3, 8), dtype=torch.int8) for n in (2, 5))
    scale = torch.rand(5, 3)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return set_similarity(x, y, "maxsim", y_scale=scale) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), function(x, y))


CODED = torch.zeros(2, 3, 4, dtype=torch.int8)
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "gradient": ({"x": torch.zeros(2, 3, 4, requires_grad=True)}, "x: expected no gradient"),
    "gradient of alpha": (
        {"kind": "soft_maxsim", "alpha": torch.tensor(1.0, requires_grad=True)},
        "alpha: expected no gradient",
    ),
    "gradient of a scale": ({"y_scale": torch.ones(2, 3, requires_grad=True)}, "y_scale: expected no gradient"),
    "scale of floats": (
        {"x": torch.zeros(2, 3, 4), "x_scale": torch.ones(2, 3)},
        "x_scale: expected None beside x of float32",
    ),
    "shape of scale": ({"y_scale": torch.ones(2, 2)}, r"y_scale: expected shape \[2, 3\] as of y, got \[2, 2\]"),
    "dimensions of scale": ({"y_scale": torch.ones(6)}, "y_scale: expected 2 dimensions"),
    "dtype of scale": ({"y_scale": torch.ones(2, 3, dtype=torch.int64)}, "y_scale: expected float32.* got int64"),
    "out_dtype": ({"out_dtype": torch.float16}, "out_dtype: expected None or torch.float32 beside codes"),
    "uint8": ({"y": CODED.to(torch.uint8)}, "y: expected float32, .*int8 or float8_e4m3fn, got uint8"),
    "features": ({"y": CODED[..., :2]}, "y: expected 4 features as in x, got 2"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    changes, message = ERRORS[name]
    arguments = {"x": CODED, "y": CODED, "kind": "maxsim"} | changes
    with pytest.raises((TypeError, ValueError), match=message):
        set_similarity(**arguments)
