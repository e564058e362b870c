"""Fixtures of the published code's numbers, and a small data set that can be learnt."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def published_excerpt() -> dict[str, np.ndarray]:
    """Losses and recall of the published code on small random inputs (an excerpt that comes with the tests)."""
    with np.load(DATA / "published_model.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def published():
    """Loads one file of the published code's numbers from the folder that SETEMB_FIXTURES names."""
    folder = os.environ.get("SETEMB_FIXTURES")
    if not folder:
        pytest.skip("SETEMB_FIXTURES is not set: it names the folder with the published code's numbers (.npz)")

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(Path(folder) / name) as file:
            return dict(file)

    return load


@pytest.fixture(scope="session")
def tiny_precomp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two things of two colours each and captions that name them: 128 to train on, 64 for dev."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_precomp(folder)
    return folder


def write_tiny_precomp(folder: Path) -> None:
    rng = np.random.default_rng(0)
    colours = ["red", "green", "blue", "black", "white", "brown", "pink", "grey"]
    things = ["dog", "cat", "car", "tree", "house", "boat", "bird", "chair"]
    prototypes = rng.normal(size=(16, 12))
    for split, n in (("train", 128), ("dev", 64)):
        images = 0.3 * rng.normal(size=(n, 6, 12))
        captions = []
        for image in images:
            a, b = ((int(rng.integers(8)), int(rng.integers(8))) for _ in range(2))
            for k, (colour, thing) in enumerate((a, b)):
                image[2 * k] += prototypes[colour]
                image[2 * k + 1] += prototypes[8 + thing]
            for k in range(5):
                (c, t), (d, u) = (a, b) if k % 2 else (b, a)
                captions.append(f"A {colours[c]} {things[t]} and a {colours[d]} {things[u]}.")
        np.save(folder / f"{split}_ims.npy", images.astype(np.float16))
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
