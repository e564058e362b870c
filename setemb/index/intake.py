"""Items that users pass in, checked and encoded a number at a time."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setemb.files import as_tensor
from setemb.index.segments import Block, encode

Record = tuple[Any, ...]
"""(id, set), (id, set, metadata) or (id, set, metadata, picture); see `setemb.index.SetIndex.add`."""

AT_ONCE = 4096
"""Items encoded, written and copied at a time."""


class Intake:
    """What items must be like, partly by the first of them: features of a vector, shape of the pictures.

    Args:
        features: None: as the first item has.
        picture: shape of the pictures, () for none; None: as the first item has.
        present: ids that are taken.
    """

    def __init__(
        self,
        similarity: str,
        dtype: str,
        features: int | None = None,
        picture: tuple[int, ...] | None = None,
        present: Container[str] = (),
    ) -> None:
        self.similarity, self.dtype, self.features, self.picture = similarity, dtype, features, picture
        self.present, self.taken = present, set[str]()

    def blocks(self, items: Iterable[Record]) -> Iterator[Block]:
        """
        Raises:
            TypeError, ValueError: naming the item, what came and what was expected.
        """
        records = iter(items)
        while some := list(islice(records, AT_ONCE)):
            ids = [self._id(record) for record in some]
            sets = [self._set(record) for record in some]
            padded = torch.nn.utils.rnn.pad_sequence(sets, batch_first=True)
            mask = torch.arange(padded.shape[1]) < torch.tensor([len(one) for one in sets])[:, None]
            meta = [record[2] if len(record) > 2 and record[2] is not None else {} for record in some]
            yield encode(padded, mask, ids, meta, self._pictures(some), self.dtype)

    def _id(self, record: Record) -> str:
        if not isinstance(record, tuple) or not 2 <= len(record) <= 4:
            raise TypeError(f"items: expected tuples (id, set[, metadata[, picture]]), got {_brief(record)}")
        id_ = record[0]
        if not isinstance(id_, str):
            raise TypeError(f"ids must be strings, got {id_!r} of {type(id_).__name__}")
        if id_ in self.taken or id_ in self.present:
            raise ValueError(f"ids must differ, {id_!r} is there already")
        self.taken.add(id_)
        return id_

    def _set(self, record: Record) -> Tensor:
        id_, one = record[:2]
        if not isinstance(one, (Tensor, np.ndarray)):
            raise TypeError(f"the set of {id_!r} must be a tensor or a numpy array, got {type(one).__name__}")
        one = as_tensor(one).detach().cpu()
        features = one.shape[1] if one.ndim == 2 and self.features is None else self.features
        if one.ndim != 2 or 0 in one.shape or one.shape[1] != features or not one.is_floating_point():
            size, least = (self.features, "k") if self.features is not None else ("D", "k, D")
            raise ValueError(
                f"the set of {id_!r} must be floats [k, {size}] with {least} >= 1, "
                f"got {str(one.dtype).removeprefix('torch.')} {list(one.shape)}"
            )
        self.features = features
        if self.similarity == "cosine" and len(one) != 1:
            raise ValueError(f'similarity "cosine" compares sets of one vector, that of {id_!r} has {len(one)}')
        return one.float()

    def _pictures(self, records: Sequence[Record]) -> np.ndarray | None:
        pictures = [record[3] if len(record) > 3 else None for record in records]
        if self.picture is None:
            shape = () if pictures[0] is None else tuple(pictures[0].shape)
            if shape and (len(shape) != 3 or shape[-1] != 3):
                raise ValueError(f"pictures must be uint8 [H, W, 3], got {list(shape)}")
            self.picture = shape
        for record, picture in zip(records, pictures, strict=True):
            found = () if picture is None else tuple(picture.shape)
            if found != self.picture or (picture is not None and picture.dtype != np.uint8):
                came = "none" if picture is None else f"{picture.dtype} {list(found)}"
                expected = f"uint8 {list(self.picture)}" if self.picture else "none"
                raise ValueError(f"the picture of {record[0]!r}: expected {expected} as of the others, got {came}")
        return np.stack(pictures) if self.picture else None  # type: ignore[arg-type]


def _brief(value: object) -> str:
    return f"{len(value)} entries" if isinstance(value, tuple) else type(value).__name__
