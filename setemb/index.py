"""A searchable collection of sets of embeddings, kept in a folder that is checked when it is read.

A folder holds::

    index.json      format, similarity, shapes, size and SHA-256 of every other file, and its own checksum
    vectors.npy     float32 or float16 [n, K, D], memory-mapped
    items.jsonl     a line an item: {"id": ..., "meta": {...}}
    pictures.npy    uint8 [n, H, W, 3], memory-mapped; may be absent
    model/          the model that made the vectors (`SetEmbedder.save_pretrained`); may be absent

It is written beside and renamed, so a folder of that name is always complete.  Search is exact: every query is compared
with every item, a block at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch
from torch import Tensor

from setemb.files import replaced_folder
from setemb.similarity import Similarity, set_similarity
from setemb_kernels import __version__

if TYPE_CHECKING:
    from setemb.model import SetEmbedder

FORMAT = "setemb-index"
VERSION = 1
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class SearchResult:
    """The best items for each of Q queries, best first."""

    scores: Tensor
    """float32 ``[Q, k]``."""
    rows: Tensor
    """int64 ``[Q, k]``, positions in the index."""
    ids: list[list[str]]


class SetIndex:
    """Sets of K vectors with an id and metadata each, compared by one similarity.

    Args:
        vectors: ``[n, K, D]``, float32 or float16, finite; numpy (also memory-mapped) or torch.
        ids: n different strings.
        meta: n dicts that JSON can hold, or None.
        pictures: uint8 ``[n, H, W, 3]`` to show with the results, or None.
        similarity, alpha: see `setemb.similarity.set_similarity`.

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
    ) -> None:
        vectors = vectors.detach().cpu().numpy() if isinstance(vectors, Tensor) else vectors
        if vectors.ndim != 3 or vectors.dtype.name not in DTYPES:
            raise ValueError(
                f"vectors must be {' or '.join(DTYPES)} [n, K, D], got {vectors.dtype.name} {list(vectors.shape)}"
            )
        for name, value in (("ids", ids), ("meta", meta), ("pictures", pictures)):
            if value is not None and len(value) != len(vectors):
                raise ValueError(f"{name} must have {len(vectors)} entries (one a set), got {len(value)}")
        if len(set(ids)) != len(ids):
            raise ValueError(f"ids must differ, got {next(i for i in ids if list(ids).count(i) > 1)!r} more than once")
        if pictures is not None and (pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8):
            raise ValueError(f"pictures must be uint8 [n, H, W, 3], got {pictures.dtype} {list(pictures.shape)}")
        if similarity not in get_args(Similarity):
            raise ValueError(f"similarity must be one of {', '.join(get_args(Similarity))}, got {similarity!r}")
        self.vectors, self.ids, self.pictures = vectors, list(ids), pictures
        self.meta: list[Mapping[str, Any]] = [{}] * len(self.ids) if meta is None else list(meta)
        self.similarity, self.alpha = similarity, float(alpha)

    def __len__(self) -> int:
        return len(self.ids)

    @torch.inference_mode()
    def search(self, queries: Tensor, k: int = 10, block: int = 16384) -> SearchResult:
        """The k best items for each query set; of items with one score, the one with the lowest row comes first.

        Args:
            queries: ``[Q, L, D]`` (L may differ from K).
            k: results a query; at most the size of the index are returned.
            block: items compared at a time; at most Q x block similarities are held.

        Raises:
            ValueError: wrong shape of queries, k or block below 1.
        """
        if queries.ndim != 3 or queries.shape[2] != self.vectors.shape[2]:
            raise ValueError(f"queries must have shape [Q, L, {self.vectors.shape[2]}], got {list(queries.shape)}")
        for name, value in (("k", k), ("block", block)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        queries = queries.float()
        scores, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
        for start in range(0, len(self), block):
            part = np.asarray(self.vectors[start : start + block], np.float32)
            items = torch.from_numpy(part if part.flags.writeable else part.copy())  # torch takes no read-only array
            new = set_similarity(queries, items, self.similarity, self.alpha)
            scores = torch.cat([scores, new], 1)
            rows = torch.cat([rows, torch.arange(start, start + len(items)).expand(len(queries), -1)], 1)
            # What was kept has lower rows and stands first, so a stable sort gives ties to the lowest row.
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            scores, rows = scores[:, :k], rows.gather(1, order[:, :k])
        return SearchResult(scores, rows, [[self.ids[row] for row in of_query] for of_query in rows.tolist()])

    def save(self, folder: str | Path, model: SetEmbedder | None = None) -> None:
        """Writes the folder, in place of one of that name. ``model`` is stored with it, to embed queries with.

        Raises:
            ValueError: the vectors are not all finite.
            FileExistsError: the folder exists and is no index (it would be lost).
        """
        folder = Path(folder)
        if folder.exists() and not _may_be_replaced(folder):
            raise FileExistsError(f"{folder} exists and is not an index: choose another folder")
        finite = np.isfinite(self.vectors).all((1, 2))
        if not finite.all():
            row = int(np.argmin(finite))
            raise ValueError(f"vectors must be finite, row {row} (id {self.ids[row]!r}) is not")
        with replaced_folder(folder) as new:
            np.save(new / "vectors.npy", np.ascontiguousarray(self.vectors))
            if self.pictures is not None:
                np.save(new / "pictures.npy", np.ascontiguousarray(self.pictures))
            with (new / "items.jsonl").open("w", encoding="utf-8") as file:
                for id_, meta in zip(self.ids, self.meta, strict=True):
                    file.write(json.dumps({"id": id_, "meta": meta}, ensure_ascii=False) + "\n")
            if model is not None:
                model.save_pretrained(new / "model")
            data_files = [path for path in sorted(new.iterdir()) if path.is_file()]
            description = {
                "format": FORMAT,
                "version": VERSION,
                "setemb": __version__,
                "similarity": self.similarity,
                "alpha": self.alpha,
                "dtype": self.vectors.dtype.name,
                "shape": list(self.vectors.shape),
                "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in data_files},
            }
            description["sha256"] = _own_checksum(description)
            (new / "index.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> SetIndex:
        """The index in a folder. Sizes are always checked, contents (SHA-256 of each file) only if ``verify``.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file was cut short or altered, or has another format or version; naming the file, what was
                found and what was expected.
        """
        folder = Path(folder)
        description = _read_description(folder / "index.json")
        for name, entry in description["files"].items():
            _verify(folder / name, entry, verify)
        # Copy on write: torch takes no read-only arrays; nothing writes into it.
        vectors = np.load(folder / "vectors.npy", mmap_mode="c", allow_pickle=False)
        found = [vectors.dtype.name, *vectors.shape]
        expected = [description["dtype"], *description["shape"]]
        if found != expected:
            raise ValueError(f"{folder / 'vectors.npy'} holds {found}, expected {expected}")
        with (folder / "items.jsonl").open(encoding="utf-8") as file:
            items = [json.loads(line) for line in file]
        pictures = folder / "pictures.npy"
        return cls(
            vectors,
            [item["id"] for item in items],
            [item["meta"] for item in items],
            np.load(pictures, mmap_mode="r", allow_pickle=False) if pictures.name in description["files"] else None,
            cast(Similarity, description["similarity"]),
            description["alpha"],
        )


@torch.inference_mode()
def embed_images(
    model: SetEmbedder,
    features: np.ndarray,
    batch_size: int = 128,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda batch: batch,
) -> Tensor:
    """Sets ``[n, K, D]`` of images, from region or grid features (numpy, also memory-mapped).

    ``prepare`` makes of a batch of them what the model takes, ``[n, T, dim_in]``.
    """
    model.eval()
    parts = [torch.empty(0, model.config.sets.num_slots, model.config.dim)]
    for start in range(0, len(features), batch_size):
        images = torch.from_numpy(prepare(features[start : start + batch_size]).astype(np.float32))
        parts.append(model.encode_image({"images": images}).embeddings)
    return torch.cat(parts)


@torch.inference_mode()
def embed_texts(model: SetEmbedder, texts: Sequence[str]) -> Tensor:
    """Sets ``[n, K, D]`` of texts, through whatever the model's text encoder takes as input."""
    config = model.config.text
    if config.encoder == "features":
        from setemb.features import TextFeatures

        tokens, mask = TextFeatures(config.source).encode(texts)
    elif model.vocabulary is not None:
        from setemb.data.precomp import WordCaptions

        tokens, mask = WordCaptions(texts, model.vocabulary, 0.0).batch(range(len(texts)), None)
    else:
        tokens, mask = cast(Any, model.text_encoder).tokenize(texts)
    return model.eval().encode_text({"texts": tokens, "text_mask": mask}).embeddings


def _may_be_replaced(folder: Path) -> bool:
    """Whether it is an empty folder or an index, of whatever version."""
    if not folder.is_dir():
        return False
    try:
        return not any(folder.iterdir()) or json.loads((folder / "index.json").read_bytes())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no index: {path} is missing")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        found = (description["format"], description["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was cut short or altered, or is no description of an index: {error!r}") from error
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} has format {found[0]!r} version {found[1]!r}, expected {FORMAT!r} version {VERSION}")
    stated = description.pop("sha256", None)
    if stated != _own_checksum(description):
        raise ValueError(f"{path} was altered: its checksum is {_own_checksum(description)}, expected {stated}")
    return cast("dict[str, Any]", description)


def _verify(path: Path, entry: Mapping[str, Any], contents: bool) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"the index is incomplete: {path} is missing")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path} was cut short or altered: {path.stat().st_size} bytes, expected {entry['bytes']}")
    if contents and (found := _sha256(path)) != entry["sha256"]:
        raise ValueError(f"{path} was altered: its SHA-256 is {found}, expected {entry['sha256']}")


def _own_checksum(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
