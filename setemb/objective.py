"""What training minimises: the loss of the similarities of a batch, and the two regularisers of its sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

import setemb_kernels
import setemb_kernels.distributed
from setemb.config import LossConfig
from setemb.losses import TIMEOUT, diversity_loss, hardest_triplet_loss, info_nce_loss, mmd_loss
from setemb.model import Batch, SetEmbedder
from setemb.modules import SetOutput
from setemb.processes import place
from setemb_kernels.distributed.ring import Ring


def training_loss(
    model: SetEmbedder, images: SetOutput, texts: SetOutput, batch: Batch, config: LossConfig, epochs_done: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, and the parts that it is made of before they are weighted: main, diversity, mmd.

    Over several processes all have its value, and each its part of one gradient.
    """
    parts = {"main": retrieval_loss(model, images.embeddings, texts.embeddings, batch, config, epochs_done)}
    loss = parts["main"]
    if config.diversity > 0:
        parts["diversity"] = mean_over_processes(diversity_loss, images.slots, texts.slots)
        loss = loss + config.diversity * parts["diversity"]
    if config.mmd > 0:
        parts["mmd"] = mmd_loss(images.embeddings, texts.embeddings, distributed=True)
        loss = loss + config.mmd * parts["mmd"]
    return loss, parts


def retrieval_loss(
    model: SetEmbedder, images: Tensor, texts: Tensor, batch: Batch, config: LossConfig, epochs_done: float
) -> Tensor:
    """The main loss of a step over sets ``[B, K, D]`` and ``[C, K, D]``.

    Similarities are never stored (`setemb_kernels.losses`) where groups say what belongs together. They are where the
    batch lists its positive pairs: bool ``[B, C]``, "positive"; not on several processes, then.
    """
    # mean of violations for the warm-up, then linearly to the hardest negative in as many epochs again
    ramp = 1.0 if config.warmup_epochs <= 0 else min(max(epochs_done / config.warmup_epochs - 1, 0.0), 1.0)
    hardest = config.hardest_fraction * ramp
    several = place()[1] > 1
    if "positive" in batch:
        if several:
            raise ValueError(
                'training on several processes takes data whose groups say what belongs together, got "positive"'
            )
        positive = batch["positive"]
        sim = model.similarity(images, texts)
        if config.kind == "info_nce":
            return info_nce_loss(sim, positive, config.temperature)
        return hardest_triplet_loss(sim, positive, config.margin, hardest)
    options: dict[str, Any] = {"x_group": batch["image_group"], "y_group": batch["caption_group"]}
    options |= model.measure()
    with torch.autocast(images.device.type, enabled=False):  # a margin needs more digits than bfloat16 has
        losses: Any = setemb_kernels.distributed if several else setemb_kernels
        if config.kind == "info_nce":
            return cast(Tensor, losses.set_infonce_loss(images, texts, temperature=config.temperature, **options))
        loss = images.new_zeros(())
        for share, negatives in ((hardest, "hardest"), (1 - hardest, "all")):
            if share > 0:
                part = losses.set_triplet_loss(images, texts, margin=config.margin, negatives=negatives, **options)
                loss = loss + share * part
        return loss


def mean_over_processes(loss: Callable[[Tensor], Tensor], *shares: Tensor) -> Tensor:
    """The sum of ``loss``, a mean over items, of each of several batches that are spread over processes.

    All get its value; the gradients are those for their own shares.
    """
    total = shares[0].new_zeros(())
    for own in shares:
        ring = Ring("mean_over_processes", None, TIMEOUT, own.device)
        part = loss(own)
        counted = torch.stack((part.detach() * len(own), part.new_tensor(float(len(own)))))
        whole, count = ring.total(counted)
        part = part * (len(own) / count.clamp(min=1))
        total = total + part + (whole / count.clamp(min=1) - part.detach())
    return total
