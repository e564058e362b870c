"""`LanceIndex`: an index in a LanceDB table, for collections that outgrow memory or one machine's disk.

LanceDB finds candidates by its own multivector search (each query vector's closest vector of an item, summed), which a
trained index makes fast and approximate; the exact similarity ranks them. `LanceIndex.recall` says what that loses. The
same code works on a folder and on object storage (``s3://...``, ``gs://...``, ``az://...``).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setemb.index.index import Item, SearchResult, SetIndex
from setemb.index.intake import Intake, Record
from setemb.index.search import best_of, merged
from setemb.index.segments import Block, Lines, Segment
from setemb.modules import SetOutput
from setemb.packages import require
from setemb.similarity import Similarity

FORMAT = "setemb-lance-1"
DTYPES = ("float32", "float16")
"""That LanceDB searches."""
_AT_ONCE = 1000
"""Ids in one condition, rows in one batch of an exact search."""


class LanceIndex:
    """Sets with ids, metadata and pictures in a table of LanceDB; methods as those of `SetIndex`.

    Every change is a version of the table, and seen at once: there is no ``save``. Make one with `build` or `open`.
    """

    def __init__(self, table: Any, similarity: Similarity, alpha: float, dtype: str) -> None:
        self.table, self.similarity, self.alpha, self.dtype = table, similarity, alpha, dtype
        self.features = int(table.schema.field("vectors").type.value_type.list_size)

    @classmethod
    def build(
        cls,
        uri: str | Path,
        items: Iterable[Record],
        *,
        similarity: Similarity = "smooth_chamfer",
        alpha: float = 16.0,
        dtype: str = "float32",
        table: str = "sets",
        storage_options: dict[str, str] | None = None,
    ) -> LanceIndex:
        """Writes items as they come; a table of this name is replaced once all of them are there.

        Args:
            uri: a folder, or an address of object storage.
            items: see `SetIndex.add`; at least one.
            similarity, alpha: see `SetIndex`.
            dtype: how vectors are stored, float32 or float16.
            table: its name.
            storage_options: of `lancedb.connect`.

        Raises:
            ImportError: the package lancedb is missing.
            TypeError, ValueError: naming the item or the argument.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        SetIndex.empty(similarity, alpha)  # refuses what cannot be
        intake = Intake(similarity, dtype)
        blocks = intake.blocks(items)
        first = next(blocks, None)
        if first is None or intake.features is None:
            raise ValueError("items: expected at least one, got none")
        schema = _schema(intake.features, dtype, bool(intake.picture), similarity, alpha)

        refused: list[Exception] = []

        def batches() -> Iterator[Any]:
            try:
                yield _batch(first, schema)
                for block in blocks:
                    yield _batch(block, schema)
            except Exception as error:
                refused.append(error)
                raise

        pa, database = require("pyarrow", "lance"), _connect(uri, storage_options)
        reader = pa.RecordBatchReader.from_batches(schema, batches())
        try:
            written = database.create_table(table, reader, mode="overwrite")
        except Exception:
            if refused:  # as it was, not as LanceDB tells it
                raise refused[0] from None
            raise
        return cls(written, similarity, float(alpha), dtype)

    @classmethod
    def open(cls, uri: str | Path, *, table: str = "sets", storage_options: dict[str, str] | None = None) -> LanceIndex:
        """The table that `build` made.

        Raises:
            ImportError: the package lancedb is missing.
            ValueError: there is no such table, or it is none of ours.
        """
        try:
            opened = _connect(uri, storage_options).open_table(table)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise ValueError(f"no table {table!r} in {uri}: {str(error).splitlines()[0]}") from error
        about = json.loads((opened.schema.metadata or {}).get(b"setemb", b"{}"))
        if about.get("format") != FORMAT:
            raise ValueError(f"table {table!r} in {uri} has format {about.get('format')!r}, expected {FORMAT!r}")
        return cls(opened, about["similarity"], about["alpha"], about["dtype"])

    def __len__(self) -> int:
        return int(self.table.count_rows())

    def __contains__(self, id_: object) -> bool:
        return isinstance(id_, str) and self.table.count_rows(_condition([id_])) > 0

    def get(self, id_: str) -> Item:
        """The item of this id.

        Raises:
            ValueError: there is none.
        """
        found = self.table.search().where(_condition([id_])).limit(1).to_arrow()
        if len(found) == 0:
            raise ValueError(f"no item has the id {id_!r}")
        vectors, mask = _sets(found, self.features)
        picture = None
        if "picture" in found.schema.names:
            image = require("PIL.Image", "demo").open(io.BytesIO(found["picture"][0].as_py()))
            picture = np.asarray(image.convert("RGB"))
        return Item(id_, json.loads(found["meta"][0].as_py()), vectors[0, mask[0]], picture)

    def add(self, items: Iterable[Record]) -> None:
        """See `SetIndex.add`; one new version of the table."""
        names = self.table.schema.names
        picture = None if "picture" in names else ()
        intake = Intake(self.similarity, self.dtype, self.features, picture)
        schema = self.table.schema
        blocks = list(intake.blocks(items))
        if not blocks:
            return
        if "picture" in names and not intake.picture:
            raise ValueError("items: expected a picture for each, as of the others, got none")
        present = sorted(self._present(intake.taken))
        if present:
            raise ValueError(f"ids must differ, {present[0]!r} is there already")
        pa = require("pyarrow", "lance")
        self.table.add(pa.Table.from_batches([_batch(block, schema) for block in blocks]))

    def delete(self, ids: Iterable[str]) -> None:
        """See `SetIndex.delete`."""
        ids = list(dict.fromkeys([ids] if isinstance(ids, str) else ids))
        present = self._present(ids)
        unknown = [id_ for id_ in ids if id_ not in present]
        if unknown:
            raise ValueError(f"no item has the id {unknown[0]!r}")
        for start in range(0, len(ids), _AT_ONCE):
            self.table.delete(_condition(ids[start : start + _AT_ONCE]))

    def compact(self) -> None:
        """Merges small files, brings the trained index up to date, and drops versions older than a week."""
        self.table.optimize()

    def train(self, **settings: Any) -> None:
        """Trains an IVF-PQ index over all vectors (cosine), which later searches use; see `lancedb.index.IvfPq`."""
        ivf = require("lancedb.index", "lance").IvfPq
        self.table.create_index("vectors", config=ivf(distance_type="cosine", **settings))

    @torch.inference_mode()
    def search(
        self,
        queries: Tensor | np.ndarray | SetOutput,
        k: int = 10,
        *,
        candidates: int | None = None,
        nprobes: int | None = None,
        exact: bool = False,
    ) -> SearchResult:
        """The k best of the candidates of each query, by the exact similarity; equals by row.

        Args:
            queries: see `SetIndex.search`.
            k: results a query.
            candidates: how many LanceDB finds; 10 k, and at least 100, unless given.
            nprobes: partitions of a trained index it looks into; as many as it thinks fit unless given.
            exact: compare with every item instead, a batch at a time.

        Returns:
            ``rows`` are LanceDB's row ids. A query of which it finds fewer candidates than k has as many ids, and the
            score -inf and row -1 in the other places.

        Raises:
            ValueError: as `SetIndex.search`.
        """
        sets = self._queries(queries)
        candidates = max(10 * k, 100) if candidates is None else candidates
        if k < 1 or candidates < k:
            raise ValueError(f"k and candidates: expected 1 <= k <= candidates, got {k} and {candidates}")
        if exact:
            scores, rows, names = self._of_all(sets, k)
            return SearchResult(scores, rows, names)
        parts = [self._of_candidates(one[None], k, candidates, nprobes) for one in sets]
        scores = torch.full((len(parts), max((len(part[2]) for part in parts), default=0)), -torch.inf)
        rows = torch.full(scores.shape, -1)
        for at, (values, found, _) in enumerate(parts):
            scores[at, : len(values)], rows[at, : len(found)] = values, found
        return SearchResult(scores, rows, [names for _, _, names in parts])

    def recall(self, queries: Tensor | np.ndarray | SetOutput, k: int = 10, **settings: Any) -> float:
        """Of the k items that exact search finds, the share that `search` with these settings finds."""
        truth, found = self.search(queries, k, exact=True), self.search(queries, k, **settings)
        wanted = sum(len(ids) for ids in truth.ids)
        return sum(len(set(a) & set(b)) for a, b in zip(truth.ids, found.ids, strict=True)) / max(1, wanted)

    def _queries(self, queries: Tensor | np.ndarray | SetOutput) -> Tensor:
        like = SetIndex.empty(self.similarity, self.alpha)
        like.features = self.features
        return like._queries(queries, None)[0]

    def _of_candidates(
        self, query: Tensor, k: int, candidates: int, nprobes: int | None
    ) -> tuple[Tensor, Tensor, list[str]]:
        asked = self.table.search(query[0].numpy(), vector_column_name="vectors").distance_type("cosine")
        asked = asked.limit(candidates).select(["id", "vectors", "_distance"]).with_row_id(True)
        if nprobes is not None:
            asked = asked.nprobes(nprobes)
        found = asked.to_arrow().sort_by("_rowid")
        if len(found) == 0:
            return torch.empty(0), torch.empty(0).long(), []
        values, at = self._best(query, found, k)
        rows = torch.from_numpy(found["_rowid"].to_numpy().astype(np.int64))
        names = found["id"].to_pylist()
        return values[0], rows[at[0]], [names[i] for i in at[0].tolist()]

    def _of_all(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor, list[list[str]]]:
        names: dict[int, str] = {}  # of the best so far
        scores, rows = merged(iter([]), k, len(queries))
        everything = self.table.search().select(["id", "vectors"]).with_row_id(True)
        for batch in everything.to_batches(batch_size=_AT_ONCE):
            if batch.num_rows and len(queries):
                values, at = self._best(queries, batch, k)
                numbers = torch.from_numpy(batch["_rowid"].to_numpy().astype(np.int64))
                scores, rows = merged(iter([(scores, rows), (values, numbers[at])]), k, len(queries))
                place = {row: i for i, row in enumerate(numbers.tolist())}
                best = set(rows.flatten().tolist())
                names = {row: names[row] if row in names else batch["id"][place[row]].as_py() for row in best}
        return scores, rows, [[names[row] for row in of_query] for of_query in rows.tolist()]

    def _best(self, queries: Tensor, found: Any, k: int) -> tuple[Tensor, Tensor]:
        vectors, mask = _sets(found, self.features)
        segment = Segment(vectors, None, None if mask.all() else mask, Lines(b"", [0], ""), None)
        return best_of(queries, None, segment, min(k, len(vectors)), self.similarity, self.alpha, None)

    def _present(self, ids: Iterable[str]) -> set[str]:
        ids, found = list(ids), set[str]()
        for start in range(0, len(ids), _AT_ONCE):
            some = ids[start : start + _AT_ONCE]
            rows = self.table.search().where(_condition(some)).select(["id"]).limit(len(some)).to_arrow()
            found.update(rows["id"].to_pylist())
        return found


def _connect(uri: str | Path, storage_options: dict[str, str] | None) -> Any:
    return require("lancedb", "lance").connect(str(uri), storage_options=storage_options)


def _schema(features: int, dtype: str, pictures: bool, similarity: str, alpha: float) -> Any:
    pa = require("pyarrow", "lance")
    number = pa.float16() if dtype == "float16" else pa.float32()
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("meta", pa.string(), nullable=False),
        pa.field("vectors", pa.list_(pa.list_(number, features))),
        *([pa.field("picture", pa.binary())] if pictures else []),
    ]
    about = {"format": FORMAT, "similarity": similarity, "alpha": float(alpha), "dtype": dtype}
    return pa.schema(fields, metadata={"setemb": json.dumps(about)})


def _batch(block: Block, schema: Any) -> Any:
    """A block as rows of the table: ragged, without what is masked."""
    from setemb.pages import webp

    pa = require("pyarrow", "lance")
    items = [json.loads(line) for line in block.lines]
    n, size, features = block.vectors.shape
    mask = torch.ones(n, size, dtype=torch.bool) if block.mask is None else block.mask
    flat = pa.array(block.vectors[mask].numpy().ravel())
    offsets = pa.array(np.concatenate([[0], mask.sum(1).numpy().cumsum()]).astype(np.int32))
    columns = [
        pa.array([item["id"] for item in items], pa.string()),
        pa.array([json.dumps(item["meta"], ensure_ascii=False) for item in items], pa.string()),
        pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(flat, features)),
    ]
    if block.pictures is not None:
        columns.append(pa.array([webp(picture) for picture in block.pictures], pa.binary()))
    return pa.record_batch(columns, schema=schema)


def _sets(found: Any, features: int) -> tuple[Tensor, Tensor]:
    """float32 ``[n, K, D]`` and mask of rows of the table."""
    column = found["vectors"]
    column = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    sizes = torch.from_numpy(np.diff(column.offsets.to_numpy()).astype(np.int64))
    flat = torch.from_numpy(column.flatten().flatten().to_numpy(zero_copy_only=False).astype(np.float32))
    mask = torch.arange(int(sizes.max())) < sizes[:, None]
    sets = torch.zeros(*mask.shape, features)
    sets[mask] = flat.view(-1, features)
    return sets, mask


def _condition(ids: Sequence[str]) -> str:
    quoted = ", ".join("'" + id_.replace("'", "''") + "'" for id_ in ids)
    return f"id IN ({quoted})"
