"""Batches in an order that can be resumed, and the Lightning data module that makes them.

Everything random about a batch is a function of the seed, of the number of the step and, where there are several, of
the process: which images, which of their captions, what is dropped. So the position in the data is one number, and
training that is resumed at a step sees what it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from setemb.processes import place, share

try:
    from lightning.pytorch import LightningDataModule
except ImportError as error:
    raise ImportError('feeding the trainer needs lightning: pip install "setemb[train]"') from error


class RetrievalData(Protocol):
    """A data set of images with captions. `setemb.data.precomp.PrecompDataset` is one."""

    def __len__(self) -> int:
        """The number of images."""
        ...

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> dict[str, Tensor]:
        """These images with captions, as `setemb.model.Batch` describes.

        ``rng`` is given in training (draw captions and drop features with it), and None in evaluation (all captions,
        nothing dropped).
        """
        ...


class StepBatches:
    """A sampler of ``(step, indices)``: an epoch is a permutation of the images, the last incomplete batch left out.

    Of several processes (`setemb.processes`) each gets its share of every batch.

    Args:
        n: number of images.
        batch_size: images a batch.
        seed: of the permutations.
        step: called at the start of each pass for the number of steps taken so far; the pass ends where the epoch ends.
        per_step: batches that make a step of the optimizer; the last ones, too few for a step, are left out. What
            is yielded as the step is then the number of the batch.
    """

    def __init__(self, n: int, batch_size: int, seed: int, step: Callable[[], int], per_step: int = 1) -> None:
        if not 1 <= batch_size <= n:
            raise ValueError(f"batch_size must lie in [1, {n}] (the number of images), got {batch_size}")
        if not 1 <= per_step <= n // batch_size:
            raise ValueError(
                f"accumulate_batches must lie in [1, {n // batch_size}] (the batches of an epoch), got {per_step}"
            )
        self.n, self.batch_size, self.seed, self.step, self.per_step = n, batch_size, seed, step, per_step

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.n // self.batch_size // self.per_step * self.per_step

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return self._from(self.step() * self.per_step)

    def _from(self, batch: int) -> Iterator[tuple[int, list[int]]]:
        epoch, first = divmod(batch, len(self))
        order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        own = share(self.batch_size, *place())
        for i in range(first, len(self)):
            yield epoch * len(self) + i, order[i * self.batch_size : (i + 1) * self.batch_size][own].tolist()


class _Batches(Dataset[dict[str, Tensor]]):
    """Makes the batch that a sampler asks for; ``step`` is None in evaluation."""

    def __init__(self, data: RetrievalData, seed: int) -> None:
        self.data, self.seed, self.rank = data, seed, place()[0]

    def __getitem__(self, asked: tuple[int | None, list[int]]) -> dict[str, Tensor]:
        step, indices = asked
        # The third number keeps these draws apart from those of the permutations, and of one process from another's.
        rng = None if step is None else np.random.default_rng((self.seed, step, 1 + self.rank))
        return self.data.batch(indices, rng)


class RetrievalDataModule(LightningDataModule):
    """Feeds a training and a dev set to the trainer.

    Args:
        train: the training set.
        dev: evaluated after each epoch, or None.
        batch_size: images a batch.
        seed: of everything random about the batches.
        workers: processes that make batches; 0: the training process itself.
        batches_per_step: whose gradients are added before the weights change (``trainer.accumulate_batches``).
    """

    def __init__(
        self,
        train: RetrievalData,
        dev: RetrievalData | None,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        batches_per_step: int = 1,
    ) -> None:
        super().__init__()
        self.batches_per_step = batches_per_step
        self.train, self.dev, self.batch_size, self.seed, self.workers = train, dev, batch_size, seed, workers
        self._sampler = StepBatches(len(train), batch_size, seed, self._step, batches_per_step)

    @property
    def steps_per_epoch(self) -> int:
        """Of the optimizer."""
        return len(self._sampler) // self.batches_per_step

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return _loader(self.train, self._sampler, self.seed, self.workers)

    def val_dataloader(self) -> Any:
        if self.dev is None:
            return []
        rank, size = place()
        return evaluation_loader(self.dev, self.batch_size, self.workers, rank=rank, size=size)

    def _step(self) -> int:
        return int(self.trainer.global_step) if self.trainer is not None else 0


def evaluation_loader(
    data: RetrievalData, batch_size: int, workers: int = 0, *, rank: int = 0, size: int = 1
) -> DataLoader[dict[str, Tensor]]:
    """All images of a data set in their order, with all their captions and nothing dropped.

    Of several processes, ``rank`` of ``size``, each gets its share, in as many batches as all others.
    """
    own = share(len(data), rank, size)
    count = math.ceil(math.ceil(len(data) / size) / batch_size)
    parts = [share(own.stop - own.start, i, count) for i in range(count)]
    sampler = [(None, list(range(own.start + part.start, own.start + part.stop))) for part in parts]
    return _loader(data, sampler, 0, workers)


def _loader(data: RetrievalData, sampler: Any, seed: int, workers: int) -> DataLoader[dict[str, Tensor]]:
    # Its own generator: making an iterator would otherwise draw from the one that dropout draws from.
    return DataLoader(
        _Batches(data, seed),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        generator=torch.Generator(),
        persistent_workers=workers > 0,
    )
