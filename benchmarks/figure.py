"""Draws times as bars: an SVG file, from numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = {
    **{"ours": "#2a7f62", "cuda": "#2a7f62", "triton": "#3b76b0"},
    **{"eager": "#d9963b", "compiled": "#b0566b"},
}
WIDTH, LEFT, RIGHT = 960, 340, 44
BAR, GAP, HEADING, TOP = 8, 7, 24, 66
"""Heights, in the figure's units: of a bar, between rows, above a group, of the head."""


class Bars(NamedTuple):
    """One row: for each name a multiple of the time of the plain products."""

    group: str
    label: str
    times: dict[str, float]


def figure(title: str, rows: Sequence[Bars]) -> str:
    """SVG: bars from the line of the products, to the left where faster, to the right where slower; doublings are
    equally far apart."""
    groups = list(dict.fromkeys(row.group for row in rows))
    rows = sorted(rows, key=lambda row: groups.index(row.group))
    names = list(dict.fromkeys(name for row in rows for name in row.times))
    logs = [math.log2(t) for row in rows for t in row.times.values()] or [0.0]
    low, high = min(-1, math.floor(min(logs))), max(1, math.ceil(max(logs)))
    parts, y, group = [], TOP, ""
    for row in rows:
        if row.group != group:
            y += HEADING
            group = row.group
            parts.append(f'<text class="g" x="20" y="{y - 7}">{escape(group)}</text>')
        middle = y + BAR * len(row.times) / 2 + 4
        parts.append(f'<text x="{LEFT - 14}" y="{middle:g}" text-anchor="end">{escape(row.label)}</text>')
        for name, times in row.times.items():
            one, end = _x(0, low, high), _x(math.log2(times), low, high)
            left, width = min(one, end), max(1.0, abs(end - one))
            colour = COLOURS.get(name, "#6b7785")
            parts.append(
                f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="{BAR - 1}" rx="1.5" fill="{colour}">'
                f"<title>{escape(name)}: {_times(times)}</title></rect>"
            )
            x, anchor = (end - 4, "end") if end < one else (left + width + 4, "start")
            parts.append(f'<text class="n" x="{x:.1f}" y="{y + BAR - 1}" text-anchor="{anchor}">{_times(times)}</text>')
            y += BAR
        y += GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}" font-family="Helvetica, Arial, '
            'sans-serif" font-size="11" fill="#2b333b">',
            f"<title>{escape(title)}</title>",
            "<style>.n{font-size:8px;fill:#6b7785}.g{font-size:12px;font-weight:bold}.t{font-size:14px;font-weight:bold}"
            "</style>",
            f'<rect width="{WIDTH}" height="{y + 10}" fill="#fff"/>',
            f'<text class="t" x="20" y="24">{escape(title)}</text>',
            *_legend(names),
            *_axis(low, high, y),
            *parts,
            "</svg>",
            "",
        ]
    )


def _x(log: float, low: int, high: int) -> float:
    return LEFT + 20 + (WIDTH - LEFT - 20 - RIGHT) * (log - low) / (high - low)


def _times(times: float) -> str:
    return f"{times:.2f}" if times < 10 else f"{times:.0f}"


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], 20.0
    for name in names:
        parts.append(f'<rect x="{x:g}" y="37" width="10" height="10" rx="2" fill="{COLOURS.get(name, "#6b7785")}"/>')
        parts.append(f'<text x="{x + 15:g}" y="46">{escape(name)}</text>')
        x += 34 + 6.2 * len(name)
    return parts


def _axis(low: int, high: int, bottom: float) -> list[str]:
    parts = []
    for log in range(low, high + 1):
        x, name = _x(log, low, high), f"{2**log}" if log >= 0 else f"1/{2**-log}"
        line = 'stroke="#6b7785" stroke-width="1.2"' if log == 0 else 'stroke="#e3e7eb"'
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{bottom}" {line}/>')
        parts.append(f'<text class="n" x="{x:.1f}" y="{TOP - 12}" text-anchor="middle">{name}</text>')
    x, name = _x(0, low, high), "← faster    the plain products = 1    slower →"
    parts.append(f'<text class="n" x="{x:.1f}" y="{TOP - 25}" xml:space="preserve" text-anchor="middle">{name}</text>')
    return parts
