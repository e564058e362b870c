"""The command line: ``setemb train | eval | ablate | index | search | serve | demo | data | convert``."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    import typer.core
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f'the command line needs {error.name}: pip install "setemb[train]"') from error

_ELSEWHERE = {
    "index": "setemb.index_cli",
    "search": "setemb.index_cli",
    "serve": "setemb.index_cli",
    "demo": "setemb.demo.cli",
    "data": "setemb.data_cli",
    "convert": "setemb.convert_cli",
    "ablate": "setemb.ablate_cli",
}
"""Commands that another module's ``app`` holds; it is imported when the command, or the list of all, is asked for."""


class _Commands(typer.core.TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_ELSEWHERE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        command: Any = typer.main.get_command(importlib.import_module(_ELSEWHERE[cmd_name]).app)
        return command.commands[cmd_name] if hasattr(command, "commands") else command


app = typer.Typer(
    cls=_Commands,
    help="Cross-modal retrieval with sets of embeddings: train a model, evaluate it, index a collection and search it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A shipped recipe's name or a YAML file.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. data.dir=... trainer.epochs=3")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run.  [default: runs/RECIPE]", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with a run that was stopped, exactly.", show_default=False),
    ] = None,
    accumulate_embeddings: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Encode N images, and N captions, at a time: for batches whose activations do not fit.",
            show_default=False,
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print all settings of the recipe and stop.")] = False,
) -> None:
    """Train a model on images and captions.

    Shipped recipes: the paper's {coco,f30k}-region-bigru, -region-bert, -resnet152-bigru and -resnext101-bert, and
    f8k-grid-minilm, f8k-grid-bigru. Give the data with data.dir=FOLDER; setemb data check FOLDER says what it is.
    """
    from setemb.config import load_config, recipes, to_yaml

    with usage_errors():
        if (recipe is None) == (resume is None):
            raise ValueError(f"give either a recipe ({', '.join(recipes())}, or a YAML file) or --resume RUN")
        if resume is not None:
            if out is not None or accumulate_embeddings is not None:
                raise ValueError("--resume goes on as the run began: no other option goes with it")
            if not (resume / "config.yaml").is_file():
                raise ValueError(f"nothing to resume: no {resume / 'config.yaml'}")
            folder, config = resume, load_config(resume / "config.yaml")
        else:
            folder = out or Path("runs") / Path(str(recipe)).stem
            if accumulate_embeddings is not None:
                overrides = [*(overrides or []), f"trainer.accumulate_embeddings={accumulate_embeddings}"]
            config = load_config(recipe, overrides or [])
            if show:
                print(to_yaml(config), end="")
                return
        from setemb.processes import first
        from setemb.training import train_precomp

        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        model = train_precomp(config, folder, resume=resume is not None)
    if first():
        tell(f"model: {model}")


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run's folder, a saved model's folder or a checkpoint file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[data.KEY=VALUE]...", help="data.dir=...")] = None,
    split: Annotated[
        str | None, typer.Option(help="Which split to evaluate.  [default: the run's dev split]", show_default=False)
    ] = None,
    folds: Annotated[int | None, typer.Option(help="Mean over so many contiguous parts (5 for COCO 1K).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
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
    """Evaluate a model: R@1, R@5, R@10 and ranks, both ways.

    Of a run, its data and settings are those of training, changed by data.KEY=VALUE.
    """
    with usage_errors():
        from setemb.checkpoint import write_file
        from setemb.training import encode_precomp, evaluate_sets, evaluation_settings, load_trained

        for override in overrides or []:
            if not override.startswith("data."):
                raise ValueError(f"eval takes data.KEY=VALUE settings alone, got {override!r}")
        if pmrp is not None and not eccv:
            raise ValueError("--pmrp goes with --eccv")
        embedder, trained = load_trained(model)
        settings = evaluation_settings(embedder, trained, overrides or [])
        split = split or settings.dev_split
        embedder, parts = encode_precomp(embedder, settings, split)
        report = evaluate_sets(embedder, parts, folds)
        figures = {"split": split, **report.to_dict()}
        if eccv:
            figures["eccv"] = _eccv(embedder, parts, pmrp)
        if json_file is not None:
            write_file(json_file, (json.dumps(figures, indent=2) + "\n").encode())
    table = Table(title=escape(f"{model}, split {split}: RSUM {report.rsum:.1f}"))
    for column in ("", "R@1", "R@5", "R@10", "median rank", "mean rank"):
        table.add_column(column, justify="right" if column else "left")
    for name, recall in (("image → text", report.image_to_text), ("text → image", report.text_to_image)):
        row = (recall.r1, recall.r5, recall.r10, recall.median_rank, recall.mean_rank)
        table.add_row(name, *(f"{figure:.1f}" for figure in row))
    Console().print(table)
    if eccv:
        table = Table("", *figures["eccv"])
        for way, name in (("image_to_text", "image → text"), ("text_to_image", "text → image")):
            table.add_row(name, *(f"{of[way]:.1f}" for of in figures["eccv"].values()))
        Console().print(table)


def _eccv(model: Any, parts: Any, pmrp: Path | None) -> dict[str, dict[str, float]]:
    """Figures of `setemb.coco`."""
    import torch

    from setemb.coco import evaluate_eccv_caption

    if model.config.similarity == "max":
        raise ValueError("--eccv wants a model of similarity smooth_chamfer or cosine, got max")
    images, captions = (torch.cat([part[i] for part in parts]).float() for i in (0, 1))
    return evaluate_eccv_caption(images, captions, pmrp_files=pmrp, alpha=model.config.alpha)


def tell(text: str) -> None:
    """Prints as it is: a path with brackets is no markup, a long one is not wrapped."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Bad input is one sentence on stderr and exit status 2, not a traceback; numbers that went wrong are status 1."""
    try:
        yield
    except FloatingPointError as error:
        Console(stderr=True).print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except (ValueError, TypeError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def main() -> None:
    # A search lives for a second or two. Walking through all of torch for garbage, and taking torch apart in the end,
    # would be a third of it, and there is nothing to tidy up.
    brief = sys.argv[1:2] == ["search"]
    if brief:
        gc.disable()
    try:
        app()
    except SystemExit as end:
        if brief and not end.code:
            with suppress(BrokenPipeError):
                sys.stdout.flush()
            os._exit(0)
        raise
