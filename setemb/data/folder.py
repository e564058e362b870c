"""A folder of data in any of the formats: which it is, its splits, and what is wrong with it.

=========== ======================================================= =====================
format      what the folder holds                                   module
=========== ======================================================= =====================
precomp     {split}_ims.npy and {split}_caps.txt                    setemb.data.precomp
karpathy    dataset*.json and pictures                              setemb.data.karpathy
datasets    a data set of the package datasets, or Parquet files    setemb.data.hub
=========== ======================================================= =====================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from setemb.config import DataConfig
from setemb.data import precomp
from setemb.data.captioned import CaptionedImages, find_split
from setemb.data.problems import Problems, Report, TooManyError

LAYOUTS = (
    "{split}_ims.npy with {split}_caps.txt, dataset*.json with pictures, or a data set of the package datasets "
    "(save_to_disk, or Parquet files)"
)


def find_format(folder: str | Path) -> str:
    """ "precomp", "karpathy" or "datasets".

    Raises:
        FileNotFoundError: there is no such folder, or it holds none of them.
    """
    from setemb.data import hub

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if precomp.splits(folder):
        return "precomp"
    if any(folder.glob("dataset*.json")) and not hub.is_saved(folder):
        return "karpathy"
    if hub.is_saved(folder) or hub.is_loadable(folder):
        return "datasets"
    raise FileNotFoundError(f"{folder} holds no image features and no captions: it must hold {LAYOUTS}")


def open_split(settings: DataConfig, split: str, training: bool = False) -> CaptionedImages:
    """One split of the folder ``settings.dir``; what is wrong with it is an error that names file and row.

    Args:
        settings: the section ``data`` of the configuration.
        split: its name.
        training: draw ``settings.captions_per_image`` captions an image.

    Raises:
        FileNotFoundError, ValueError, ImportError.
    """
    from setemb.data.hub import HubDataset
    from setemb.data.karpathy import KarpathyDataset

    if not settings.dir:
        raise ValueError("data.dir must name the folder with the data, got nothing")
    drawn = settings.captions_per_image if training else 0
    kind = settings.format if settings.format != "auto" else find_format(settings.dir)
    if kind == "precomp":
        return precomp.PrecompDataset(settings.dir, split, settings.region_drop, drawn)
    pictures: dict[str, Any] = {
        "size": settings.picture_size,
        "smallest_crop": settings.smallest_crop,
        "whole_picture": settings.whole_picture,
        "caption_limit": settings.caption_limit,
        "captions_per_batch": drawn,
        "check": settings.check_pictures,
    }
    if kind == "karpathy":
        return KarpathyDataset(settings.dir, split, settings.images or None, text=settings.caption_text, **pictures)
    columns = settings.image_column, settings.caption_column, settings.group_column
    return HubDataset(settings.dir, split, *columns, **pictures)


@dataclass
class SplitReport:
    """What one split holds; None: unknown, as a file cannot be read."""

    name: str
    images: int | None = None
    captions: int | None = None
    captions_per_image: tuple[int, int] | None = None
    """Least and most."""
    features: str = ""
    """``tokens x features dtype`` of region features."""


@dataclass
class FolderReport:
    """What a folder is and what is wrong with it."""

    format: str
    splits: list[SplitReport] = field(default_factory=list)
    bytes: int = 0
    """Disk use of all files in the folder."""
    problems: list[str] = field(default_factory=list)
    more: bool = False
    """There are more problems."""


def check_folder(
    folder: str | Path,
    needed: Sequence[str] = ("train", "dev"),
    deep: bool = False,
    limit: int = 20,
    settings: DataConfig | None = None,
) -> FolderReport:
    """Looks at all splits of a folder.

    Args:
        folder: of any format.
        needed: splits that must be there.
        deep: decode every picture, and read all features: they must be finite and not zeros alone.
        limit: problems that are told; looking ends where there are more.
        settings: the section ``data`` of the configuration, for columns and folders with other names.

    Raises:
        FileNotFoundError: there is no such folder, or it is of no known format.
        ImportError: the format needs a package.
    """
    folder, settings = Path(folder), settings or DataConfig()
    kind = settings.format if settings.format != "auto" else find_format(folder)
    report = FolderReport(kind, bytes=_disk_use(folder))
    problems = Problems(limit)
    look: dict[str, Callable[..., Iterator[SplitReport]]] = {
        "precomp": _look_precomp,
        "karpathy": _look_karpathy,
        "datasets": _look_datasets,
    }
    try:
        for split in look[kind](folder, settings, deep, problems):
            report.splits.append(split)
        found = {split.name for split in report.splits}
        for name in needed:
            if find_split(name, found) is None:
                problems(ValueError(f"{folder} has no split {name!r}; it has {', '.join(sorted(found)) or 'none'}"))
    except TooManyError:
        pass
    report.problems, report.more = problems.found, problems.more
    return report


def _look_precomp(folder: Path, settings: DataConfig, deep: bool, report: Report) -> Iterator[SplitReport]:
    sizes: dict[int, str] = {}
    for name in precomp.splits(folder):
        images, texts = precomp.read_split(folder, name, report)
        result = SplitReport(name, None if images is None else len(images), len(texts) or None)
        yield result
        if images is None:
            continue
        result.features = f"{images.shape[1]} x {images.shape[2]} {images.dtype}"
        if texts and len(texts) % len(images) == 0:
            result.captions_per_image = (len(texts) // len(images),) * 2
        sizes.setdefault(images.shape[2], name)
        if len(sizes) > 1:
            first, (size, other) = name, next(iter(sizes.items()))
            report(
                ValueError(
                    f"{folder / f'{first}_ims.npy'} has {images.shape[2]} features a region, {other}_ims.npy {size}"
                )
            )
            del sizes[images.shape[2]]
        if deep:
            precomp.check_features(folder / f"{name}_ims.npy", images, report)


def _look_karpathy(folder: Path, settings: DataConfig, deep: bool, report: Report) -> Iterator[SplitReport]:
    from setemb.data import karpathy

    try:
        path = karpathy.index_path(folder)
    except ValueError as error:
        report(error)
        return
    index = karpathy.read_index(path, settings.caption_text, settings.caption_limit, report)
    root = Path(settings.images) if settings.images else karpathy.find_pictures(path, list(index.values()))
    for name, listed in index.items():
        counts = [len(captions) for captions in listed.captions]
        yield SplitReport(name, len(counts), sum(counts), (min(counts), max(counts)))
        karpathy.check_entries(path, listed, report)
        karpathy.check_pictures(path, root, listed, report, deep)


def _look_datasets(folder: Path, settings: DataConfig, deep: bool, report: Report) -> Iterator[SplitReport]:
    from setemb.data import hub

    try:
        splits = hub.open_splits(folder)
    except ValueError as error:
        report(error)
        return
    for name, rows in splits.items():
        result = SplitReport(name, len(rows))
        yield result
        where = f"{folder}, split {name}"
        try:
            images, captions = hub.columns(rows, settings.image_column, settings.caption_column, where)
        except ValueError as error:
            report(error)
            continue
        texts, numbers = hub.read_captions(rows, captions, where, settings.caption_limit, report), None
        if settings.group_column:
            try:
                numbers, texts = hub.grouped(rows, settings.group_column, texts, where, settings.caption_limit, report)
            except ValueError as error:
                report(error)
                continue
            rows, result.images = rows.select(numbers), len(numbers)
        counts = np.array([len(own) for own in texts])
        result.captions = int(counts.sum())
        result.captions_per_image = (int(counts.min()), int(counts.max())) if len(counts) else None
        hub.check_pictures(hub.encoded_pictures(rows, images), where, report, deep, numbers)


def _disk_use(folder: Path) -> int:
    total = 0
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            total += _disk_use(Path(entry.path))
        elif entry.is_file():
            total += entry.stat().st_size
    return total
