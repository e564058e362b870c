"""The command ``setemb data check``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from setemb.cli import tell, usage_errors

app = typer.Typer()
data = typer.Typer(help="Look at data sets.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.callback()
def group() -> None:
    """Look at data sets."""


@data.command()
def check(
    folder: Annotated[Path, typer.Argument(help="With features, pictures or a data set, and captions.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[data.KEY=VALUE]...", help="As for train, e.g. data.caption_column=")
    ] = None,
    needed: Annotated[list[str] | None, typer.Option("--split", help="A split that must be there; repeatable.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every picture, read all features.")] = False,
    problems: Annotated[int, typer.Option(help="How many problems to tell.")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
) -> None:
    """Say what a folder of data is, and everything that is wrong with it.

    Exit status: 0 where nothing is wrong, 1 where something is, 2 where the folder is none of a known format.
    """
    from setemb.checkpoint import write_file
    from setemb.config import load_config
    from setemb.data.folder import check_folder

    with usage_errors():
        for override in overrides or []:
            if not override.startswith("data."):
                raise ValueError(f"check takes data.KEY=VALUE settings alone, got {override!r}")
        settings = load_config(None, overrides or []).data
        report = check_folder(folder, needed or ("train", "dev"), deep, problems, settings)
        if json_file is not None:
            write_file(json_file, (json.dumps(asdict(report), indent=2) + "\n").encode())
    tell(f"{folder}: {report.format}, {report.bytes / 2**20:,.1f} MiB")
    table = Table()
    for column in ("split", "images", "captions", "an image", "features"):
        table.add_column(column, justify="left" if column in ("split", "features") else "right")
    for split in report.splits:
        least, most = split.captions_per_image or (None, None)
        an_image = "?" if least is None else str(least) if least == most else f"{least} to {most}"
        counts = ("?" if n is None else f"{n:,}" for n in (split.images, split.captions))
        table.add_row(escape(split.name), *counts, an_image, split.features)
    Console().print(table)
    for problem in report.problems:
        tell(problem)
    if report.problems:
        tell(f"{len(report.problems)} problems{', and more' if report.more else ''}")
        raise typer.Exit(1)
    tell("nothing is wrong" + ("" if deep else " (--deep reads everything)"))
