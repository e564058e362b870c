"""Raw pictures with the Karpathy split: ``dataset_{coco,flickr30k,flickr8k}.json``.

The file lists images: ``filename``, ``split`` (train, restval, val or test), ``sentences`` (``raw`` and ``tokens``)
and, for COCO, ``filepath``, the folder of the picture (train2014 or val2014). Pictures lie in the folder of the file or
in one beside it.

Source: Karpathy and Fei-Fei, CVPR 2015.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from setemb.data import pictures
from setemb.data.captioned import CaptionedImages, find_split
from setemb.data.problems import Report, stop

THREADS = 8
"""That look at pictures before training; a network's file system answers many at once."""


@dataclass
class Listed:
    """The images of one split, and where the file lists them."""

    rows: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """Of the picture, relative to the folder with the pictures."""
    captions: list[list[str]] = field(default_factory=list)


class KarpathyDataset(CaptionedImages):
    """Pictures and captions of one split.

    Args:
        folder: with the JSON file.
        split: a name of the file's, or several joined by "+" ("train+restval").
        images: folder of the pictures; None: found.
        size: pixels a side.
        smallest_crop, whole_picture: see `setemb.data.pictures.crop`.
        text: which form of the captions, "raw" or "tokens" (joined by blanks).
        caption_limit: captions of an image that exist, the first ones; 0: all. Flickr's images have 5, COCO's 5 to 7,
            of which published figures take 5.
        captions_per_batch: see `CaptionedImages`.
        check: look at every picture's file first.

    Raises:
        FileNotFoundError, ValueError: naming the file and the row.
    """

    kind = "pictures"

    def __init__(
        self,
        folder: str | Path,
        split: str,
        images: str | Path | None = None,
        size: int = 224,
        smallest_crop: float = 0.08,
        whole_picture: bool = False,
        text: str = "raw",
        caption_limit: int = 0,
        captions_per_batch: int = 0,
        check: bool = True,
    ) -> None:
        pictures.check_size(size, smallest_crop)
        self.whole_picture = whole_picture
        self.path = index_path(Path(folder))
        chosen = select(read_index(self.path, text, caption_limit), split, self.path)
        self.root = Path(images) if images else find_pictures(self.path, [chosen])
        check_entries(self.path, chosen, stop)
        if check:
            check_pictures(self.path, self.root, chosen, stop)
        self.rows, self.names, self.size, self.smallest_crop = chosen.rows, chosen.names, size, smallest_crop
        texts = [caption for captions in chosen.captions for caption in captions]
        super().__init__(split, texts, np.array([len(captions) for captions in chosen.captions]), captions_per_batch)

    def read(self, rows: np.ndarray, rng: np.random.Generator | None) -> Tensor:
        made = []
        for row in rows:
            path = self.root / self.names[row]
            picture = pictures.decode(path, f"{self.path}, image {self.rows[row]}: {path}")
            made.append(pictures.crop(picture, self.size, self.smallest_crop, rng, self.whole_picture))
        return pictures.stacked(made)


def index_path(folder: Path) -> Path:
    """The JSON file of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    found = sorted(folder.glob("dataset*.json"))
    if not found:
        raise FileNotFoundError(f"no dataset*.json in {folder}")
    if len(found) > 1:
        raise ValueError(f"{folder} must hold one dataset*.json, got {', '.join(path.name for path in found)}")
    return found[0]


def read_index(path: Path, text: str = "raw", caption_limit: int = 0, report: Report = stop) -> dict[str, Listed]:
    """The images of each split."""
    if text not in ("raw", "tokens"):
        raise ValueError(f'captions must be "raw" or "tokens", got {text!r}')
    if caption_limit < 0:
        raise ValueError(f"caption_limit must be at least 0, got {caption_limit}")
    result: dict[str, Listed] = {}
    row = -1
    try:
        content = path.read_text(encoding="utf-8")
        for row, image in enumerate(_images(content)):
            try:
                name = str(Path(str(image.get("filepath") or ""), image["filename"]))
                split = image["split"]
                captions = [
                    str(sentence["raw"]) if text == "raw" else " ".join(sentence["tokens"])
                    for sentence in image["sentences"]
                ]
            except (KeyError, TypeError, AttributeError) as error:
                what = f"{error} is missing" if isinstance(error, KeyError) else f"it reads {str(image)[:80]!r}"
                report(ValueError(f"{path}, image {row}: {what}"))
                continue
            listed = result.setdefault(str(split), Listed())
            listed.rows.append(row)
            listed.names.append(name)
            listed.captions.append(captions[: caption_limit or None])
    except json.JSONDecodeError as error:
        report(ValueError(f"{path} was cut short or is no JSON: {error}"))
    except UnicodeDecodeError as error:
        report(ValueError(f"{path} is not UTF-8: {error}"))
    else:
        if row < 0:
            report(ValueError(f"{path} lists no images"))
    return result


def select(index: dict[str, Listed], split: str, path: Path) -> Listed:
    """One split, or several joined by "+"."""
    result = Listed()
    for name in split.split("+"):
        known = find_split(name, index)
        if known is None:
            raise ValueError(f"{path} has no split {name!r}; it has {', '.join(index)}")
        result.rows += index[known].rows
        result.names += index[known].names
        result.captions += index[known].captions
    return result


def find_pictures(path: Path, splits: Sequence[Listed], sample: int = 50) -> Path:
    """The folder in which most of a sample of the pictures are: that of the file, or one inside it."""
    names = [
        listed.names[i] for listed in splits for i in range(0, len(listed.names), max(1, len(listed.names) // sample))
    ]
    folders = [path.parent, *sorted(entry for entry in path.parent.iterdir() if entry.is_dir())]
    return max(folders, key=lambda folder: sum((folder / name).is_file() for name in names))


def check_entries(path: Path, listed: Listed, report: Report) -> None:
    """Each image is listed once and has captions, none of them empty."""
    seen: dict[str, int] = {}
    for row, name, captions in zip(listed.rows, listed.names, listed.captions, strict=True):
        if name in seen:
            report(ValueError(f"{path}, image {row}: {name} is image {seen[name]} already"))
        seen[name] = row
        if not captions:
            report(ValueError(f"{path}, image {row} ({name}): it has no caption"))
        for number, caption in enumerate(captions):
            if not caption.strip():
                report(ValueError(f"{path}, image {row} ({name}): caption {number} is empty"))


def check_pictures(path: Path, root: Path, listed: Listed, report: Report, deep: bool = False) -> None:
    """Each picture is there and looks whole; ``deep`` decodes it."""

    def look(name: str) -> Exception | None:
        try:
            with (root / name).open("rb") as file:
                wrong = pictures.whats_wrong(file, deep)
        except OSError as error:
            return FileNotFoundError(f"{root / name}: {error.strerror}")
        return None if wrong is None else ValueError(f"{root / name}: {wrong}")

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for row, problem in zip(listed.rows, pool.map(look, listed.names), strict=True):
                if problem is not None:
                    report(type(problem)(f"{path}, image {row}: {problem}"))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _images(content: str) -> Iterator[Any]:
    """The elements of ``images``, one at a time: COCO's file as Python objects would take ten times its size."""
    decoder, space = json.JSONDecoder(), " \t\r\n"

    def at(place: int) -> int:
        while place < len(content) and content[place] in space:
            place += 1
        return place

    def expect(place: int, *marks: str) -> int:
        place = at(place)
        if content[place : place + 1] not in marks:
            raise json.JSONDecodeError(f"Expecting {' or '.join(map(repr, marks))}", content, place)
        return place

    place = expect(0, "{")
    if content[at(place + 1) : at(place + 1) + 1] == "}":
        place = at(place + 1)
    while content[place] != "}":
        key, place = decoder.raw_decode(content, at(place + 1))
        place = at(expect(place, ":") + 1)
        if key == "images" and content[place : place + 1] == "[":
            if content[at(place + 1) : at(place + 1) + 1] == "]":
                place = at(place + 1)
            while content[place] != "]":
                image, place = decoder.raw_decode(content, at(place + 1))
                yield image
                place = expect(place, ",", "]")
            place += 1
        else:
            _, place = decoder.raw_decode(content, place)
        place = expect(place, ",", "}")
