"""Training on batches whose activations do not fit: encode in parts, keep embeddings, make activations again.

A contrastive loss needs the embeddings of the whole batch, but the encoders do not need each other's activations. So
each part is encoded without keeping its activations; the loss gives the gradient of every embedding; and each part is
encoded once more to carry it on (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
2021). The gradient is that of the whole batch; memory is that of one part's activations. It costs one more forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from setemb.model import Batch
from setemb.modules import SetOutput


def encode_in_parts(
    encode: Callable[[Batch], SetOutput], batch: Batch, keys: Sequence[str], size: int, module: nn.Module
) -> SetOutput:
    """``encode(batch)``, at most `size` items at a time.

    Dropout is the same in both passes over a part. Batch normalisation takes its statistics from the part, not from the
    batch, and adds them to its running ones once.

    Args:
        encode: from a batch to its sets.
        batch: whose `keys` hold the items, along their first axis; those that are missing are left out.
        size: items of a part; 0: all.
        module: what `encode` runs.
    """
    tensors = {key: batch[key] for key in keys if key in batch}
    count = len(tensors[keys[0]])
    if size <= 0 or count <= size:
        return encode(tensors)

    def part(*values: Tensor) -> tuple[Tensor, Tensor]:
        out = encode(dict(zip(tensors, values, strict=True)))
        return out.embeddings, out.slots

    outputs = [
        checkpoint(
            part,
            *(value[first : first + size] for value in tensors.values()),
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), running_statistics_kept(module)),
        )
        for first in range(0, count, size)
    ]
    embeddings, slots = (torch.cat(values) for values in zip(*outputs, strict=True))
    return SetOutput(embeddings, slots)


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch normalisation inside does not touch its running statistics."""
    layers: list[Any] = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
