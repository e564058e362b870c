"""Training that goes wrong: numbers that are not finite, collapse, float16, and a kill in the middle of a save."""

from __future__ import annotations

import signal
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("omegaconf")
pytest.importorskip("typer")

from typer.testing import CliRunner

from setemb.callbacks import StopAtNonFinite, WarnOfCollapse
from setemb.checkpoint import load_checkpoint, remove_leftovers
from setemb.cli import app
from setemb.config import LossConfig, load_config
from setemb.training import load_model, read_metrics, train_precomp
from tests.model.conftest import write_tiny_precomp
from tests.model.test_training import STEPS, TINY, assert_same, run, train_arguments, uninterrupted

__all__ = ["uninterrupted"]

# Kills its own process, with a signal that nothing can catch, in the given part of the given save of a file.
KILLED_IN_A_SAVE = """
import os, signal
import setemb.checkpoint
from setemb.cli import main

real_write, real_open, real_replace = setemb.checkpoint.write_file, os.fdopen, os.replace
saves, deadly = 0, False

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def write_file(path, data):
    global saves, deadly
    saves += os.path.basename(path) == {file!r}
    deadly = saves == {save} and os.path.basename(path) == {file!r}
    real_write(path, data)

class Half:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        die()

def fdopen(*arguments, **options):
    file = real_open(*arguments, **options)
    return Half(file) if deadly and {part!r} == "half written" else file

def replace(*arguments):
    if deadly and {part!r} == "before the rename":
        die()
    real_replace(*arguments)

setemb.checkpoint.write_file, os.fdopen, os.replace = write_file, fdopen, replace
main()
"""


@pytest.mark.parametrize(
    ("file", "save", "part", "resumed_from"),
    [
        ("last.safetensors", 3, "half written", 4),
        ("last.safetensors", 3, "before the rename", 4),
        ("best.safetensors", 2, "half written", 6),
    ],
)
def test_a_run_that_is_killed_in_a_save_ends_with_the_same_bits(
    tiny_precomp, uninterrupted, tmp_path, file, save, part, resumed_from
):
    whole, folder = uninterrupted(0.0), tmp_path / "run"
    code = KILLED_IN_A_SAVE.format(file=file, save=save, part=part)
    killed = run(*train_arguments(tiny_precomp, folder, 0.0), code=code)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [path for path in folder.iterdir() if path.name.startswith(".")]
    assert len(left) == 1
    checkpoint = load_checkpoint(folder / "last.safetensors")  # whole
    assert checkpoint["global_step"] == resumed_from
    assert load_model(folder / "best.safetensors") is not None
    resumed = run("train", "--resume", folder)
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = (load_checkpoint(f / "last.safetensors") for f in (folder, whole))
    assert ours["global_step"] == 3 * STEPS
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert_same(ours[name], theirs[name], name)
    model = "model/model.safetensors"
    assert (folder / model).read_bytes() == (whole / model).read_bytes()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_leftovers_of_writes_alone_are_removed(tmp_path):
    kept = (".config.yaml.swp", ".config.yaml.swap.file", ".git.x", ".hidden", ".nfs0001", "last.safetensors")
    for name in (".last.safetensors.x1y2_z3w", ".config.yaml.abcdefgh", *kept):
        (tmp_path / name).write_text("")
    (tmp_path / ".folder.yaml.abcdefgh").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*kept, ".folder.yaml.abcdefgh"))


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_checkpoint(tmp_path):
    write_tiny_precomp(tmp_path)
    images = np.load(tmp_path / "train_ims.npy")
    bad = int(np.random.default_rng((0, 0)).permutation(128)[2 * 32 + 5])  # of the third batch
    images[bad] = np.nan
    np.save(tmp_path / "train_ims.npy", images)
    arguments = [f"data.dir={tmp_path}", "trainer.epochs=2", "trainer.checkpoint_every=1"]
    result = CliRunner().invoke(app, ["train", str(TINY), *arguments, "--out", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "training stopped at step 2 (epoch 0, batch 2): the loss is nan (main nan" in result.stderr
    assert f"rows {bad} of the training split hold features that are not finite" in result.stderr
    assert f"the last checkpoint, of step 2, is {tmp_path / 'run' / 'last.safetensors'}" in result.stderr
    assert "Traceback" not in result.stderr
    state = load_checkpoint(tmp_path / "run" / "last.safetensors")["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())
    result = CliRunner().invoke(app, ["train", str(TINY), *arguments[:2], "--out", str(tmp_path / "other")])
    assert result.exit_code == 1 and "there is no checkpoint yet" in result.stderr


def poisoned(monkeypatch, step: int, where: str) -> None:
    """From a step on, a parameter's gradient, or the loss, is not finite."""
    from setemb.training import RetrievalModule

    real = RetrievalModule.training_step

    def training_step(self, batch, number):
        loss = real(self, batch, number)
        if self.global_step >= step and where == "loss":
            loss = loss * torch.inf
            self.losses["loss"] = loss.detach()
        return loss

    def on_after_backward(self):
        if self.global_step >= step and where == "gradient":
            self.model.image_sets.slots.grad[0, 0] = torch.nan

    monkeypatch.setattr(RetrievalModule, "training_step", training_step)
    monkeypatch.setattr(RetrievalModule, "on_after_backward", on_after_backward)


@pytest.mark.parametrize(("where", "what"), [("loss", "the loss is inf"), ("gradient", "a gradient is not finite")])
def test_what_goes_wrong_in_a_step_does_not_reach_the_weights(tiny_precomp, tmp_path, monkeypatch, where, what):
    poisoned(monkeypatch, 6, where)
    config = load_config(TINY, [f"data.dir={tiny_precomp}", "trainer.epochs=2", "trainer.checkpoint_every=1"])
    with pytest.raises(FloatingPointError, match=rf"stopped at step 6 \(epoch 1, batch 2\): {what}") as caught:
        train_precomp(config, tmp_path / "run")
    message = str(caught.value)
    indices = np.random.default_rng((0, 1)).permutation(128)[64:96].tolist()
    assert f"its images are rows {', '.join(map(str, indices[:8]))} and 24 more of the training split" in message
    assert "the last checkpoint, of step 6, is" in message
    monkeypatch.undo()
    config = load_config(tmp_path / "run" / "config.yaml")
    train_precomp(config, tmp_path / "run", resume=True)
    assert load_checkpoint(tmp_path / "run" / "last.safetensors")["global_step"] == 2 * STEPS


@pytest.mark.parametrize("kind", ["info_nce", "triplet"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_learns_what_float32_learns(tiny_precomp, tmp_path, precision, kind):
    finals = []
    for name in (precision, "32"):
        settings = [f"trainer.precision={name}", "trainer.epochs=6", f"loss.kind={kind}", "loss.hardest_fraction=0"]
        train_precomp(load_config(TINY, [f"data.dir={tiny_precomp}", *settings]), tmp_path / name)
        rows = [row["loss/main"] for row in read_metrics(tmp_path / name) if "loss/main" in row]
        finals.append(np.mean(rows[-4:]))
        assert finals[-1] < 0.8 * rows[0]
    assert finals[0] == pytest.approx(finals[1], rel=0.1)
    scaler = load_checkpoint(tmp_path / precision / "last.safetensors").get("MixedPrecision", {})
    assert ("scale" in scaler) == (precision == "16-mixed")
    assert scaler.get("scale", 1.0) > StopAtNonFinite.SMALLEST_SCALE


def test_float16_on_a_cpu_is_float16(tiny_precomp, tmp_path, monkeypatch):
    """Lightning would take bfloat16."""
    seen = set()
    real = torch.nn.GRU.forward

    def forward(self, *arguments):
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return real(self, *arguments)

    monkeypatch.setattr(torch.nn.GRU, "forward", forward)
    settings = [f"data.dir={tiny_precomp}", "trainer.precision=16-mixed", "trainer.epochs=1"]
    train_precomp(load_config(TINY, settings), tmp_path / "run")
    assert seen == {torch.float16}


def test_float16_leaves_out_steps_that_overflow_and_stops_where_all_do(tiny_precomp, tmp_path, monkeypatch):
    poisoned(monkeypatch, 2, "gradient")
    settings = [
        f"data.dir={tiny_precomp}",
        "trainer.precision=16-mixed",
        "trainer.epochs=20",
        "trainer.validate_every=20",
    ]
    with pytest.raises(FloatingPointError, match=r"gradients overflow float16 even at a scale of") as caught:
        train_precomp(load_config(TINY, [*settings, "trainer.checkpoint_every=1"]), tmp_path / "run")
    assert "stopped at step 33 " in str(caught.value)  # 2 + 31 halvings from 2^16 to 2^-15
    state = load_checkpoint(tmp_path / "run" / "last.safetensors")["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())


@pytest.mark.parametrize(("warmup", "collapses"), [(0, True), (1, False)], ids=["at once", "with the warm-up default"])
def test_collapse_is_said_and_the_warm_up_avoids_it(tiny_precomp, tmp_path, warmup, collapses):
    assert LossConfig().warmup_epochs == 1
    settings = [f"data.dir={tiny_precomp}", f"loss.warmup_epochs={warmup}", "optimizer.lr=1e-2"]
    settings += ["trainer.epochs=40", "trainer.validate_every=40"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_precomp(load_config(TINY, settings), tmp_path / "run")
    said = [str(warning.message) for warning in caught if "collapsed" in str(warning.message)]
    assert len(said) == collapses
    if collapses:
        assert "the loss stayed at 0.4" in said[0] and "(loss.warmup_epochs, now 0)" in said[0]
    rsum = next(row["dev/rsum"] for row in read_metrics(tmp_path / "run") if "dev/rsum" in row)
    assert (rsum < 520) == collapses  # 455 and 587 when this was written


def test_what_looks_like_collapse_and_is_not():
    """A loss that falls through twice the margin; one that is noisy there; one that stays elsewhere."""
    rng = np.random.default_rng(0)
    for losses, stuck in (
        (np.full(100, 0.4), True),
        (0.4 + 0.02 * rng.normal(size=100), True),
        (np.linspace(0.44, 0.36, 100), False),
        (np.full(100, 0.3), False),
        (np.full(99, 0.4), False),
    ):
        watch = WarnOfCollapse(LossConfig(margin=0.2))
        watch.losses.extend(losses.tolist())
        assert watch.stuck() == stuck
