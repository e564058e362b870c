"""``setemb demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("demo")
def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the recipe emoji, e.g. optimizer.lr=5e-4"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page, the index and the runs.")] = Path("demo"),
    epochs: Annotated[int | None, typer.Option(min=1, help="In place of the recipe's number of epochs.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for the features.  [default: ~/.cache/setemb/emoji]", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few emoji, one epoch: only to see that it works.")] = False,
) -> None:
    """Train on emoji from packages, find unseen ones by name, and write a page about it (minutes on two cores)."""
    from setemb.cli import usage_errors

    console = Console()
    with usage_errors():
        from setemb.demo.runner import run_demo

        settings = [*(overrides or []), *([f"trainer.epochs={epochs}"] if epochs is not None else [])]
        run_demo(out, settings, cache, quick, console)
    console.print(
        f'\npage: {out / "index.html"}\nsearch: setemb search --index {out / "index"} "party"', soft_wrap=True
    )
