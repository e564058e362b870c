"""The binding of the CUDA kernels, by torch's stable ABI, with emulated kernels behind it: schemas, order and types
of arguments, strides, optional tensors. What this leaves to a GPU: the device guard, the stream, the launch itself.

In a process of its own, since ops can be registered once.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.emulate import CSRC, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

CASES = {
    "smooth_chamfer": ("odd sizes", "K 2 L 7", "masks", "transposed", "sliced", "alpha 1e4"),
    "slot_attention": ("odd sizes", "bias, shared, masked", "heads first", "sliced", "keys are values", "many tokens"),
}
COUNT = 3 * sum(map(len, CASES.values()))
"""Three dtypes."""


def test_binding() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cuda.test_binding"],
        cwd=CSRC.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    assert run.stdout.split() == ["passed", str(COUNT)]


def register_emulated() -> None:
    """Make ``torch.ops.setemb_cuda`` serve tensors of the CPU, once in a process."""
    folder = Path(torch.__file__).parent
    library = ctypes.CDLL(
        str(
            build(
                Path(__file__).parent / "binding.cpp",
                *("-DSETEMB_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{folder}/include"),
                *(f"-L{folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{folder}/lib"),
            )
        )
    )
    library.register_emulated()
    everything = ctypes.c_size_t(1 << 62)  # ranges are checked by the other tests
    library.emulator_register(ctypes.c_void_p(0), everything, everything, 1)


def _main() -> None:
    from tests.kernels.slot_attention import test_cuda as slot_attention
    from tests.kernels.smooth_chamfer import test_cuda as smooth_chamfer

    register_emulated()
    for op in (smooth_chamfer, slot_attention):
        for dtype in op.DTYPES:
            for name in CASES[op.__name__.split(".")[-2]]:
                op.check(op.run, op.NAMED[name], dtype)
    smooth_chamfer.backend._on_host = lambda alpha: False
    smooth_chamfer.check(smooth_chamfer.run, smooth_chamfer.NAMED["masks"], torch.float32)
    i = smooth_chamfer.NAMED["paper"].build(torch.float32)
    rows, columns = smooth_chamfer.backend.hardest(*i[:5], torch.full((20,), 7), None)
    s = smooth_chamfer.backend.forward(*i[:5])
    s[:, 7] = -float("inf")
    assert torch.equal(rows.who, s.argmax(1)) and torch.equal(columns.value, s.amax(0))
    print("passed", COUNT)


if __name__ == "__main__":
    _main()
