"""Encoders that torch compiles: the same numbers, no names of their own, and a message where it cannot be."""

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

from setemb.accumulate import encode_in_parts
from setemb.checkpoint import load_checkpoint
from setemb.compilation import compiled
from setemb.config import load_config
from setemb.model import SetEmbedder
from setemb.training import load_model, read_metrics, train_precomp
from tests.model.test_training import STEPS, TINY, tiny_model

# Nothing that the compiler draws otherwise.
STILL = ["model.image.dropout=0", "model.text.dropout=0", "model.sets.dropout=0"]


def gradients(model: SetEmbedder, encode: object, batch: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = encode_in_parts(encode, batch, ("texts", "text_mask"), size, model)  # type: ignore[arg-type]
    (out.embeddings * torch.arange(out.embeddings.numel()).view_as(out.embeddings).sin()).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_a_compiled_encoder_also_in_parts() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = tiny_model().eval()
    encode = compiled(model.encode_text)

    def batch(count: int, length: int) -> dict[str, torch.Tensor]:
        mask = torch.arange(length) < torch.randint(1, length + 1, (count, 1))
        return {"texts": torch.randn(count, length, 10), "text_mask": mask}

    for count, length, size in ((6, 5, 0), (6, 5, 4)):
        one = batch(count, length)
        expected = gradients(model, model.encode_text, one, size)
        torch.testing.assert_close(gradients(model, encode, one, size), expected, rtol=1e-4, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        for count, length in ((6, 9), (7, 11), (6, 4)):
            gradients(model, encode, batch(count, length), 0)
    assert not [name for name in model.state_dict() if "_orig_mod" in name]


def test_training_gives_the_same_model(tiny_precomp: Path, tmp_path: Path) -> None:
    settings = [f"data.dir={tiny_precomp}", "trainer.epochs=2", "trainer.ema_decay=0.5", "optimizer.lr=1e-4", *STILL]
    for name in ("false", "true"):
        torch.compiler.reset()
        train_precomp(load_config(TINY, [*settings, f"trainer.compile={name}"]), tmp_path / name)
    losses = [[row["loss"] for row in read_metrics(tmp_path / n) if "loss" in row] for n in ("false", "true")]
    assert len(losses[0]) == 2 * STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    plain, ours = (load_checkpoint(tmp_path / n / "last.safetensors") for n in ("false", "true"))
    for part in ("state_dict", "current_model_state"):
        assert list(ours[part]) == list(plain[part])
        for key, tensor in plain[part].items():
            # Adam divides by the gradient's size: a bias that batch normalisation takes out again, whose gradient is
            # rounding alone, goes anywhere within the learning rate, and the mean of what it is added to with it.
            if not key.endswith(("mlp.fc1.bias", "mlp.norm.running_mean")):
                torch.testing.assert_close(ours[part][key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    assert isinstance(load_model(tmp_path / "true"), SetEmbedder)
    config = load_config(tmp_path / "true" / "config.yaml", ["trainer.epochs=3"])
    train_precomp(config, tmp_path / "true", resume=True)
    assert load_checkpoint(tmp_path / "true" / "last.safetensors")["global_step"] == 3 * STEPS


def test_without_a_compiler_one_sentence(tiny_precomp: Path, tmp_path: Path) -> None:
    arguments = ["train", TINY, f"data.dir={tiny_precomp}", "trainer.compile=true", "--out", tmp_path / "run"]
    environment = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "-m", "setemb", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 2, result.stderr
    assert "trainer.compile=true: torch cannot compile here (" in result.stderr
    assert "train with trainer.compile=false" in result.stderr
    assert "Traceback" not in result.stderr
