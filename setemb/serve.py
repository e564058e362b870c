"""``setemb serve``: a page with a search box and a JSON API over one index, for this machine unless told otherwise.

=====================  ========================================================================================
``GET /``              the page; ``/?q=WORDS`` searches at once
``GET /api``           what is served: items, similarity, limits
``POST /api/search``   ``{"query": "...", "k": 10, "pairs": false}`` -> ``{"query": "...", "results": [...]}``
``POST /api/image``    a picture's bytes as the body (``Content-Type: image/...``), ``?k=10&pairs=false`` -> the same
``GET /picture/ROW``   the picture of an item, WebP
=====================  ========================================================================================

A result has rank, score, row, id, whatever the item's metadata say, and with ``pairs`` what `setemb.search.find` says.
Whatever goes wrong is ``{"error": "one sentence"}`` with a status of its own.
"""

from __future__ import annotations

import asyncio
import io
import logging
import re
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

try:
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from pydantic import BaseModel, ConfigDict, Field
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise ImportError(f'the server needs {error.name}: pip install "setemb[serve]"') from error

from setemb.inputs import read_query, takes_pictures
from setemb.packages import require
from setemb.pages import TEMPLATES, render_page, webp
from setemb.search import Query, find, queries

if TYPE_CHECKING:
    from setemb.index import SetIndex
    from setemb.model import SetEmbedder

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; img-src 'self' blob:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may ask for."""

    query_characters: int = 1000
    k: int = 100
    json_bytes: int = 16 << 10
    """Of a request's body."""
    image_bytes: int = 8 << 20
    """Of a picture."""
    image_pixels: int = 16_000_000
    """Of a picture: a small file may hold many."""
    requests: int = 8
    """To the API, at once; more are turned away with status 503. One is worked on, the others wait for it."""
    body_seconds: float = 15.0
    """In which a body has to arrive."""


class Search(BaseModel):
    """What ``/api/search`` takes."""

    model_config = ConfigDict(extra="forbid", strict=True)
    query: str = Field(min_length=1)
    k: int = Field(default=10, ge=1)
    pairs: bool = False


def create_app(
    index: SetIndex, model: SetEmbedder, *, limits: Limits | None = None, hosts: tuple[str, ...] = LOOPBACK
) -> FastAPI:
    """The server of an index, whose queries this model encodes.

    Args:
        limits: on requests.
        hosts: names under which it may be asked, none for any: a page of another site whose name leads to this machine
            is refused.
    """
    limits = limits or Limits()
    app = FastAPI(title="setemb", docs_url=None, redoc_url=None)
    app.add_middleware(_Guard, limits=limits, hosts=hosts)
    one_at_a_time = Lock()
    asked_with_pictures = takes_pictures(model)
    page = render_page("serve.html.j2", items=len(index), limits=limits, takes_pictures=asked_with_pictures)
    script = (TEMPLATES / "serve.js").read_text(encoding="utf-8")

    def check(k: int) -> None:
        if not 1 <= k <= limits.k:
            raise HTTPException(422, f"k: expected 1 <= k <= {limits.k}, got {k}")

    def answer(wanted: list[Query], k: int, pairs: bool) -> dict[str, Any]:
        """What goes wrong in here is no fault of who asks."""
        result = find(index, wanted, k, pairs)[0]
        return result | {"pictures": [index.item(hit["row"]).picture is not None for hit in result["results"]]}

    @app.get("/", response_class=HTMLResponse)
    def show() -> str:
        return page

    @app.get("/serve.js")
    def show_script() -> Response:
        return Response(script, media_type="text/javascript")

    @app.get("/favicon.ico", status_code=204)
    def show_nothing() -> Response:  # browsers ask for it
        return Response(status_code=204)

    @app.get("/api")
    def about() -> dict[str, Any]:
        return {
            "items": len(index),
            "similarity": index.similarity,
            "alpha": index.alpha,
            "pictures_as_queries": asked_with_pictures,
            "limits": asdict(limits),
        }

    @app.post("/api/search")
    def search(wanted: Search) -> dict[str, Any]:
        if len(wanted.query) > limits.query_characters:
            raise HTTPException(
                422, f"query: expected at most {limits.query_characters} characters, got {len(wanted.query)}"
            )
        if not wanted.query.strip():
            raise HTTPException(422, "query: it must not be empty")
        check(wanted.k)
        with one_at_a_time:
            return answer(queries(model, [wanted.query]), wanted.k, wanted.pairs)

    @app.post("/api/image")
    async def search_image(request: Request, k: int = 10, pairs: bool = False) -> Any:
        kind = request.headers.get("content-type", "")
        if not kind.startswith("image/"):
            raise HTTPException(415, f"expected a picture, Content-Type image/..., got {kind or 'none'}")
        check(k)
        if not asked_with_pictures:
            raise HTTPException(422, "this model takes features of images, not pictures")
        body = await request.body()

        def work() -> dict[str, Any]:
            with one_at_a_time:  # a picture is large while it is read
                try:
                    pixels = read_query(model, io.BytesIO(body), limits.image_pixels)
                except ValueError as error:
                    raise HTTPException(422, str(error)) from error
                return answer(queries(model, images=[("the picture", pixels)]), k, pairs)

        return await asyncio.to_thread(work)

    @app.get("/picture/{row}")
    def show_picture(row: int) -> Response:
        picture = index.item(row).picture if 0 <= row < len(index) else None
        if picture is None:
            raise HTTPException(404, f"no item at row {row} has a picture")
        return Response(webp(picture), media_type="image/webp")

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_input(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return JSONResponse({"error": f"{where}: {first['msg']}"}, 422)

    return app


class _Guard:
    """Limits on bodies and on requests at once, headers of every answer, and one sentence for what nobody expected."""

    def __init__(self, app: ASGIApp, limits: Limits, hosts: tuple[str, ...]) -> None:
        self.app, self.limits, self.hosts, self.active = app, limits, hosts, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                more = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        async def refuse(status: int, text: str, headers: dict[str, str] | None = None) -> None:
            await JSONResponse({"error": text}, status, headers=headers)(scope, receive, with_headers)

        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if self.hosts and re.sub(r":\d+$", "", host) not in self.hosts:
            await refuse(400, f"this server is not {host or 'without a name'}")
            return
        counts = scope["path"].startswith("/api")  # the page and its many small pictures do not
        if counts and self.active >= self.limits.requests:
            await refuse(503, "too many requests at once, try again", {"Retry-After": "1", "Connection": "close"})
            return
        self.active += counts
        try:
            most = self.limits.image_bytes if scope["path"] == "/api/image" else self.limits.json_bytes
            try:
                body = await asyncio.wait_for(_body(scope, receive, most), self.limits.body_seconds)
            except asyncio.TimeoutError:
                await refuse(408, "the body did not arrive in time", {"Connection": "close"})
                return
            if body is None:
                await refuse(413, f"the body: expected at most {most:,} bytes", {"Connection": "close"})
                return
            given = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def again() -> Message:
                return next(given, None) or await receive()

            await self.app(scope, again, with_headers)
        except Exception:
            logging.getLogger("setemb.serve").exception("a request failed")
            if not started:
                await refuse(500, "something went wrong here")
        finally:
            self.active -= counts


async def _body(scope: Scope, receive: Receive, most: int) -> bytes | None:
    """The whole body; None where it is larger than allowed, of which no more than that is held."""
    for name, value in scope["headers"]:
        if name == b"content-length" and (not value.isdigit() or int(value) > most):
            return None
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def listen(
    index: SetIndex, model: SetEmbedder, host: str, port: int, started: Callable[[str], None] = lambda address: None
) -> None:
    """Serves until it is interrupted; calls ``started`` with the address once it answers.

    Raises:
        OSError: the port is taken, or there is no such address.
    """
    uvicorn = require("uvicorn", "serve")
    app = create_app(index, model, hosts=LOOPBACK if host in (*LOOPBACK, "::1") else ())
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen at {host} port {port}: {error.strerror or error}") from error
        listener.listen(64)  # from here on a request is answered, a little later
        started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        settings = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=5)
        uvicorn.Server(settings).run(sockets=[listener])
