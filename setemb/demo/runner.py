"""The stages of the demo: features, three models trained alike, their recall on unseen emoji, an index, a page."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from setemb.checkpoint import write_file
from setemb.config import Config, load_config
from setemb.data.emoji import NOTICE, STYLES, split, training_phrases
from setemb.data.loader import RetrievalDataModule
from setemb.demo.data import PACKAGES, EmojiFeatures, EmojiPairs, load_features
from setemb.demo.start import start_from_least_squares
from setemb.evaluation import RecallReport
from setemb.features import with_context
from setemb.index import SetIndex, embed_images
from setemb.model import SetEmbedder
from setemb.similarity import Similarity
from setemb.training import encode_dataset, evaluate_sets, fit, load_model, read_metrics

TEST_EMOJI, DEV_EMOJI = 383, 96


@dataclass(frozen=True)
class Variant:
    """One of the models that are trained alike; they differ in `overrides` alone."""

    key: str
    label: str
    overrides: tuple[str, ...] = ()


VARIANTS = (
    Variant("set", "set of 4, smooth-Chamfer"),
    Variant("mil", "set of 4, closest pair (MIL)", ("model.similarity=max",)),
    Variant("one", "one vector", ("model.sets.num_slots=1", "model.similarity=cosine")),
)


START = Variant("start", "set of 4, before training")


@dataclass
class Trained:
    """A trained model and what it reached on the test part."""

    variant: Variant
    model: SetEmbedder
    report: RecallReport
    keyword_map: float
    """Mean average precision of shared keywords, see `keyword_precision`; in percent."""
    pictures: Tensor
    """``[2 n_test, K, D]``."""
    names: Tensor
    """``[n_test, K, D]``."""
    metrics: list[dict[str, float]]
    seconds: float


@dataclass
class DemoResult:
    """Everything that the page shows."""

    features: EmojiFeatures
    parts: dict[str, list[int]]
    trained: list[Trained]
    start: Trained
    """The first of them before training, see `start_from_least_squares`."""
    config: Config
    seconds: dict[str, float] = field(default_factory=dict)
    quick: bool = False


def run_demo(
    out: Path,
    overrides: Sequence[str] = (),
    cache: Path | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> DemoResult:
    """Runs all stages and leaves in ``out``: index.html, results.json, NOTICE.txt, index/ and runs/.

    Args:
        out: folder, made if needed; runs and index of an earlier demo there are replaced.
        overrides: of the settings in recipes/emoji.yaml, ``key=value``.
        cache: of the features, see `load_features`.
        quick: a tenth of the emoji and one epoch; to see that everything works.
        console: where progress is told.
    """
    from setemb.demo.report import write_report

    console = console or Console()
    seconds: dict[str, float] = {}
    if quick:
        overrides = ("trainer.epochs=1", "data.batch_size=32", *overrides)
    config = load_config("emoji", overrides)
    out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it tells of devices and of other products
    torch.manual_seed(config.trainer.seed)

    with _stage("features", seconds, console):
        features = _load_features(cache, quick, console)
        n = len(features.emojis)
        test, dev = (TEST_EMOJI, DEV_EMOJI) if not quick else (n // 5, n // 10)
        parts = split(features.emojis, features.thumbnails, test=test, dev=dev)
        phrases = training_phrases(features.emojis, parts)
    trained = []
    for variant in VARIANTS:
        with _stage(f"training: {variant.label}", seconds, console):
            variant_config = load_config("emoji", (*overrides, *variant.overrides))
            variant_config.trainer.progress = console.is_terminal
            model, metrics = train_variant(variant_config, features, parts, phrases, out / "runs" / variant.key)
        took = seconds[f"training: {variant.label}"]
        with _stage(f"evaluation: {variant.label}", seconds, console):
            trained.append(evaluate_variant(variant, model, features, parts["test"], metrics, took))
    with _stage(f"evaluation: {START.label}", seconds, console):
        start = evaluate_variant(START, new_model(config, features, phrases), features, parts["test"])
    with _stage("index", seconds, console):
        main = trained[0].model
        SetIndex.build(
            out / "index",
            emoji_pictures(main, features),
            similarity=cast(Similarity, main.config.similarity),
            alpha=main.config.alpha,
            model=main,
        )
    result = DemoResult(features, parts, trained, start, config, seconds, quick)
    with _stage("page", seconds, console):
        write_file(out / "NOTICE.txt", (NOTICE.replace(". ", ".\n") + "\n").encode())
        write_report(result, out / "index.html")
    write_file(out / "results.json", (json.dumps(summary(result), indent=1) + "\n").encode())
    return result


def new_model(config: Config, features: EmojiFeatures, phrases: Mapping[int, Sequence[str]]) -> SetEmbedder:
    """A model where training starts; fills in the sizes in ``config.model``."""
    config.model.image.dim_in = with_context(features.grids[:1]).shape[2]
    config.model.text.dim_in = features.captions.states.shape[1]
    torch.manual_seed(config.trainer.seed)
    model = SetEmbedder(config.model)
    start_from_least_squares(model, features, phrases)
    return model


def train_variant(
    config: Config,
    features: EmojiFeatures,
    parts: Mapping[str, Sequence[int]],
    phrases: Mapping[int, Sequence[str]],
    folder: Path,
) -> tuple[SetEmbedder, list[dict[str, float]]]:
    """Trains one model, in place of one that the folder holds; returns it and the logged metrics."""
    shutil.rmtree(folder, ignore_errors=True)
    data = config.data
    train = EmojiPairs(
        features, parts["train"], phrases, phrases_per_emoji=data.captions_per_image, cell_drop=data.region_drop
    )
    dev = EmojiPairs(features, parts["dev"])
    trainer = config.trainer
    module = RetrievalDataModule(train, dev, data.batch_size, trainer.seed, data.workers, trainer.accumulate_batches)
    return load_model(fit(config, new_model(config, features, phrases), module, folder)), read_metrics(folder)


def evaluate_variant(
    variant: Variant,
    model: SetEmbedder,
    features: EmojiFeatures,
    members: Sequence[int],
    metrics: Sequence[dict[str, float]] = (),
    seconds: float = 0.0,
) -> Trained:
    """Recall of the names and of both drawings of unseen emoji, and the precision of the keywords that they share."""
    encoded = encode_dataset(model, EmojiPairs(features, members))
    pictures, names = (torch.cat([batch[i] for batch in encoded]) for i in (0, 1))
    precision = keyword_precision(model, pictures, features, members)
    return Trained(variant, model, evaluate_sets(model, encoded), precision, pictures, names, list(metrics), seconds)


def shared_keywords(features: EmojiFeatures, members: Sequence[int], at_least: int = 5) -> dict[str, list[int]]:
    """Keywords that this many of the members have, and which (their numbers within ``members``)."""
    holders: dict[str, list[int]] = {}
    for number, i in enumerate(members):
        for keyword in features.emojis[i].keywords:
            holders.setdefault(keyword, []).append(number)
    return {keyword: numbers for keyword, numbers in sorted(holders.items()) if len(numbers) >= at_least}


@torch.inference_mode()
def embed_phrases(model: SetEmbedder, features: EmojiFeatures, phrases: Sequence[str]) -> Tensor:
    """Sets ``[n, K, D]`` of phrases whose token features are cached."""
    texts, mask = features.captions.batch([features.caption_of[phrase] for phrase in phrases], None)
    return model.encode_text({"texts": texts, "text_mask": mask}).embeddings


@torch.inference_mode()
def keyword_precision(model: SetEmbedder, pictures: Tensor, features: EmojiFeatures, members: Sequence[int]) -> float:
    """Mean over shared keywords of the average precision of their ranking of ``pictures``, in percent.

    A picture is relevant if its emoji has the keyword. 0.0 where no keyword is shared by enough emoji.
    """
    holders = shared_keywords(features, members)
    if not holders:
        return 0.0
    scores = model.similarity(embed_phrases(model, features, list(holders)), pictures)
    order = scores.argsort(dim=1, descending=True, stable=True) // len(STYLES)
    relevant = torch.zeros(len(holders), len(members), dtype=torch.bool)
    for row, numbers in enumerate(holders.values()):
        relevant[row, numbers] = True
    hits = relevant.gather(1, order).float()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    return float(100 * ((precision * hits).sum(1) / hits.sum(1)).mean())


def chance(items: int, relevant: int, k: int) -> float:
    """Percentage of queries with one of ``relevant`` among the first k of ``items`` in random order."""
    return 100 * (1 - math.comb(items - relevant, k) / math.comb(items, k))


def emoji_pictures(model: SetEmbedder, features: EmojiFeatures) -> Iterator[tuple[Any, ...]]:
    """All drawings of all emoji, as items of an index."""
    items = [(emoji, style) for emoji in features.emojis for style in STYLES]
    vectors = embed_images(model, features.grids, prepare=with_context)
    for (emoji, style), one, picture in zip(items, vectors, features.thumbnails, strict=True):
        yield f"{style}/{emoji.id}", one, {"emoji": emoji.character, "name": emoji.name}, np.asarray(picture)


def emoji_names(model: SetEmbedder, features: EmojiFeatures) -> Iterator[tuple[Any, ...]]:
    """The names of all emoji, as items of an index."""
    for start in range(0, len(features.emojis), 256):
        some = features.emojis[start : start + 256]
        for emoji, one in zip(some, embed_phrases(model, features, [e.name for e in some]), strict=True):
            yield emoji.id, one, {"emoji": emoji.character, "name": emoji.name}


def summary(result: DemoResult) -> dict[str, Any]:
    """The figures of a demo, as JSON takes them."""
    test = result.parts["test"]
    names, pictures = len(test), len(STYLES) * len(test)
    return {
        "quick": result.quick,
        "emoji": {part: len(members) for part, members in result.parts.items()},
        "protocol": f"{names} names and {pictures} pictures of unseen emoji; either of its two drawings answers a name",
        "test": {
            t.variant.key: {
                "label": t.variant.label,
                **t.report.to_dict(),
                "shared_keywords_map": t.keyword_map,
                "dev_rsum": max((row["dev/rsum"] for row in t.metrics if "dev/rsum" in row), default=None),
                "seconds": t.seconds,
            }
            for t in (*result.trained, result.start)
        },
        "chance": {
            "text_to_image": {f"r{k}": chance(pictures, len(STYLES), k) for k in (1, 5, 10)},
            "image_to_text": {f"r{k}": chance(names, 1, k) for k in (1, 5, 10)},
        },
        "seconds": result.seconds,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the machine and of what the figures depend on."""
    return {
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        **{name: version(name) for name in ("torch", "lightning", "numpy", *PACKAGES)},
    }


def _load_features(cache: Path | None, quick: bool, console: Console) -> EmojiFeatures:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(f"features of {what}", total=total)
            bars.update(tasks[what], completed=done)

        return load_features(cache, 200 if quick else None, progress)


@contextmanager
def _stage(name: str, seconds: dict[str, float], console: Console) -> Iterator[None]:
    console.print(f"[bold]{name}[/]")
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    console.print(f"  {seconds[name]:.1f} s", style="dim")
