"""Raw pictures with the Karpathy file: what a batch holds, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from setemb.config import DataConfig
from setemb.data import karpathy, pictures
from setemb.data.captioned import CaptionedImages
from setemb.data.captions import TokenCaptions, WordCaptions
from setemb.data.folder import check_folder, find_format, open_split
from setemb.data.karpathy import KarpathyDataset
from setemb.data.vocab import Vocabulary
from setemb.inputs import read_picture

pytest.importorskip("PIL")
from PIL import Image

from tests.model.folders import COLOURS, picture_bytes, write_index, write_karpathy, write_precomp


def with_captions(data: CaptionedImages) -> CaptionedImages:
    data.captions = WordCaptions(data.texts, Vocabulary.build(data.texts))
    return data


def texts_of(data: CaptionedImages, batch: dict[str, torch.Tensor]) -> list[str]:
    words = np.array(data.captions.vocabulary.words)
    return [" ".join(words[row[mask]][1:-1]) for row, mask in zip(batch["texts"], batch["text_mask"], strict=True)]


def test_karpathy_splits_captions_and_pictures(tmp_path):
    entries = write_karpathy(tmp_path)
    assert find_format(tmp_path) == "karpathy"
    train = with_captions(KarpathyDataset(tmp_path, "train+restval", size=16))
    assert [train.names[i] for i in (0, 4)] == ["train2014/train2014_000000.jpg", "val2014/val2014_000004.jpg"]
    assert train.texts == [s["raw"] for e in entries[:6] for s in e["sentences"]]
    assert len(train) == 6
    dev = with_captions(KarpathyDataset(tmp_path, "dev", size=16, text="tokens"))
    assert dev.texts[0] == "a blue picture, number 6, text 0"
    batch = dev.batch([2, 0], None)
    assert batch["images"].shape == (2, 3, 16, 16) and batch["images"].dtype == torch.uint8
    assert batch["image_group"].tolist() == [2, 0]
    assert batch["caption_group"].tolist() == [2] * 7 + [0] * 5  # COCO has images of more captions
    assert texts_of(dev, batch)[6:8] == ["a red picture number 8 text 6", "a blue picture number 6 text 0"]
    for row, colour in ((2, "red"), (0, "blue")):
        mean = batch["images"][[2, 0].index(row)].float().mean((1, 2))
        torch.testing.assert_close(mean, torch.tensor(COLOURS[colour]).float(), atol=6.0, rtol=0)
    five = KarpathyDataset(tmp_path, "test", size=16, caption_limit=5)
    assert five.offsets.tolist() == [0, 5, 10]


def test_training_pictures_are_drawn_and_evaluation_is_not(tmp_path):
    write_karpathy(tmp_path)
    data = with_captions(KarpathyDataset(tmp_path, "train", size=16, captions_per_batch=6))
    first, again, other = (data.batch([0, 3], np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["images"], other["images"])
    assert first["caption_group"].tolist() == [0] * 5 + [3] * 6  # image 0 has no sixth caption
    assert torch.equal(data.batch([0], None)["images"], data.batch([0], None)["images"])


def test_crops_are_of_the_size_and_place_that_is_said():
    ramp = np.zeros((40, 80, 3), np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(80), np.arange(40)[:, None]  # red is x, green is y
    whole = Image.fromarray(ramp)
    middle = pictures.crop(whole, 35, 0.08, None)  # 35 of 40 in the middle, pixel for pixel
    np.testing.assert_allclose(middle[0][0], np.arange(35) + 22.5, atol=1)
    np.testing.assert_allclose(middle[1][:, 0], np.arange(35) + 2.5, atol=1)
    squeezed = pictures.crop(whole, 40, 0.08, None, whole=True)
    np.testing.assert_allclose(squeezed[0][0], np.arange(40) * 2 + 0.5, atol=1)
    np.testing.assert_allclose(squeezed[1][:, 0], np.arange(40), atol=1)
    rng, areas, ratios, mirrored = np.random.default_rng(0), [], [], 0
    for _ in range(400):
        x, y = (channel.astype(float) for channel in pictures.crop(whole, 32, 0.25, rng)[:2])
        w, h = (np.ptp(x[16]) + 1) * 32 / 31, (np.ptp(y[:, 16]) + 1) * 32 / 31
        areas.append(w * h / 3200)
        ratios.append(w / h)
        mirrored += x[0, 0] > x[0, -1]
    assert 0.2 < min(areas) < 0.3 and max(areas) > 0.55  # the whole is wider than 4:3, so no crop is all of it
    assert 0.7 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.6
    assert 150 < mirrored < 250
    for size, smallest, message in ((0, 0.5, "picture_size must be at least 1"), (8, 0.0, "smallest_crop must lie in")):
        with pytest.raises(ValueError, match=message):
            pictures.check_size(size, smallest)


def test_pictures_of_all_modes_become_upright_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new("RGB", (6, 4), (200, 10, 10)).convert(mode).save(path)
        assert pictures.decode(path, "here").mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.decode(tmp_path / "turned.jpg", "here").size == (4, 6)
    with pytest.raises(ValueError, match="row 3 cannot be read as a picture"):
        pictures.decode(b"no picture", "row 3")


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_grey_of_16_bits_keeps_its_shades(tmp_path, mode):
    shades = np.array([[0, 257 * 100, 65535], [128, 129, 65278]], dtype=">u2" if mode == "I;16B" else "<u2")
    Image.frombytes(mode, (3, 2), shades.tobytes()).save(tmp_path / "grey.tif")
    with Image.open(tmp_path / "grey.tif") as written:
        assert written.mode == mode
    expected = [[0, 100, 255], [0, 1, 254]]
    assert np.asarray(pictures.decode(tmp_path / "grey.tif", "here"))[..., 1].tolist() == expected
    assert look(tmp_path, (tmp_path / "grey.tif").read_bytes(), deep=True) is None


@pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32)])
def test_pictures_without_a_known_white_are_refused(tmp_path, mode, dtype):
    Image.fromarray(np.full((4, 4), 1000, dtype)).save(tmp_path / "p.tif")
    with pytest.raises(ValueError, match=rf"row 3 cannot be read .*must be of 8 or 16 bits, got .*\(mode {mode}\)"):
        pictures.decode(tmp_path / "p.tif", "row 3")
    assert f"(mode {mode})" in look(tmp_path, (tmp_path / "p.tif").read_bytes())


def test_pictures_that_are_asked_keep_their_shades_as_well(tmp_path):
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as written:
        assert written.mode == "I;16"
    assert (read_picture(tmp_path / "grey.png", 8) == 100).all()
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=rf"the picture is no picture that can be read: .*\(mode {mode}\)"):
            read_picture(Image.new(mode, (4, 4)), 8)


def test_formats_with_programs_of_their_own_are_not_opened(tmp_path, monkeypatch):
    """EPS is a program; Pillow has Ghostscript run it."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    picture_of = Image.new("RGB", (6, 4))
    picture_of.save(tmp_path / "p.eps")
    with Image.open(tmp_path / "p.eps") as written:
        assert written.format == "EPS"
    with pytest.raises(ValueError, match="cannot identify image file"):
        pictures.decode(tmp_path / "p.eps", "here")
    assert "cannot identify image file" in look(tmp_path, (tmp_path / "p.eps").read_bytes(), deep=True)
    for kind in pictures.FORMATS:
        picture_of.save(tmp_path / "picture", kind)
        assert pictures.decode(tmp_path / "picture", "here").size == (6, 4)


def test_what_is_wrong_with_a_picture(tmp_path):
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        whole = picture_bytes(0, kind=kind)
        for deep in (False, True):
            assert look(tmp_path, whole, deep) is None, kind
        assert "cannot be read as a picture" in look(tmp_path, whole[: len(whole) // 2])
    assert look(tmp_path, b"") == "the file is empty"
    assert "cannot be read" in look(tmp_path, b"not a picture at all")
    png = picture_bytes(0, kind="PNG")
    place = png.index(b"IDAT") + 8
    inside = png[:place] + bytes(b ^ 0x5A for b in png[place : place + 40]) + png[place + 40 :]
    assert look(tmp_path, inside) is None  # its ends are whole
    assert "cannot be read as a picture" in look(tmp_path, inside, deep=True)


def look(folder: Path, content: bytes, deep: bool = False) -> str | None:
    (folder / "file").write_bytes(content)
    with (folder / "file").open("rb") as file:
        return pictures.whats_wrong(file, deep)


def test_checks_read_the_ends_of_a_picture_alone(tmp_path, monkeypatch):
    """Of a large folder, decoding everything would take hours."""
    write_karpathy(tmp_path)
    loads = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: loads.append(self))
    KarpathyDataset(tmp_path, "train")
    assert loads == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[1].pop("filename"), r"dataset_coco\.json, image 1: 'filename' is missing"),
        (lambda e: e[1].pop("split"), r"dataset_coco\.json, image 1: 'split' is missing"),
        (lambda e: e[2]["sentences"][1].pop("raw"), r"dataset_coco\.json, image 2: 'raw' is missing"),
        (lambda e: e.__setitem__(2, "x"), r"dataset_coco\.json, image 2: it reads 'x'"),
        (lambda e: e[1].update(sentences=[]), r"dataset_coco\.json, image 1 \(.*000001\.jpg\): it has no caption"),
        (lambda e: e[0]["sentences"][3].update(raw=" "), r"image 0 \(.*000000\.jpg\): caption 3 is empty"),
        (lambda e: e[2].update(filename=e[0]["filename"]), r"image 2: .*000000\.jpg is image 0 already"),
        (lambda e: e[3].update(filename="gone.jpg"), r"image 3: .*train2014/gone\.jpg: No such file"),
        (lambda e: e.clear(), r"dataset_coco\.json lists no images"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, message):
    entries = write_karpathy(tmp_path)
    change(entries)
    write_index(tmp_path, entries)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        KarpathyDataset(tmp_path, "train")


def test_a_broken_file_or_folder_is_named(tmp_path):
    entries = write_karpathy(tmp_path)
    path = tmp_path / "dataset_coco.json"
    whole = path.read_text()
    for end in (1, 20, len(whole) // 2, len(whole) - 1):
        path.write_text(whole[:end])
        with pytest.raises(ValueError, match=r"dataset_coco\.json was cut short or is no JSON: .*line 1 column"):
            KarpathyDataset(tmp_path, "train")
    for content, message in (
        (whole.replace('}, {"filepath"', '} {"filepath"', 1), "is no JSON: Expecting ',' or ']'"),
        ('{"a": 1 "images": []}', "is no JSON: Expecting ',' or '}'"),
        ("[]", "is no JSON: Expecting '{'"),
        ("{}", "lists no images"),
        ('{"images": []}', "lists"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            KarpathyDataset(tmp_path, "train")
    path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(ValueError, match=r"dataset_coco\.json is not UTF-8"):
        KarpathyDataset(tmp_path, "train")
    path.write_text(json.dumps({"images": entries}, indent=2))
    with pytest.raises(ValueError, match="has no split 'dive'; it has train, restval, val, test"):
        KarpathyDataset(tmp_path, "dive")
    broken = tmp_path / "images" / "val2014" / "val2014_000007.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    KarpathyDataset(tmp_path, "train")
    with pytest.raises(ValueError, match=r"dataset_coco\.json, image 7: .*val2014_000007\.jpg: cannot be read"):
        KarpathyDataset(tmp_path, "dev")
    later = with_captions(KarpathyDataset(tmp_path, "dev", check=False))
    with pytest.raises(ValueError, match=r"dataset_coco\.json, image 7: .*val2014_000007\.jpg cannot be read"):
        later.batch([1], None)
    (tmp_path / "dataset_other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must hold one dataset\*\.json, got dataset_coco\.json, dataset_other\.json"):
        KarpathyDataset(tmp_path, "train")


def test_the_index_is_that_of_json(tmp_path):
    """Read an image at a time, whatever stands around the list."""
    content = {"a": {"images": [1]}, "images": [{"k": ']}\\"'}, {}, [1, {"x": []}], "s", 3.5, None], "z": [[]]}
    for text in (json.dumps(content), json.dumps(content, indent=3), " " + json.dumps(content, separators=(",", ":"))):
        assert list(karpathy._images(text)) == content["images"]


def test_pictures_are_found_beside_the_file(tmp_path):
    write_karpathy(tmp_path, pictures="deep")
    (tmp_path / "empty").mkdir()
    data = KarpathyDataset(tmp_path, "train", check=False)
    assert data.root == tmp_path / "deep"
    os.rename(tmp_path / "deep", tmp_path.parent / f"{tmp_path.name}-elsewhere")
    with pytest.raises(FileNotFoundError, match=r"image 0: .*No such file"):
        KarpathyDataset(tmp_path, "train")
    assert len(KarpathyDataset(tmp_path, "train", images=tmp_path.parent / f"{tmp_path.name}-elsewhere")) == 4


def test_tokens_of_a_language_model_are_hit_as_words_are():
    def tokenize(texts):
        rows = [[101, *range(1000, 1000 + len(text.split())), 102] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return ids, ids > 0

    captions = TokenCaptions(["w " * 10, "w " * 4] * 1000, tokenize, drop=0.2, mask_id=103, vocab_size=50)
    clean, mask = captions.batch([0, 1], None)
    assert clean.shape == (2, 12) and mask.sum(1).tolist() == [12, 6]
    ids, mask = captions.batch(range(0, 2000, 2), np.random.default_rng(0))
    assert (12 - mask.sum(1).float()).mean().item() == pytest.approx(10 * 0.2 * 0.4, rel=0.1)
    assert (ids == 103).sum(1).float().mean().item() == pytest.approx(10 * 0.2 * 0.5, rel=0.1)
    assert ((ids < 50) & mask).sum(1).float().mean().item() == pytest.approx(10 * 0.2 * 0.1, rel=0.2)
    assert (ids[:, 0] == 101).all() and (ids[torch.arange(1000), mask.sum(1) - 1] == 102).all()


def test_a_folder_is_opened_as_what_it_is(tmp_path):
    write_precomp(tmp_path / "p")
    write_karpathy(tmp_path / "k")
    settings = DataConfig(dir=str(tmp_path / "p"), captions_per_image=2)
    assert open_split(settings, "train", training=True).captions_per_batch == 2
    assert open_split(settings, "dev").captions_per_batch == 5
    settings = DataConfig(dir=str(tmp_path / "k"), picture_size=24, caption_limit=3, captions_per_image=3)
    data = open_split(settings, "dev")
    assert (data.kind, data.size, data.offsets.tolist()) == ("pictures", 24, [0, 3, 6, 9])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_format(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no image features and no captions: it must hold .*_ims\.npy"):
        find_format(tmp_path)
    with pytest.raises(ValueError, match=r"data\.dir must name the folder"):
        open_split(DataConfig(), "train")


@pytest.mark.parametrize("name", ["val", "validation"])
@pytest.mark.parametrize("kind", ["precomp", "karpathy"])
def test_checking_and_training_agree_on_what_dev_is(tmp_path, kind, name):
    if kind == "precomp":
        write_precomp(tmp_path)
        for end in ("ims.npy", "caps.txt"):
            (tmp_path / f"dev_{end}").rename(tmp_path / f"{name}_{end}")
    else:
        write_karpathy(tmp_path, {"train": 4, name: 2})
    assert check_folder(tmp_path).problems == []
    assert len(open_split(DataConfig(dir=str(tmp_path)), "dev")) == 2
    with pytest.raises((ValueError, FileNotFoundError), match=r"no split 'test'|no image features .*test_ims"):
        open_split(DataConfig(dir=str(tmp_path)), "test")
