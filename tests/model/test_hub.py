"""Data sets of the package datasets, made on the fly and read from disk."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from setemb.config import DataConfig
from setemb.data import hub
from setemb.data.captions import WordCaptions
from setemb.data.folder import check_folder, find_format, open_split
from setemb.data.hub import HubDataset
from setemb.data.problems import stop
from setemb.data.vocab import Vocabulary
from tests.model.folders import COLOURS, picture_bytes

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def no_progress(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def rows(n: int, first: int = 0, **changes: Any) -> dict[str, list[Any]]:
    """A column of pictures and one of lists of captions, of more captions in the last row."""
    colours = list(COLOURS)
    columns = {
        "picture": [{"bytes": picture_bytes(first + i, colours[i % 4]), "path": None} for i in range(n)],
        "captions": [[f"a {colours[i % 4]} thing {k}" for k in range(2 + (i == n - 1))] for i in range(n)],
        "id": list(range(n)),
    }
    return columns | changes


def dataset(columns: dict[str, list[Any]]) -> Any:
    made = datasets.Dataset.from_dict(columns)
    return made.cast_column("picture", datasets.Image()) if "picture" in columns else made


def save(folder: Path, **splits: dict[str, list[Any]]) -> Path:
    datasets.DatasetDict({name: dataset(columns) for name, columns in splits.items()}).save_to_disk(folder)
    return folder


def test_saved_data_sets_are_read(tmp_path):
    folder = save(tmp_path / "d", train=rows(5), extra=rows(2, 50), validation=rows(3, 10))
    assert find_format(folder) == "datasets"
    data = HubDataset(folder, "dev", size=16)
    data.captions = WordCaptions(data.texts, Vocabulary.build(data.texts))
    assert data.offsets.tolist() == [0, 2, 4, 7]
    batch = data.batch([2, 0], None)
    assert batch["images"].shape == (2, 3, 16, 16)
    assert batch["caption_group"].tolist() == [2, 2, 2, 0, 0]
    for i, colour in enumerate(("blue", "red")):
        mean = batch["images"][i].float().mean((1, 2))
        torch.testing.assert_close(mean, torch.tensor(COLOURS[colour]).float(), atol=6.0, rtol=0)
    joined = HubDataset(folder, "train+extra", size=16, caption_limit=1)
    assert len(joined) == 7 and joined.texts[6] == "a green thing 0"
    first, again = (joined_batch(joined, seed) for seed in (0, 0))
    assert torch.equal(first, again) and not torch.equal(first, joined_batch(joined, 1))
    with pytest.raises(ValueError, match="has no split 'test'; it has train, extra, validation"):
        HubDataset(folder, "test")


def joined_batch(data: HubDataset, seed: int) -> torch.Tensor:
    return data.read(np.array([0, 6]), np.random.default_rng(seed))


def test_batches_are_made_in_other_processes(tmp_path):
    loader = pytest.importorskip("setemb.data.loader", reason="needs lightning", exc_type=ImportError)
    data = HubDataset(save(tmp_path / "d", train=rows(8)), "train", size=8)
    data.captions = WordCaptions(data.texts, Vocabulary.build(data.texts))
    batches = [
        list(loader.RetrievalDataModule(data, data, batch_size=4, seed=0, workers=workers).train_dataloader())
        for workers in (0, 2)
    ]
    assert len(batches[0]) == 2
    for ours, theirs in zip(*batches, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_parquet_and_numbered_captions_are_read(tmp_path):
    columns = rows(3)
    columns |= {"caption_0": ["one", "two", "three"], "caption_1": ["un", "deux", "trois"]}
    del columns["captions"]
    dataset(columns).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    settings = DataConfig(dir=str(tmp_path), picture_size=8, captions_per_image=2)
    assert find_format(tmp_path) == "datasets"
    data = open_split(settings, "train", training=True)
    assert data.texts == ["one", "un", "two", "deux", "three", "trois"]
    assert HubDataset(tmp_path, "train", caption_column="caption_1", size=8).texts == ["un", "deux", "trois"]


def test_rows_of_one_picture_are_grouped(tmp_path):
    columns = rows(5)
    columns |= {"captions": [["a"], ["b"], ["c"], ["d", "e"], ["f"]], "id": [7, 3, 7, 3, 9]}
    folder = save(tmp_path / "d", train=columns)
    data = open_split(DataConfig(dir=str(folder), group_column="id", picture_size=8), "train")
    assert (data.rows.tolist(), data.offsets.tolist()) == ([0, 1, 4], [0, 2, 5, 6])
    assert data.texts == ["a", "c", "b", "d", "e", "f"]
    assert HubDataset(folder, "train", group_column="id", caption_limit=2).texts == ["a", "c", "b", "d", "f"]
    alone = HubDataset(folder, "train", size=8)
    assert torch.equal(data.read(np.arange(3), None), alone.read(np.array([0, 1, 4]), None))
    report = check_folder(folder, ["train"], settings=DataConfig(group_column="id"))
    assert report.problems == [] and report.splits[0].images == 3 and report.splits[0].captions_per_image == (1, 3)
    with pytest.raises(ValueError, match=r"data\.group_column must be one of picture, captions, id; got image"):
        HubDataset(folder, "train", group_column="image")
    assert len(check_folder(folder, ["train"], settings=DataConfig(group_column="image")).problems) == 1
    columns["picture"][4] = {"bytes": b"", "path": None}
    broken = save(tmp_path / "b", train=columns)
    (found,) = check_folder(broken, ["train"], settings=DataConfig(group_column="id")).problems
    assert "row 4: the picture: the file is empty" in found
    with pytest.raises(ValueError, match="row 4: the picture: the file is empty"):
        HubDataset(broken, "train", group_column="id")


@pytest.mark.parametrize(
    ("ids", "row", "value"),
    [([7, 3, None], 2, "None"), ([[7], [3], [7]], 0, r"\[7\]"), ([0.5, float("nan"), 0.5], 1, "nan")],
)
def test_rows_that_do_not_say_their_image_are_named(tmp_path, ids, row, value):
    folder = save(tmp_path / "d", train=rows(3) | {"id": ids})
    message = f"split train, row {row}: id must say which image it is, got {value}"
    with pytest.raises(ValueError, match=message):
        HubDataset(folder, "train", group_column="id")
    report = check_folder(folder, ["train"], settings=DataConfig(group_column="id"))
    assert re.search(message, report.problems[0])
    assert len(report.problems) == (3 if isinstance(ids[0], list) else 1)


def test_columns_that_are_not_clear_are_named(tmp_path):
    folder = save(tmp_path / "a", train=rows(2))
    for options, message in (
        (
            {"image_column": "id"},
            "data.image_column must name its column of pictures, of picture, captions, id; got id",
        ),
        (
            {"caption_column": "words"},
            "data.caption_column must name its captions, of picture, captions, id; got words",
        ),
        ({"caption_column": "id"}, r"row 0: captions must be strings, got \[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            HubDataset(folder, "train", **options)
    columns = rows(2)
    del columns["captions"]
    with pytest.raises(ValueError, match=r"data\.caption_column must name its captions, .*; got none"):
        HubDataset(save(tmp_path / "b", train=columns), "train")
    del columns["picture"]
    with pytest.raises(ValueError, match=r"data\.image_column must name its column of pictures, .*; got none"):
        HubDataset(save(tmp_path / "c", train=columns), "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": [["a"], [], ["b"]]}, r"split train, row 1: it has no caption"),
        ({"captions": [["a"], ["b", " "], ["b"]]}, r"split train, row 1: caption 1 is empty"),
        ({"captions": [["a"], ["b"], [None]]}, r"split train, row 2: captions must be strings, got \[None\]"),
        ({1: None}, r"split train, row 1: the picture: there is none"),
        ({2: {"bytes": b"", "path": None}}, r"split train, row 2: the picture: the file is empty"),
        ({2: {"bytes": picture_bytes(0)[:-50], "path": None}}, r"row 2: the picture: cannot be read as a picture"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, changes, message):
    columns = rows(3)
    for key, value in changes.items():
        if isinstance(key, int):
            columns["picture"][key] = value
        else:
            columns[key] = value
    made = datasets.Dataset.from_dict(columns).cast(
        datasets.Features(
            {
                "picture": datasets.Image(decode=False),
                "captions": datasets.List(datasets.Value("string")),
                "id": datasets.Value("int64"),
            }
        )
    )
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        HubDataset(tmp_path / "d", "train")
    report = check_folder(tmp_path / "d", ["train"])
    assert report.format == "datasets" and len(report.problems) == 1
    (split,) = report.splits
    assert (split.name, split.images) == ("train", 3)


def test_a_data_set_that_does_not_open_is_named(tmp_path):
    folder = save(tmp_path / "d", train=rows(3), validation=rows(2))
    assert check_folder(folder).problems == []
    arrow = next((folder / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"d cannot be read as a data set"):
        HubDataset(folder, "train")
    (problem,) = check_folder(folder, []).problems
    assert "d cannot be read as a data set" in problem


def test_a_folder_of_pictures_with_metadata_is_read(tmp_path):
    lines = []
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(picture_bytes(i))
        lines.append(json.dumps({"file_name": f"{i}.jpg", "text": f"thing {i}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    data = HubDataset(tmp_path, "train", size=8)
    assert data.texts == ["thing 0", "thing 1", "thing 2"]
    assert data.read(np.array([2]), None).shape == (1, 3, 8, 8)
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(ValueError, match=r"here, row 1: the picture: .*1\.jpg: No such file"):
        hub.check_pictures(data.pictures, "here", stop)


@pytest.mark.parametrize("missing", ["datasets", "PIL.Image"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, missing):
    folder = save(tmp_path / "d", train=rows(2))
    monkeypatch.setitem(sys.modules, missing, None)
    extra = "datasets" if missing == "datasets" else "pictures"
    with pytest.raises(ImportError, match=rf'pip install "setemb\[{extra}\]"'):
        HubDataset(folder, "train")
