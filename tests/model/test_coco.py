"""ECCV Caption, CxC and PMRP through the package ``eccv_caption``, with its own files: restated in plain loops."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from setemb.coco import eccv_caption_of, evaluate_eccv_caption
from setemb.ensemble import Encoded, Similarities
from setemb_kernels import smooth_chamfer

package = pytest.importorskip("eccv_caption")
DATA = Path(package.__file__).parent / "data"


def truth(name: str) -> dict[int, set[int]]:
    return {int(query): set(map(int, found)) for query, found in json.loads((DATA / name).read_text()).items()}


@pytest.fixture(scope="module")
def ids() -> tuple[list[int], list[int]]:
    captions = np.load(DATA / "coco_test_ids.npy").tolist()
    image_of = truth("original_caption_to_image.json")
    return [min(image_of[caption]) for caption in captions[::5]], captions


@pytest.fixture(scope="module")
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    """Captions near their images, so that figures lie well between nothing and all."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5000, 2, 8, generator=generator)
    captions = images.repeat_interleave(5, 0) + 0.8 * torch.randn(25_000, 2, 8, generator=generator)
    return tuple(torch.nn.functional.normalize(x, dim=-1) for x in (images, captions))  # type: ignore[return-value]


def by_sorting(
    queries: torch.Tensor, query_ids: list[int], items: torch.Tensor, item_ids: list[int], wanted: Mapping[int, object]
) -> dict[int, list[int]]:
    rows = [row for row, id_ in enumerate(query_ids) if id_ in wanted]
    order = np.concatenate(
        [
            smooth_chamfer(queries[part], items).argsort(dim=1, descending=True, stable=True)[:, :64].numpy()
            for part in torch.tensor(rows).split(500)
        ]
    )
    return {query_ids[row]: np.asarray(item_ids)[found].tolist() for row, found in zip(rows, order, strict=True)}


def test_figures_are_those_of_plain_loops(
    sets: tuple[torch.Tensor, torch.Tensor], ids: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    # PMRP's own files are not in the package: some of ECCV Caption's pairs stand in for them
    plausible = {}
    for way in ("image_to_caption", "caption_to_image"):
        positives = dict(list(truth(f"eccv_{way}.json").items())[::3])
        plausible[way] = positives
        (tmp_path / f"pm_{way}.json").write_text(json.dumps({k: sorted(v) for k, v in positives.items()}))
    found = evaluate_eccv_caption(*sets, pmrp_files=tmp_path)
    for way, name, x, y in (
        ("image_to_text", "image_to_caption", 0, 1),
        ("text_to_image", "caption_to_image", 1, 0),
    ):
        eccv, cxc = truth(f"eccv_{name}.json"), truth(f"cxc_{name}.json")
        some = dict(list(cxc.items())[::10])
        lists = by_sorting(sets[x], ids[x], sets[y], ids[y], {**eccv, **some})
        first, precision, average = [], [], []
        for query, positives in eccv.items():
            hits = np.array([item in positives for item in lists[query][: len(positives)]])
            precisions = hits.cumsum() / np.arange(1, len(hits) + 1)
            first.append(hits[0])
            precision.append(precisions[-1])
            average.append((precisions * hits).mean())
        expected = {"eccv_r1": first, "eccv_rprecision": precision, "eccv_map_at_r": average}
        expected["pmrp"] = [
            np.mean([item in positives for item in lists[query][: len(positives)]])
            for query, positives in plausible[name].items()
        ]
        for figure, values in expected.items():
            assert 5 < 100 * np.mean(values) < 95
            assert found[figure][way] == pytest.approx(100 * np.mean(values), abs=1e-9), (figure, way)
        for k in (1, 5, 10):  # of every tenth query: near enough to see a wrong k
            part = 100 * np.mean([bool(positives & set(lists[query][:k])) for query, positives in some.items()])
            assert found[f"cxc_r{k}"][way] == pytest.approx(part, abs=4)
    assert found["cxc_r1"]["text_to_image"] < found["cxc_r5"]["text_to_image"] < found["cxc_r10"]["text_to_image"]


def test_the_order_does_not_matter_where_ids_are_given(
    sets: tuple[torch.Tensor, torch.Tensor], ids: tuple[list[int], list[int]]
) -> None:
    usual = evaluate_eccv_caption(*sets)
    assert "pmrp" not in usual
    images, captions = (torch.from_numpy(np.random.default_rng(0).permutation(n)) for n in (5000, 25_000))
    again = evaluate_eccv_caption(
        sets[0][images].numpy(),
        sets[1][captions],
        image_ids=[ids[0][i] for i in images],
        caption_ids=[ids[1][i] for i in captions],
    )
    assert again.keys() == usual.keys()
    for figure, ways in usual.items():
        assert again[figure] == pytest.approx(ways, abs=0.1), figure  # a near tie may turn


def test_an_ensemble_of_parts_is_the_whole(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Dot products of two parts of vectors add up to those of the vectors."""
    images, captions = (of.flatten(1)[:, None] for of in sets)
    parts = [Encoded(images[..., part], captions[..., part]) for part in (slice(0, 5), slice(5, 16))]
    whole = evaluate_eccv_caption(images, captions)
    for figure, ways in eccv_caption_of(Similarities(parts)).items():
        assert ways == pytest.approx(whole[figure], abs=0.1), figure  # a near tie may turn
        assert 1 < ways["image_to_text"] < 100  # by chance far less


def test_what_does_not_fit_is_named(
    sets: tuple[torch.Tensor, torch.Tensor], ids: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    images, captions = sets
    with pytest.raises(ValueError, match="caption_ids: expected one for each of 24999 sets, got 25000"):
        evaluate_eccv_caption(images, captions[1:])
    with pytest.raises(ValueError, match="image_ids: expected all of the test split, 1 are missing"):
        evaluate_eccv_caption(images, captions, image_ids=[*ids[0][1:], -1])
    with pytest.raises(ValueError, match="image_ids: expected 5000 that differ, got 4999"):
        evaluate_eccv_caption(images, captions, image_ids=[*ids[0][1:], ids[0][1]])
    with pytest.raises(FileNotFoundError, match=r"pmrp_files: .*pm_image_to_caption\.json is missing"):
        evaluate_eccv_caption(images, captions, pmrp_files=tmp_path)


def test_the_command_line_tells_them(tmp_path: Path) -> None:
    """A collection of COCO's size, and an untrained model: the figures of its sets."""
    pytest.importorskip("typer")
    pytest.importorskip("lightning")
    from typer.testing import CliRunner

    from setemb.cli import app
    from setemb.config import DataConfig, ModelConfig
    from setemb.data.vocab import Vocabulary
    from setemb.model import SetEmbedder
    from setemb.training import encode_precomp

    rng = np.random.default_rng(0)
    np.save(tmp_path / "testall_ims.npy", rng.normal(size=(5000, 2, 4)).astype(np.float16))
    words = ["a", "b", "c", "d"]
    captions = [" ".join(rng.choice(words, 3)) for _ in range(25_000)]
    (tmp_path / "testall_caps.txt").write_text("\n".join(captions) + "\n")
    vocabulary = Vocabulary.build(captions, 1)
    config = ModelConfig(dim=8)
    config.image.dim_in, config.text.vocab_size, config.text.dim_word = 4, len(vocabulary), 8
    config.sets.heads, config.sets.dim_head, config.sets.iterations = 1, 8, 1
    torch.manual_seed(0)
    SetEmbedder(config, vocabulary).save_pretrained(tmp_path / "model")
    call = ["eval", str(tmp_path / "model"), f"data.dir={tmp_path}", "data.batch_size=500", "--split", "testall"]
    told = CliRunner().invoke(app, [*call, "--eccv", "--json", str(tmp_path / "report.json")], env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    assert "eccv_map_at_r" in told.output
    report = json.loads((tmp_path / "report.json").read_text())
    data = DataConfig(dir=str(tmp_path), batch_size=500)
    _, parts = encode_precomp(tmp_path / "model", data, "testall")
    expected = evaluate_eccv_caption(*(torch.cat([part[i] for part in parts]) for i in (0, 1)))
    assert report["eccv"] == expected
    told = CliRunner().invoke(app, [*call, "--pmrp", str(tmp_path)])
    assert told.exit_code == 2
    assert "--pmrp goes with --eccv" in told.output
