"""What the README says of GPUs, from result files of `make gpu` and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figure import Bars
from benchmarks.figure import figure as draw
from benchmarks.gpu.table import PEERS, floor, names_of_ours, sizes_of, times_product

ROOT = Path(__file__).parent.parent
FAR = 0.02
"""A result that is further than this from eager's, in relation to it, proves nothing: sixteen roundings to bfloat16."""


def kernels(root: Path = ROOT) -> list[tuple[str, str]]:
    """Every op and the implementations for a GPU that the source has, "triton" or "cuda"."""
    found = [(path.parent.name, "triton") for path in root.glob("setemb_kernels/ops/*/triton.py")]
    ops = {op for op, _ in found}
    for op in ops:
        found += [(op, "cuda")] * any(root.glob(f"csrc/cuda/{op}*.cu"))
    return sorted(found)


def unproven(contents: list[dict[str, Any]], root: Path = ROOT) -> list[tuple[str, str]]:
    """Those that no run has both tested without a failure and measured with a right result."""
    proven = set()
    for content in contents:
        passed = {stage["name"] for stage in content["stages"] if stage["status"] == "ok"}
        for row in content["rows"]:
            for name, off in row.get("difference", {}).items():
                tested = {"tests", f"tests {name}"} & passed  # files until 2026-11-27 have one stage of all tests
                if tested and off is not None and off <= FAR and name in row["milliseconds"]:
                    proven.add((row["op"], name))
    return [kernel for kernel in kernels(root) if kernel not in proven]


def section(contents: list[dict[str, Any]], root: Path = ROOT) -> str:
    """Tables and figures of GPUs, the files of each device's last day; what is not proven."""
    last = {content["device"]: content["date"] for content in contents}
    newest = [content for content in contents if content["date"] == last[content["device"]]]
    lines = [""]
    for content in newest:
        lines += _table(content)
    if not contents:
        lines.append("**Nothing has run on a GPU yet**: there is no result file of `make gpu`.")
    missing = unproven(contents, root)
    if missing:
        names = ", ".join(f"{op} in {'Triton' if name == 'triton' else 'CUDA C++'}" for op, name in missing)
        lines.append(f"Kernels that no run on a GPU has proven: {names}.")
    return "\n".join(lines) + "\n"


def _table(content: dict[str, Any]) -> list[str]:
    versions, file = content["versions"], content["file"]
    ours = names_of_ours(content["rows"])
    clocks = content["clocks"].get("after") or content["clocks"].get("before") or {}
    speed = f"; SM at {clocks['sm_mhz']:.0f} MHz after the last row" if "sm_mhz" in clocks else ""
    lines = [
        f"**{content['device']}**, torch {versions['torch']}, CUDA {versions['cuda']}, Triton {versions['triton']}"
        f"{speed}; "
        f"[{content['date']}](benchmarks/results/{file}). Beside the cuBLAS products of the same operands, times are "
        "multiples of theirs; the floor is what operations or bytes take at the best this card did.",
        "",
        f"![Times beside the products](benchmarks/results/{Path(file).with_suffix('.svg').name})",
    ]
    rows = [
        f"| | floor, ms | products, ms | {' | '.join((*ours, *PEERS))} |",
        "|---" * (3 + len(ours) + len(PEERS)) + "|",
    ]
    batches = []
    for row in content["rows"]:
        if "batches" in row:
            batches.append(f"{row['row']}: {', '.join(sizes_of(row))}.")
            continue
        if "product" not in row.get("milliseconds", {}):
            continue
        least, ms = floor(row, content.get("ceilings", {})), row["milliseconds"]
        cells = ["" if least is None else _time(least), _time(ms["product"])]
        for name in (*ours, *PEERS):
            cells.append(f"{times_product(row, name):.2f}" if name in ms else row["failed"].get(name, ""))
        rows.append(f"| {row['row']} | {' | '.join(cells)} |")
    bad = [f"{s['name']}: {s['status']}, {s.get('detail', '')}" for s in content["stages"] if s["status"] != "ok"]
    return [*lines, *collapsed("All rows", rows), "", *batches, *(f"Stage {line}." for line in bad), ""]


def collapsed(title: str, lines: list[str]) -> list[str]:
    """Lines that a page shows when it is asked to."""
    return ["", "<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>"]


def _time(ms: float) -> str:
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def figure(content: dict[str, Any]) -> str:
    """SVG: of each row a bar for each implementation, as multiples of the products."""
    names, bars = (*names_of_ours(content["rows"]), *PEERS), []
    for row in content["rows"]:
        ms = row.get("milliseconds", {})
        times = {name: times_product(row, name) for name in names if name in ms} if "product" in ms else {}
        if times:
            bars.append(Bars(row["op"], row["name"], times))
    return draw(f"{content['device']}, {content['date']}: times beside the cuBLAS products of the same operands", bars)
