"""``setemb serve``: what it answers, what it refuses and how, and its page in a real browser."""

# ruff: noqa: E402 - packages are asked for before they are imported
from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("jinja2")
httpx2 = pytest.importorskip("httpx2")
Image = pytest.importorskip("PIL.Image")

from fastapi.testclient import TestClient

from setemb.config import ModelConfig
from setemb.data.vocab import Vocabulary
from setemb.index import SetIndex
from setemb.model import SetEmbedder
from setemb.serve import Limits, create_app
from tests.index.browser import Browser, chromium, serving

TEXTS = [f"a picture of thing {i}" for i in range(12)]
EVIL = "<img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve sentences under an untrained model: each finds itself first. One has a name that would be markup."""
    torch.manual_seed(0)
    vocabulary = Vocabulary.build([*TEXTS, EVIL], 1)
    config = ModelConfig(dim=16)
    config.image.dim_in, config.text.vocab_size = 8, len(vocabulary)
    model = SetEmbedder(config, vocabulary)
    folder = tmp_path_factory.mktemp("serve") / "index"
    sets = model.encode_text([*TEXTS, EVIL]).embeddings
    pictures = np.random.default_rng(0).integers(0, 256, (13, 6, 5, 3), dtype=np.uint8)
    SetIndex.build(
        folder,
        [
            (f"item/{i}", sets[i], {"name": text, "tags": ["a", i]}, pictures[i])
            for i, text in enumerate([*TEXTS, EVIL])
        ],
        model=model,
    )
    return folder


def client(folder: Path, source: str = "", **limits: Any) -> TestClient:
    """``source``: of a model that takes pictures."""
    index = SetIndex.load(folder)
    assert index.model_folder is not None
    model = SetEmbedder.from_pretrained(index.model_folder)
    model.config.image.source = source
    app = create_app(index, model, limits=Limits(**limits), hosts=("testserver",))
    return TestClient(app, raise_server_exceptions=False)


def test_it_answers(folder: Path) -> None:
    asking = client(folder)
    answer = asking.post("/api/search", json={"query": TEXTS[4], "k": 3, "pairs": True})
    assert answer.status_code == 200
    body = answer.json()
    assert body["query"] == TEXTS[4]
    assert [hit["rank"] for hit in body["results"]] == [1, 2, 3]
    first = body["results"][0]
    assert (first["id"], first["name"], first["tags"], first["row"]) == ("item/4", TEXTS[4], ["a", 4], 4)
    pairs = torch.tensor(first["pairs"])
    assert pairs.shape == (4, 4)
    torch.testing.assert_close(pairs.diagonal(), torch.ones(4))
    assert "pairs" not in asking.post("/api/search", json={"query": TEXTS[4]}).json()["results"][0]
    assert len(asking.post("/api/search", json={"query": TEXTS[4]}).json()["results"]) == 10
    about = asking.get("/api").json()
    assert (about["items"], about["similarity"], about["pictures_as_queries"]) == (13, "smooth_chamfer", False)
    picture = asking.get("/picture/4")
    assert picture.headers["content-type"] == "image/webp"
    pixels = np.asarray(Image.open(io.BytesIO(picture.content)))
    assert np.array_equal(pixels, SetIndex.load(folder).item(4).picture)  # type: ignore[arg-type]
    page = asking.get("/")
    assert "13 items" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert asking.get("/serve.js").headers["content-type"].startswith("text/javascript")


def picture(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


JSON = {"Content-Type": "application/json"}
PNG = {"Content-Type": "image/png"}


@pytest.mark.parametrize(
    ("path", "given", "status", "message"),
    [
        ("/api/search", {"json": {"query": ""}}, 422, "query: String should have at least 1 character"),
        ("/api/search", {"json": {"query": "   "}}, 422, "query: it must not be empty"),
        ("/api/search", {"json": {"query": "x" * 1001}}, 422, "query: expected at most 1000 characters, got 1001"),
        ("/api/search", {"json": {}}, 422, "query: Field required"),
        ("/api/search", {"json": {"query": 3}}, 422, "query: Input should be a valid string"),
        ("/api/search", {"json": {"query": "a", "k": 0}}, 422, "k: Input should be greater than or equal to 1"),
        ("/api/search", {"json": {"query": "a", "k": 101}}, 422, "k: expected 1 <= k <= 100, got 101"),
        ("/api/search", {"json": {"query": "a", "k": "many"}}, 422, "k: Input should be a valid integer"),
        ("/api/search", {"json": {"query": "a", "alpha": 3}}, 422, "alpha: Extra inputs are not permitted"),
        ("/api/search", {"content": b"{", "headers": JSON}, 422, "JSON decode error"),
        ("/api/search", {"content": b"\xff\xfe", "headers": JSON}, 4, ""),
        ("/api/search", {"json": {"query": "a" * 20_000}}, 413, "the body: expected at most 16,384 bytes"),
        ("/api/image", {"content": b"x" * (8 << 20 | 1), "headers": PNG}, 413, "expected at most 8,388,608 bytes"),
        ("/api/image", {"content": picture()}, 415, "expected a picture, Content-Type image/..., got none"),
        ("/api/image", {"content": picture(), "headers": PNG}, 422, "this model takes features of images"),
        ("/api/image?k=x", {"content": picture(), "headers": PNG}, 422, "k: Input should be a valid integer"),
        ("/api/nothing", {"json": {}}, 404, "Not Found"),
    ],
)
def test_what_it_refuses_is_one_sentence(
    folder: Path, path: str, given: dict[str, Any], status: int, message: str
) -> None:
    answer = client(folder).post(path, **given)
    assert str(answer.status_code).startswith(str(status))
    assert message in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("query", "content", "message"),
    [
        ("", b"no picture", "the picture is no picture that can be read: it is none of PNG"),
        ("", picture((5000, 4000)), "the picture: expected at most 16,000,000 pixels, got 5000 x 4000"),
        ("?k=101", picture(), "k: expected 1 <= k <= 100, got 101"),
    ],
    ids=["no picture", "pixels", "k"],
)
def test_pictures_that_are_refused(folder: Path, query: str, content: bytes, message: str) -> None:
    answer = client(folder, "efficientnet-lite0").post(f"/api/image{query}", content=content, headers=PNG)
    assert answer.status_code == 422
    assert message in answer.json()["error"]


def test_pictures_are_decoded_one_at_a_time_where_they_are_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding takes far more memory than the file: where it is in vain it is left out."""
    from setemb import serve

    active, most = 0, 0

    def decode(*arguments: Any) -> np.ndarray:
        nonlocal active, most
        active += 1
        most = max(most, active)
        time.sleep(0.1)
        active -= 1
        raise ValueError("decoded")

    monkeypatch.setattr(serve, "read_query", decode)

    async def scene(source: str) -> list[str]:
        transport = httpx2.ASGITransport(app=client(folder, source).app)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://testserver", timeout=60) as asking:
            several = (asking.post("/api/image", content=picture(), headers=PNG) for _ in range(4))
            return [answer.json()["error"] for answer in await asyncio.gather(*several)]

    assert asyncio.run(scene("")) == ["this model takes features of images, not pictures"] * 4
    assert most == 0
    assert asyncio.run(scene("efficientnet-lite0")) == ["decoded"] * 4
    assert most == 1


def test_a_damaged_index_is_no_fault_of_who_asks(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (path,) = copy.glob("*/items.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"id"', b'"xx"'))
    answer = client(copy).post("/api/search", json={"query": TEXTS[0]})
    assert (answer.status_code, answer.json()) == (500, {"error": "something went wrong here"})


def test_other_refusals(folder: Path) -> None:
    asking = client(folder)
    for row in ("13", "-1", "99999999999999999999"):
        assert asking.get(f"/picture/{row}").status_code == 404
    assert asking.get("/picture/x").status_code == 422
    assert asking.get("/api/search").status_code == 405
    assert asking.get("/docs").status_code == 404
    answer = asking.get("/", headers={"Host": "elsewhere.example"})
    assert (answer.status_code, answer.json()["error"]) == (400, "this server is not elsewhere.example")

    def chunks() -> Iterator[bytes]:  # a body that does not say how long it is
        for _ in range(100):
            yield b" " * 1000

    assert asking.post("/api/search", content=chunks(), headers=JSON).status_code == 413


def test_what_nobody_expected_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a secret path")

    asking = client(folder)
    monkeypatch.setattr("setemb.serve.find", broken)
    answer = asking.post("/api/search", json={"query": "a"})
    assert (answer.status_code, answer.json()) == (500, {"error": "something went wrong here"})
    monkeypatch.undo()
    assert asking.post("/api/search", json={"query": "a"}).status_code == 200


def test_too_many_at_once_are_turned_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are at work, one of them waiting for the other: a third is refused, and welcome once they are done."""
    from setemb import serve

    real, go_on = serve.find, threading.Event()

    def slow(*arguments: Any) -> Any:
        assert go_on.wait(30)
        return real(*arguments)

    monkeypatch.setattr(serve, "find", slow)
    app = client(folder, requests=2).app

    async def scene() -> None:
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://testserver", timeout=60) as asking:
            two = [asyncio.create_task(asking.post("/api/search", json={"query": "a"})) for _ in range(2)]
            await asyncio.sleep(0.2)
            refused = await asking.get("/api")
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert "too many requests" in refused.json()["error"]
            for path in ("/picture/4", "/"):  # a page asks for many of these, and they are not searches
                assert (await asking.get(path)).status_code == 200
            assert not any(task.done() for task in two)
            go_on.set()
            assert [answer.status_code for answer in await asyncio.gather(*two)] == [200, 200]
            assert (await asking.get("/api")).status_code == 200

    asyncio.run(asyncio.wait_for(scene(), 60))


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving(folder) as address:
        yield address


def test_the_program_serves_this_machine_alone(address: str, folder: Path) -> None:
    with urllib.request.urlopen(f"{address}/api", timeout=20) as answer:
        assert json.load(answer)["items"] == 13
    port, others = address.rpartition(":")[2], set[Any]()
    with contextlib.suppress(OSError):  # a name that leads nowhere
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for other in others - {"127.0.0.1"}:
        with pytest.raises(OSError):  # noqa: PT011 - refused, whatever the reason
            socket.create_connection((str(other), int(port)), 2).close()
    taken = [sys.executable, "-m", "setemb", "serve", "--index", str(folder), "--port", port]
    again = subprocess.run(taken, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert again.returncode == 2
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_body_that_does_not_arrive_is_given_up(folder: Path) -> None:
    app = client(folder, body_seconds=0.2).app
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"testserver"), (b"content-length", b"10")]
    scope = {"type": "http", "method": "POST", "path": "/api/search", "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_the_page_in_a_browser(address: str, tmp_path: Path) -> None:
    program = chromium()
    assert program is not None
    with Browser(program, tmp_path / "profile") as page:
        page.open(address)
        page.type(TEXTS[7], "#query")
        page.wait("document.querySelectorAll('#results .card').length === 12")
        shown = page.value("document.querySelector('#results .card').innerText")
        assert f"1. {TEXTS[7]}" in shown
        assert "item/7" in shown
        assert "tags: a, 7" in shown
        assert page.value("document.getElementById('status').textContent") == f"12 found for “{TEXTS[7]}”"
        page.wait("document.querySelector('#results img').complete")
        assert page.value("document.querySelector('#results img').naturalWidth") == 5
        best = page.value("[...document.querySelectorAll('.card:first-child td')].map(c => c.className === 'best')")
        assert best == [i // 4 == i % 4 for i in range(16)], "each slot matched itself"
        assert re.search(r"\?q=a%20picture", page.value("location.href"))
        # a name that would be markup is text, and a search in the address is made at once
        page.open(f"{address}/?q=img+src+x+onerror+document+title+owned")
        page.wait("document.querySelectorAll('#results .card').length === 12")
        assert page.value("document.getElementById('results').innerText").count("<img src=x") == 1
        assert page.value("document.title") == "setemb"
        assert page.errors == []
        page.value("document.getElementById('query').value = ''")
        page.type("x " * 500, "#query")  # as long as the box lets in
        page.wait("document.getElementById('status').textContent.startsWith('12 found')")
        page.value("window.fetch = async () => { throw new Error('offline') }")
        page.value("document.getElementById('query').value = ''")
        page.type("thing", "#query")
        page.wait("document.getElementById('status').textContent === 'the server does not answer'")
        assert page.value("document.querySelectorAll('.card').length") == 0
