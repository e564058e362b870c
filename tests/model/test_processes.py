"""``setemb train`` under torchrun: the gradient of one process, the evaluation of all, one run's files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("omegaconf")
pytest.importorskip("typer")
pytest.importorskip("tensorboard")

from setemb.checkpoint import load_checkpoint
from setemb.config import DataConfig
from setemb.training import evaluate_precomp, read_metrics
from tests.model.test_training import TINY

ROOT = Path(__file__).parents[2]
# One step of Adam, whose first moment then is a tenth of the gradient; nothing is drawn at random.
ONE_STEP = [
    "trainer.epochs=1",
    "trainer.gradient_clip=0",
    "data.batch_size=97",
    "data.captions_per_image=0",
    "data.region_drop=0",
    "data.word_drop=0",
    "model.image.dropout=0",
    "model.text.dropout=0",
    "model.sets.dropout=0",
    "loss.mmd=1",
    "loss.diversity=1",
]
LOSSES = {
    "hardest and all": ["loss.warmup_epochs=0", "loss.hardest_fraction=0.5"],
    "info_nce": ["loss.kind=info_nce"],
    "match probability": ["loss.kind=info_nce", "model.similarity=match_probability", "model.match_scale=4"],
}


def train(processes: int, data: Path, out: Path, settings: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    program = [str(Path(__file__).with_name("frozen_norms.py")), "train", str(TINY), f"data.dir={data}"]
    return subprocess.run(
        [sys.executable, *launcher, *program, *settings, "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        timeout=120,
    )


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_one_process(loss: str, processes: int, tiny_precomp: Path, tmp_path: Path) -> None:
    moments, runs = [], []
    for count in (1, processes):
        folder = tmp_path / str(count)
        result = train(count, tiny_precomp, folder, [*ONE_STEP, *LOSSES[loss]])
        assert result.returncode == 0, result.stderr
        (optimizer,) = load_checkpoint(folder / "last.safetensors")["optimizer_states"]
        moments.append([state["exp_avg"] for _, state in sorted(optimizer["state"].items())])
        runs.append(folder)
    largest = max(moment.abs().amax().item() for moment in moments[0])
    assert largest > 1e-3
    for one, several in zip(*moments, strict=True):
        torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-5 * largest)
    logged = [read_metrics(folder) for folder in runs]
    losses = [{k: v for row in rows for k, v in row.items() if k.startswith("loss")} for rows in logged]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # What all have encoded is what the one who evaluates gets: the model's own recall.
    assert [path.name for path in (runs[1] / "metrics").iterdir()] == ["from_step_0"]
    rsum = next(row["dev/rsum"] for row in logged[1] if "dev/rsum" in row)
    report = evaluate_precomp(runs[1] / "model", DataConfig(dir=str(tiny_precomp)))
    assert report.rsum == pytest.approx(rsum, abs=1e-3)


def test_shares_of_other_sizes_parts_and_more_steps(tiny_precomp: Path, tmp_path: Path) -> None:
    """Dev shares of 21, 21 and 22 images in batches of 21; each process encodes parts; moving averages of weights."""
    settings = ["data.batch_size=21", "trainer.epochs=2", "trainer.ema_decay=0.9", "trainer.accumulate_embeddings=4"]
    result = train(3, tiny_precomp, tmp_path / "run", settings)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("model:") == 1
    rsum = [row["dev/rsum"] for row in read_metrics(tmp_path / "run") if "dev/rsum" in row]
    assert len(rsum) == 2
    report = evaluate_precomp(tmp_path / "run" / "model", DataConfig(dir=str(tiny_precomp)))
    assert report.rsum == pytest.approx(max(rsum), abs=1e-3)


def test_what_several_processes_cannot_do_is_said(tiny_precomp: Path, tmp_path: Path) -> None:
    result = train(3, tiny_precomp, tmp_path / "few", ["data.batch_size=2", "trainer.epochs=1"])
    assert result.returncode != 0
    assert "3 processes need as many images in a batch and in the dev set, got 2" in result.stderr
