"""Checkpoints as safetensors: tensors as they are, everything else as JSON in the file's metadata. No pickle.

A file is complete or absent: it is written beside, flushed to disk and renamed. Its metadata holds a checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "setemb-checkpoint-1"

BESIDE = r"\.[a-z0-9_]{8}"
"""What ends the name ``.NAME`` while `write_file` writes NAME, as `tempfile` makes it; editors end theirs otherwise."""
_LEFTOVER = re.compile(rf"\..+\.(safetensors|yaml|json|txt){BESIDE}")


def write_file(path: str | Path, data: bytes) -> None:
    """Writes beside, flushes to disk and renames: a reader sees the old file or the whole new one."""
    path = Path(path)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder: str | Path) -> None:
    """Removes what `write_file` left in a folder when its process was killed."""
    for path in Path(folder).glob(".*.*"):
        if path.is_file() and _LEFTOVER.fullmatch(path.name):
            path.unlink()


def weights_to_bytes(state: Mapping[str, Tensor]) -> bytes:
    """A state dict as a safetensors file."""
    return bytes(save({name: _plain(tensor) for name, tensor in state.items()}, {"format": "pt"}))


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Writes a nested structure of dicts, lists, tuples, tensors, numbers, strings and None.

    Raises:
        TypeError: it holds something else; naming where.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(checkpoint, tensors, "checkpoint"))
    digest = _digest(structure, tensors)
    data = save(tensors, {"format": FORMAT, "structure": structure, "sha256": digest})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """What `save_checkpoint` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file was cut short or altered, or is no checkpoint of this format; naming the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file itself is not iterable
    except SafetensorError as error:
        raise ValueError(f"{path} was cut short or altered, or is no checkpoint: {error}") from error
    if _digest(metadata["structure"], tensors) != metadata["sha256"]:
        raise ValueError(f"{path} was altered: its checksum does not fit its contents")
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    result: dict[str, Any] = _decode(json.loads(metadata["structure"]), tensors)
    return result


def _digest(structure: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous and not shared with another tensor, as the format asks."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """JSON in which what JSON lacks is a one-entry dict with a key that starts with "$"."""
    if isinstance(value, Tensor):
        name = where if where not in tensors else f"{where} {len(tensors)}"  # a.b may be two keys or one with a dot
        tensors[name] = _plain(value)
        return {"$tensor": name}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):  # of a subclass: an enumeration
        return str.__str__(value)
    if isinstance(value, Mapping):
        items = [[_encode_key(k, where), _encode(v, tensors, f"{where}.{k}")] for k, v in value.items()]
        return {"$ordered" if isinstance(value, OrderedDict) else "$dict": items}
    if isinstance(value, tuple):
        return {"$tuple": [_encode(v, tensors, f"{where}.{i}") for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(v, tensors, f"{where}.{i}") for i, v in enumerate(value)]
    raise TypeError(f"{where} holds a {type(value).__name__}, which a checkpoint without pickle cannot hold")


def _encode_key(key: Any, where: str) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"{where} has a key of {type(key).__name__}; a checkpoint holds keys of str and int")
    result: str | int = key
    return result


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return tensors[content]
    if kind == "$tuple":
        return tuple(_decode(v, tensors) for v in content)
    decoded = [(k, _decode(v, tensors)) for k, v in content]
    return OrderedDict(decoded) if kind == "$ordered" else dict(decoded)
