"""The command ``setemb eval``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from setemb.cli import usage_errors

if TYPE_CHECKING:
    from torch import Tensor

    from setemb.ensemble import Encoded

app = typer.Typer()

WAYS = {"image_to_text": "image → text", "text_to_image": "text → image"}


@dataclass
class _Seen:
    """A split as one model sees it."""

    name: str
    split: str
    texts: Sequence[str]
    encoded: Encoded
    image_groups: Tensor
    caption_groups: Tensor


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... [data.KEY=VALUE]...",
            help="Runs' folders, saved models' folders or checkpoint files; and data.dir=... and the like.",
            show_default=False,
        ),
    ],
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Also all models together: the mean of their similarities.")
    ] = False,
    split: Annotated[
        str | None, typer.Option(help="Which split to evaluate.  [default: the run's dev split]", show_default=False)
    ] = None,
    folds: Annotated[int | None, typer.Option(help="Mean over so many contiguous parts (5 for COCO 1K).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw which slots match, an .svg file.", show_default=False)
    ] = None,
    eccv: Annotated[
        bool,
        typer.Option(
            "--eccv", help="Also ECCV Caption and CxC; the split is the test split of COCO in its usual order."
        ),
    ] = False,
    pmrp: Annotated[
        Path | None,
        typer.Option(help="With --eccv, also PMRP: the folder with pm_*.json.", show_default=False),
    ] = None,
) -> None:
    """Evaluate models: R@1, R@5, R@10 and ranks, both ways, and how diverse their sets are.

    Of a run, its data and settings are those of training, changed by data.KEY=VALUE: those that stand after the last
    model are for all of them, those after another model for that one.

    With --json, one model's figures are written as they are; of several, a list "models", and "ensemble".
    """
    with usage_errors():
        from setemb.checkpoint import write_file

        asked = _asked(models)
        if pmrp is not None and not eccv:
            raise ValueError("--pmrp goes with --eccv")
        if ensemble and len(asked) < 2:
            raise ValueError(f"--ensemble wants two models or more, got {len(asked)}")
        if plot is not None and plot.suffix != ".svg":
            raise ValueError(f"--plot draws an .svg file, got {plot}")
        reports: dict[str, dict[str, Any]] = {}
        kept: list[_Seen] = []
        for name, overrides in asked:
            seen = _see(name, overrides, split)
            label = name if name not in reports else f"{name} ({len(reports) + 1})"
            reports[label] = _figures([seen], folds, eccv, pmrp)
            if ensemble:
                kept.append(seen)
                _check_same(kept[0], seen)
        together = _figures(kept, folds, eccv, pmrp) if ensemble else None
        if json_file is not None:
            figures: dict[str, Any] = next(iter(reports.values()))
            if len(asked) > 1:
                figures = {"models": [{"model": name} | of for name, of in reports.items()]}
                figures |= {} if together is None else {"ensemble": together}
            write_file(json_file, (json.dumps(figures, indent=2) + "\n").encode())
        if plot is not None:
            write_file(plot, _drawn(reports).encode())
    console = Console()
    if len(asked) == 1:
        ((label, of),) = reports.items()
        console.print(_table_of_one(label, of))
    else:
        console.print(_table_of_all(reports | ({} if together is None else {"ensemble": together})))
    console.print(_table_of_sets(reports))
    if eccv:
        console.print(_table_of_eccv(reports | ({} if together is None else {"ensemble": together})))


def _asked(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Models, each with its settings: those for all, then its own."""
    asked: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if "=" not in argument or Path(argument).exists():
            asked.append((argument, []))
        elif not argument.startswith("data."):
            raise ValueError(f"eval takes data.KEY=VALUE settings alone, got {argument!r}")
        elif not asked:
            raise ValueError(f"the first argument must be a model, got {argument!r}")
        else:
            asked[-1][1].append(argument)
    common = asked[-1][1]
    return [(name, own if own is common else [*common, *own]) for name, own in asked]


def _see(name: str, overrides: list[str], split: str | None) -> _Seen:
    from setemb.data.folder import open_split
    from setemb.training import encode_split, encoded_by, evaluation_settings, load_trained

    model, trained = load_trained(name)
    settings = evaluation_settings(model, trained, overrides)
    split = split or settings.dev_split
    data = open_split(settings, split)
    return _Seen(name, split, data.texts, *encoded_by(model, encode_split(model, settings, data)))


def _check_same(first: _Seen, other: _Seen) -> None:
    """Refuses an ensemble whose models have seen different things; captions may differ in case and punctuation."""
    sizes = [(len(of.image_groups), len(of.caption_groups)) for of in (first, other)]
    what = "--ensemble wants the same images and captions"
    if sizes[0] != sizes[1]:
        (n, m), (i, j) = sizes
        raise ValueError(f"{what}: {first.name} has {n} images and {m} captions, {other.name} {i} and {j}")
    for row, (a, b) in enumerate(zip(first.texts, other.texts, strict=True)):
        if _letters(a) != _letters(b):
            raise ValueError(f"{what}: caption {row} of {first.name} is {a!r}, of {other.name} {b!r}")
    if not first.caption_groups.equal(other.caption_groups) or not first.image_groups.equal(other.image_groups):
        raise ValueError(f"{what}: {other.name} has other captions of an image than {first.name}")


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).lower()


def _figures(seen: Sequence[_Seen], folds: int | None, eccv: bool, pmrp: Path | None) -> dict[str, Any]:
    """Of one model, or of an ensemble."""
    from setemb.coco import eccv_caption_of
    from setemb.diversity import set_report
    from setemb.ensemble import Similarities
    from setemb.evaluation import evaluate_similarities

    similarities = Similarities([of.encoded for of in seen])
    groups: dict[str, Any] = {"image_groups": seen[0].image_groups, "caption_groups": seen[0].caption_groups}
    report = evaluate_similarities(similarities, folds=folds, **groups)
    figures: dict[str, Any] = {"split": seen[0].split, **report.to_dict()}
    if len(seen) == 1:
        figures["sets"] = set_report(similarities, **groups).to_dict()
    if eccv:
        figures["eccv"] = eccv_caption_of(similarities, pmrp_files=pmrp)
    return figures


def _table_of_one(name: str, figures: dict[str, Any]) -> Table:
    table = Table(title=escape(f"{name}, split {figures['split']}: RSUM {figures['rsum']:.1f}"))
    for column in ("", "R@1", "R@5", "R@10", "median rank", "mean rank"):
        table.add_column(column, justify="right" if column else "left")
    for way, label in WAYS.items():
        table.add_row(label, *(f"{figure:.1f}" for figure in figures[way].values()))
    return table


def _table_of_all(reports: dict[str, dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("", overflow="fold")
    for label in WAYS.values():
        table.add_column(f"{label}\nR@1/5/10", justify="right", no_wrap=True)
        table.add_column("rank: median,\nmean", justify="right", no_wrap=True)
    table.add_column("RSUM", justify="right", no_wrap=True)
    for name, of in reports.items():
        cells = []
        for way in WAYS:
            r1, r5, r10, median, mean = of[way].values()
            cells += [f"{r1:.1f} {r5:.1f} {r10:.1f}", f"{median:.1f} {mean:.1f}"]
        table.add_row(escape(name), *cells, f"{of['rsum']:.1f}")
    return table


def _table_of_sets(reports: dict[str, dict[str, Any]]) -> Table:
    """How diverse sets are, and how often each slot is in the closest pair of vectors."""
    table = Table("sets of", "log circular variance", "slots that match, %: of positive pairs", *map(_found, WAYS))
    for name, of in reports.items():
        for side, label in (("image", "images"), ("caption", "captions")):
            variance = of["sets"]["log_circular_variance"][side]
            uses = [" ".join(f"{share:.0f}" for share in use[side]) for use in of["sets"]["slots"].values()]
            first = label if len(reports) == 1 else f"{escape(name)}, {label}"
            table.add_row(first, "one vector" if variance is None else f"{variance:.2f}", *uses)
    return table


def _found(way: str) -> str:
    return f"found first, {WAYS[way]}"


def _table_of_eccv(reports: dict[str, dict[str, Any]]) -> Table:
    table = Table("", *next(iter(reports.values()))["eccv"])
    for name, of in reports.items():
        for way, label in WAYS.items():
            first = label if len(reports) == 1 else f"{escape(name)}, {label}"
            table.add_row(first, *(f"{figure[way]:.1f}" for figure in of["eccv"].values()))
    return table


def _drawn(reports: dict[str, dict[str, Any]]) -> str:
    """For each model and side, a bar a slot and kind of pairs."""
    from setemb.charts import grouped_bars, page_of_charts

    colours = {"positive": "#2f5fd0", "image_to_text": "#d9822b", "text_to_image": "#3a9d7c"}
    key = {"positive pairs": "positive"} | {_found(way): way for way in WAYS}
    charts = []
    for name, of in reports.items():
        for side, label in (("image", "images"), ("caption", "captions")):
            series = {title: (way, of["sets"]["slots"][way][side]) for title, way in key.items()}
            slots = [f"slot {k + 1}" for k in range(len(of["sets"]["slots"]["positive"][side]))]
            variance = of["sets"]["log_circular_variance"][side]
            known = "" if variance is None else f", log circular variance {variance:.2f}"
            charts.append((f"{name}: {label}{known}", grouped_bars(slots, series, f"{name}, slots of {label}")))
    note = "How often each slot is in the closest pair of vectors, in percent"
    return page_of_charts(charts, colours, key, note)
