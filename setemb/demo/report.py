"""The demo's page: one HTML file, pictures inlined, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from setemb.charts import grouped_bars, lines
from setemb.checkpoint import write_file
from setemb.data.emoji import NOTICE, STYLES
from setemb.features import with_context
from setemb.pages import render_page

if TYPE_CHECKING:
    from setemb.demo.runner import DemoResult, Trained

AT = ("R@1", "R@5", "R@10")


def write_report(result: DemoResult, path: Path) -> None:
    """Renders the page of a demo."""
    from setemb.demo.runner import summary

    figures = summary(result)
    context = figures | {
        "notice": NOTICE,
        "trained": result.trained,
        "start": result.start,
        "counts": {part: len(members) for part, members in result.parts.items()},
        "model": result.config.model,
        "settings": result.config,
        "examples": _examples(result),
        "recall_charts": _recall_charts(result, figures["chance"]),
        "curves": _curves(result),
        "found_by_name": _found_by_name(result),
        "found_by_keyword": _found_by_keyword(result),
        "named": _named(result),
        "slots": _slots(result),
    }
    write_file(path, render_page("demo.html.j2", **context).encode())


def _thumbnail(result: DemoResult, row: int) -> np.ndarray:
    """Of a picture of the test part."""
    emoji = result.parts["test"][row // len(STYLES)]
    return result.features.thumbnails[len(STYLES) * emoji + row % len(STYLES)]


def _examples(result: DemoResult, count: int = 4) -> list[dict[str, Any]]:
    """A few training emoji with their drawings and phrases."""
    rng = np.random.default_rng(4)
    rich = [i for i in result.parts["train"] if len(result.features.emojis[i].keywords) >= 4]
    chosen = rng.choice(rich or result.parts["train"], min(count, len(rich) or 1), replace=False)
    rows = len(STYLES)
    return [
        {
            "emoji": result.features.emojis[i],
            "pictures": [result.features.thumbnails[rows * i + j] for j in range(rows)],
        }
        for i in chosen.tolist()
    ]


def _recall_charts(result: DemoResult, chance: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    charts = []
    for key, label in (("text_to_image", "name → picture"), ("image_to_text", "picture → name")):
        series = {"chance": ("chance", list(chance[key].values()))}
        for trained in reversed(result.trained):
            recall = getattr(trained.report, key)
            series[trained.variant.label] = (trained.variant.key, [recall.r1, recall.r5, recall.r10])
        charts.append({"label": label, "series": series, "svg": grouped_bars(AT, series, f"Recall, {label}")})
    return charts


def _curves(result: DemoResult) -> list[dict[str, Any]]:
    def points(trained: Trained, key: str, per_step: bool) -> list[tuple[float, float]]:
        return [(row["step" if per_step else "epoch"] + 1, row[key]) for row in trained.metrics if key in row]

    order = list(reversed(result.trained))
    return [
        {
            "label": label,
            "svg": lines(
                {t.variant.label: (t.variant.key, points(t, key, per_step)) for t in order},
                label,
                "step" if per_step else "epoch",
            ),
        }
        for label, key, per_step in (
            ("training loss", "loss", True),
            ("recall on dev emoji (sum of the six)", "dev/rsum", False),
        )
    ]


def _ranked(result: DemoResult, queries: Tensor, items: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
    scores = result.trained[0].model.similarity(queries, items)
    best = scores.sort(dim=1, descending=True, stable=True)
    return best.indices[:, :k].tolist(), best.values[:, :k].tolist()


@torch.inference_mode()
def _found_by_name(result: DemoResult, count: int = 10, k: int = 8) -> list[dict[str, Any]]:
    """Names drawn by chance (successes and failures as they come), each with the pictures found first."""
    main, test = result.trained[0], result.parts["test"]
    chosen = np.sort(np.random.default_rng(1).choice(len(test), min(count, len(test)), replace=False)).tolist()
    rows, _ = _ranked(result, main.names[chosen], main.pictures, k)
    ranks = main.report.caption_ranks
    return [
        {
            "query": result.features.emojis[test[number]].name,
            "rank": int(ranks[number]) + 1,
            "answers": [_thumbnail(result, len(STYLES) * number + j) for j in range(len(STYLES))],
            "hits": [
                {
                    "picture": _thumbnail(result, row),
                    "right": row // len(STYLES) == number,
                    "name": result.features.emojis[test[row // len(STYLES)]].name,
                }
                for row in found
            ],
        }
        for number, found in zip(chosen, rows, strict=True)
    ]


@torch.inference_mode()
def _found_by_keyword(result: DemoResult, count: int = 6, k: int = 8) -> list[dict[str, Any]]:
    """Keywords that many test emoji share, each with the pictures found first."""
    from setemb.demo.runner import embed_phrases, shared_keywords

    main, test = result.trained[0], result.parts["test"]
    holders = shared_keywords(result.features, test)
    if not holders:
        return []
    chosen = np.sort(np.random.default_rng(2).choice(len(holders), min(count, len(holders)), replace=False))
    words = [list(holders)[i] for i in chosen]
    rows, _ = _ranked(result, embed_phrases(main.model, result.features, words), main.pictures, k)
    return [
        {
            "query": word,
            "holders": len(holders[word]),
            "hits": [
                {
                    "picture": _thumbnail(result, row),
                    "right": row // len(STYLES) in holders[word],
                    "name": result.features.emojis[test[row // len(STYLES)]].name,
                }
                for row in found
            ],
        }
        for word, found in zip(words, rows, strict=True)
    ]


@torch.inference_mode()
def _named(result: DemoResult, count: int = 8, k: int = 5) -> list[dict[str, Any]]:
    """Pictures drawn by chance, each with the names found first."""
    main, test = result.trained[0], result.parts["test"]
    chosen = np.sort(np.random.default_rng(3).choice(len(main.pictures), min(count, len(main.pictures)), replace=False))
    rows, scores = _ranked(result, main.pictures[torch.from_numpy(chosen)], main.names, k)
    return [
        {
            "picture": _thumbnail(result, row),
            "style": STYLES[row % len(STYLES)],
            "truth": result.features.emojis[test[row // len(STYLES)]].name,
            "rank": int(main.report.image_ranks[row]) + 1,
            "names": [
                {
                    "name": result.features.emojis[test[number]].name,
                    "right": number == row // len(STYLES),
                    "score": score,
                    "share": max(0.0, score) / max(best, 1e-6),
                }
                for number, score in zip(found, of, strict=True)
            ],
        }
        for row, found, of, best in zip(chosen.tolist(), rows, scores, (s[0] for s in scores), strict=True)
    ]


@torch.inference_mode()
def _slots(result: DemoResult, count: int = 6) -> list[dict[str, Any]]:
    """For some test pictures, which cells each slot took and which name its vector is closest to."""
    from PIL import Image

    main, test, features = result.trained[0], result.parts["test"], result.features
    rng = np.random.default_rng(5)
    easy = [row for row, rank in enumerate(main.report.image_ranks) if rank < 5] or list(range(len(main.pictures)))
    chosen = np.sort(rng.choice(easy, min(count, len(easy)), replace=False)).tolist()
    rows = [len(STYLES) * test[row // len(STYLES)] + row % len(STYLES) for row in chosen]
    grids = torch.from_numpy(with_context(features.grids[rows]))
    attention = main.model.encode_image({"images": grids}, return_attention=True).attention
    assert attention is not None
    side = round(grids.shape[1] ** 0.5)
    maps = attention.mean(1).unflatten(-1, (side, side)).numpy()  # [n, K, side, side], sums to 1 over K
    closest = torch.einsum("nkd,mld->nkml", main.pictures[chosen], main.names).amax(-1).argmax(-1)
    shown_pictures = []
    for n, row in enumerate(chosen):
        thumbnail = _thumbnail(result, row)
        slots = []
        for share, name in zip(maps[n], closest[n].tolist(), strict=True):
            # A cell is shown as strongly as the slot holds it, relative to the strongest of the picture; white is none.
            strength = Image.fromarray((share / max(float(maps[n].max()), 1e-6)).astype(np.float32))
            strength = strength.resize(thumbnail.shape[1::-1], Image.Resampling.BICUBIC)
            shown = np.clip(np.asarray(strength), 0.06, 1)[:, :, None]
            slots.append(
                {
                    "picture": (255 - (255 - thumbnail) * shown).astype(np.uint8),
                    "name": features.emojis[test[name]].name,
                    "share": 100 * float(share.mean()),
                }
            )
        shown_pictures.append(
            {"picture": thumbnail, "name": features.emojis[test[row // len(STYLES)]].name, "slots": slots}
        )
    return shown_pictures
