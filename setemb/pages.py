"""Pages from the templates of this package: one HTML file each, pictures inlined."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from setemb.packages import require

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, **context: Any) -> str:
    """A template; the filter ``picture`` inlines a uint8 ``[H, W, 3 or 4]`` array."""
    jinja2 = require("jinja2", "demo")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = picture
    return str(environment.get_template(template).render(**context))


def picture(pixels: np.ndarray) -> str:
    """A ``data:`` address with the picture as WebP, without loss."""
    return "data:image/webp;base64," + base64.b64encode(webp(pixels)).decode()


def webp(pixels: np.ndarray) -> bytes:
    """A picture as a WebP file, without loss."""
    buffer = io.BytesIO()
    require("PIL.Image", "demo").fromarray(np.asarray(pixels)).save(buffer, "WEBP", lossless=True, method=4)
    return buffer.getvalue()
