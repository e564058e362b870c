"""One rank's shard of a batch of sets, and the sets of y of the other ranks as they come by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from setemb_kernels.distributed.ring import Layout, Ring
from setemb_kernels.losses.tiles import Gradients, Sets

_DESCRIPTION = 256


class Shard(NamedTuple):
    """A slice of the whole batch."""

    start: int
    stop: int


class Batch:
    """``sets`` of this rank, with ids that hold in all ranks, and the sizes of the others' shards.

    Args:
        ring: of the ranks.
        sets: this rank's; groups on all ranks or on none.
        need_y: whether this rank wants a gradient of y.
        options: of the loss, which must be the same on all ranks.
    """

    def __init__(self, ring: Ring, sets: Sets, need_y: bool, options: str) -> None:
        self.ring = ring
        L, D = sets.y.shape[1:]
        ids = "no groups" if sets.x_group is None else "groups"
        dtype = str(sets.y.dtype).removeprefix("torch.")
        kind = f"mean {sets.kind}" if sets.mean else sets.kind
        described = f"{ring.name}({options}), {kind}, y {dtype} [*, {L}, {D}], {ids}"
        sizes = torch.tensor([len(sets.x), len(sets.y), sets.y_mask is not None, need_y])
        self.x_counts, self.y_counts, masked, needed = self._meet(sizes, described)
        self.x_shards, self.y_shards = _shards(self.x_counts), _shards(self.y_counts)
        self.need_y, self.masked = any(needed), any(masked)
        device = sets.x.device
        x_ids, y_ids = (
            torch.arange(*shards[ring.rank], device=device) if group is None else group.long()
            for shards, group in ((self.x_shards, sets.x_group), (self.y_shards, sets.y_group))
        )
        y_mask = sets.y_mask
        if self.masked and y_mask is None:
            y_mask = torch.ones(sets.y.shape[:2], dtype=torch.bool, device=device)
        self.sets = sets._replace(y_mask=y_mask, x_group=x_ids, y_group=y_ids)

    def _meet(self, sizes: Tensor, described: str) -> list[list[int]]:
        """Columns of everybody's ``sizes``, once all are known to compute the same."""
        ring = self.ring
        text = torch.tensor(list(described.encode()[:_DESCRIPTION].ljust(_DESCRIPTION)), dtype=torch.int64)
        own = torch.cat((sizes, text)).to(ring.device)
        everyone = torch.stack(ring.gather(own, [tuple(own.shape)] * ring.size)).cpu()
        count = len(sizes)
        for rank in range(1, ring.size):
            if not torch.equal(everyone[rank, count:], everyone[0, count:]):
                here, there = (bytes(everyone[r, count:].tolist()).decode().strip() for r in (rank, 0))
                raise ValueError(f"all ranks must compute the same loss: rank {rank} computes {here}, rank 0 {there}")
        columns: list[list[int]] = everyone[:, :count].T.tolist()
        return columns

    def visit(self, state: Sequence[Tensor] = ()) -> Iterator[tuple[int, Sets, list[Tensor]]]:
        """This rank's sets of x with the sets of y of each rank in turn.

        Args:
            state: tensors ``[M', ...]``, one entry a set of this rank's y, that travel with them.

        Yields:
            The rank that owns the sets of y; the sets; the owner's ``state``.
        """
        own = [self.sets.y, *state, self.sets.y_group, *([self.sets.y_mask] if self.masked else [])]
        tensors = [tensor for tensor in own if tensor is not None]
        layout = Layout([(tuple(tensor.shape[1:]), tensor.dtype) for tensor in tensors])
        if self.ring.size == 1:
            yield 0, self.sets, list(state)
            return
        for owner, block in self.ring.blocks(layout.pack(tensors), [layout.length(n) for n in self.y_counts]):
            y, *rest = layout.unpack(block, self.y_counts[owner])
            y_mask = rest.pop() if self.masked else None
            y_group = rest.pop()
            yield owner, self.sets._replace(y=y, y_mask=y_mask, y_group=y_group), rest

    def collect_gradients(
        self,
        gradients: Gradients,
        add: Callable[[int, Sets, Gradients, list[Tensor]], None],
        state: Sequence[Tensor] = (),
    ) -> None:
        """Run ``add(owner, sets, gradients, state)`` next to the y of each rank, whose gradient goes home."""

        def parts() -> Iterator[tuple[int, Tensor]]:
            for owner, sets, theirs in self.visit(state):
                beside = gradients.beside(sets)
                add(owner, sets, beside, theirs)
                yield owner, beside.y

        if self.need_y:
            shapes = [(count, *self.sets.y.shape[1:]) for count in self.y_counts]
            gradients.y = self.ring.bring_home(parts(), shapes, torch.add)
        else:
            for _ in parts():
                pass

    def start(self, owner: int) -> tuple[int, int]:
        """The places in the whole batch of this rank's first set of x and of ``owner``'s first set of y."""
        return self.x_shards[self.ring.rank].start, self.y_shards[owner].start

    def whole(self, own: Tensor) -> Tensor:
        """``[M]`` of all ranks from this rank's ``own [M']``."""
        return torch.cat(self.ring.gather(own, [(count,) for count in self.y_counts]))


def _shards(counts: Sequence[int]) -> list[Shard]:
    stops = list(accumulate(counts))
    return [Shard(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
