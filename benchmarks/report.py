"""Writes the README's tables of figures from the files under benchmarks/results, and from nothing else.

python -m benchmarks.report          # print
python -m benchmarks.report --write  # into README.md, between the markers
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START, END = "<!-- figures: made by `python -m benchmarks.report --write` -->", "<!-- end of figures -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    if parser.parse_args().write:
        readme = ROOT / "README.md"
        before, after = outside(readme.read_text())
        readme.write_text(before + START + "\n" + tables() + END + after)
    else:
        print(tables(), end="")


def outside(text: str) -> tuple[str, str]:
    """What stands before and after the markers."""
    before, rest = text.split(START)
    return before, rest.split(END)[1]


def tables(folder: Path = ROOT / "benchmarks" / "results") -> str:
    """One table a device: of each row the newest figures."""
    devices: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda p: p.name[-15:]):
        content = json.loads(path.read_text())
        devices.setdefault(content["device"], []).append(content | {"file": path.name})
    return "".join(_table(contents) for contents in devices.values())


def _table(contents: list[dict[str, Any]]) -> str:
    newest = contents[-1]
    rows = {(row["op"], row["name"]): row for content in contents for row in content["rows"]}
    cuda = f", CUDA {newest['versions']['cuda']}" if newest["versions"]["cuda"] else ""
    files = ", ".join(f"[{content['date']}](benchmarks/results/{content['file']})" for content in contents)
    lines = [
        "",
        f"**{newest['device']}**, torch {newest['versions']['torch']}{cuda}; all numbers: {files}",
        "",
        "| | beside, ms | ours, ms | ours / beside | eager / ours | compiled / ours | oneDNN product / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    memory = []
    for row in rows.values():
        if "batches" in row:
            figures = ", ".join(f"{name} {size:,}" for name, size in row["batches"].items())
            memory.append(f"| {row['op']} {row['name']} | {figures} |")
            continue
        if "memory_mib" in row:
            memory.append(f"| {row['op']} {row['name']} | {row['memory_mib']:.0f} MiB |")
            continue
        ms = row["milliseconds"]
        peers = [
            f"{ms[p] / ms['ours']:.{digits}f}" if p in ms else ""
            for p, digits in (("eager", 1), ("compiled", 1), ("onednn", 2))
        ]
        cells = [f"{row['op']} {row['name']}", f"{ms['floor']:.1f} ({row['floor']})", f"{ms['ours']:.1f}"]
        cells.append(f"{row['ratio']:.2f}")
        lines.append(f"| {' | '.join(cells + peers)} |")
    if memory:
        lines += ["", "| peak memory beyond inputs, result and gradients; largest batch | |", "|---|---|", *memory]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
