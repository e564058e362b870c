"""Writes the tables of figures from the files under benchmarks/results, and from nothing else.

python -m benchmarks.report          # print
python -m benchmarks.report --write  # into README.md and docs/integrations.md, between the markers; figures beside
                                     # the result files
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks import gpu_report
from benchmarks.figure import Bars
from benchmarks.figure import figure as draw

ROOT = Path(__file__).parent.parent
INTEGRATION = "integration"
"""The op of rows of drop-ins, whose table is in docs/integrations.md."""

START, END = "<!-- figures: made by `python -m benchmarks.report --write` -->", "<!-- end of figures -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    if parser.parse_args().write:
        for path, figure in figures():
            path.write_text(figure)
        for document, make in DOCUMENTS.items():
            before, after = outside((ROOT / document).read_text())
            (ROOT / document).write_text(before + START + "\n" + make() + END + after)
    else:
        print(*(make() for make in DOCUMENTS.values()), sep="\n", end="")


def outside(text: str) -> tuple[str, str]:
    """What stands before and after the markers."""
    before, rest = text.split(START)
    return before, rest.split(END)[1]


RESULTS = ROOT / "benchmarks" / "results"


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The result files, in the order of their dates. Dry runs don't count."""
    contents = []
    for path in sorted(folder.glob("*.json"), key=lambda p: (p.name[-15:], p.name)):
        content = json.loads(path.read_text()) | {"file": path.name}
        if not content.get("dry_run"):
            contents.append(content)
    return contents


def tables(folder: Path = RESULTS) -> str:
    """One table a CPU, of each row the newest figures; then GPUs."""
    cpus, gpus = _by_device(folder)
    return "".join(_table(contents) for contents in cpus) + gpu_report.section(gpus)


def figures(folder: Path = RESULTS) -> list[tuple[Path, str]]:
    """Files and what belongs into them: a figure of each CPU, and one beside each result file of a GPU."""
    cpus, gpus = _by_device(folder)
    found = [(folder / _figure_name(contents), _figure(contents)) for contents in cpus]
    return found + [((folder / content["file"]).with_suffix(".svg"), gpu_report.figure(content)) for content in gpus]


def _by_device(folder: Path) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Of each CPU its files, and those of GPUs."""
    cpus: dict[str, list[dict[str, Any]]] = {}
    gpus = []
    for content in read(folder):
        if content.get("kind") == "gpu":
            gpus.append(content)
        else:
            cpus.setdefault(content["device"], []).append(content)
    return list(cpus.values()), gpus


def _newest_rows(contents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({(row["op"], row["name"]): row for content in contents for row in content["rows"]}.values())


def _figure_name(contents: list[dict[str, Any]]) -> str:
    """That of the newest file, less the date."""
    return re.sub(r"(-[0-9]{4}-[0-9]{2}-[0-9]{2})?[.]json$", ".svg", contents[-1]["file"])


def _figure(contents: list[dict[str, Any]]) -> str:
    """SVG of all rows that stand beside plain products."""
    bars = []
    for row in _newest_rows(contents):
        if "milliseconds" in row and "product" in row["floor"]:
            ms = row["milliseconds"]
            times = {p: row["ratio"] * (ms[p] / ms["ours"]) for p in ("ours", "eager", "compiled") if p in ms}
            bars.append(Bars(row["op"], row["name"].removesuffix(" cpu").replace(" cpu, ", ", "), times))
    return draw(f"{contents[-1]['device']}: times beside the plain products of the same operands", bars)


def drop_ins(folder: Path = RESULTS) -> str:
    """A table of time and memory with and without each drop-in, the newest figures of each CPU."""
    devices: dict[str, dict[str, dict[str, Any]]] = {}
    for content in read(folder):
        for row in content["rows"] if content.get("kind") != "gpu" else ():
            if row["op"] == INTEGRATION:
                devices.setdefault(content["device"], {})[row["name"]] = row | {"date": content["date"]}
    if not devices:
        return "\nNothing has been measured yet.\n"
    lines = []
    for device, rows in devices.items():
        lines += [
            "",
            f"**{device}**",
            "",
            "| | beside | its own, ms | ours, ms | ours / its own | its own, MiB | ours, MiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            if "memory_mib" in row:
                continue
            ms = row["milliseconds"]
            memory = [rows.get(f"peak memory, {which}: {name}") for which in ("own", "ours")]
            mib = ["" if m is None else f"{m['memory_mib']:.0f}" for m in memory]
            cells = [name, f"{row['floor']} ({row['date']})", f"{ms['floor']:.1f}", f"{ms['ours']:.1f}"]
            cells += [f"{row['ratio']:.2f}", *mib]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _table(contents: list[dict[str, Any]]) -> str:
    newest = contents[-1]
    cuda = f", CUDA {newest['versions']['cuda']}" if newest["versions"]["cuda"] else ""
    files = ", ".join(f"[{content['date']}](benchmarks/results/{content['file']})" for content in contents)
    lines = [
        "",
        f"**{newest['device']}**, torch {newest['versions']['torch']}{cuda}; all numbers: {files}",
        "",
        f"![Times beside the plain products](benchmarks/results/{_figure_name(contents)})",
    ]
    rows = [
        "| | beside, ms | ours, ms | ours / beside | eager / ours | compiled / ours | others / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    memory, sections = [], []
    for row in _newest_rows(contents):
        if row["op"] == INTEGRATION:
            continue
        if "batches" in row:
            figures = ", ".join(f"{name} {size:,}" for name, size in row["batches"].items())
            memory.append(f"| {row['op']} {row['name']} | {figures} |")
            continue
        if "sections" in row:
            sections += _sections(row)
            continue
        if "memory_mib" in row:
            memory.append(f"| {row['op']} {row['name']} | {row['memory_mib']:.0f} MiB |")
            continue
        ms = row["milliseconds"]
        peers = [f"{ms[p] / ms['ours']:.1f}" if p in ms else "" for p in ("eager", "compiled")]
        others = [p for p in ms if p not in ("floor", "ours", "eager", "compiled")]
        peers.append(", ".join(f"{OTHERS.get(p, p)} {ms[p] / ms['ours']:.2f}" for p in others))
        cells = [f"{row['op']} {row['name']}", f"{ms['floor']:.1f} ({row['floor']})", f"{ms['ours']:.1f}"]
        cells.append(f"{row['ratio']:.2f}")
        rows.append(f"| {' | '.join(cells + peers)} |")
    lines += gpu_report.collapsed("All rows", rows)
    if memory:
        memory = ["| peak memory beyond inputs, result and gradients; largest batch | |", "|---|---|", *memory]
        lines += gpu_report.collapsed("Memory, and the largest batch", memory)
    if sections:
        lines += gpu_report.collapsed("Where a training step spends its time", sections)
    return "\n".join(lines) + "\n"


def _sections(row: dict[str, Any]) -> list[str]:
    """A table of where the time goes."""
    columns = list(dict.fromkeys(column for times in row["sections"].values() for column in times))
    whole = sum(sum(times.values()) for times in row["sections"].values())
    lines = [
        "",
        f"| {row['op']} {row['name']} | {', ms | '.join(columns)}, ms | share |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for part, times in row["sections"].items():
        cells = [f"{times[column]:.0f}" if column in times else "" for column in columns]
        lines.append(f"| {' | '.join([part, *cells, f'{100 * sum(times.values()) / whole:.0f} %'])} |")
    return lines


OTHERS = {"onednn": "oneDNN's product"}
"""What a column of the results is called, where not by its own name."""

DOCUMENTS = {"README.md": tables, "docs/integrations.md": drop_ins}


if __name__ == "__main__":
    main()
