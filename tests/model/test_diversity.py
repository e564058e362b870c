"""Circular variance of sets, and which slots match: restated in plain loops."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from setemb.charts import grouped_bars, page_of_charts
from setemb.config import ModelConfig
from setemb.data.vocab import Vocabulary
from setemb.diversity import LEAST, best_of_tiles, log_circular_variance, positive_pairs, set_report
from setemb.ensemble import Encoded, Similarities
from setemb.model import SetEmbedder
from setemb_kernels import smooth_chamfer


def sets(n: int, k: int, d: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(n, k, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_circular_variance_is_one_less_the_length_of_the_mean() -> None:
    x = sets(9000, 3, 5, 0) * torch.rand(9000, 3, 1)  # lengths do not count
    unit = normalize(x.double(), dim=-1)
    expected = (1 - unit.mean(1).norm(dim=-1)).log().mean()
    assert log_circular_variance(x) == pytest.approx(float(expected), rel=1e-6)
    assert log_circular_variance(x.numpy()) == log_circular_variance(x)
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert log_circular_variance(opposite) == 0.0
    # two vectors an angle apart: |mean| = cos(angle / 2), where 1 - |mean| would be all rounding
    for angle in (1e-2, 1e-4, 1e-6):
        pair = torch.tensor([[[1.0, 0.0], [math.cos(angle), math.sin(angle)]]], dtype=torch.float64)
        assert log_circular_variance(pair) == pytest.approx(math.log(2 * math.sin(angle / 4) ** 2), abs=1e-6)
    assert log_circular_variance(torch.ones(2, 4, 3)) == pytest.approx(math.log(LEAST))
    assert log_circular_variance(torch.ones(2, 1, 3)) is None
    with pytest.raises(ValueError, match=r"sets must have shape \[n, K, D\] with n > 0, got \[0, 2, 3\]"):
        log_circular_variance(torch.ones(0, 2, 3))


def test_positive_pairs_are_all_of_them() -> None:
    images, captions = torch.tensor([4, 2, 4, 9, 7]), torch.tensor([9, 4, 2, 4, 9, 5])
    found = sorted(zip(*(t.tolist() for t in positive_pairs(images, captions)), strict=True))
    assert found == [(i, c) for i in range(5) for c in range(6) if images[i] == captions[c]]


@pytest.mark.parametrize("block", [1, 3, 100])
def test_the_best_of_both_sides_is_the_first_of_equals(block: int) -> None:
    s = torch.randint(0, 4, (8, 11), generator=torch.Generator().manual_seed(0)).float()
    s[3], s[:, 5] = torch.nan, torch.nan

    def by_number(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return s[x[:, 0, 0].long()][:, y[:, 0, 0].long()].clone()

    numbers = [torch.arange(n)[:, None, None].float() for n in s.shape]
    columns, rows = best_of_tiles(Similarities([Encoded(*numbers, similarity=by_number)], block))
    known = s.nan_to_num(-1.0)
    assert columns.tolist() == [row.tolist().index(row.max()) for row in known]
    assert rows.tolist() == [column.tolist().index(column.max()) for column in known.T]


def test_slots_are_counted_where_they_are_closest() -> None:
    images, captions = sets(12, 3, 6, 1), sets(30, 4, 6, 2)
    image_groups, caption_groups = torch.arange(12), torch.arange(30) % 12
    report = set_report(Similarities([Encoded(images, captions)], 7), image_groups, caption_groups)
    s = smooth_chamfer(images, captions)
    pairs = {
        "positive": [(i, c) for i in range(12) for c in range(30) if image_groups[i] == caption_groups[c]],
        "image_to_text": list(enumerate(s.argmax(1).tolist())),
        "text_to_image": [(i, c) for c, i in enumerate(s.argmax(0).tolist())],
    }
    for way, of in pairs.items():
        counts = np.zeros((3, 4))
        for i, c in of:
            dots = (images[i] @ captions[c].T).numpy()
            counts[np.unravel_index(dots.argmax(), dots.shape)] += 100 / len(of)
        np.testing.assert_allclose(report.slots[way].image, counts.sum(1), rtol=1e-9)
        np.testing.assert_allclose(report.slots[way].caption, counts.sum(0), rtol=1e-9)
    with pytest.raises(ValueError, match="similarities must be of one model, got an ensemble of 2"):
        set_report(Similarities([Encoded(images, captions)] * 2), image_groups, caption_groups)


def test_a_page_of_charts_is_a_picture_by_itself() -> None:
    chart = grouped_bars(("slot 1", "slot <2>"), {"a & b": ("one", [30.0, 70.0])}, "title")
    page = page_of_charts([("first", chart), ("sec<ond", chart)], {"one": "#123456"}, {"a & b": "one"}, "a note")
    root = ElementTree.fromstring(page)
    words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a & b", "a note", "first", "sec<ond", "slot <2>", "70.0"} <= set(words)
    places = [float(node.get("y")) for node in root if node.tag.endswith("}svg")]  # type: ignore[arg-type]
    assert places[1] - places[0] > 250 and float(root.get("height")) > places[1] + 250  # type: ignore[arg-type]
    assert "rect.one,circle.one{fill:#123456}" in page


def test_the_command_tells_and_draws_them(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("lightning")
    from typer.testing import CliRunner

    from setemb.cli import app
    from setemb.config import DataConfig
    from setemb.training import encode_precomp

    rng = np.random.default_rng(0)
    np.save(tmp_path / "dev_ims.npy", rng.normal(size=(20, 3, 4)).astype(np.float32))
    captions = [" ".join(rng.choice(["a", "b", "c", "d"], 3)) for _ in range(100)]
    (tmp_path / "dev_caps.txt").write_text("\n".join(captions) + "\n")
    vocabulary = Vocabulary.build(captions, 1)
    for slots in (1, 3):
        config = ModelConfig(dim=8)
        config.image.dim_in, config.text.vocab_size, config.text.dim_word = 4, len(vocabulary), 8
        config.sets.num_slots, config.sets.heads, config.sets.dim_head = slots, 1, 8
        torch.manual_seed(0)
        SetEmbedder(config, vocabulary).save_pretrained(tmp_path / f"model-{slots}")
    models = [str(tmp_path / f"model-{slots}") for slots in (1, 3)]
    call = [
        "eval",
        *models,
        f"data.dir={tmp_path}",
        "--json",
        str(tmp_path / "r.json"),
        "--plot",
        str(tmp_path / "p.svg"),
    ]
    told = CliRunner().invoke(app, call, env={"COLUMNS": "250"})
    assert told.exit_code == 0, told.output
    one, several = (of["sets"] for of in json.loads((tmp_path / "r.json").read_text())["models"])
    assert one["log_circular_variance"] == {"image": None, "caption": None}
    assert "one vector" in told.output
    _, parts = encode_precomp(tmp_path / "model-3", DataConfig(dir=str(tmp_path)), "dev")
    for i, side in enumerate(("image", "caption")):
        expected = log_circular_variance(torch.cat([part[i] for part in parts]))
        assert several["log_circular_variance"][side] == expected
        assert f"{expected:.2f}" in told.output
        for uses in several["slots"].values():
            assert len(uses[side]) == 3 and sum(uses[side]) == pytest.approx(100)
            assert " ".join(f"{share:.0f}" for share in uses[side]) in told.output
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert f"{several['slots']['positive']['image'][1]:.1f}" in words
    assert sum("log circular variance" in str(word) for word in words) == 2
