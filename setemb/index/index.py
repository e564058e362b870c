"""`SetIndex`: sets of embeddings under ids, with metadata and pictures, that are searched, changed and kept."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from setemb.files import as_tensor
from setemb.index.folder import Revision, read_description, read_segments, write_segments, writing
from setemb.index.intake import AT_ONCE, Intake, Record
from setemb.index.search import best_of, merged
from setemb.index.segments import DTYPES, Segment, encode, in_memory, padded
from setemb.modules import SetOutput
from setemb.similarity import INDEXED, Similarity
from setemb_kernels import __version__

if TYPE_CHECKING:
    from setemb.model import SetEmbedder

TRIES = 20
"""How often a reader begins again because a writer has replaced the files it was about to map."""


@dataclass(frozen=True)
class SearchResult:
    """The best items for each of Q queries, best first."""

    scores: Tensor
    """float32 ``[Q, k]``."""
    rows: Tensor
    """int64 ``[Q, k]``, places in the index; see `SetIndex.item`. They hold until something is deleted."""
    ids: list[list[str]]


@dataclass(frozen=True)
class Item:
    """What an index knows of one of its items."""

    id: str
    meta: dict[str, Any]
    vectors: Tensor
    """float32 ``[k, D]``."""
    picture: np.ndarray | None
    """uint8 ``[H, W, 3]``."""


class SetIndex:
    """Sets of vectors with an id and metadata each, compared by one similarity.

    An index is in memory, or mapped from a folder that `save`, `build` or ``setemb index`` wrote. `add` and `delete`
    change what is in memory; `save` makes that the next revision in the folder. Other processes may read the folder
    meanwhile: what they have loaded stays as it is.

    Args:
        vectors: ``[n, K, D]`` float32, bfloat16, float16 or float64, finite; numpy (also memory-mapped) or torch.
        ids: n different strings.
        meta: n dicts that JSON can hold, or None.
        pictures: uint8 ``[n, H, W, 3]`` to show with the results, or None.
        similarity, alpha: see `setemb.similarity.set_similarity`.
        mask: bool ``[n, K]``, True = valid: sets of different sizes. None: all are.
        dtype: how vectors are stored: float32, bfloat16, float16 or int8 (with a scale for each vector). As they are
            unless given.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """

    def __init__(
        self,
        vectors: np.ndarray | Tensor,
        ids: Sequence[str],
        meta: Sequence[Mapping[str, Any]] | None = None,
        pictures: np.ndarray | None = None,
        similarity: Similarity = "smooth_chamfer",
        alpha: float = 16.0,
        *,
        mask: Tensor | None = None,
        dtype: str | None = None,
    ) -> None:
        sets = as_tensor(vectors).detach().cpu()
        if sets.ndim != 3 or 0 in sets.shape[1:] or not sets.is_floating_point():
            raise ValueError(
                f"vectors must be floats [n, K, D] with K, D >= 1, got {_name(sets.dtype)} {list(sets.shape)}"
            )
        for name, value in (("ids", ids), ("meta", meta), ("pictures", pictures), ("mask", mask)):
            if value is not None and len(value) != len(sets):
                raise ValueError(f"{name} must have {len(sets)} entries (one a set), got {len(value)}")
        if pictures is not None and (pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8):
            raise ValueError(f"pictures must be uint8 [n, H, W, 3], got {pictures.dtype} {list(pictures.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != sets.shape[:2]):
            raise ValueError(f"mask must be bool {list(sets.shape[:2])}, got {_name(mask.dtype)} {list(mask.shape)}")
        same = "float32" if sets.dtype == torch.float64 else _name(sets.dtype)
        self._begin(similarity, alpha, same if dtype is None else dtype, sets.shape[2])
        ids = list(ids)
        if len(set(ids)) != len(ids):
            raise ValueError(f"ids must differ, got {_twice(ids)!r} more than once")
        if similarity == "cosine" and sets.shape[1] != 1:
            raise ValueError(f'similarity "cosine" compares sets of one vector, got {sets.shape[1]}')
        if len(sets) > 0:
            block = encode(sets, mask, ids, [{}] * len(ids) if meta is None else meta, pictures, self.dtype)
            self._segments.append(in_memory([block]))

    def _begin(self, similarity: Similarity, alpha: float, dtype: str, features: int | None) -> None:
        if similarity not in INDEXED:
            raise ValueError(f"similarity must be one of {', '.join(INDEXED)}, got {similarity!r}")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be a finite number > 0, got {alpha!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.similarity, self.alpha, self.dtype, self.features = similarity, float(alpha), dtype, features
        self._segments: list[Segment] = []
        self._rows: dict[str, tuple[int, int]] | None = None
        """Of every id its segment and its row there; made when it is needed."""
        self.folder: Path | None = None
        """Where the index was loaded from or saved."""
        self._read: dict[str, Any] | None = None

    @classmethod
    def empty(
        cls, similarity: Similarity = "smooth_chamfer", alpha: float = 16.0, *, dtype: str = "float32"
    ) -> SetIndex:
        """An index without items; the first one that is added says how many features they have."""
        result = cls.__new__(cls)
        result._begin(similarity, alpha, dtype, None)
        return result

    # What is there

    def __len__(self) -> int:
        return sum(segment.live for segment in self._segments)

    def __contains__(self, id_: object) -> bool:
        return id_ in self._where()

    @property
    def ids(self) -> list[str]:
        """Of all items, by row. Reads all of them."""
        return [segment.lines[row][0] for segment in self._segments for row in segment.live_rows().tolist()]

    def item(self, row: int) -> Item:
        """The item at a place in the index, ``0 <= row < len(index)``."""
        segment, at = self._place(row)
        id_, meta = segment.lines[at]
        vectors, mask = segment.decoded(slice(at, at + 1))
        # copies: what is stored may be a map that must not be written
        picture = None if segment.pictures is None else np.array(segment.pictures[at])
        return Item(id_, meta, vectors[0].clone() if mask is None else vectors[0, mask[0]], picture)

    def get(self, id_: str) -> Item:
        """The item of this id.

        Raises:
            ValueError: there is none.
        """
        number, at = self._known(id_)
        return self.item(sum(s.live for s in self._segments[:number]) + self._segment_place(number, at))

    @property
    def model_folder(self) -> Path | None:
        """The folder of the model that is kept with the index (`SetEmbedder.from_pretrained`), if there is one."""
        name = None if self._read is None else self._read["model"]
        return None if name is None or self.folder is None else self.folder / name

    def _segment_place(self, number: int, at: int) -> int:
        return int(self._segments[number].places_of(np.array([at]))[0])

    def _place(self, row: int) -> tuple[Segment, int]:
        left = row
        for segment in self._segments:
            if 0 <= left < segment.live:
                return segment, int(segment.rows_of(np.array([left]))[0])
            left -= segment.live
        raise IndexError(f"row: expected 0 <= row < {len(self)}, got {row}")

    def _where(self) -> dict[str, tuple[int, int]]:
        if self._rows is None:
            self._rows = {
                segment.lines[row][0]: (number, row)
                for number, segment in enumerate(self._segments)
                for row in segment.live_rows().tolist()
            }
        return self._rows

    def _known(self, id_: str) -> tuple[int, int]:
        try:
            return self._where()[id_]
        except KeyError:
            raise ValueError(f"no item has the id {id_!r}") from None

    # Search

    @torch.inference_mode()
    def search(
        self,
        queries: Tensor | np.ndarray | SetOutput,
        k: int = 10,
        block: int | None = None,
        query_mask: Tensor | np.ndarray | None = None,
    ) -> SearchResult:
        """The k best items for each query set; of items with one score, the one with the lowest row comes first.

        Args:
            queries: ``[Q, L, D]`` (L may differ from K), torch or numpy, or what `SetEmbedder.encode_text` returns.
            k: results a query; at most the size of the index are returned.
            block: items compared at a time; memory grows with it, results do not depend on it.
            query_mask: bool ``[Q, L]``, True = valid.

        Raises:
            TypeError: queries are no tensor and no array.
            ValueError: wrong shape of queries, a query that is not finite, k or block below 1.
        """
        queries, query_mask = self._queries(queries, query_mask)
        for name, value in (("k", k), ("block", block)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._merge_in_memory()

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            before = 0
            for segment in self._segments:
                if segment.live > 0 and len(queries) > 0:
                    found = best_of(queries, query_mask, segment, k, self.similarity, self.alpha, block)
                    places = segment.places_of(found[1].numpy())
                    yield found[0], torch.from_numpy(places) + before
                before += segment.live

        scores, rows = merged(parts(), min(k, len(self)), len(queries))
        return SearchResult(scores, rows, [[self._id(row) for row in of_query] for of_query in rows.tolist()])

    def _queries(
        self, given: Tensor | np.ndarray | SetOutput, mask: Tensor | np.ndarray | None
    ) -> tuple[Tensor, Tensor | None]:
        given = given.embeddings if isinstance(given, SetOutput) else given
        for name, value in (("queries", given), ("query_mask", mask)):
            if not isinstance(value, (Tensor, np.ndarray)) and (name == "queries" or value is not None):
                raise TypeError(f"{name} must be a tensor or a numpy array, got {type(value).__name__}")
        queries, mask = as_tensor(given).detach().cpu().float(), None if mask is None else as_tensor(mask).cpu()
        if queries.ndim != 3 or (self.features is not None and queries.shape[2] != self.features):
            features = "D" if self.features is None else self.features
            raise ValueError(f"queries must have shape [Q, L, {features}], got {list(queries.shape)}")
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != queries.shape[:2]:
                raise ValueError(
                    f"query_mask must be bool {list(queries.shape[:2])}, got {_name(mask.dtype)} {list(mask.shape)}"
                )
            queries = queries.masked_fill(~mask[..., None], 0)
        finite = queries.isfinite().all(2).all(1)
        if not finite.all():
            raise ValueError(f"queries must be finite, query {int((~finite).nonzero()[0])} is not")
        if self.similarity == "cosine" and queries.shape[1] != 1:
            raise ValueError(f'similarity "cosine" compares sets of one vector, got queries of {queries.shape[1]}')
        return queries, mask

    def _id(self, row: int) -> str:
        segment, at = self._place(row)
        return segment.lines[at][0]

    # Changes

    def add(self, items: Iterable[Record]) -> None:
        """Adds items, in memory; all of them or, if one is refused, none.

        Args:
            items: ``(id, set)``, ``(id, set, metadata)`` or ``(id, set, metadata, picture)`` each: a string not yet in
                the index; ``[k, D]`` floats, torch or numpy, k >= 1 and not the same for all; a dict that JSON can
                hold; uint8 ``[H, W, 3]``, of one shape for all items, or none for all.

        Raises:
            TypeError, ValueError: naming the item, what came and what was expected.
        """
        known = self._where()
        intake = Intake(self.similarity, self.dtype, self.features, self._picture_shape(), known)
        blocks = list(intake.blocks(items))
        if not blocks:
            return
        segment, number = in_memory(blocks), len(self._segments)
        self.features = intake.features
        self._segments.append(segment)
        for row in range(len(segment.vectors)):
            known[segment.lines[row][0]] = (number, row)

    def delete(self, ids: Iterable[str]) -> None:
        """Leaves out items; what they took is given back by `compact`. All of them or, if an id is unknown, none.

        Raises:
            ValueError: an id is unknown.
        """
        gone: dict[int, set[int]] = {}
        ids = list(dict.fromkeys([ids] if isinstance(ids, str) else ids))
        for id_ in ids:
            number, row = self._known(id_)
            gone.setdefault(number, set()).add(row)
        for number, rows in gone.items():
            segment = self._segments[number]
            segment.deleted = np.union1d(segment.deleted, np.array(sorted(rows), np.int64))
        for id_ in ids:
            del self._where()[id_]

    def _merge_in_memory(self) -> None:
        """What was added piece by piece becomes one segment."""
        new = [segment for segment in self._segments if segment.name is None]
        if len(new) > 1:
            blocks = [block for segment in new for block in segment.blocks(max(1, len(segment.vectors)))]
            stored = [segment for segment in self._segments if segment.name is not None]
            self._segments, self._rows = [*stored, *([in_memory(blocks)] if blocks else [])], None

    def _picture_shape(self) -> tuple[int, ...] | None:
        for segment in self._segments:
            return () if segment.pictures is None else segment.pictures.shape[1:]
        return None

    def compact(self) -> None:
        """Gives back what deleted items took and makes one segment of several; of an index in a folder, as `save`."""
        if self.folder is None:
            blocks = [block for segment in self._segments for block in segment.blocks(AT_ONCE)]
            self._segments, self._rows = [in_memory(blocks)] if blocks else [], None
        else:
            self._write(self.folder, None, compact=True)

    # Folders

    def save(self, folder: str | Path | None = None, model: SetEmbedder | None = None) -> None:
        """Writes the folder: where the index came from, its next revision; anywhere else, all of it, compact.

        A reader of the folder sees the old revision or the new one, also after a crash. Of an index that was loaded
        from the folder only what changed is written.

        Args:
            folder: that of the index unless given. An index that is there is replaced.
            model: stored with the index, to embed queries with. The one that is there stays unless given.

        Raises:
            ValueError: no folder was ever given, or another process has saved the index since it was loaded.
            FileExistsError: the folder exists and is no index (it would be lost).
            TimeoutError: another process keeps writing.
        """
        target = self.folder if folder is None else Path(folder).resolve()
        if target is None:
            raise ValueError("folder must be given: the index is in memory alone")
        self._write(target, model, compact=target != self.folder)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        items: Iterable[Record],
        *,
        similarity: Similarity = "smooth_chamfer",
        alpha: float = 16.0,
        dtype: str = "float32",
        model: SetEmbedder | None = None,
    ) -> SetIndex:
        """Writes items into a folder as they come, and returns the index; in memory are their ids and a few of them.

        Args:
            folder: an index that is there is replaced, once all items are written.
            items: see `add`.
            similarity, alpha, dtype, model: see `SetIndex` and `save`.

        Raises:
            TypeError, ValueError, FileExistsError, TimeoutError: as `add` and `save`.
        """
        result = cls.empty(similarity, alpha, dtype=dtype)
        intake = Intake(similarity, dtype)
        with writing(Path(folder).resolve()) as revision:
            segments = write_segments(revision, intake.blocks(items), dtype)
            result.features = intake.features
            result._commit(revision, [], segments, result._keep_model(revision, model))
        return result

    @classmethod
    def load(cls, folder: str | Path, verify: bool = False) -> SetIndex:
        """Maps the index in a folder. Names, sizes and headers are always checked; contents (the SHA-256 of each
        file) only if ``verify``.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file was cut short or altered, or has another format or version; naming the file, what was
                found and what was expected.
        """
        description, folder = read_description(Path(folder)), Path(folder).resolve()
        for _ in range(TRIES):
            try:
                segments = read_segments(folder, description, verify)
                break
            except FileNotFoundError:  # a writer has replaced it meanwhile, or it is incomplete
                again = read_description(folder)
                if again["token"] == description["token"]:
                    raise
                description = again
        else:
            raise FileNotFoundError(f"{folder} was replaced {TRIES} times while it was read")
        result = cls.empty(description["similarity"], description["alpha"], dtype=description["dtype"])
        result.folder, result._read, result._segments = folder, description, segments
        result.features = description["features"]
        return result

    def _write(self, target: Path, model: SetEmbedder | None, compact: bool) -> None:
        self._merge_in_memory()
        with writing(target) as revision:
            if target == self.folder and self._read is not None:
                now = None if revision.present is None else revision.present["token"]
                if now != self._read["token"]:
                    raise ValueError(
                        f"{target} was changed by another process since revision {self._read['revision']} was loaded: "
                        "load it again"
                    )
            stored: list[tuple[Segment, dict[str, Any]]] = []
            if compact:
                size = max((segment.vectors.shape[1] for segment in self._segments), default=0)
                blocks = (padded(block, size) for segment in self._segments for block in segment.blocks(AT_ONCE))
            else:
                stored = [(s, self._kept(revision, s)) for s in self._segments if s.name and s.live]
                new = [segment for segment in self._segments if segment.name is None]
                blocks = (block for segment in new for block in segment.blocks(AT_ONCE))
            name = self._keep_model(revision, model)
            self._commit(revision, stored, write_segments(revision, blocks, self.dtype), name)

    def _kept(self, revision: Revision, segment: Segment) -> dict[str, Any]:
        """The entry of a segment that is in the folder, with what is deleted of it now."""
        assert self._read is not None and segment.name is not None
        entry: dict[str, Any] = next(e for e in self._read["segments"] if e["folder"] == segment.name)
        present = entry["deleted"] and self._read["files"][entry["deleted"]]
        if len(segment.deleted) == (present or {}).get("rows", 0):
            revision.keep_listed([segment.name, *([entry["deleted"]] if present else [])])
            return entry
        revision.keep_listed([segment.name])
        return entry | {"deleted": revision.keep_deleted(segment.deleted)}

    def _keep_model(self, revision: Revision, model: SetEmbedder | None) -> str | None:
        if model is not None:
            path = revision.beside()
            model.save_pretrained(path)
        elif self.model_folder is None or self.folder == revision.folder:
            return None if self._read is None else self._read["model"]
        else:
            path = Path(shutil.copytree(self.model_folder, revision.beside()))
        return revision.keep(path, "model", listed=False)

    def _commit(
        self,
        revision: Revision,
        stored: list[tuple[Segment, dict[str, Any]]],
        new: list[dict[str, Any]],
        model: str | None,
    ) -> None:
        """Makes it the present revision, and this object one of what is in the folder now.

        Segments that stay are not mapped again. The new ones are mapped first: once the revision has changed, nothing
        is left that may fail.
        """
        description = {
            "setemb": __version__,
            "similarity": self.similarity,
            "alpha": self.alpha,
            "dtype": self.dtype,
            "features": self.features,
            "model": model,
        }
        added = read_segments(revision.folder, description | {"files": revision.files, "segments": new}, contents=False)
        read = revision.commit(description | {"segments": [*(entry for _, entry in stored), *new]})
        self.folder, self._read, self._rows = revision.folder, read, None
        self._segments = [*(segment for segment, _ in stored), *added]


def _twice(ids: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(id_ for id_ in ids if id_ in seen or seen.add(id_))  # type: ignore[func-returns-value]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
