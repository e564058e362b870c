"""Sets as an index stores them: encoded, in memory or mapped from files that are never changed once they are there."""

from __future__ import annotations

import json
import math
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from setemb.files import as_tensor

DTYPES = {
    "float32": (torch.float32, "<f4"),
    "bfloat16": (torch.bfloat16, "<u2"),
    "float16": (torch.float16, "<f2"),
    "int8": (torch.int8, "|i1"),
}
"""Of stored vectors: torch's, and that of the .npy file, which has no bfloat16."""


@dataclass
class Block:
    """Sets in memory. A masked vector is there, as zeros, and does not count."""

    vectors: Tensor
    """``[n, K, D]``."""
    scale: Tensor | None
    """float32 ``[n, K]`` beside int8: a vector is this number times its entries."""
    mask: Tensor | None
    """bool ``[n, K]``, True = valid; None: all are."""
    lines: list[bytes]
    """Of each set ``{"id": ..., "meta": {...}}`` and a newline."""
    pictures: np.ndarray | None
    """uint8 ``[n, H, W, 3]``."""

    def __len__(self) -> int:
        return len(self.vectors)


def encode(
    sets: Tensor,
    mask: Tensor | None,
    ids: Sequence[str],
    meta: Sequence[Mapping[str, Any]],
    pictures: np.ndarray | None,
    dtype: str,
) -> Block:
    """Stores ``[n, K, D]`` in this dtype.

    Raises:
        TypeError, ValueError: an id, metadata or a set that cannot be stored; naming the item.
    """
    lines = [line_of(id_, of) for id_, of in zip(ids, meta, strict=True)]
    if mask is not None:
        if not mask.any(1).all():
            raise ValueError(f"sets must hold a vector, that of {ids[int((~mask.any(1)).nonzero()[0])]!r} has none")
        sets = sets.masked_fill(~mask[..., None], 0)  # whatever stood there
        mask = None if mask.all() else mask
    scale, kind = None, DTYPES[dtype][0]
    if dtype == "int8":
        sets = sets.float()
        scale = sets.abs().amax(2) / 127
        stored = (sets / torch.where(scale > 0, scale, 1.0)[..., None]).round()
        finite = scale.isfinite().all(1)
        stored = stored.nan_to_num(0).to(kind)
    else:
        stored = sets.to(kind)
        finite = stored.isfinite().flatten(1).all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        why = f"do not fit {dtype}" if sets[row].isfinite().all() else "are not"
        raise ValueError(f"vectors must be finite, those of row {row} (id {ids[row]!r}) {why}")
    return Block(stored.contiguous(), scale, mask, lines, pictures)


def line_of(id_: str, meta: Mapping[str, Any]) -> bytes:
    if not isinstance(id_, str):
        raise TypeError(f"ids must be strings, got {id_!r} of {type(id_).__name__}")
    if not isinstance(meta, Mapping):
        raise TypeError(f"meta of {id_!r} must be a dict, got {type(meta).__name__}")
    try:
        text = json.dumps({"id": id_, "meta": dict(meta)}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta of {id_!r} must be what JSON holds: {error}") from error
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError as error:
        raise ValueError(f"id and meta of {id_!r} must be Unicode: {error}") from error


class Lines:
    """The lines of ``items.jsonl``, read where they are asked for."""

    def __init__(self, data: Any, offsets: Any, name: str) -> None:
        self._data, self._offsets, self._name = data, offsets, name

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def raw(self, row: int) -> bytes:
        return bytes(self._data[int(self._offsets[row]) : int(self._offsets[row + 1])])

    def __getitem__(self, row: int) -> tuple[str, dict[str, Any]]:
        try:
            item = json.loads(self.raw(row))
            return item["id"], item["meta"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._name} was altered: line {row + 1} is no item ({error!r})") from error


@dataclass
class Segment:
    """Sets one after the other, some of them deleted."""

    vectors: Tensor
    scale: Tensor | None
    mask: Tensor | None
    lines: Lines
    pictures: np.ndarray | None
    deleted: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64, sorted: rows that are no longer there."""
    name: str | None = None
    """Its folder in that of the index; None: in memory."""

    @property
    def live(self) -> int:
        return len(self.vectors) - len(self.deleted)

    def rows_of(self, live: np.ndarray) -> np.ndarray:
        """Rows of what stands at these places among what is not deleted."""
        before = self.deleted - np.arange(len(self.deleted))  # live rows before each deleted one
        return live + np.searchsorted(before, live, side="right")

    def places_of(self, rows: np.ndarray) -> np.ndarray:
        """Places of these rows, which are not deleted, among those that are not."""
        return rows - np.searchsorted(self.deleted, rows)

    def live_rows(self) -> np.ndarray:
        return np.delete(np.arange(len(self.vectors)), self.deleted)

    def decoded(self, rows: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """float32 ``[n, K, D]`` and their mask."""
        vectors = self.vectors[rows].float()
        if self.scale is not None:
            vectors = vectors * self.scale[rows, :, None]
        return vectors, None if self.mask is None else self.mask[rows]

    def blocks(self, count: int) -> Iterator[Block]:
        """What is not deleted, so many at a time, as it is stored."""
        rows = self.live_rows()
        for start in range(0, len(rows), count):
            some = rows[start : start + count]
            at = torch.from_numpy(some)
            yield Block(
                self.vectors[at],
                None if self.scale is None else self.scale[at],
                None if self.mask is None else self.mask[at],
                [self.lines.raw(row) for row in some.tolist()],
                None if self.pictures is None else np.asarray(self.pictures[some]),
            )


def padded(block: Block, size: int) -> Block:
    """The same sets with room for ``size`` vectors."""
    n, more = len(block), size - block.vectors.shape[1]
    if more == 0:
        return block
    mask = torch.ones(n, size - more, dtype=torch.bool) if block.mask is None else block.mask
    return Block(
        functional.pad(block.vectors, (0, 0, 0, more)),
        None if block.scale is None else functional.pad(block.scale, (0, more)),
        functional.pad(mask, (0, more)),
        block.lines,
        block.pictures,
    )


def in_memory(blocks: Sequence[Block]) -> Segment:
    """One segment of blocks of any sizes."""
    size = max(block.vectors.shape[1] for block in blocks)
    blocks = [padded(block, size) for block in blocks]
    lines = [line for block in blocks for line in block.lines]
    masks = [b.mask if b.mask is not None else torch.ones(len(b), size, dtype=torch.bool) for b in blocks]
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in lines], dtype=np.int64)])
    pictures = [block.pictures for block in blocks if block.pictures is not None]
    return Segment(
        torch.cat([block.vectors for block in blocks]),
        None if blocks[0].scale is None else torch.cat([block.scale for block in blocks if block.scale is not None]),
        None if all(block.mask is None for block in blocks) else torch.cat(masks),
        Lines(b"".join(lines), offsets, "items"),
        np.concatenate(pictures) if pictures else None,
    )


class _Array:
    """A .npy file that grows; how many rows it has is known in the end."""

    def __init__(self, path: Path, descr: str, row: tuple[int, ...]) -> None:
        self.path, self.descr, self.row, self.count = path, descr, row, 0
        self.file = path.open("wb")
        self._head()
        self._start = self.file.tell()

    def _head(self) -> None:
        # numpy pads the header so that another number of rows has room
        shape = (self.count, *self.row)
        header = {"descr": self.descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows).data)
        self.count += len(rows)

    def close(self) -> None:
        self.file.seek(0)
        self._head()
        assert self.file.tell() == self._start, "the header of a .npy file must keep its length"
        self.file.close()


class SegmentWriter:
    """Writes blocks of sets of up to K vectors into a folder; holds none of them."""

    def __init__(self, folder: Path, size: int, features: int, dtype: str, picture: tuple[int, ...] | None) -> None:
        self.folder, self.size, self.count, self.dtype = folder, size, 0, dtype
        self._masked = False
        folder.mkdir()
        self._vectors = _Array(folder / "vectors.npy", DTYPES[dtype][1], (size, features))
        self._mask = _Array(folder / "mask.npy", "|b1", (size,))
        self._scale = _Array(folder / "scale.npy", "<f4", (size,)) if dtype == "int8" else None
        self._pictures = None if picture is None else _Array(folder / "pictures.npy", "|u1", picture)
        self._offsets = _Array(folder / "offsets.npy", "<i8", ())
        self._offsets.append(np.zeros(1, np.int64))
        self._items, self._bytes = (folder / "items.jsonl").open("wb"), 0

    def append(self, block: Block) -> None:
        block = padded(block, self.size)
        self._masked |= block.mask is not None
        self._vectors.append(block.vectors.contiguous().view(torch.uint8).numpy())
        mask = torch.ones(len(block), self.size, dtype=torch.bool) if block.mask is None else block.mask
        self._mask.append(mask.numpy())
        if self._scale is not None:
            assert block.scale is not None
            self._scale.append(block.scale.numpy())
        if self._pictures is not None:
            assert block.pictures is not None
            self._pictures.append(block.pictures)
        ends = self._bytes + np.cumsum([len(line) for line in block.lines], dtype=np.int64)
        self._offsets.append(ends)
        self._items.writelines(block.lines)
        self._bytes = int(ends[-1])
        self.count += len(block)

    def close(self) -> None:
        for array in (self._vectors, self._mask, self._scale, self._pictures, self._offsets):
            if array is not None:
                array.close()
        self._items.close()
        if not self._masked:
            self._mask.path.unlink()


def read_segment(
    folder: Path, count: int, size: int, features: int, dtype: str, *, mask: bool, pictures: bool
) -> Segment:
    """Maps the files of one segment.

    Args:
        mask, pictures: whether it has these files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file holds something else than the description of the index says; naming the file.
    """
    kind, descr = DTYPES[dtype]

    def array(name: str, expected: str, *shape: int) -> np.ndarray:
        path = folder / name
        try:
            found = _array(path)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} was altered: {error}") from error
        if found.dtype.str != expected or found.shape[: len(shape)] != shape:
            raise ValueError(
                f"{path} was altered: it holds {found.dtype.str} {list(found.shape)}, expected {expected} {list(shape)}"
            )
        return found

    vectors = as_tensor(array("vectors.npy", descr, count, size, features))
    items = folder / "items.jsonl"
    return Segment(
        vectors.view(kind) if dtype == "bfloat16" else vectors,
        as_tensor(array("scale.npy", "<f4", count, size)) if dtype == "int8" else None,
        as_tensor(array("mask.npy", "|b1", count, size)) if mask else None,
        Lines(_mapped(items), array("offsets.npy", "<i8", count + 1), str(items)),
        array("pictures.npy", "|u1", count) if pictures else None,
        name=folder.name,
    )


def _mapped(path: Path) -> mmap.mmap:
    """Shared and read-only, so that what is larger than memory can be mapped too."""
    with path.open("rb") as file:
        if sys.version_info >= (3, 13):  # before, a map keeps a file descriptor
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, trackfd=False)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _array(path: Path) -> np.ndarray:
    """A .npy file of numbers, as `_Array` writes it.

    Raises:
        ValueError: it is none.
    """
    data = _mapped(path)
    if (version := np.lib.format.read_magic(data)) != (1, 0):
        raise ValueError(f"it is of .npy version {version}, expected (1, 0)")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(data)
    if fortran or dtype.hasobject:
        raise ValueError(f"it does not hold numbers in row order: {dtype.str}, fortran_order {fortran}")
    return np.frombuffer(data, dtype, math.prod(shape), data.tell()).reshape(shape)
