"""Folders that are never half-written, and arrays of files as tensors."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@contextmanager
def replaced_folder(target: str | Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `target`; at the end of the block it takes the place of `target`.

    If the block raises, the new folder vanishes and `target` stays as it was.  The files are flushed to disk before the
    folder is renamed, so a folder of that name is complete even after a power cut.
    """
    target = Path(target).resolve()  # of a link, what it points to is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield new
        new.chmod(0o755)  # mkdtemp makes it private
        for path in new.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        old = new.with_name(f"{new.name}-old")
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def as_tensor(array: np.ndarray | Tensor) -> Tensor:
    """A tensor over the same memory, for reading: numpy arrays may be mapped from a file that must not be written."""
    import torch

    if isinstance(array, torch.Tensor):
        return array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)
