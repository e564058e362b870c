"""The field's precomputed format: ``{split}_ims.npy`` and ``{split}_caps.txt`` in one folder.

``{split}_ims.npy``   ``[n, tokens, d]`` float16 or float32: features of regions or grid cells of n images (mapped).
``{split}_caps.txt``  UTF-8, a caption a line, the same number of captions for each image, one image after the other
                      (five an image: captions 5i..5i+4 belong to image i).

`coco_precomp` and `f30k_precomp` are such folders, of splits train, dev, test and (COCO's 5,000) testall.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from setemb.data.captioned import CaptionedImages, find_split
from setemb.data.captions import WordCaptions as WordCaptions  # where others look for it
from setemb.data.problems import Report, stop

_BLOCK_BYTES = 64 << 20


class PrecompDataset(CaptionedImages):
    """Images and captions of one split.

    Args:
        folder, split: see the module.
        region_drop: share of an image's regions left out in training; the same number for each image, at least one
            stays. Regions are drawn anew in every batch.
        captions_per_batch: see `CaptionedImages`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short or of the wrong shape, captions are not a whole number an image, or a caption is
            empty; naming the file and the line.
    """

    kind = "regions"

    def __init__(self, folder: str | Path, split: str, region_drop: float = 0.2, captions_per_batch: int = 0) -> None:
        split = find_split(split, splits(Path(folder))) or split
        images, texts = read_split(Path(folder), split)
        assert images is not None
        if not 0 <= region_drop < 1:
            raise ValueError(f"region_drop must lie in [0, 1), got {region_drop}")
        super().__init__(split, texts, np.full(len(images), len(texts) // len(images)), captions_per_batch)
        self.images, self.region_drop = images, region_drop

    @property
    def captions_per_image(self) -> int:
        return len(self.texts) // len(self)

    @property
    def dim(self) -> int:
        """Features of a region."""
        return int(self.images.shape[2])

    def read(self, rows: np.ndarray, rng: np.random.Generator | None) -> Tensor:
        images = self.images[rows].astype(np.float32)
        return torch.from_numpy(images if rng is None else _drop_regions(images, self.region_drop, rng))


def splits(folder: Path) -> list[str]:
    """Names of the splits of which at least one file is there."""
    names = {path.name.removesuffix(end) for end in ("_ims.npy", "_caps.txt") for path in folder.glob(f"*{end}")}
    return sorted(names)


def read_split(folder: Path, split: str, report: Report = stop) -> tuple[np.ndarray | None, list[str]]:
    """Features (memory-mapped; None where they cannot be read) and captions."""
    images, texts = _read_images(folder / f"{split}_ims.npy", report), _read_captions(folder, split, report)
    if images is not None and texts and len(texts) % len(images):
        report(
            ValueError(
                f"{folder / f'{split}_caps.txt'} must hold a whole number of captions for each of {len(images)} images "
                f"in {split}_ims.npy, got {len(texts)}"
            )
        )
    return images, texts


def check_features(path: Path, images: np.ndarray, report: Report) -> None:
    """Reads all features: none may be infinite or not a number, and no image may hold zeros alone."""
    step = max(1, _BLOCK_BYTES // max(1, images[:1].nbytes))
    for start in range(0, len(images), step):
        block = images[start : start + step].reshape(len(images[start : start + step]), -1)
        for what, bad in (("a feature that is not finite", ~np.isfinite(block).all(1)), ("zeros alone", ~block.any(1))):
            for row in np.flatnonzero(bad):
                report(ValueError(f"{path}, image {start + int(row)}: it holds {what}"))


def _drop_regions(images: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    n, regions = images.shape[:2]
    kept = max(1, round(regions * (1 - share)))
    if kept == regions:
        return images
    chosen = np.sort(rng.random((n, regions)).argsort(1)[:, :kept], 1)
    return np.take_along_axis(images, chosen[:, :, None], 1)


def _read_images(path: Path, report: Report) -> np.ndarray | None:
    if not path.is_file():
        report(FileNotFoundError(f"no image features {path}"))
        return None
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:  # a file that is shorter than its header says is a ValueError
        report(ValueError(f"{path} was cut short or is no .npy file: {error}"))
        return None
    if images.ndim != 3 or 0 in images.shape or images.dtype.kind != "f":
        report(
            ValueError(f"{path} must hold floats [images, tokens, features], got {images.dtype} {list(images.shape)}")
        )
        return None
    extra = path.stat().st_size - images.offset - images.nbytes
    if extra:
        report(ValueError(f"{path} is {extra} bytes longer than the {len(images)} images that its header says"))
    return images


def _read_captions(folder: Path, split: str, report: Report) -> list[str]:
    path = folder / f"{split}_caps.txt"
    if not path.is_file():
        report(FileNotFoundError(f"no captions {path}"))
        return []
    try:
        captions = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        report(ValueError(f"{path} is not UTF-8: {error}"))
        return []
    for number in _empty(captions):
        report(ValueError(f"{path}, line {number + 1}: the caption is empty"))
    return captions


def _empty(captions: list[str]) -> Iterator[int]:
    return (i for i, caption in enumerate(captions) if not caption.strip())
