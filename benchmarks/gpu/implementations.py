"""Ours, one by one: every implementation that can serve a device, chosen by name for the time of a call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

from setemb_kernels import backends, use_backend

KERNELS = {
    "triton": ("set_similarity", "slot_attention", "smooth_chamfer"),
    "cuda": ("slot_attention", "smooth_chamfer"),
}
"""What there is for a GPU, and the ops it has kernels for; the losses and the search are made of them."""
GPU = tuple(KERNELS)
OPS = KERNELS["triton"]

Choice = Callable[[], AbstractContextManager[object]]


def ours(device: str) -> dict[str, Choice]:
    """Name -> what makes it serve the ops it has kernels for, while entered. On the CPU the compiled module, which is
    not chosen."""
    if device == "cpu":
        (name,) = {row.implementation for row in backends() if row.device == "cpu"}
        return {name: nullcontext}
    reasons = absent(device)
    return {name: _chooser(name) for name in GPU if name not in reasons}


def absent(device: str) -> dict[str, str]:
    """Name -> why it cannot serve."""
    reasons = {}
    for name in GPU if device == "cuda" else ():
        try:
            with _chooser(name)():
                pass
        except RuntimeError as error:
            reasons[name] = str(error).rsplit(" cannot serve CUDA devices: ", 1)[-1]
    return reasons


def serves(name: str, op: str) -> bool:
    """Whether an implementation has kernels of its own for `op`, or for what it is made of."""
    return op not in OPS or op in KERNELS.get(name, OPS)


def _chooser(name: str) -> Choice:
    def choose() -> AbstractContextManager[object]:
        with ExitStack() as stack:
            for op in KERNELS[name]:
                stack.enter_context(use_backend(op, implementation=name))
            return stack.pop_all()

    return choose
