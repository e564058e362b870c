"""Batches whose gradients are added: their mean, and runs that resume in the middle of an epoch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("omegaconf")
pytest.importorskip("typer")
pytest.importorskip("tensorboard")

import setemb.training
from setemb.checkpoint import load_checkpoint
from setemb.config import load_config
from setemb.data.folder import open_split
from setemb.data.loader import RetrievalDataModule
from setemb.data.vocab import Vocabulary
from setemb.model import SetEmbedder
from setemb.objective import training_loss
from setemb.training import captions_for, fit, parameter_groups, read_metrics, train_precomp
from tests.model.test_compile import STILL
from tests.model.test_training import TINY, assert_same


def test_a_step_takes_the_mean_of_its_batches_gradients(tiny_precomp: Path, tmp_path: Path) -> None:
    settings = ["data.batch_size=40", "trainer.accumulate_batches=3", "trainer.epochs=1", "trainer.gradient_clip=0"]
    config = load_config(TINY, [f"data.dir={tiny_precomp}", *settings, *STILL])
    train = open_split(config.data, "train", training=True)
    vocabulary = Vocabulary.build(train.texts, 1, "words")
    config.model.image.dim_in, config.model.text.vocab_size = train.dim, len(vocabulary)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = SetEmbedder(config.model, vocabulary)
    train.captions = captions_for(model, train.texts, config.data)
    data = RetrievalDataModule(train, None, 40, config.trainer.seed, batches_per_step=3)
    assert data.steps_per_epoch == 1
    other = copy.deepcopy(model).train()
    for batch in data.train_dataloader():
        loss, _ = training_loss(
            other, other.encode_image(batch), other.encode_text(batch), batch, config.loss, epochs_done=0.0
        )
        (loss / 3).backward()
    expected = [p.grad for group in parameter_groups(other, config.optimizer) for p in group["params"]]
    fit(config, model, data, tmp_path)
    checkpoint = load_checkpoint(tmp_path / "last.safetensors")
    assert checkpoint["global_step"] == 1
    moments = [state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()]
    torch.testing.assert_close([10 * moment for moment in moments], expected, rtol=1e-4, atol=1e-6)


class StopError(Exception):
    pass


def test_it_resumes_in_the_middle_of_an_epoch(
    tiny_precomp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["data.batch_size=16", "trainer.accumulate_batches=2", "trainer.epochs=2", "trainer.checkpoint_every=2"]
    settings += [f"data.dir={tiny_precomp}", "trainer.log_every=1"]
    train_precomp(load_config(TINY, settings), tmp_path / "whole")
    real = setemb.training.LastCheckpoint.on_train_batch_end

    def stopping(self: Any, trainer: Any, *rest: Any) -> None:
        real(self, trainer, *rest)
        if trainer.global_step == 7:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(setemb.training.LastCheckpoint, "on_train_batch_end", stopping)
        with pytest.raises(StopError):
            train_precomp(load_config(TINY, settings), tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.safetensors")["global_step"] == 6
    train_precomp(load_config(tmp_path / "run" / "config.yaml"), tmp_path / "run", resume=True)
    ours, theirs = (load_checkpoint(tmp_path / name / "last.safetensors") for name in ("run", "whole"))
    assert ours["global_step"] == 8
    assert_same(ours["state_dict"], theirs["state_dict"])
    losses = [[row["loss"] for row in read_metrics(tmp_path / n) if "loss" in row] for n in ("run", "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_what_does_not_fit_is_refused(tiny_precomp: Path, tmp_path: Path) -> None:
    for value, message in (
        (0, r"accumulate_batches must lie in \[1, 4\] \(the batches of an epoch\), got 0"),
        (5, r"accumulate_batches must lie in \[1, 4\] \(the batches of an epoch\), got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            train_precomp(
                load_config(TINY, [f"data.dir={tiny_precomp}", f"trainer.accumulate_batches={value}"]), tmp_path
            )
