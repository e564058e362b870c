"""The command ``setemb ablate``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from setemb.cli import tell, usage_errors

app = typer.Typer()


@app.command()
def ablate(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For all runs, e.g. data.dir=...")
    ] = None,
    study: Annotated[
        list[str] | None,
        typer.Option(help="similarity, sets, slots, iterations, alpha, loss or batch; repeatable.", show_default=False),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2...", help="A study of any setting; repeatable.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each variant.")] = 1,
    jobs: Annotated[int, typer.Option(help="Trainings at a time, each with its share of the processor.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the runs and the tables.")] = Path("runs/ablations"),
) -> None:
    """Train variants of a recipe and compare them on the dev split, by their last epoch, averaged over seeds.

    Asked again, it takes what has been trained from the folder, and goes on with what was stopped.
    """
    with usage_errors():
        from setemb.ablations import STUDIES, Study, cells, plan, tables, train_all, write_tables
        from setemb.ablations import vary as study_of

        chosen: list[Study] = []
        for name in study or []:
            if name not in STUDIES:
                raise ValueError(f"--study must be one of {', '.join(STUDIES)}, got {name!r}")
            chosen.append(STUDIES[name])
        for one in vary or []:
            key, _, values = one.partition("=")
            if not key or not values:
                raise ValueError(f"--vary must read KEY=V1,V2, got {one!r}")
            chosen.append(study_of(key, values.split(",")))
        if not chosen:
            raise ValueError("give at least one --study or --vary")
        planned = plan(recipe, [*(overrides or []), "trainer.progress=false"], chosen, seeds)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        figures: dict[str, Any] = {}
        about = {"recipe": recipe, "overrides": overrides or [], "seeds": seeds}
        for run, found in train_all(planned.runs, out, jobs):
            figures[run.folder] = found
            tell(f"{len(figures)} of {len(planned.runs)}: {run.folder}: RSUM {found['last']['rsum']:.1f}")
            write_tables(out, tables(planned, figures), about)
    for part in tables(planned, figures):
        table = Table(part["study"], "image → text R@1 5 10", "text → image R@1 5 10", "RSUM", "seeds")
        for row in part["rows"]:
            table.add_row(*cells(row))
        Console().print(table)
    tell(f"{out / 'ablations.md'}, {out / 'ablations.json'}")
