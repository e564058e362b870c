"""Pictures: decoded and cropped for a backbone, and checked without being decoded.

Importing needs pillow: ``pip install "setemb[pictures]"``.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from setemb.packages import require

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""Of files that are opened; Pillow knows more, some of which start another program (EPS: Ghostscript)."""

EVALUATION_CROP = 0.875
"""Share of the short side that the crop in the middle has: 224 of 256."""

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
"""How a whole file ends; these bytes are nowhere else. Pictures of other formats are decoded."""

_TAIL = 64
"""Some writers add a few bytes after the end."""


def decode(file: str | Path | IO[bytes] | bytes, where: str) -> Any:
    """An RGB picture, upright.

    Raises:
        ValueError: it cannot be read; naming ``where`` it came from.
    """
    image, ops = require("PIL.Image", "pictures"), require("PIL.ImageOps", "pictures")
    try:
        with image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as opened:
            return eight_bits(ops.exif_transpose(opened)).convert("RGB")
    except Exception as error:  # whatever a decoder raises
        raise ValueError(f"{where} cannot be read as a picture: {error}") from error


def eight_bits(picture: Any) -> Any:
    """The picture; grey of 16 bits as 8 (65535 becomes 255), which Pillow would clip.

    Raises:
        ValueError: it holds 32-bit integers or floats, of which nobody knows what is white.
    """
    if picture.mode in ("I", "F"):
        kind = {"I": "32-bit integers", "F": "floats"}[picture.mode]
        raise ValueError(f"its pixels must be of 8 or 16 bits, got {kind} (mode {picture.mode})")
    if not picture.mode.startswith("I;16"):
        return picture
    grey = np.round(np.asarray(picture) / 257).astype(np.uint8)
    return require("PIL.Image", "pictures").fromarray(grey)


def crop(picture: Any, size: int, smallest: float, rng: np.random.Generator | None, whole: bool = False) -> np.ndarray:
    """uint8 ``[3, size, size]``.

    In training (where there is an rng) a part of the picture: its area is a share of the whole, uniform in
    ``[smallest, 1]``, its aspect ratio log-uniform in [3/4, 4/3]; mirrored half of the time. Else the square in the
    middle, `EVALUATION_CROP` of the short side, or the ``whole`` picture, squeezed.
    """
    image = require("PIL.Image", "pictures")
    width, height = picture.size
    mirrored = False
    if rng is None and whole:
        w, h, left, top = width, height, 0.0, 0.0
    elif rng is None:
        w = h = EVALUATION_CROP * min(width, height)
        left, top = (width - w) / 2, (height - h) / 2
    else:
        share, ratio = rng.uniform(smallest, 1), math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        w = min(width, math.sqrt(share * width * height * ratio))
        h = min(height, math.sqrt(share * width * height / ratio))
        left, top = rng.uniform(0, 1, 2) * (width - w, height - h)
        mirrored = rng.random() < 0.5
    box = (left, top, min(width, left + w), min(height, top + h))
    pixels = np.asarray(picture.resize((size, size), image.Resampling.BILINEAR, box=box))
    return (pixels[:, ::-1] if mirrored else pixels).transpose(2, 0, 1)


def stacked(pictures: list[np.ndarray]) -> Tensor:
    """uint8 ``[B, 3, size, size]``."""
    return torch.from_numpy(np.stack(pictures))


def whats_wrong(file: IO[bytes], deep: bool = False) -> str | None:
    """Why a picture cannot be read, or None.

    Only its first and last bytes are read, unless they do not look like those of a whole file, or ``deep``.
    """
    image = require("PIL.Image", "pictures")
    try:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return "the file is empty"
        file.seek(max(0, size - _TAIL))
        tail = file.read(_TAIL)
        file.seek(0)
        with image.open(file, formats=FORMATS) as picture:
            if picture.mode in ("I", "F"):
                eight_bits(picture)  # says so
            end = _ENDS.get(picture.format)
            if deep or end is None or end not in tail:
                picture.load()
    except Exception as error:  # whatever a decoder raises
        return f"cannot be read as a picture: {error}"
    return None


def check_size(size: int, smallest: float) -> None:
    if size < 1:
        raise ValueError(f"picture_size must be at least 1, got {size}")
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest_crop must lie in (0, 1], got {smallest}")
