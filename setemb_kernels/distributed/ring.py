"""Exchanges between neighbours of a ring of ranks, posted ahead, and all that the losses make of them.

Everything, the few scalars included, goes through `Ring.exchange`. So a rank always waits for one certain other, and
can say for which (see `missing`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from setemb_kernels.distributed import missing

_ALIGNMENT = 16
_UNUSED_TAG = 0x5E7E
_PATIENCE = 0.8
"""The part of the time-out for which an exchange is waited for; the rest is for finding out who is missing."""


class Ring:
    """This rank's place among ``size`` ranks: it sends to the next and receives from the previous one.

    Args:
        name: of what is computed, for error messages.
        group: None: the default group, or where there is none, a ring of one.
        timeout: seconds that an exchange may take, the search for a dead rank included.
        device: of the tensors.
        alone: a ring of one, whatever groups there are.
    """

    def __init__(
        self, name: str, group: ProcessGroup | None, timeout: float, device: torch.device, *, alone: bool = False
    ) -> None:
        self.name, self.timeout, self.device = name, timeout, device
        self.group, self.rank, self.size = group, 0, 1
        if not alone and (group is not None or (dist.is_available() and dist.is_initialized())):
            self.group = dist.group.WORLD if group is None else group
            self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
            if self.rank < 0:
                raise ValueError("group: expected a process group that this rank belongs to")
        self.next, self.previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        self.nccl = self.size > 1 and device.type == "cuda" and "nccl" in dist.get_backend(self.group)

    def exchange(self, tensor: Tensor, expected: Tensor) -> Exchange:
        """Start sending ``tensor`` to the next rank, and receiving into ``expected`` what the previous one sends."""
        return Exchange(self, tensor, expected)

    def gather(self, tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """This small tensor of every rank, whose shapes are known."""
        parts = [tensor] * self.size
        for step in range(1, self.size):
            owner = (self.rank - step) % self.size
            parts[owner] = self.exchange(tensor, tensor.new_empty(shapes[owner])).wait()
            tensor = parts[owner]
        return parts

    def blocks(self, block: Tensor, lengths: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The flat block of each rank in turn, with its owner; the next is under way while one is worked on."""
        for step in range(self.size):
            coming = None
            if step + 1 < self.size:
                length = lengths[(self.rank - step - 1) % self.size]
                coming = self.exchange(block, block.new_empty(length))
            yield (self.rank - step) % self.size, block
            if coming is not None:
                block = coming.wait()

    def owners(self) -> Iterator[int]:
        """The order in which `blocks` come."""
        return ((self.rank - step) % self.size for step in range(self.size))

    def bring_home(
        self,
        parts: Iterator[tuple[int, Tensor]],
        shapes: Sequence[tuple[int, ...]],
        merge: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """What all ranks have for this one, merged.

        ``parts`` are what this rank has for each owner, in the order of `owners`. They travel one step behind
        the blocks: what the ranks before have for an owner arrives while this rank makes its own part.
        """
        coming = None
        for owner, part in parts:
            if coming is not None:
                part = merge(coming.wait(), part)
            coming = self.exchange(part, part.new_empty(shapes[(owner - 1) % self.size]))
        assert coming is not None
        return coming.wait()

    def add_home(self, whole: Tensor, counts: Sequence[int]) -> Tensor:
        """Of the sum over the ranks of ``whole [sum of counts]``, this rank's piece."""
        pieces = whole.split(list(counts))
        shapes = [(count,) for count in counts]
        return self.bring_home(((owner, pieces[owner]) for owner in self.owners()), shapes, torch.add)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over the ranks of a few numbers, the same to the bit on all of them."""
        return torch.stack(self.gather(numbers, [tuple(numbers.shape)] * self.size)).sum(0)

    def error(self, peer: int, cause: Exception, waited: float) -> RuntimeError:
        """That an exchange with a neighbour failed, naming the rank that is to blame."""
        if self.group is None:
            return RuntimeError(f"{self.name}: {cause}")
        late = waited >= 0.95 * _PATIENCE * self.timeout
        store = dist.distributed_c10d._get_process_group_store(self.group)
        rest = (1 - _PATIENCE) * self.timeout
        found = missing.find(store, self.rank, peer, late=late, patience=rest, wake=self._close)
        reason = f"waited {waited:.1f} s" if late else missing.first_line(cause)
        if found.rank is None:
            return RuntimeError(f"{self.name}: no answer from rank {self._global(peer)} ({reason}); {found.why}")
        return RuntimeError(f"{self.name}: rank {self._global(found.rank)} takes no part: {found.why} ({reason})")

    def _close(self) -> None:
        """Close the connections of a group of gloo, so that nobody waits for this rank in vain.

        An exchange that takes too long does that; here one that nobody answers.
        """
        for peer in [] if self.nccl else {self.next, self.previous}:
            with suppress(RuntimeError):
                unanswered = dist.irecv(torch.empty(1), group=self.group, group_src=peer, tag=_UNUSED_TAG)
                assert unanswered is not None
                unanswered.wait(timedelta(milliseconds=1))

    def _global(self, rank: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, rank)


class Exchange:
    """One tensor on its way to the next rank, another on its way from the previous."""

    def __init__(self, ring: Ring, tensor: Tensor, expected: Tensor) -> None:
        self.ring, self.works = ring, list[tuple[int, Any]]()
        if ring.size == 1:
            self.received = tensor
            return
        self.received = expected if ring.nccl else expected.cpu()
        # Kept until it has left: the works do not own it.
        self.sent = tensor.contiguous() if ring.nccl else tensor.contiguous().cpu()
        if ring.nccl:  # in one group: two ranks that only send to each other would wait for ever
            operations = [dist.P2POp(dist.isend, self.sent, group=ring.group, group_peer=ring.next)]
            operations += [dist.P2POp(dist.irecv, self.received, group=ring.group, group_peer=ring.previous)]
            operations = [operation for operation in operations if operation.tensor.numel()]
            self.works = [(ring.previous, work) for work in dist.batch_isend_irecv(operations)] if operations else []
            return
        if self.received.numel():
            self._post(ring.previous, partial(dist.irecv, self.received, group=ring.group, group_src=ring.previous))
        if self.sent.numel():
            self._post(ring.next, partial(dist.isend, self.sent, group=ring.group, group_dst=ring.next))

    def _post(self, peer: int, start: Callable[[], Any]) -> None:
        self.works.append((peer, self._try(peer, start)))

    def wait(self) -> Tensor:
        """What the previous rank sent."""
        patience = timedelta(seconds=_PATIENCE * self.ring.timeout)
        for peer, work in self.works:
            self._try(peer, partial(work.wait, patience))
        return self.received.to(self.ring.device)

    def _try(self, peer: int, action: Callable[[], Any]) -> Any:
        start = time.monotonic()
        try:
            return action()
        except RuntimeError as error:
            raise self.ring.error(peer, error, time.monotonic() - start) from error


class Layout:
    """Several tensors of one block, with one entry a set, as one flat tensor of bytes: one message.

    Args:
        parts: shape of an entry and dtype, for each tensor.
    """

    def __init__(self, parts: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.parts = parts

    def length(self, count: int) -> int:
        """Bytes of a block of ``count`` sets."""
        return sum(_padded(count * _bytes(shape, dtype)) for shape, dtype in self.parts)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors ``[count, *shape]`` to bytes."""
        count = len(tensors[0])
        out = torch.empty(self.length(count), dtype=torch.uint8, device=tensors[0].device)
        for place, tensor in zip(self.unpack(out, count), tensors, strict=True):
            place.copy_(tensor)
        return out

    def unpack(self, block: Tensor, count: int) -> list[Tensor]:
        """Views of the bytes."""
        tensors, start = [], 0
        for shape, dtype in self.parts:
            size = count * _bytes(shape, dtype)
            tensors.append(block[start : start + size].view(dtype).view(count, *shape))
            start += _padded(size)
        return tensors


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
