"""``setemb index`` and ``setemb search``. A command imports what it needs when it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from setemb.index import Item, SetIndex
    from setemb.model import SetEmbedder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("index")
def build(
    model: Annotated[Path, typer.Argument(help="A run's folder, a saved model's folder or a checkpoint file.")],
    data: Annotated[
        str, typer.Option(help='"emoji", or a folder with {split}_ims.npy and {split}_caps.txt.', show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the index; an index there is replaced.", show_default=False)],
    split: Annotated[str, typer.Option(help="Which split of the folder.")] = "dev",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the features of the emoji.  [default: ~/.cache/setemb/emoji]", show_default=False
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Keep the vectors in float16.")] = False,
) -> None:
    """Embed a collection of images with a trained model and keep it as a searchable index, the model included."""
    from setemb.cli import tell, usage_errors

    with usage_errors():
        from setemb.training import load_model

        loaded = load_model(model)
        if data == "emoji":
            from setemb.demo.data import load_features
            from setemb.demo.runner import index_emoji

            index = index_emoji(loaded, load_features(cache), half)
        else:
            index = _index_precomp(loaded, data, split, half)
        index.save(out, loaded)
    tell(f"{len(index)} images in {out}")


@app.command("search")
def search(
    query: Annotated[list[str], typer.Argument(help="What to look for; several queries give several lists.")],
    index: Annotated[Path, typer.Option(help="Folder that `setemb index` or `setemb demo` wrote.", show_default=False)],
    top: Annotated[int, typer.Option("-k", "--top", min=1, help="Results a query.")] = 10,
    model: Annotated[
        Path | None,
        typer.Option(help="Embed the queries with this model, not the one in the index.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with the pictures to this file.", show_default=False)
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the checksums of the index first.")] = False,
) -> None:
    """Search an index with words."""
    from setemb.cli import usage_errors

    with usage_errors():
        import torch

        from setemb.index import SetIndex, embed_texts
        from setemb.model import SetEmbedder

        if any(not text.strip() for text in query):
            raise ValueError("a query must not be empty")
        loaded = SetIndex.load(index, verify=verify)
        folder = model if model is not None else loaded.model_folder
        if folder is None:
            raise ValueError(f"{index} holds no model: name the one that made it with --model")
        if not folder.is_dir():
            raise ValueError(f"{folder} is missing: name the model that made the index with --model")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a few words are too little to share: threads that wait for each other cost more
        queries = embed_texts(SetEmbedder.from_pretrained(folder), query)
        torch.set_num_threads(threads)
        found = loaded.search(queries, top)
        results = [
            {
                "query": text,
                "results": [
                    _hit(rank, score, row, loaded.item(row))
                    for rank, (score, row) in enumerate(zip(scores, rows, strict=True), 1)
                ],
            }
            for text, scores, rows in zip(query, found.scores.tolist(), found.rows.tolist(), strict=True)
        ]
        if html is not None:
            _write_page(html, results, loaded)
    if as_json:
        json.dump(results, sys.stdout, indent=1, ensure_ascii=False)
        sys.stdout.write("\n")
    else:
        for result in results:
            Console().print(_table(result))


def _index_precomp(model: SetEmbedder, folder: str, split: str, half: bool) -> SetIndex:
    """The images of a split of the precomputed format, with their captions."""
    from setemb.data.precomp import PrecompDataset
    from setemb.index import SetIndex, embed_images

    data = PrecompDataset(folder, split)
    vectors, each = embed_images(model, data.images), data.captions_per_image
    return SetIndex(
        vectors.half() if half else vectors,
        [f"{split}/{row}" for row in range(len(data))],
        [{"captions": data.texts[row * each : (row + 1) * each]} for row in range(len(data))],
        similarity=model.config.similarity,  # type: ignore[arg-type]
        alpha=model.config.alpha,
    )


def _hit(rank: int, score: float, row: int, item: Item) -> dict[str, Any]:
    """What a result says of itself comes first, and wins over metadata of the same name."""
    own, meta = {"rank": rank, "score": score, "row": row, "id": item.id}, item.meta
    return {**own, **{key: value for key, value in meta.items() if key not in own}}


def _table(result: Mapping[str, Any]) -> Table:
    """Rank, score, id, and whatever metadata the items have."""
    rows: Sequence[Mapping[str, Any]] = result["results"]
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "row"))
    table = Table(title=escape(f"“{result['query']}”"), title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(escape(column), justify="right" if column in ("rank", "score") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(_text(row.get(column, ""))) for column in columns))
    return table


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _write_page(path: Path, results: Sequence[Mapping[str, Any]], index: SetIndex) -> None:
    from setemb.checkpoint import write_file
    from setemb.packages import require

    require("jinja2", "demo")
    from setemb.demo.report import render_page

    found = {hit["row"]: index.item(hit["row"]).picture for result in results for hit in result["results"]}
    pictures = {row: picture for row, picture in found.items() if picture is not None}
    write_file(path, render_page("search.html.j2", results=results, pictures=pictures, text=_text).encode())
