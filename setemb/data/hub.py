"""Data sets of the package ``datasets``, on disk: what `save_to_disk` wrote, or Parquet files or a folder of pictures
with metadata, as `load_dataset` reads them.

A row is an image: a column of pictures, and one of captions (a string, or a list of strings) or several
(``caption_0``, ``caption_1``, ...). Where a row is a caption and its picture, rows of one value in a third column are
one image, whose picture is that of the first.

Importing needs datasets and pillow: ``pip install "setemb[datasets]"``.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from setemb.data import pictures
from setemb.data.captioned import CaptionedImages, find_split
from setemb.data.problems import Report, stop
from setemb.packages import require

CAPTION_NAMES = ("captions", "caption", "sentences", "sentence", "texts", "text")


class HubDataset(CaptionedImages):
    """Pictures and captions of one split.

    Args:
        folder: see the module.
        split: a name of the data set's, or several joined by "+"; see `setemb.data.captioned.find_split`.
        image_column: "": the only column of pictures.
        caption_column: name, or names joined by ","; "": the column of a usual name.
        group_column: rows that are equal here are one image; "": each row is one.
        size, smallest_crop, whole_picture, caption_limit, captions_per_batch, check: as in
            `setemb.data.karpathy.KarpathyDataset`.

    Raises:
        FileNotFoundError, ValueError: naming the split and the row.
    """

    kind = "pictures"

    def __init__(
        self,
        folder: str | Path,
        split: str,
        image_column: str = "",
        caption_column: str = "",
        group_column: str = "",
        size: int = 224,
        smallest_crop: float = 0.08,
        whole_picture: bool = False,
        caption_limit: int = 0,
        captions_per_batch: int = 0,
        check: bool = True,
    ) -> None:
        pictures.check_size(size, smallest_crop)
        self.whole_picture = whole_picture
        rows = select(open_splits(Path(folder)), split, folder)
        self.where = f"{folder}, split {split}"
        images, captions = columns(rows, image_column, caption_column, self.where)
        texts = read_captions(rows, captions, self.where, caption_limit)
        self.size, self.smallest_crop = size, smallest_crop
        self.rows = np.arange(len(rows))
        if group_column:
            self.rows, texts = grouped(rows, group_column, texts, self.where, caption_limit)
            rows = rows.select(self.rows)
        self.pictures = encoded_pictures(rows, images)
        if check:
            check_pictures(self.pictures, self.where, stop, rows=self.rows)
        counts = np.array([len(own) for own in texts])
        super().__init__(split, [text for own in texts for text in own], counts, captions_per_batch)

    def read(self, rows: np.ndarray, rng: np.random.Generator | None) -> Tensor:
        made = []
        for row in rows:
            (cell,) = self.pictures[int(row)].values()
            where = f"{self.where}, row {self.rows[row]}: the picture"
            picture = pictures.decode(cell["bytes"] or cell["path"], where)
            made.append(pictures.crop(picture, self.size, self.smallest_crop, rng, self.whole_picture))
        return pictures.stacked(made)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def is_loadable(folder: Path) -> bool:
    """Whether `load_dataset` reads it: Parquet files, or pictures with metadata."""
    names = ("*.parquet", "*/*.parquet", "metadata.*", "*/metadata.*")
    return any(next(folder.glob(name), None) is not None for name in names)


def open_splits(folder: Path) -> dict[str, Any]:
    """The splits of a data set; nothing of them is read.

    Raises:
        ValueError: the package cannot read it; naming the folder.
    """
    datasets = require("datasets", "datasets")
    try:
        found = datasets.load_from_disk(str(folder)) if is_saved(folder) else datasets.load_dataset(str(folder))
    except Exception as error:  # whatever the readers of the formats raise
        raise ValueError(f"{folder} cannot be read as a data set: {error}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def select(splits: dict[str, Any], split: str, folder: str | Path) -> Any:
    """One split, or several joined by "+"."""
    parts = []
    for name in split.split("+"):
        known = find_split(name, splits)
        if known is None:
            raise ValueError(f"{folder} has no split {name!r}; it has {', '.join(splits)}")
        parts.append(splits[known])
    return parts[0] if len(parts) == 1 else require("datasets", "datasets").concatenate_datasets(parts)


def columns(rows: Any, image_column: str, caption_column: str, where: str) -> tuple[str, list[str]]:
    """The columns of pictures and of captions.

    Raises:
        ValueError: there is none, or it is not clear which; naming all columns.
    """
    picture = type(require("datasets", "datasets").Image())
    kinds = rows.features
    found = [name for name, kind in kinds.items() if isinstance(kind, picture)]
    images = [image_column] if image_column else found
    if len(images) != 1 or images[0] not in found:
        hint = image_column or (", ".join(found) if found else "none")
        raise ValueError(
            f"{where}: data.image_column must name its column of pictures, of {', '.join(kinds)}; got {hint}"
        )
    numbered = [name for name in kinds if re.fullmatch(r"(caption|sentence|text)_?\d+", name)]
    usual = next(([name] for name in CAPTION_NAMES if name in kinds), numbered)
    captions = [name.strip() for name in caption_column.split(",")] if caption_column else usual
    if not captions or any(name not in kinds for name in captions):
        hint = caption_column or "none"
        raise ValueError(f"{where}: data.caption_column must name its captions, of {', '.join(kinds)}; got {hint}")
    return images[0], captions


def read_captions(
    rows: Any, names: Sequence[str], where: str, caption_limit: int = 0, report: Report = stop
) -> list[list[str]]:
    """The captions of each row; pictures are not read."""
    if caption_limit < 0:
        raise ValueError(f"caption_limit must be at least 0, got {caption_limit}")
    result = []
    for row, cells in enumerate(rows.select_columns(list(names))):
        own: list[Any] = []
        for name in names:
            own += cells[name] if isinstance(cells[name], list) else [cells[name]]
        if any(not isinstance(caption, str) for caption in own):
            report(ValueError(f"{where}, row {row}: captions must be strings, got {str(own)[:80]}"))
        if not own:
            report(ValueError(f"{where}, row {row}: it has no caption"))
        own = own[: caption_limit or None]
        for number, caption in enumerate(own):
            if isinstance(caption, str) and not caption.strip():
                report(ValueError(f"{where}, row {row}: caption {number} is empty"))
        result.append(own)
    return result


def grouped(
    rows: Any, name: str, texts: list[list[str]], where: str, caption_limit: int = 0, report: Report = stop
) -> tuple[np.ndarray, list[list[str]]]:
    """The first row of each image, and its captions, in the order of the first rows.

    A row whose value is missing, or is no single value, is told and left out.

    Raises:
        ValueError: there is no such column.
    """
    if name not in rows.features:
        raise ValueError(f"{where}: data.group_column must be one of {', '.join(rows.features)}; got {name}")
    first: dict[Any, int] = {}
    captions: dict[Any, list[str]] = {}
    for row, (cells, own) in enumerate(zip(rows.select_columns([name]), texts, strict=True)):
        value = cells[name]
        if value is None or value != value or not isinstance(value, Hashable):
            report(ValueError(f"{where}, row {row}: {name} must say which image it is, got {str(value)[:80]}"))
            continue
        first.setdefault(value, row)
        captions.setdefault(value, []).extend(own)
    return np.array(list(first.values()), dtype=np.int64), [own[: caption_limit or None] for own in captions.values()]


def encoded_pictures(rows: Any, name: str) -> Any:
    """The column of pictures alone, as files: ``bytes``, or else ``path``."""
    return rows.select_columns([name]).cast_column(name, require("datasets", "datasets").Image(decode=False))


def check_pictures(
    column: Any, where: str, report: Report, deep: bool = False, rows: Sequence[int] | np.ndarray | None = None
) -> None:
    """Each picture is there and looks whole; ``deep`` decodes it. Of a picture's bytes few are read.

    ``rows`` are the numbers to call them by.
    """
    arrow = require("pyarrow", "datasets")
    row = 0
    for batch in column.with_format("arrow").iter(256):
        for cell in batch[0].combine_chunks():
            path, content = cell.get("path"), cell.get("bytes")
            wrong: str | None = "there is none"
            try:
                if content is not None and content.is_valid:
                    wrong = pictures.whats_wrong(arrow.BufferReader(content.as_buffer()), deep)
                elif path is not None and path.is_valid:
                    with open(path.as_py(), "rb") as file:
                        wrong = pictures.whats_wrong(file, deep)
            except OSError as error:
                wrong = f"{path}: {error.strerror}"
            if wrong is not None:
                number = row if rows is None else rows[row]
                report(ValueError(f"{where}, row {number}: the picture: {wrong}"))
            row += 1
