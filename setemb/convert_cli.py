"""The command ``setemb convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from setemb.cli import tell, usage_errors

app = typer.Typer()


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="ckpt.pth.tar of the published code.")],
    out: Annotated[Path, typer.Argument(help="Folder for the model.")],
    vocabulary: Annotated[
        Path | None, typer.Option(help="Its words, *_vocab.pkl or JSON; for models with a GRU.", show_default=False)
    ] = None,
    source: Annotated[str, typer.Option(help="The language model of models with BERT.")] = "bert-base-uncased",
) -> None:
    """Convert a checkpoint of the published code into a model: safetensors and a JSON configuration.

    Nothing that the checkpoint holds is run. The model is evaluated as theirs is (padding as in the published code).
    """
    with usage_errors():
        from setemb.published import convert

        if out.exists() and any(out.iterdir()):
            raise FileExistsError(f"{out} exists and is not empty: choose another folder")
        model = convert(checkpoint, vocabulary, source)
        model.save_pretrained(out)
    tell(f"model: {out}")
