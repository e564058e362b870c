"""The command line: ``setemb train | eval | ablate | index | search | serve | demo | data | convert``."""

from __future__ import annotations

import gc
import importlib
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
except ImportError as error:
    raise SystemExit(f'the command line needs {error.name}: pip install "setemb[train]"') from error

_ELSEWHERE = {
    "eval": "setemb.eval_cli",
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


@app.callback()
def commands() -> None:  # with it, the one command of this module is one of several
    pass


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
    f8k-grid-minilm, f8k-grid-bigru, f30k-clip. Give the data with data.dir=FOLDER; setemb data check FOLDER says what
    it is.
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
