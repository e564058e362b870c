"""Word vectors in text form: GloVe's ``.txt``, word2vec's and fastText's ``.vec``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_vectors(path: str | Path, words: Sequence[str], dim: int) -> tuple[Tensor, Tensor]:
    """float32 ``[n, dim]`` vectors of these words, 0 where there is none, and bool ``[n]``, which were found.

    A line is a word and ``dim`` numbers; a first line of two numbers (how many, how long) is passed over. A word that
    the file lacks is looked for without hyphens, full stops and apostrophes. The file is read a line at a time.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line of another length, or something other than numbers; naming the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no word vectors {path}")
    rows: dict[str, list[int]] = {}
    for row, word in enumerate(words):
        rows.setdefault(word, []).append(row)
    plain: dict[str, list[int]] = {}
    for row, word in enumerate(words):
        plain.setdefault(word.translate(_MARKS), []).append(row)
    vectors, found = np.zeros((len(words), dim), np.float32), np.zeros(len(words), bool)
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            parts = line.rstrip().split(" ")
            if number == 1 and len(parts) == 2 and all(part.isdigit() for part in parts):
                continue
            word, values = " ".join(parts[:-dim]), parts[-dim:]  # some of GloVe's words have blanks
            if len(parts) <= dim:
                raise ValueError(f"{path}, line {number}: expected a word and {dim} numbers, got {len(parts) - 1}")
            if word not in rows and word not in plain:
                continue
            try:
                vector = np.array(values, np.float32)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            for row in rows.get(word, ()):
                vectors[row], found[row] = vector, True
            for row in plain.get(word, ()):
                if not found[row]:
                    vectors[row], found[row] = vector, True
    return torch.from_numpy(vectors), torch.from_numpy(found)


_MARKS = str.maketrans("", "", "-.'")
