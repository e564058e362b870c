"""``setemb index`` and ``setemb search`` on a folder of the precomputed format, with a model that reads words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("omegaconf")
pytest.importorskip("lightning")


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Twelve images of 3 regions and five captions each, and an untrained model."""
    from setemb.config import ModelConfig
    from setemb.data.vocab import Vocabulary
    from setemb.model import SetEmbedder

    rng = np.random.default_rng(0)
    np.save(tmp_path / "dev_ims.npy", rng.normal(size=(12, 3, 8)).astype(np.float16))
    captions = [f"a picture of thing {i}, said {j} times" for i in range(12) for j in range(5)]
    (tmp_path / "dev_caps.txt").write_text("\n".join(captions) + "\n")
    vocabulary = Vocabulary.build(captions, 1)
    config = ModelConfig(dim=16)
    config.image.dim_in, config.text.vocab_size = 8, len(vocabulary)
    torch.manual_seed(0)
    SetEmbedder(config, vocabulary).save_pretrained(tmp_path / "model")
    return tmp_path


def call(*arguments: object) -> tuple[int, str]:
    from typer.testing import CliRunner

    from setemb.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_index_and_search_a_folder(collection: Path) -> None:
    index = collection / "index"
    code, output = call("index", collection / "model", "--data", collection, "--out", index, "--half")
    assert code == 0, output
    assert "12 images" in output
    code, output = call("search", "--index", index, "-k", "20", "--json", "thing 3")
    assert code == 0, output
    (result,) = json.loads(output)
    assert sorted(hit["id"] for hit in result["results"]) == sorted(f"dev/{i}" for i in range(12))
    first = result["results"][0]
    assert first["captions"][4] == f"a picture of thing {first['row']}, said 4 times"
    code, output = call("search", "--index", index, "--html", collection / "page.html", "thing 3")
    assert code == 0, output
    assert "dev/" in (collection / "page.html").read_text()


def test_a_picture_may_be_the_query_and_texts_the_answer(collection: Path) -> None:
    """With features in a file, as this model takes them. What is asked is the best answer to itself."""
    images, texts = collection / "images", collection / "texts"
    for of, out in (("images", images), ("texts", texts)):
        code, output = call("index", collection / "model", "--data", collection, "--out", out, "--of", of)
        assert code == 0, output
        assert f"{60 if of == 'texts' else 12} {of} in" in output
    np.save(collection / "query.npy", np.load(collection / "dev_ims.npy")[7])
    code, output = call(
        "search", "--index", images, "--image", collection / "query.npy", "-k", "2", "--json", "thing 3"
    )
    assert code == 0, output
    by_text, by_image = json.loads(output)
    assert by_text["query"] == "thing 3"
    assert by_image["query"] == str(collection / "query.npy")
    assert by_image["results"][0]["id"] == "dev/7"
    said = "a picture of thing 3, said 2 times"
    code, output = call("search", "--index", texts, "--html", collection / "page.html", "--json", said)
    assert code == 0, output
    hits = json.loads(output)[0]["results"]
    assert hits[0] == {"rank": 1, "score": hits[0]["score"], "row": 17, "id": "dev/3/2", "caption": said} | {
        "image": "dev/3"
    }
    # the best answer is the query itself, so each slot matched itself
    page = (collection / "page.html").read_text()
    table = page[page.index('<table class="pairs">') : page.index("</table>")]
    cells = re.findall(r"<td( class=\"best\")? style=\"--share: (\d+)%\">(-?[\d.]+)</td>", table)
    assert len(cells) == 16
    for i, (best, share, value) in enumerate(cells):
        assert bool(best) == (i // 4 == i % 4)
        assert float(value) == pytest.approx(1 if i // 4 == i % 4 else float(value))
        assert int(share) == pytest.approx(max(0, 100 * float(value)), abs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give words to look for, or a picture with --image"),
        (["--image", "absent.npy"], "No such file"),
        (["--image", "absent.png"], "No such file"),
        (["--image", "{folder}/dev_caps.txt"], "dev_caps.txt is no picture that can be read"),
        (["--image", "{folder}/bytes.npy"], "bytes.npy: an .npy file holds features, float [T, d]; got uint8"),
        (["--image", "{folder}/cube.npy"], "images: expected features [T, 8], got [12, 3, 8]"),
        (["--image", "{folder}/dot.png"], "this model takes features of images, not pictures"),
    ],
)
def test_bad_queries_are_one_sentence(collection: Path, arguments: list[str], message: str) -> None:
    from PIL import Image

    Image.new("RGB", (3, 3)).save(collection / "dot.png")
    np.save(collection / "cube.npy", np.load(collection / "dev_ims.npy"))
    np.save(collection / "bytes.npy", np.zeros((3, 3, 3), np.uint8))
    call("index", collection / "model", "--data", collection, "--out", collection / "index")
    code, output = call("search", "--index", collection / "index", *(a.format(folder=collection) for a in arguments))
    assert code == 2
    assert message in " ".join(output.split())
    assert "Traceback" not in output


def test_one_query_in_one_line(collection: Path) -> None:
    from setemb.index import SetIndex, embed_texts
    from setemb.model import SetEmbedder

    call("index", collection / "model", "--data", collection, "--out", collection / "index", "--dtype", "int8")
    index, model = SetIndex.load(collection / "index"), SetEmbedder.from_pretrained(collection / "model")
    assert index.dtype == "int8"
    features = np.load(collection / "dev_ims.npy")
    assert index.search(model.encode_image(features[5]), 1).ids == [["dev/5"]]
    found = index.search(model.encode_image(list(features)), 1)
    assert found.ids == [[f"dev/{i}"] for i in range(12)]
    assert index.search(model.encode_image(features), 1).ids == found.ids
    both = model.train().encode_text(["thing 3", "a picture"])
    assert model.training and model.text_encoder.training, "it is as it was"
    assert not both.embeddings.requires_grad
    torch.testing.assert_close(model.encode_text("thing 3").embeddings, both.embeddings[:1])
    assert torch.equal(embed_texts(model, ["thing 3", "a picture"]), both.embeddings)
    uneven = model.encode_image([features[5], features[6][:2]]).embeddings
    torch.testing.assert_close(uneven[1:], model.encode_image(torch.from_numpy(features[6][:2])).embeddings)
    for call_, error, message in (
        (lambda: model.encode_text([]), ValueError, "texts: expected at least one, got none"),
        (lambda: embed_texts(model, []), ValueError, "texts: expected at least one, got none"),
        (lambda: model.encode_text(["a", " "]), ValueError, "a text must not be empty"),
        (lambda: model.encode_text([3]), TypeError, "texts: expected strings, got int"),  # type: ignore[list-item]
        (lambda: model.encode_image([]), ValueError, "images: expected at least one, got none"),
        (lambda: model.encode_image(3), TypeError, "images: expected files, pictures or features, got int"),
        (lambda: model.encode_image(np.zeros((2, 9))), ValueError, r"images: expected features \[T, 8\], got \[2, 9\]"),
        (lambda: model.encode_image(np.zeros((2, 8), int)), ValueError, "or a picture, uint8; got int64"),
        (lambda: model.encode_image(np.zeros((2, 2, 3), np.uint8)), ValueError, "not pictures"),
    ):
        with pytest.raises(error, match=message):
            call_()


def test_an_index_that_is_replaced_meanwhile_is_loaded_again(collection: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the index and its model comes a rebuild, which removes the model that was there."""
    from setemb.index import SetIndex

    arguments = ("index", collection / "model", "--data", collection, "--out", collection / "index")
    assert call(*arguments)[0] == 0
    real, loads = SetIndex.load.__func__, 0  # type: ignore[attr-defined]

    def load(cls: type[SetIndex], *given: object, **more: object) -> SetIndex:
        nonlocal loads
        loads += 1
        index: SetIndex = real(cls, *given, **more)
        if loads == 1:
            assert call(*arguments, "--of", "texts")[0] == 0
        return index

    monkeypatch.setattr(SetIndex, "load", classmethod(load))
    code, output = call("search", "--index", collection / "index", "-k", "60", "--json", "thing 3")
    assert code == 0, output
    assert len(json.loads(output)[0]["results"]) == 60, "the captions, which came later"
    assert loads == 2
    (model,) = (collection / "index").glob("model-*")
    (model / "config.json").unlink()
    code, output = call("search", "--index", collection / "index", "thing 3")
    assert code == 2
    assert "config.json" in output


def test_another_model_may_be_a_checkpoint(collection: Path) -> None:
    from setemb.checkpoint import save_checkpoint
    from setemb.config import Config
    from setemb.model import SetEmbedder

    model = SetEmbedder.from_pretrained(collection / "model")
    assert model.vocabulary is not None
    about = {"config": asdict(Config(model=model.config)), "vocabulary": model.vocabulary.to_text()}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint({"setemb": about, "state_dict": state}, collection / "best.safetensors")
    call("index", collection / "model", "--data", collection, "--out", collection / "index")
    found = []
    for path in ("model", "best.safetensors"):
        search = ("search", "--index", collection / "index", "--model", collection / path, "--json", "thing 3")
        code, output = call(*search)
        assert code == 0, output
        found.append(json.loads(output))
    assert found[0] == found[1]
    code, output = call("search", "--index", collection / "index", "--model", collection / "absent", "thing 3")
    assert code == 2
    assert f"no checkpoint {collection / 'absent'}" in output


def test_half_and_another_dtype_are_refused(collection: Path) -> None:
    arguments = ("index", collection / "model", "--data", collection, "--out", collection / "index", "--half")
    code, output = call(*arguments, "--dtype", "int8")
    assert code == 2
    assert "--half is --dtype float16: it cannot be with --dtype int8" in output
    assert call(*arguments, "--dtype", "float16")[0] == 0


def test_the_index_holds_what_the_model_says(collection: Path) -> None:
    from setemb.index import SetIndex, embed_images
    from setemb.model import SetEmbedder

    code, output = call("index", collection / "model", "--data", collection, "--out", collection / "index")
    assert code == 0, output
    model = SetEmbedder.from_pretrained(collection / "model")
    expected = embed_images(model, np.load(collection / "dev_ims.npy"), batch_size=5)
    loaded = SetIndex.load(collection / "index")
    found = torch.stack([loaded.item(row).vectors for row in range(len(loaded))])
    torch.testing.assert_close(found, expected)


def test_a_folder_of_something_else_is_not_overwritten(collection: Path) -> None:
    code, output = call("index", collection / "model", "--data", collection, "--out", collection)
    assert code == 2
    assert "is not an index" in " ".join(output.split())
    assert (collection / "dev_caps.txt").is_file()


def test_an_altered_index_is_one_sentence(collection: Path) -> None:
    call("index", collection / "model", "--data", collection, "--out", collection / "index")
    (path,) = (collection / "index").glob("segment-*/vectors.npy")
    path.write_bytes(path.read_bytes()[:-7])
    code, output = call("search", "--index", collection / "index", "thing")
    assert code == 2
    assert "vectors.npy was cut short or altered" in " ".join(output.split())
    assert "Traceback" not in output


def test_metadata_and_queries_of_any_kind_are_shown(collection: Path) -> None:
    from setemb.index import SetIndex, embed_images
    from setemb.model import SetEmbedder

    model = SetEmbedder.from_pretrained(collection / "model")
    vectors = embed_images(model, np.load(collection / "dev_ims.npy"))
    meta = [{"year": 2000 + i, "tags": ["a", i], "seen": None, "id": "x", "score": 9.0, "row": -1} for i in range(12)]
    SetIndex(vectors, [f"item-{i}" for i in range(12)], meta).save(collection / "index", model)
    code, output = call("search", "--index", collection / "index", "--html", collection / "page.html", "[/thing] 3 [a]")
    assert code == 0, output
    assert "“[/thing] 3 [a]”" in output
    assert "year: 2003" in (collection / "page.html").read_text()
    code, output = call("search", "--index", collection / "index", "--json", "thing 3")
    assert code == 0, output
    for hit in json.loads(output)[0]["results"]:
        assert hit["id"] == f"item-{hit['row']}"
        assert hit["year"] == 2000 + hit["row"]
        assert hit["score"] < 2


def test_a_path_that_cannot_be_written_is_one_sentence(collection: Path) -> None:
    (collection / "file").write_text("text")
    code, output = call("index", collection / "model", "--data", collection, "--out", collection / "file" / "index")
    assert code == 2
    assert "Error:" in output
    assert "Traceback" not in output


def test_the_program_says_all_it_found_and_how_it_ended(collection: Path) -> None:
    call("index", collection / "model", "--data", collection, "--out", collection / "index")
    for index, status in (("index", 0), ("absent", 2)):
        arguments = ["search", "--index", collection / index, "-k", "12", "--json", "thing"]
        command = [sys.executable, "-m", "setemb", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert result.returncode == status, result.stderr
        assert (len(json.loads(result.stdout)[0]["results"]) == 12) if status == 0 else "no index" in result.stderr
