"""What a user has, texts and pictures, as the batch that a model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from setemb.data import pictures
from setemb.packages import require

if TYPE_CHECKING:
    from setemb.features import ImageFeatures, TextFeatures
    from setemb.model import SetEmbedder

MAX_PIXELS = 50_000_000
"""Of a picture that is read from a file."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Of files; others have readers that were not made for files from strangers (one starts another program)."""

Picture = Any
"""A file (`str` or `Path`), a Pillow image, uint8 ``[H, W, 3]``, or features as the model has them, float ``[T, d]``
(an .npy file of them, numpy or torch)."""


def text_batch(model: SetEmbedder, texts: str | Sequence[str]) -> dict[str, Tensor]:
    """``texts`` and ``text_mask`` of `setemb.model.Batch`, through whatever the text encoder takes as input.

    Raises:
        TypeError, ValueError: no text, an empty one, or something else than texts.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("texts: expected at least one, got none")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts: expected strings, got {type(text).__name__}")
        if not text.strip():
            raise ValueError("a text must not be empty")
    if model.config.text.encoder == "features":
        tokens, mask = _text_features(model.config.text.source).encode(texts)
    elif model.vocabulary is not None:
        from setemb.data.precomp import WordCaptions

        tokens, mask = WordCaptions(texts, model.vocabulary, 0.0).batch(range(len(texts)), None)
    else:
        tokens, mask = cast(Any, model.text_encoder).tokenize(texts)
    device = next(model.parameters()).device
    return {"texts": tokens.to(device), "text_mask": mask.to(device)}


def image_batch(model: SetEmbedder, images: Picture | Sequence[Picture]) -> dict[str, Tensor]:
    """``images`` and ``image_mask`` of `setemb.model.Batch`.

    A model with a backbone inside takes pictures alone, cropped as in evaluation. Of the others those that
    say what makes features of pictures (``model.image.source``) take both, the rest features alone.

    Raises:
        FileNotFoundError: no such file.
        TypeError, ValueError: no image, something that is none or that the model does not take, or features of another
            size than the model's.
    """
    several = isinstance(images, (list, tuple))
    if isinstance(images, (Tensor, np.ndarray)):
        several = images.ndim != (3 if images.dtype in (np.uint8, torch.uint8) else 2)
    images = list(images) if several else [images]
    if not images:
        raise ValueError("images: expected at least one, got none")
    device = next(model.parameters()).device
    if model.config.image.takes == "pictures":
        return {"images": _crops(model, images).to(device)}
    read = [_features_or_pixels(image) for image in images]
    pixels = {i: value for i, value in enumerate(read) if value.dtype == np.uint8}
    if pixels:
        source = model.config.image.source
        if not source:
            raise ValueError(
                "this model takes features of images, not pictures: its setting model.image.source is empty; "
                "give the features of an image, an .npy file of [T, d]"
            )
        for i, features in zip(pixels, _picture_features(source, list(pixels.values())), strict=True):
            read[i] = features
    dim = model.config.image.dim_in
    for value in read:
        if value.ndim != 2 or len(value) == 0 or value.shape[1] != dim:
            raise ValueError(f"images: expected features [T, {dim}], got {list(value.shape)}")
    rows = [torch.from_numpy(value.astype(np.float32)) for value in read]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    batch = {"images": padded.to(device)}
    return batch if mask.all() else batch | {"image_mask": mask.to(device)}


def read_picture(source: Any, size: int, most: int = MAX_PIXELS) -> np.ndarray:
    """uint8 ``[size, size, 3]``: the whole picture, upright, on white; of a file, bytes in one, or a Pillow image.

    Args:
        most: pixels it may have. While it is read it takes 8 bytes a pixel, 12 where it is turned.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no picture, or too large a one.
    """
    # a large photograph is read at a fraction of its size
    upright = _opened(source, 2 * size, most).convert("RGBA")
    Image, ImageOps = require("PIL.Image", "demo"), require("PIL.ImageOps", "demo")
    upright = ImageOps.contain(upright, (size, size), Image.Resampling.BICUBIC)
    page = Image.new("RGBA", (size, size), "white")
    page.alpha_composite(upright, ((size - upright.width) // 2, (size - upright.height) // 2))
    return np.asarray(page.convert("RGB"))


def takes_pictures(model: SetEmbedder) -> bool:
    """Whether a model can be asked with pictures, not with features of them alone."""
    return model.config.image.takes == "pictures" or bool(model.config.image.source)


def read_query(model: SetEmbedder, source: Any, most: int) -> np.ndarray:
    """uint8 ``[H, W, 3]``, what `image_batch` takes; errors as in `read_picture`."""
    if model.config.image.takes == "pictures":  # which crops them itself
        return np.asarray(_opened(source, most=most).convert("RGB"))
    return read_picture(source, 224, most)


def _opened(source: Any, draft: int = 0, most: int = MAX_PIXELS) -> Any:
    """A Pillow image, upright, of 8 bits; errors as in `read_picture`. ``draft``: a side of so many pixels will do."""
    Image, ImageOps = require("PIL.Image", "demo"), require("PIL.ImageOps", "demo")
    unidentified = require("PIL", "demo").UnidentifiedImageError
    name = str(source) if isinstance(source, (str, Path)) else "the picture"
    try:
        opened = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
        if opened.width * opened.height > most:
            raise ValueError(f"{name}: expected at most {most:,} pixels, got {opened.width} x {opened.height}")
        if draft:
            opened.draft("RGB", (draft, draft))
        upright = ImageOps.exif_transpose(opened)
    except (FileNotFoundError, ValueError):
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        why = "it is none of " + ", ".join(FORMATS) if isinstance(error, unidentified) else str(error)
        raise ValueError(f"{name} is no picture that can be read: {why}") from error
    try:
        return pictures.eight_bits(upright)
    except ValueError as error:
        raise ValueError(f"{name} is no picture that can be read: {error}") from error


def _crops(model: SetEmbedder, images: Sequence[Picture]) -> Tensor:
    """uint8 ``[B, 3, size, size]``."""
    image = model.config.image
    if image.picture_size < 1:
        raise ValueError(
            "the model does not say at which size it looks at pictures: set image.picture_size in its config.json to "
            "the data.picture_size that it was trained with"
        )
    opened = [_opened(_picture(given)).convert("RGB") for given in images]
    return pictures.stacked([pictures.crop(p, image.picture_size, 1.0, None, image.whole_picture) for p in opened])


def _picture(image: Picture) -> Any:
    """A file or a Pillow image."""
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"images: expected pictures uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        return require("PIL.Image", "demo").fromarray(image)
    if isinstance(image, Mapping) or not (isinstance(image, (str, Path)) or hasattr(image, "convert")):
        raise TypeError(f"images: expected files, pictures or features, got {type(image).__name__}")
    return image


def _features_or_pixels(image: Picture) -> np.ndarray:
    """float ``[T, d]`` or uint8 ``[224, 224, 3]``."""
    if isinstance(image, (str, Path)) and Path(image).suffix == ".npy":
        try:
            array = np.load(image, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{image}: expected features, float [T, d]: {error}") from error
        if array.dtype.kind != "f":
            raise ValueError(f"{image}: an .npy file holds features, float [T, d]; got {array.dtype}")
        return array
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        if image.dtype.kind != "f":
            raise ValueError(f"images: expected features, float [T, d], or a picture, uint8; got {image.dtype}")
        return image
    return read_picture(_picture(image), 224)


def _picture_features(source: str, pixels: list[np.ndarray]) -> np.ndarray:
    from setemb.features import with_context

    assert source == "efficientnet-lite0", source
    return with_context(_image_features().extract(np.stack(pixels)))


@lru_cache(maxsize=2)
def _text_features(source: str) -> TextFeatures:
    from setemb.features import TextFeatures

    return TextFeatures(source)


@lru_cache(maxsize=1)
def _image_features() -> ImageFeatures:
    from setemb.features import ImageFeatures

    return ImageFeatures()
