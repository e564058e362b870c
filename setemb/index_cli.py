"""``setemb index``, ``setemb search`` and ``setemb serve``. A command imports what it needs when it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from setemb.index import SetIndex
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
    of: Annotated[
        Literal["images", "texts"], typer.Option(help="What is found later: images, or captions (names of emoji).")
    ] = "images",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the features of the emoji.  [default: ~/.cache/setemb/emoji]", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "int8"] | None,
        typer.Option(help="How the vectors are kept.  [default: float32]", show_default=False),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="As --dtype float16.")] = False,
) -> None:
    """Embed a collection with a trained model and keep it as a searchable index, the model included."""
    from setemb.cli import tell, usage_errors

    with usage_errors():
        if half and dtype not in (None, "float16"):
            raise ValueError(f"--half is --dtype float16: it cannot be with --dtype {dtype}")
        from setemb.index import SetIndex
        from setemb.training import load_model

        loaded = load_model(model)
        index = SetIndex.build(
            out,
            _emoji(loaded, cache, of) if data == "emoji" else _precomp(loaded, data, split, of),
            similarity=loaded.config.similarity,  # type: ignore[arg-type]
            alpha=loaded.config.alpha,
            dtype="float16" if half else dtype or "float32",
            model=loaded,
        )
    tell(f"{len(index)} {of} in {out}")


@app.command("search")
def search(
    query: Annotated[
        list[str] | None,
        typer.Argument(help="Words to look for; several queries give several lists.", show_default=False),
    ] = None,
    *,
    index: Annotated[Path, typer.Option(help="Folder that `setemb index` or `setemb demo` wrote.", show_default=False)],
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="A picture to look for, or an .npy file of an image's features; may be given several times.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[int, typer.Option("-k", "--top", min=1, help="Results a query.")] = 10,
    model: Annotated[
        Path | None,
        typer.Option(help="Embed the queries with this model, not the one in the index.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write a page with pictures, and what each slot matched, to this file.", show_default=False
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the checksums of the index first.")] = False,
) -> None:
    """Search an index with words or pictures."""
    from setemb.cli import usage_errors

    with usage_errors():
        if not query and not image:
            raise ValueError("give words to look for, or a picture with --image")
        if any(not text.strip() for text in query or []):
            raise ValueError("a query must not be empty")
        from setemb.search import find, queries

        loaded, encoder = opened(index, model, verify)
        pictures = [(str(path), path) for path in image or []]
        wanted = queries(encoder, query or [], pictures)
        results = find(loaded, wanted, top, pairs=html is not None)
        if html is not None:
            _write_page(html, results, loaded, image or [])
    if as_json:
        shown = [answer | {"results": [_without_pairs(hit) for hit in answer["results"]]} for answer in results]
        json.dump(shown, sys.stdout, indent=1, ensure_ascii=False)
        sys.stdout.write("\n")
    else:
        for result in results:
            Console().print(_table(result))


@app.command("serve")
def serve(
    index: Annotated[Path, typer.Option(help="Folder that `setemb index` or `setemb demo` wrote.", show_default=False)],
    model: Annotated[
        Path | None,
        typer.Option(help="Embed the queries with this model, not the one in the index.", show_default=False),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Anything but this machine's own lets others in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    verify: Annotated[bool, typer.Option("--verify", help="Check the checksums of the index first.")] = False,
) -> None:
    """Serve an index: a page with a search box, and a JSON API."""
    from setemb.cli import tell, usage_errors

    with usage_errors():
        from setemb.serve import listen

        listen(*opened(index, model, verify), host, port, lambda address: tell(f"{index}: {address}"))


def opened(folder: Path, other: Path | None, verify: bool = False) -> tuple[SetIndex, SetEmbedder]:
    """An index and the model that is kept with it, or another one, that `setemb.training.load_model` finds.

    Raises:
        FileNotFoundError, ValueError: there is no index, or no model; or one of them was altered.
    """
    from setemb.index import SetIndex

    index = SetIndex.load(folder, verify=verify)
    if other is not None:
        return index, _model(other)
    try:
        return index, _kept_model(index, folder)
    except (FileNotFoundError, ValueError):  # it may have gone with a revision that was replaced just now
        again = SetIndex.load(folder, verify=verify)
        if again.model_folder == index.model_folder:
            raise
        return again, _kept_model(again, folder)


def _kept_model(index: SetIndex, folder: Path) -> SetEmbedder:
    from setemb.model import SetEmbedder

    path = index.model_folder
    if path is None:
        raise ValueError(f"{folder} holds no model: name the one that made it with --model")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing: name the model that made the index with --model")
    return SetEmbedder.from_pretrained(path)


def _model(path: Path) -> SetEmbedder:
    if (path / "config.json").is_file():  # seconds sooner than with what trains
        from setemb.model import SetEmbedder

        return SetEmbedder.from_pretrained(path)
    from setemb.training import load_model

    return load_model(path)


def _emoji(model: SetEmbedder, cache: Path | None, of: str) -> Iterator[tuple[Any, ...]]:
    from setemb.demo.data import load_features
    from setemb.demo.runner import emoji_names, emoji_pictures

    features = load_features(cache)
    return emoji_pictures(model, features) if of == "images" else emoji_names(model, features)


def _precomp(model: SetEmbedder, folder: str, split: str, of: str) -> Iterator[tuple[Any, ...]]:
    """The images of a split of a folder of data, of any format, with their captions; or captions with images' ids."""
    from dataclasses import replace

    import numpy as np
    import torch

    from setemb.config import DataConfig
    from setemb.data.folder import open_split
    from setemb.index import embed_texts
    from setemb.training import check_fits, evaluation_settings

    at_once = 128
    if of == "texts":
        data = open_split(DataConfig(dir=folder, check_pictures=False), split)
        owners = np.arange(len(data)).repeat(np.diff(data.offsets))
        for start in range(0, len(data.texts), at_once):
            texts = data.texts[start : start + at_once]
            for row, (text, one) in enumerate(zip(texts, embed_texts(model, texts), strict=True), start):
                image = f"{split}/{owners[row]}"
                yield f"{image}/{row - data.offsets[owners[row]]}", one, {"caption": text, "image": image}
        return
    settings = replace(evaluation_settings(model, None), dir=folder)
    data = open_split(settings, split)
    check_fits(model.config.image, data, settings)
    for start in range(0, len(data), at_once):
        images = data.read(np.arange(start, min(start + at_once, len(data))), None)
        with torch.inference_mode():
            sets = model.encode_image({"images": images}).embeddings
        for row, one in enumerate(sets, start):
            yield f"{split}/{row}", one, {"captions": data.texts[data.offsets[row] : data.offsets[row + 1]]}


def _table(result: Mapping[str, Any]) -> Table:
    """Rank, score, id, and whatever metadata the items have."""
    rows: Sequence[Mapping[str, Any]] = result["results"]
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("row", "pairs")))
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


def _without_pairs(hit: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in hit.items() if key != "pairs"}


def _write_page(path: Path, results: Sequence[Mapping[str, Any]], index: SetIndex, images: Sequence[Path]) -> None:
    from setemb.checkpoint import write_file
    from setemb.inputs import read_picture
    from setemb.pages import render_page

    found = {hit["row"]: index.item(hit["row"]).picture for result in results for hit in result["results"]}
    page = render_page(
        "search.html.j2",
        results=results,
        pictures={row: picture for row, picture in found.items() if picture is not None},
        asked={str(path): read_picture(path, 160) for path in images if path.suffix != ".npy"},
        text=_text,
    )
    write_file(path, page.encode())
