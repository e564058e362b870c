"""A handful of small calls of every op, forward and backward, by every implementation: what compute-sanitizer watches.

python -m benchmarks.gpu.small_cases [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.implementations import absent, ours, serves
from setemb_kernels import set_similarity, set_triplet_loss, slot_attention, smooth_chamfer

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SETS = (  # N, M, K, L, D: each number of slots that kernels are compiled for, on either side
    *((5, 7, 4, 4, 24), (3, 2, 3, 5, 33), (3, 2, 64, 16, 40), (2, 3, 16, 2, 20), (4, 3, 1, 1, 20)),
)
SLOTS = ((2, 1, 4, 37, 24), (1, 3, 7, 20, 33), (1, 1, 64, 600, 24))  # B, H, K, T, D; one head of keys

KINDS = ("smooth_chamfer", "chamfer", "maxsim", "soft_maxsim", "max", "match_probability")


def sets(device: str, dtype: torch.dtype, N: int, M: int, K: int, L: int, D: int) -> None:
    x, y = (torch.randn(*size, D, device=device).to(dtype).requires_grad_() for size in ((N, K), (M, L)))
    x_mask, y_mask = (torch.rand(*size, device=device) < 0.7 for size in ((N, K), (M, L)))
    s = smooth_chamfer(x, y, x_mask=x_mask, y_mask=y_mask)
    s.backward(torch.randn_like(s))
    x_group, y_group = (torch.arange(n, device=device) % 3 for n in (N, M))
    set_triplet_loss(x, y, x_group=x_group, y_group=y_group).backward()


def learned_alpha(device: str) -> None:
    """Alpha on the device, with a gradient."""
    x, y = (torch.randn(*size, device=device).requires_grad_() for size in ((5, 4, 24), (7, 3, 24)))
    alpha = torch.tensor(16.0, device=device, requires_grad=True)
    s = smooth_chamfer(x, y, alpha=alpha)
    s.backward(torch.randn_like(s))


def ragged(device: str, dtype: torch.dtype, kind: str) -> None:
    """All pairs and candidates of sets of 0 to 90 vectors."""
    x, y = (torch.randn(rows, 24, device=device).to(dtype).requires_grad_() for rows in (40, 125))
    x_offsets, y_offsets = (torch.tensor(v, device=device) for v in ([0, 3, 3, 40], [0, 90, 91, 91, 125]))
    scale = torch.tensor(4.0, device=device, requires_grad=True)
    for candidates in (None, torch.tensor([[0, -1], [3, 0], [1, 1]], device=device)):
        s = set_similarity(
            x,
            y,
            kind,  # type: ignore[arg-type]
            alpha=scale,
            scale=scale,
            x_offsets=x_offsets,
            y_offsets=y_offsets,
            candidates=candidates,
        )
        s.backward(torch.randn_like(s))


def slots(device: str, dtype: torch.dtype, B: int, H: int, K: int, T: int, D: int) -> None:
    q = torch.randn(B, H, K, D, device=device).to(dtype).requires_grad_()
    k, v = (torch.randn(B, 1, T, D, device=device).to(dtype).requires_grad_() for _ in range(2))
    bias = torch.randn(B, H, K, device=device).to(dtype).requires_grad_()
    out = slot_attention(q, k, v, bias=bias, mask=torch.rand(B, T, device=device) < 0.7, token_eps=1e-3)
    out.backward(torch.randn_like(out))


def _addmm(
    total: Tensor, a: Tensor, b: Tensor, *, out: Tensor | None = None, out_dtype: object = None, beta: float = 1,
    alpha: float = 1,
) -> Tensor:  # fmt: skip
    product = alpha * (a.float()[:, :, None] * b.float()).sum(1)
    result = product if beta == 0 else product + beta * total
    return total.copy_(result) if out is None else out.copy_(result)


def _mm(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_((a.float()[:, :, None] * b.float()).sum(1))


@contextmanager
def plain_products() -> Iterator[None]:
    """The products that our ops ask torch for, without cuBLAS."""
    with (
        patch.object(torch, "addmm", _addmm),
        patch.object(torch, "mm", _mm),
        patch.object(Tensor, "addmm_", _addmm),
    ):
        yield


def main(device: str, of: Collection[str] | None = None) -> int:
    """How many calls were made, of these implementations or of all."""
    count = 0
    choices = {name: choice for name, choice in ours(device).items() if of is None or name in of}
    for name in sorted(choices, key=lambda name: name != "cuda"):  # first what has not run anywhere else
        context = choices[name]
        with context():
            for dtype in DTYPES:
                for size in SETS:
                    sets(device, dtype, *size)
                for size in SLOTS:
                    slots(device, dtype, *size)
            learned_alpha(device)
        if device == "cuda":
            torch.cuda.synchronize()
        calls = len(DTYPES) * (len(SETS) + len(SLOTS)) + 1
        if serves(name, "set_similarity"):
            for dtype in DTYPES:
                for kind in KINDS:
                    ragged(device, dtype, kind)
            calls += len(DTYPES) * len(KINDS)
        count += calls
        print(f"{name}: {calls} calls", flush=True)
    for name, reason in absent(device).items():
        print(f"{name}: absent, {reason}")
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--of", nargs="+", help="implementations; else all")
    parser.add_argument("--plain-products", action="store_true", help="those of torch by additions, without cuBLAS")
    torch.manual_seed(0)
    args = parser.parse_args()
    with plain_products() if args.plain_products else nullcontext():
        main(args.device, args.of)
