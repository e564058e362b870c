"""Charts as inline SVG without scripts; colours are CSS classes of the page, so they follow its light and dark form.

`page_of_charts` makes a file of its own of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

WIDTH = 520

_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#646b7d}.title{font-size:14px;font-weight:600;fill:#1d2230}"
    ".key{font-size:12px;fill:#1d2230}.label{text-anchor:middle;font-size:12.5px;fill:#1d2230}"
    ".value{text-anchor:middle;font-size:10.5px;fill:#1d2230}.grid{stroke:#e2e0da}"
    "polyline{fill:none;stroke-width:2;stroke-linejoin:round}"
)


def grouped_bars(groups: Sequence[str], series: Mapping[str, tuple[str, Sequence[float]]], title: str) -> Markup:
    """Bars in groups, with the value above each.

    Args:
        groups: labels under the groups.
        series: for each name its CSS class and one value in percent a group.
        title: read out in place of the picture.
    """
    height, base, top = 250, 210, 22
    highest = max((value for _, values in series.values() for value in values), default=0.0)
    limit = max(20.0, 20 * -(-highest // 20))
    group_width = WIDTH / len(groups)
    bar = 0.8 * group_width / len(series)
    parts = [_grid([limit * i / 4 for i in range(5)], lambda v: base - (base - top) * v / limit, "{:.0f}")]
    for g, group in enumerate(groups):
        left = g * group_width + 0.1 * group_width
        for s, (name, (css, values)) in enumerate(series.items()):
            tall = max((base - top) * values[g] / limit, 0.75)
            x, y = left + s * bar, base - tall
            parts.append(
                f'<rect class="{css}" x="{x + 1:.1f}" y="{y:.1f}" width="{bar - 2:.1f}" height="{tall:.1f}" rx="2">'
                f"<title>{escape(name)}, {escape(group)}: {values[g]:.1f} %</title></rect>"
                f'<text class="value" x="{x + bar / 2:.1f}" y="{y - 4:.1f}">{values[g]:.1f}</text>'
            )
        parts.append(f'<text class="label" x="{left + 0.4 * group_width:.1f}" y="{base + 20}">{escape(group)}</text>')
    return _svg(height, title, parts)


def lines(series: Mapping[str, tuple[str, Sequence[tuple[float, float]]]], title: str, x_label: str) -> Markup:
    """Lines through points (x, y) in the order given.

    Args:
        series: for each name its CSS class and its points; one without points is left out.
        title: read out in place of the picture.
        x_label: under the axis.
    """
    height, base, top, left, right = 250, 205, 14, 40, WIDTH - 8
    points = [p for _, line in series.values() for p in line]
    if not points:
        return _svg(height, title, ['<text class="label" x="260" y="120">nothing was logged</text>'])
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    x1, margin = (x1 if x1 > x0 else x0 + 1), 0.05 * (y1 - y0) or 1.0
    y0, y1 = y0 - margin, y1 + margin

    def at_y(y: float) -> float:
        return base - (base - top) * (y - y0) / (y1 - y0)

    form = "{:.0f}" if y1 - y0 > 8 else "{:.2f}"
    parts = [_grid([y0 + (y1 - y0) * i / 4 for i in range(5)], at_y, form)]
    for name, (css, line) in series.items():
        if not line:
            continue
        path = [(left + (right - left) * (x - x0) / (x1 - x0), at_y(y)) for x, y in line]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
        parts.append(f'<polyline class="{css}" points="{drawn}"><title>{escape(name)}</title></polyline>')
        parts.append(f'<circle class="{css}" cx="{path[-1][0]:.1f}" cy="{path[-1][1]:.1f}" r="3"/>')
    for x in (x0, (x0 + x1) / 2, x1):
        at = left + (right - left) * (x - x0) / (x1 - x0)
        anchor = "start" if x == x0 else "end" if x == x1 else "middle"
        parts.append(f'<text class="tick" text-anchor="{anchor}" x="{at:.1f}" y="{base + 18}">{x:.0f}</text>')
    parts.append(f'<text class="label" x="{(left + right) / 2:.1f}" y="{base + 38}">{escape(x_label)}</text>')
    return _svg(height, title, parts)


def page_of_charts(
    charts: Sequence[tuple[str, Markup]], colours: Mapping[str, str], key: Mapping[str, str], note: str = ""
) -> str:
    """An SVG file of charts one below the other, each under its title, with one key for all.

    Args:
        charts: titles and what `grouped_bars` or `lines` made.
        colours: of each CSS class that they use.
        key: for each name of a series its CSS class.
        note: a line below the key.
    """
    parts, top = [], 14.0
    for i, (name, css) in enumerate(key.items()):
        x, y = 4 + i % 2 * WIDTH / 2, top + i // 2 * 18
        parts.append(f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="10" height="10" rx="2"/>')
        parts.append(f'<text class="key" x="{x + 16:.1f}" y="{y + 9:.1f}">{escape(name)}</text>')
    top += -(-len(key) // 2) * 18 + 12
    if note:
        parts.append(f'<text x="4" y="{top:.1f}">{escape(note)}</text>')
        top += 12
    for title, chart in charts:
        drawn = str(chart)  # Markup would escape what replaces
        height = float(drawn.partition('viewBox="')[2].partition('"')[0].split()[3])
        parts.append(f'<text class="title" x="4" y="{top + 14:.1f}">{escape(title)}</text>')
        parts.append(drawn.replace("<svg ", f'<svg x="8" y="{top + 22:.1f}" width="{WIDTH}" height="{height:.0f}" ', 1))
        top += height + 30
    style = _STYLE + "".join(
        f"rect.{css},circle.{css}{{fill:{value}}}polyline.{css}{{stroke:{value}}}" for css, value in colours.items()
    )
    size = f'viewBox="0 0 {WIDTH + 16} {top:.0f}" width="{WIDTH + 16}" height="{top:.0f}"'
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{paper}{"".join(parts)}</svg>\n'


def _grid(values: Sequence[float], at_y: Callable[[float], float], form: str) -> str:
    return "".join(
        f'<line class="grid" x1="0" x2="{WIDTH}" y1="{at_y(v):.1f}" y2="{at_y(v):.1f}"/>'
        f'<text class="tick" x="0" y="{at_y(v) - 3:.1f}">{form.format(v)}</text>'
        for v in values
    )


def _svg(height: int, title: str, parts: Sequence[str]) -> Markup:
    start = f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return Markup(start + "".join(parts) + "</svg>")
