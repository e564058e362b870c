"""The emulator itself: it computes what the hardware is documented to compute, and notices each planted fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.emulate import ORDERS, EmulationError, Emulator, compiler, poisoned

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator(Path(__file__).parent / "building_blocks.cpp")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(  # ldmatrix transposes 16-bit numbers only
    ("dtype", "transposed"), [(dtype, t) for dtype in KINDS for t in (False, True) if not t or dtype.itemsize == 2]
)
def test_product(emulator: Emulator, dtype: torch.dtype, transposed: bool, order: int) -> None:
    emulator.reset(order)
    generator = torch.Generator().manual_seed(0)
    k = 32 // dtype.itemsize
    a, b = (torch.randn(n, k, generator=generator).to(dtype) for n in (16, 8))
    if dtype == torch.float32:  # numbers of tf32, of which no bit is cut off
        a, b = ((v.view(torch.int32) & ~0x1FFF).view(torch.float32) for v in (a, b))
    columns = b.T.contiguous() if transposed else b
    c = poisoned((16, 8), torch.float32)
    emulator.register(a), emulator.register(columns), emulator.register(c, writable=True)
    emulator.call("run_product", a, columns, c, KINDS[dtype], transposed)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=2**-23, atol=2**-149)
    assert emulator.writes(c) == (1, 1)
    assert emulator.counts()[2] == 1


FAULTS = [
    "",
    "race",
    "nobody waited",
    "not committed",
    "outside all buffers",
    "outside all buffers",
    "to an input",
    "not aligned",
    "different places",
    "they have ended|ends while others wait",
    "twice",
    "outside all buffers",
    "",
    "race at .* another lane",
    "different places",
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_planted_faults(emulator: Emulator, fault: int, order: int) -> None:
    emulator.reset(order)
    values = torch.randn(256, generator=torch.Generator().manual_seed(0))
    out = poisoned((256,), torch.float32)
    emulator.register(values), emulator.register(out, writable=True)
    expected = FAULTS[fault]
    if expected in ("", "twice"):
        emulator.call("run_reverse", values, out, 2, fault)
        assert torch.equal(out, values.view(2, 128).flip(1).flatten())
        assert emulator.writes(out) == (1, 2 if expected else 1)
    else:
        with pytest.raises(EmulationError, match=expected):
            emulator.call("run_reverse", values, out, 2, fault)


def test_numbers(emulator: Emulator) -> None:
    """Conversions are torch's; approximations are within their documented errors and not exact."""
    emulator.reset()
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0))
    special = [0.0, -0.0, 1.0, 65504.0, 65519.0, 65520.0, 6e-8, 2.9e-8, 3e-8, 3.4e38, float("inf"), float("nan"), 1e-40]
    values = bits.to(torch.int32).view(torch.float32)
    values[: len(special)] = torch.tensor(special)
    outs = [poisoned((len(values),), torch.float32) for _ in range(6)]
    for t in outs:
        emulator.register(t, writable=True)
    emulator.register(values)
    emulator.call("run_rounding", values, *outs, len(values))
    bfloat, half, tf32, exp2, log2, reciprocal = outs
    for got, dtype in ((bfloat, torch.bfloat16), (half, torch.float16)):
        torch.testing.assert_close(got, values.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    finite = values.isfinite() & (values.abs() < 3.4e38)
    error = (tf32.double() - values.double()).abs()[finite]
    assert (error <= values.abs()[finite].double() * 2**-11 + 2**-136).all()
    assert ((tf32.view(torch.int32) & 0x1FFF) == 0)[finite].all()
    normal = finite & (values.abs() >= 2**-126)
    for got, exact, bound in (
        (exp2, values.double().exp2(), 2**-22),
        (log2, values.double().log2(), 2**-22),
        (reciprocal, 1 / values.double(), 2**-23),
    ):
        tested = normal & exact.isfinite() & (exact.abs() < 2.0**127) & (exact.abs() >= 2.0**-126)
        error = ((got.double() - exact).abs() / exact.abs().clamp(min=1 if got is log2 else 0))[tested]
        assert 0.5 * bound < error.max() <= bound + 2**-24


def test_exchange(emulator: Emulator) -> None:
    emulator.reset(2)
    out = poisoned((3, 32), torch.int32)
    emulator.register(out, writable=True)
    emulator.call("run_exchange", out)
    lanes = torch.arange(32, dtype=torch.int32)
    assert torch.equal(out[0], lanes ^ 5)
    assert (out[1] == 49).all()
    assert (out[2] == sum(1 << i for i in range(1, 32, 3))).all()


@pytest.mark.parametrize(("stride", "waiting"), [(0, 0), (1, 0), (2, 16), (4, 24), (5, 0), (15, 0)])
def test_banks(emulator: Emulator, stride: int, waiting: int) -> None:
    """Lanes that read other words of a bank wait; those that read the same do not."""
    emulator.reset()
    values, out = torch.arange(512, dtype=torch.int32), poisoned((32,), torch.int32)
    emulator.register(values), emulator.register(out, writable=True)
    emulator.call("run_together", values, out, stride)
    assert torch.equal(out, values[: 31 * stride + 1 : stride] if stride else torch.zeros_like(out))
    assert emulator.counts()[:2] == (1, waiting)
