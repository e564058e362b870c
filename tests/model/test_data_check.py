"""``setemb data check``: what a folder is, and all that is wrong with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("PIL")

from typer.testing import CliRunner

from setemb.cli import app
from setemb.config import DataConfig
from setemb.data.folder import check_folder
from tests.model.folders import picture_bytes, write_index, write_karpathy, write_precomp


def check(*arguments: str | Path) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["data", "check", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output.splitlines()


def test_a_good_folder_is_described(tmp_path):
    write_precomp(tmp_path / "p")
    code, lines = check(tmp_path / "p")
    assert code == 0 and lines[-1].startswith("nothing is wrong")
    assert "precomp" in lines[0] and "MiB" in lines[0]
    assert any("train" in line and " 4 " in line and " 20 " in line and "3 x 5 float32" in line for line in lines)
    write_karpathy(tmp_path / "k")
    code, lines = check(tmp_path / "k", "--deep", "--json", tmp_path / "report.json")
    assert code == 0 and lines[-1] == "nothing is wrong"
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(s["name"], s["images"], s["captions"], s["captions_per_image"]) for s in report["splits"]] == [
        ("train", 4, 22, [5, 7]),
        ("restval", 2, 12, [5, 7]),
        ("val", 3, 17, [5, 7]),
        ("test", 2, 12, [5, 7]),
    ]
    size = sum(path.stat().st_size for path in (tmp_path / "k").rglob("*") if path.is_file())
    assert (report["format"], report["bytes"], report["problems"]) == ("karpathy", size, [])


PRECOMP_PROBLEMS = {
    "no images": (lambda f: (f / "dev_ims.npy").unlink(), r"no image features .*dev_ims\.npy"),
    "no captions": (lambda f: (f / "dev_caps.txt").unlink(), r"no captions .*dev_caps\.txt"),
    "cut short": (lambda f: cut(f / "dev_ims.npy", -1), r"dev_ims\.npy was cut short"),
    "too long": (lambda f: append(f / "dev_ims.npy", b"abc"), r"dev_ims\.npy is 3 bytes longer than the 2 images"),
    "dtype": (lambda f: np.save(f / "dev_ims.npy", np.zeros((2, 3, 5), int)), r"dev_ims\.npy must hold floats .*int64"),
    "shape": (lambda f: np.save(f / "dev_ims.npy", np.zeros((2, 15))), r"dev_ims\.npy must hold floats .*\[2, 15\]"),
    "features": (lambda f: np.save(f / "dev_ims.npy", np.zeros((2, 3, 6))), r"train_ims\.npy has 5 features .* 6"),
    "count": (lambda f: append(f / "dev_caps.txt", b"more\n"), r"dev_caps\.txt must hold a whole number .*got 11"),
    "empty": (lambda f: (f / "dev_caps.txt").write_text("a\n \n" * 2), r"dev_caps\.txt, line 2: the caption is empty"),
    "encoding": (lambda f: append(f / "dev_caps.txt", b"\xff\n"), r"dev_caps\.txt is not UTF-8"),
    "missing split": (
        lambda f: [(f / f"dev_{name}").unlink() for name in ("ims.npy", "caps.txt")],
        r"p has no split 'dev'; it has train",
    ),
}


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def append(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)


@pytest.mark.parametrize("name", PRECOMP_PROBLEMS)
def test_what_is_wrong_with_a_precomputed_folder(tmp_path, name):
    change, message = PRECOMP_PROBLEMS[name]
    write_precomp(tmp_path / "p")
    change(tmp_path / "p")
    code, lines = check(tmp_path / "p")
    assert code == 1
    assert len([line for line in lines if re.search(message, line)]) == 1, lines
    more = 1 if name != "empty" else 2
    assert lines[-1] == f"{more} problems"


def test_all_problems_are_told_up_to_a_number(tmp_path):
    entries = write_karpathy(tmp_path)
    images = tmp_path / "images"
    for row in (0, 2, 7):
        (images / entries[row]["filepath"] / entries[row]["filename"]).unlink()
    cut(images / "val2014" / "val2014_000005.jpg", -300)
    (images / "val2014" / "val2014_000009.jpg").write_bytes(b"")
    entries[3]["sentences"][0]["raw"] = ""
    del entries[10]["split"]
    write_index(tmp_path, entries)
    code, lines = check(tmp_path)
    assert code == 1 and lines[-1] == "7 problems"
    for row, what in ((0, "No such"), (2, "No such"), (7, "No such"), (5, "cannot be read"), (9, "is empty")):
        assert any(f"image {row}:" in line and what in line for line in lines), row
    assert any("image 3 " in line and "caption 0 is empty" in line for line in lines)
    assert any("image 10: 'split' is missing" in line for line in lines)
    code, lines = check(tmp_path, "--problems", "3")
    assert code == 1 and lines[-1] == "3 problems, and more"
    code, lines = check(tmp_path, "--split", "train", "--split", "gold", "--problems", "99")
    assert any("has no split 'gold'" in line for line in lines)
    report = check_folder(tmp_path, limit=1)
    assert len(report.problems) == 1 and report.more


def test_deep_reads_features_and_pictures(tmp_path):
    images = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float16)
    images[1, 2, 3], images[2] = np.nan, 0
    write_precomp(tmp_path / "p", train_ims=images)
    assert check(tmp_path / "p")[0] == 0
    code, lines = check(tmp_path / "p", "--deep")
    assert code == 1
    assert any("train_ims.npy, image 1: it holds a feature that is not finite" in line for line in lines)
    assert any("train_ims.npy, image 2: it holds zeros alone" in line for line in lines)
    write_karpathy(tmp_path / "k")
    path = tmp_path / "k" / "images" / "train2014" / "train2014_000001.jpg"
    png = picture_bytes(0, kind="PNG")
    place = png.index(b"IDAT") + 30
    path.write_bytes(png[:place] + bytes(20) + png[place + 20 :])  # its ends are whole
    assert check(tmp_path / "k")[0] == 0
    code, lines = check(tmp_path / "k", "--deep")
    assert code == 1
    assert any("image 1:" in line and "cannot be read" in line for line in lines)


def test_large_files_are_read_in_blocks(tmp_path, monkeypatch):
    images = np.random.default_rng(0).normal(size=(50, 3, 5)).astype(np.float32)
    images[[7, 49]] = 0
    write_precomp(tmp_path, train_ims=images, train_caps=b"a\n" * 50)
    monkeypatch.setattr("setemb.data.precomp._BLOCK_BYTES", 4 * images[0].nbytes)
    report = check_folder(tmp_path, deep=True)
    assert [problem.split("image ")[1] for problem in report.problems] == [
        "7: it holds zeros alone",
        "49: it holds zeros alone",
    ]


def test_what_is_no_data_is_said(tmp_path):
    code, lines = check(tmp_path)
    assert code == 2 and "holds no image features and no captions: it must hold" in lines[0]
    code, lines = check(tmp_path / "none")
    assert code == 2 and "there is no folder" in lines[0]
    write_precomp(tmp_path)
    code, lines = check(tmp_path, "loss.margin=1")
    assert code == 2 and "check takes data.KEY=VALUE settings alone" in lines[0]
    code, lines = check(tmp_path, "--problems", "0")
    assert code == 2 and "the number of problems must be at least 1, got 0" in lines[0]
    code, lines = check(tmp_path, "data.format=karpathy")
    assert code == 2 and "no dataset*.json in" in lines[0]


def test_the_program_ends_with_the_status(tmp_path):
    write_precomp(tmp_path)
    program = [sys.executable, "-m", "setemb", "data", "check", tmp_path]
    for status in (0, 1):
        result = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert result.returncode == status, result.stderr
        append(tmp_path / "dev_caps.txt", b"\n")


def test_settings_name_columns_and_folders(tmp_path):
    write_karpathy(tmp_path / "k", pictures="../elsewhere")
    assert check(tmp_path / "k")[0] == 1
    settings = DataConfig(images=str(tmp_path / "elsewhere"), caption_limit=2)
    report = check_folder(tmp_path / "k", settings=settings)
    assert report.problems == [] and {split.captions_per_image for split in report.splits} == {(2, 2)}
    assert check(tmp_path / "k", f"data.images={tmp_path / 'elsewhere'}")[0] == 0
