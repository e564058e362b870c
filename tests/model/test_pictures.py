"""Pictures through a backbone: timm's models, and training from raw pictures end to end.

Wheels of torchvision, which timm imports, are built for one kind of torch and do not load beside another. So what is
ours is tested with a stand-in for timm; timm's own models are tested where it works.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("omegaconf")
pytest.importorskip("PIL")
pytest.importorskip("typer")

from PIL import Image
from typer.testing import CliRunner

from setemb.cli import app
from setemb.config import DataConfig, ModelConfig, OptimizerConfig, load_config
from setemb.data.folder import open_split
from setemb.inputs import read_query, takes_pictures
from setemb.model import SetEmbedder
from setemb.modules.backbones import TimmBackbone
from setemb.training import evaluate_precomp, load_model, parameter_groups, read_metrics, train_precomp
from tests.model.folders import write_karpathy, write_precomp
from tests.model.stand_in import TinyNetwork, timm

__all__ = ["timm"]

TINY = Path(__file__).parents[1] / "data" / "tiny.yaml"


def test_a_backbone_says_what_it_gives_and_what_is_wrong(timm, tmp_path):
    backbone = TimmBackbone("tiny.one", "random")
    assert (backbone.channels, backbone.mean, backbone.std) == (8, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    x = torch.randn(2, 3, 8, 12)
    assert backbone(x).shape == (2, 8, 2, 3)
    assert timm.calls[0] == {"pretrained": False, "pretrained_cfg_overlay": None}
    source = TinyNetwork()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    again = TimmBackbone("tiny", str(tmp_path / "weights.pth"))
    assert torch.equal(again.network.conv.weight, source.conv.weight)
    assert not any("classifier" in name for name in again.state_dict())
    with pytest.raises(ValueError, match=r"backbone must be a model of timm, got 'other'$"):
        TimmBackbone("other")
    with pytest.raises(ValueError, match="got 'tiny_2'; near: tiny"):
        TimmBackbone("tiny_2")
    with pytest.raises(ValueError, match=r"backbone tiny: its weights \(pretrained\) cannot be had: no network"):
        TimmBackbone("tiny")
    with pytest.raises(ValueError, match=r'weights must be "pretrained", "random" or a file, got .*gone'):
        TimmBackbone("tiny", str(tmp_path / "gone"))


@pytest.mark.parametrize("error", [None, RuntimeError("operator torchvision::nms does not exist")])
def test_a_missing_timm_names_the_extra(monkeypatch, error):
    monkeypatch.setitem(sys.modules, "timm", None)
    message = r'needs the package .timm.: pip install "setemb\[pictures\]"'
    if error is not None:
        monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(error))
        message = "the package 'timm' does not work here: operator torchvision::nms does not exist"
    with pytest.raises(ImportError, match=message):
        TimmBackbone("resnet152.tv_in1k")


def picture_model(**image: object) -> SetEmbedder:
    torch.manual_seed(0)
    config = ModelConfig(dim=8)
    config.image.encoder, config.image.backbone, config.image.weights = "pictures", "tiny", "random"
    for key, value in image.items():
        setattr(config.image, key, value)
    config.text.encoder, config.text.dim_in, config.sets.dim_head = "features", 5, 4
    return SetEmbedder(config)


def test_pictures_of_bytes_are_normalised_and_cells_dropped_in_training(timm):
    encoder = picture_model(cell_drop=0.25, dropout=0.0).eval().image_encoder
    pictures = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(t)[:, None, None] for t in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5)))
    local, _, mask = encoder(pictures)
    torch.testing.assert_close(local, encoder((pictures / 255 - mean) / std)[0])
    assert local.shape == (3, 16, 8) and mask is None
    encoder.train()
    encoder.regions.eval()
    torch.manual_seed(0)
    dropped = encoder(pictures)[0]
    assert dropped.shape == (3, 12, 8)  # the backbone is frozen: in evaluation mode, cells as above
    for own, cells in zip(dropped, local, strict=True):
        places = [int((cells - cell).abs().sum(1).argmin()) for cell in own]
        assert places == sorted(set(places))
        torch.testing.assert_close(own, cells[places])
    for bad, message in ((pictures[0], r"must have shape \[B, 3, H, W\]"), (pictures[:, :2], "must have shape")):
        with pytest.raises(ValueError, match=message):
            encoder(bad)
    with pytest.raises(ValueError, match="pictures have no mask"):
        encoder(pictures, torch.ones(3, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"cell_drop must lie in \[0, 1\), got 1"):
        picture_model(cell_drop=1.0)


def test_parts_have_their_own_learning_rates(timm):
    config = OptimizerConfig(lr=1.0, image_factor=0.5, text_factor=0.25, sets_factor=0.125, backbone_factor=0.01)
    for frozen in (True, False):
        model = picture_model(frozen=frozen)
        rates = {p: group["lr"] for group in parameter_groups(model, config) for p in group["params"]}
        backbone = list(model.image_encoder.backbone.parameters())
        assert {rates.get(p) for p in backbone} == ({None} if frozen else {0.01})
        assert {rates[p] for p in model.image_encoder.regions.parameters()} == {0.5}
        assert {rates[p] for p in model.text_encoder.parameters()} == {0.25}
        assert {rates[p] for p in model.image_sets.parameters()} == {0.125}
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == len(rates) == sum(len(g["params"]) for g in parameter_groups(model, config))


@pytest.mark.parametrize("frozen", [True, False])
def test_training_from_raw_pictures(timm, tmp_path, monkeypatch, frozen):
    write_karpathy(tmp_path / "data", {"train": 24, "restval": 8, "val": 8, "test": 8}, pictures="../elsewhere")
    monkeypatch.chdir(tmp_path)
    settings = [
        "data.dir=data",
        "data.images=elsewhere",
        "data.train_split=train+restval",
        "data.batch_size=8",
        "data.picture_size=16",
        "data.workers=2",
        "model.image.encoder=pictures",
        "model.image.backbone=tiny",
        "model.image.weights=random",
        f"model.image.frozen={str(frozen).lower()}",
        "trainer.epochs=8",
        "loss.kind=info_nce",
        "optimizer.backbone_factor=1",
    ]
    config = load_config(TINY, settings)
    model = load_model(train_precomp(config, tmp_path / "run"))
    monkeypatch.chdir("/")
    again = load_config(tmp_path / "run" / "config.yaml", ["trainer.epochs=9"])
    train_precomp(again, tmp_path / "run", resume=True)
    rows = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert sum(rows[-4:]) < 0.95 * sum(rows[:4])
    report = evaluate_precomp(tmp_path / "run", config.data, "dev")
    assert report.rsum == pytest.approx(best_rsum(tmp_path / "run"))
    norm = model.image_encoder.backbone.network.norm
    assert (norm.num_batches_tracked == 0) == frozen
    assert torch.equal(norm.weight, torch.ones(8)) == frozen


def best_rsum(run: Path) -> float:
    """What training reported, a float32."""
    return max(row["dev/rsum"] for row in read_metrics(run) if "dev/rsum" in row)


SETTINGS = [
    "data.batch_size=8",
    "data.picture_size=12",
    "data.whole_picture=true",
    "data.caption_limit=3",
    "data.captions_per_image=3",
    "data.dev_split=val+restval",
    "model.image.encoder=pictures",
    "model.image.backbone=tiny",
    "model.image.weights=random",
    "trainer.epochs=2",
    "loss.kind=info_nce",
]


@pytest.fixture
def run(timm, tmp_path: Path) -> Path:
    """Of pictures, with settings other than the defaults that change what is evaluated."""
    write_karpathy(tmp_path / "data", {"train": 16, "restval": 6, "val": 10}, pictures="../elsewhere")
    data = [f"data.dir={tmp_path / 'data'}", f"data.images={tmp_path / 'elsewhere'}"]
    train_precomp(load_config(TINY, [*data, *SETTINGS]), tmp_path / "run")
    return tmp_path / "run"


def evaluated(*arguments: object) -> dict[str, object]:
    file = Path(str(arguments[0])).parent / "report.json"
    result = CliRunner().invoke(app, ["eval", *map(str, arguments), "--json", str(file)])
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text())


def test_a_run_is_evaluated_as_it_was_in_training(run, tmp_path):
    report, best = evaluated(run), best_rsum(run)
    assert report["rsum"] == pytest.approx(best) and report["split"] == "val+restval"
    for place in (run / "model", run / "best.safetensors"):
        assert evaluated(place) == report
    without = evaluated(run, "data.caption_limit=0")
    assert without["split"] == "val+restval" and without["rsum"] != pytest.approx(best)  # 5 or 7 captions, not 3
    (tmp_path / "copy").mkdir()
    shutil.copy(run / "best.safetensors", tmp_path / "copy")
    assert evaluated(tmp_path / "copy") == report
    moved = shutil.copytree(tmp_path / "data", tmp_path / "moved")
    result = CliRunner().invoke(app, ["eval", str(run), f"data.dir={moved}"])  # not the pictures of another folder
    assert result.exit_code == 2 and f"{moved}/" in result.stderr and "No such file" in result.stderr
    shutil.move(tmp_path / "elsewhere", moved / "images")
    assert evaluated(run, f"data.dir={moved}") == report


def test_a_model_by_itself_says_how_it_looks_at_pictures(run, tmp_path):
    alone = shutil.copytree(run / "model", tmp_path / "alone" / "model")
    model = load_model(alone)
    assert (model.config.image.picture_size, model.config.image.whole_picture) == (12, True)
    given = [f"data.dir={tmp_path / 'data'}", f"data.images={tmp_path / 'elsewhere'}"]
    limits = ["data.caption_limit=3", "--split", "val+restval"]
    report = evaluated(run)
    assert evaluated(alone, *given, *limits) == report
    model.config.image.picture_size, model.config.image.whole_picture = 0, False  # as older ones are
    model.save_pretrained(tmp_path / "old")
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "old"), *given])
    assert result.exit_code == 2 and "give data.picture_size=..." in result.stderr
    sizes = ["data.picture_size=12", "data.whole_picture=true"]
    assert evaluated(tmp_path / "old", *given, *sizes, *limits) == report
    with pytest.raises(ValueError, match=r"does not say at which size .*set image\.picture_size in its config\.json"):
        load_model(tmp_path / "old").encode_image(Image.new("RGB", (30, 20)))


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_of_pictures_is_asked_with_pictures(timm, tmp_path, whole):
    write_karpathy(tmp_path)
    model = picture_model(picture_size=12, whole_picture=whole).eval()
    data = open_split(DataConfig(dir=str(tmp_path), picture_size=12, whole_picture=whole), "dev")
    with torch.inference_mode():
        expected = model.encode_image({"images": data.read(np.arange(3), None)}).embeddings
    files = [data.root / name for name in data.names]
    opened = [Image.open(file) for file in files]
    for asked in (files, opened, [np.asarray(picture) for picture in opened]):
        assert torch.equal(model.encode_image(asked).embeddings, expected)
    assert torch.equal(model.encode_image(str(files[1])).embeddings, model.encode_image(opened[1]).embeddings)
    uploaded = read_query(model, io.BytesIO(files[1].read_bytes()), 10**6)  # as the server does
    assert takes_pictures(model)
    assert torch.equal(model.encode_image(uploaded).embeddings, model.encode_image(opened[1]).embeddings)
    for wrong in (np.zeros((3, 8), np.float32), torch.zeros(3, 8)):
        with pytest.raises(ValueError, match=r"expected pictures uint8 \[H, W, 3\], got float32 \[3, 8\]"):
            model.encode_image(wrong)
    np.save(tmp_path / "features.npy", np.zeros((3, 8), np.float32))
    with pytest.raises(ValueError, match=r"features\.npy is no picture that can be read"):
        model.encode_image(tmp_path / "features.npy")


def test_a_folder_of_pictures_is_indexed_and_searched(run, tmp_path):
    from setemb.index import SetIndex

    data = shutil.copytree(tmp_path / "data", tmp_path / "collection")
    shutil.move(tmp_path / "elsewhere", data / "images")
    for of, count in (("images", 10), ("texts", 52)):
        arguments = ["index", str(run), "--data", str(data), "--out", str(tmp_path / of), "--of", of]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0 and f"{count} {of}" in result.output, result.output
    split = open_split(DataConfig(dir=str(data)), "dev")
    asked = data / "images" / split.names[7]
    result = CliRunner().invoke(app, ["search", "--index", str(tmp_path / "images"), "--image", str(asked), "--json"])
    assert result.exit_code == 0, result.output
    (answer,) = json.loads(result.stdout)
    assert answer["results"][0]["id"] == "dev/7"
    assert answer["results"][0]["captions"] == split.texts[35:40]
    texts = SetIndex.load(tmp_path / "texts")
    assert [(texts.item(i).id, texts.item(i).meta) for i in (36, 51)] == [
        ("dev/7/1", {"caption": split.texts[36], "image": "dev/7"}),
        ("dev/9/6", {"caption": split.texts[51], "image": "dev/9"}),  # the last image has two more
    ]
    write_precomp(tmp_path / "regions")
    wrong = ["index", str(run), "--data", str(tmp_path / "regions"), "--out", str(tmp_path / "no")]
    result = CliRunner().invoke(app, wrong)
    assert result.exit_code == 2 and "model.image.encoder takes pictures" in result.stderr


def test_what_does_not_fit_is_said_before_training(timm, tmp_path):
    write_karpathy(tmp_path / "pictures")
    write_precomp(tmp_path / "regions")
    with pytest.raises(ValueError, match=r"model\.image\.encoder takes pictures, .*regions has regions"):
        train(
            tmp_path / "regions",
            "model.image.encoder=pictures",
            "model.image.backbone=tiny",
            "model.image.weights=random",
        )
    with pytest.raises(ValueError, match=r"model\.image\.encoder takes regions, .*pictures has pictures"):
        train(tmp_path / "pictures")
    with pytest.raises(ValueError, match=r"data\.format\" must be one of auto, precomp"):
        train(tmp_path / "pictures", "data.format=none")
    assert open_split(load_config(TINY, [f"data.dir={tmp_path / 'pictures'}"]).data, "dev").kind == "pictures"


def train(folder: Path, *settings: str) -> None:
    settings = (f"data.dir={folder}", "data.batch_size=2", "trainer.epochs=1", *settings)
    train_precomp(load_config(TINY, list(settings)), folder / "run")


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet152.tv_in1k", 58_143_808), ("resnext101_32x8d.fb_wsl_ig1b_ft_in1k", 86_742_336)]
)
def test_the_published_backbones_are_those_of_timm(name, parameters):
    """Their layers without the classifier, as many parameters as the papers' networks have."""
    pytest.importorskip("timm", exc_type=ImportError)
    backbone = TimmBackbone(name, "random").eval()
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    with torch.inference_mode():
        assert backbone(torch.zeros(1, 3, 64, 96)).shape == (1, 2048, 2, 3)
    assert (backbone.channels, backbone.mean) == (2048, (0.485, 0.456, 0.406))


def test_other_models_of_timm_and_files_of_weights(tmp_path):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone("test_resnet", str(tmp_path / "weights.pth")).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone(x), source.eval().forward_features(x))
    for name, size in (("test_convnext", 64), ("test_vit", 160)):
        other = TimmBackbone(name, "random")
        cells = other(torch.randn(1, 3, size, size))
        assert cells.shape[:2] == (1, other.channels) and cells.shape[2] == cells.shape[3] > 1
    torch.save({"other": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"backbone test_resnet: its weights .* cannot be had"):
        TimmBackbone("test_resnet", str(tmp_path / "weights.pth"))
