"""Ablations: trainings that differ in a few settings, repeated over seeds, and their figures side by side.

A study is a list of variants, each a label and what it changes in a recipe. Variants that come to the same settings are
trained once. A folder of ablations::

    ablations.json, ablations.md              the figures, made again after each training
    runs/SETTINGS/seed_N/                     a run (`setemb.training`); SETTINGS say what differs from the recipe
    runs/SETTINGS/seed_N/figures.json         there once the run has ended
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from setemb.checkpoint import write_file
from setemb.config import Config, flat, from_dict, load_config


@dataclass(frozen=True)
class Variant:
    label: str
    overrides: tuple[str, ...] = ()
    """``key=value`` each."""


@dataclass(frozen=True)
class Study:
    title: str
    variants: tuple[Variant, ...]


def vary(key: str, values: Sequence[str], title: str = "", symbol: str = "") -> Study:
    """A study of one setting."""
    return Study(title or key, tuple(Variant(f"{symbol or key} = {value}", (f"{key}={value}",)) for value in values))


STUDIES = {
    "similarity": Study(
        "Similarity of sets",
        (
            Variant("smooth-Chamfer", ("model.similarity=smooth_chamfer",)),
            Variant("Chamfer", ("model.similarity=chamfer",)),
            Variant("closest pair (MIL)", ("model.similarity=max",)),
            Variant("match probability", ("model.similarity=match_probability",)),
            # of sets of one vector, smooth-Chamfer is the cosine
            Variant("one vector, cosine", ("model.similarity=smooth_chamfer", "model.sets.num_slots=1")),
        ),
    ),
    "sets": Study(
        "What makes the sets",
        (
            Variant("slot attention", ("model.sets.kind=slot_attention",)),
            Variant("PIE-Net", ("model.sets.kind=pie_net",)),
        ),
    ),
    "slots": vary("model.sets.num_slots", ("1", "2", "4", "8"), "Vectors in a set", "K"),
    "iterations": vary("model.sets.iterations", ("1", "2", "3", "4"), "Iterations of slot attention", "T"),
    "alpha": vary("model.alpha", ("1", "4", "16", "64"), "Sharpness of smooth-Chamfer", "alpha"),
    "loss": Study(
        "Loss",
        (Variant("InfoNCE", ("loss.kind=info_nce",)), Variant("triplet, hardest negative", ("loss.kind=triplet",))),
    ),
    "batch": Study(
        "Images in a batch",
        (
            Variant("128", ("data.batch_size=128",)),
            # Few steps are left: a larger rate, as the square root of the batch, and no memory of earlier weights.
            *(
                Variant(
                    f"{size:,}, lr x {factor}",
                    (
                        f"data.batch_size={size}",
                        f"optimizer.lr={factor}e-3",
                        "trainer.ema_decay=0",
                        "trainer.accumulate_embeddings=512",
                    ),
                )
                for size, factor in ((1024, 3), (4096, 6))
            ),
        ),
    ),
}
"""By name; "K" and the like are those of the paper."""

FIGURES = (
    "image_to_text/r1",
    "image_to_text/r5",
    "image_to_text/r10",
    "text_to_image/r1",
    "text_to_image/r5",
    "text_to_image/r10",
    "rsum",
)


@dataclass(frozen=True)
class Run:
    """One training; `folder` is that below ``runs``."""

    folder: str
    settings: Mapping[str, Any]
    """The whole configuration as nested mappings."""


@dataclass
class Plan:
    """Which runs the studies want: for each variant one a seed."""

    studies: list[tuple[Study, list[list[Run]]]]

    @property
    def runs(self) -> list[Run]:
        """Each once, in the order of the studies."""
        return list({run.folder: run for _, variants in self.studies for runs in variants for run in runs}.values())


def plan(recipe: str | Path | None, overrides: Sequence[str], studies: Sequence[Study], seeds: int) -> Plan:
    """Lays the variants over a recipe and its overrides; seeds count on from the recipe's.

    Raises:
        ValueError: as `load_config`; no studies or seeds.
    """
    if not studies or seeds < 1:
        raise ValueError(f"ablations want at least one study and one seed, got {len(studies)} and {seeds}")
    base = load_config(recipe, overrides)
    plain = dict(flat(asdict(base)))
    laid = []
    for study in studies:
        variants = []
        for variant in study.variants:
            config = load_config(recipe, [*overrides, *variant.overrides])
            changed = [(k, v) for k, v in flat(asdict(config)) if v != plain[k]]
            if any(key == "trainer.seed" for key, _ in changed):
                raise ValueError(f"a study cannot vary trainer.seed, got {variant.label!r}: ask for several seeds")
            name = ",".join(f"{key}={quote(str(value), safe='')}" for key, value in changed) or "recipe"
            runs = []
            for seed in range(base.trainer.seed, base.trainer.seed + seeds):
                config.trainer.seed = seed
                runs.append(Run(f"{name}/seed_{seed}", asdict(config)))
            variants.append(runs)
        laid.append((study, variants))
    return Plan(laid)


def train_run(run: Run, out: str | Path) -> dict[str, Any]:
    """Trains, or goes on with, or only looks at a run in ``out/runs``: its figures on the dev split.

    Those of the last epoch, so that no variant gains from an epoch chosen on the split it is judged by; and of the
    best, by RSUM.

    Raises:
        FileExistsError: the folder holds a run with other settings.
    """
    from setemb.training import read_metrics, train_precomp

    folder = Path(out) / "runs" / run.folder
    ended, asked = folder / "figures.json", folder / "asked.json"
    if asked.is_file():
        before = json.loads(asked.read_text(encoding="utf-8"))
        if before != run.settings:
            old, new = dict(flat(before)), dict(flat(run.settings))
            key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
            raise FileExistsError(
                f"{folder} was trained with {key}={old.get(key)!r}, now asked for is {new.get(key)!r}: choose another "
                "folder of ablations"
            )
    if ended.is_file():
        return dict(json.loads(ended.read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    write_file(asked, json.dumps(run.settings, indent=1).encode())
    begun = (folder / "last.safetensors").is_file()
    config: Config = load_config(folder / "config.yaml") if begun else from_dict(Config, run.settings)
    train_precomp(config, folder, resume=begun)
    rows = [row for row in read_metrics(folder) if "dev/rsum" in row]
    best = max(rows, key=lambda row: row["dev/rsum"])
    figures = {
        "epochs": len(rows),
        "last": {name: rows[-1][f"dev/{name}"] for name in FIGURES},
        "best": {name: best[f"dev/{name}"] for name in FIGURES},
    }
    write_file(ended, json.dumps(figures, indent=1).encode())
    return figures


def train_all(runs: Sequence[Run], out: str | Path, jobs: int = 1) -> Iterator[tuple[Run, dict[str, Any]]]:
    """The runs and their figures as they end; ``jobs`` at a time, each in a process with its share of the threads.

    What has begun ends, and is kept, also where another one fails.
    """
    import torch

    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if jobs == 1:
        for run in runs:
            yield run, train_run(run, out)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        under_way: dict[Future[dict[str, Any]], Run] = {pool.submit(train_run, run, out): run for run in runs}
        try:
            for done in as_completed(under_way):
                yield under_way[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def tables(plan: Plan, figures: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each study the means over seeds, of variants of which a run has ended.

    Args:
        figures: of `train_run`, by the run's folder.

    Returns:
        As JSON takes it: title and rows, each with its label, its number of seeds, the mean of each figure of the last
        epoch, the standard deviation of RSUM over seeds (None of one) and the mean of the best epoch's RSUM.
    """
    result = []
    for study, variants in plan.studies:
        rows = []
        for variant, runs in zip(study.variants, variants, strict=True):
            ended = [figures[run.folder] for run in runs if run.folder in figures]
            if not ended:
                continue
            sums = [one["last"]["rsum"] for one in ended]
            rows.append(
                {
                    "variant": variant.label,
                    "overrides": list(variant.overrides),
                    "seeds": len(ended),
                    "mean": {name: statistics.fmean(one["last"][name] for one in ended) for name in FIGURES},
                    "rsum_deviation": statistics.stdev(sums) if len(sums) > 1 else None,
                    "best_rsum": statistics.fmean(one["best"]["rsum"] for one in ended),
                }
            )
        result.append({"study": study.title, "rows": rows})
    return result


def to_markdown(studies: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for study in studies:
        lines += [
            f"| {study['study']} | image -> text R@1/5/10 | text -> image R@1/5/10 | RSUM | seeds |",
            "|---|---|---|---|---|",
        ]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in study["rows"]] + [""]
    return "\n".join(lines)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of `tables` as a line shows it."""
    recalls = [f"{row['mean'][name]:.1f}" for name in FIGURES[:-1]]
    spread = "" if row["rsum_deviation"] is None else f" ± {row['rsum_deviation']:.1f}"
    total = f"{row['mean']['rsum']:.1f}{spread}"
    return [row["variant"], " ".join(recalls[:3]), " ".join(recalls[3:]), total, str(row["seeds"])]


def write_tables(folder: str | Path, studies: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """``ablations.json`` and ``ablations.md``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "ablations.json", (json.dumps({**about, "studies": studies}, indent=2) + "\n").encode())
    write_file(folder / "ablations.md", to_markdown(studies).encode())
