"""What the report says of GPUs, from files that are made up."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_report, report
from benchmarks.gpu import table
from benchmarks.gpu.rows import rows as gpu_rows


def run(**changes: Any) -> dict[str, Any]:
    rows = [
        {
            **{"row": "smooth_chamfer forward", "op": "smooth_chamfer", "name": "forward"},
            **{"operations": 2e9, "bytes": 1e6},
            "milliseconds": {"product": 2.0, "triton": 3.0, "cuda": 2.5, "eager": 30.0, "compiled": 12.0}
            | {"product, again": 3.0},
            **{"difference": {"eager": 0.0, "triton": 0.003, "cuda": 0.5}, "failed": {}},
        },
        {
            **{"row": "slot_attention <forward>", "op": "slot_attention", "name": "<forward>"},
            **{"operations": 1e6, "bytes": 2e9},
            **{"milliseconds": {"product": 20.0, "triton": 40.0}, "difference": {"triton": None}},
            "failed": {"eager": "out of memory", "cuda": "not built"},
        },
        {"row": "largest batch", "op": "set_triplet_loss", "batches": {"eager": 4096, "ours": 131072}, "failed": {}},
    ]
    content = {
        **{"kind": "gpu", "device": "NVIDIA X", "date": "2026-01-02", "rows": rows},
        "versions": {"torch": "2.11", "cuda": "13.0", "triton": "3.6"},
        "clocks": {"source": "nvidia-smi", "after": {"sm_mhz": 1980.0}},
        "ceilings": {"bfloat16_operations_per_second": 1e12, "copy_bytes_per_second": 1e12},
        "stages": [{"name": "tests", "status": "ok"}, {"name": "racecheck", "status": "absent", "detail": "not here"}],
    }
    return content | changes


def doublings(figure: str) -> list[float]:
    """How many doublings each bar of a figure stands for, to the left or the right of the products."""
    ticks = {
        name: float(x) for x, name in re.findall(r'class="n" x="([0-9.]+)" y="54" text-anchor="middle">(.+?)<', figure)
    }
    one = ticks["2"] - ticks["1"]
    found = []
    for x, width in re.findall(r'<rect x="([0-9.]+)" y="[0-9]+" width="([0-9.]+)" height="7"', figure):
        left, right = float(x) - ticks["1"], float(x) + float(width) - ticks["1"]
        assert min(abs(left), abs(right)) < 0.11  # a bar begins or ends at the products
        found.append((left if right < 0.11 else right) / one)
    return found


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A source tree with three kernels for GPUs."""
    for path in ("ops/smooth_chamfer/triton.py", "ops/slot_attention/triton.py"):
        (tmp_path / "setemb_kernels" / path).parent.mkdir(parents=True)
        (tmp_path / "setemb_kernels" / path).touch()
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/smooth_chamfer_backward.cu").touch()
    return tmp_path


def test_compiled_is_measured_by_way_of_ours() -> None:
    """Which both passes have; a call that waits for the host may take twice as long in one of them."""
    ms = {"product": 2.0, "triton": 3.0, "compiled": 12.0, "product, again": 3.0}
    assert table.times_product({"milliseconds": ms}, "triton") == 1.5
    assert table.times_product({"milliseconds": ms}, "compiled") == 4.0
    assert table.times_product({"milliseconds": ms | {"triton, again": 6.0}}, "compiled") == 3.0
    assert table.times_product({"milliseconds": {"product": 2.0, "compiled": 5.0}}, "compiled") == 2.5


ALL = [("slot_attention", "triton"), ("smooth_chamfer", "cuda"), ("smooth_chamfer", "triton")]


def test_a_kernel_is_proven_by_tests_and_a_right_result(kernels: Path) -> None:
    assert gpu_report.kernels(kernels) == ALL
    assert gpu_report.unproven([], kernels) == ALL
    assert gpu_report.unproven([run()], kernels) == ALL[:2]
    assert gpu_report.unproven([run(stages=[{"name": "tests", "status": "failed"}])], kernels) == ALL
    assert gpu_report.unproven([run(stages=[])], kernels) == ALL
    for name, expected in (("triton", ALL[:2]), ("cuda", ALL)):  # a stage of tests for each implementation
        stages = [{"name": f"tests {name}", "status": "ok"}, {"name": "tests cpu", "status": "ok"}]
        assert gpu_report.unproven([run(stages=stages)], kernels) == expected


def test_without_a_file(tmp_path: Path, kernels: Path) -> None:
    text = gpu_report.section([], kernels)
    assert "Nothing has run on a GPU yet" in text
    assert "slot_attention in Triton, smooth_chamfer in CUDA C++, smooth_chamfer in Triton" in text
    (tmp_path / "cpu-2026-01-02.json").write_text(json.dumps(run(dry_run=True)))
    assert "Nothing has run on a GPU yet" in report.tables(tmp_path)
    assert report.figures(tmp_path) == []


def test_with_files(tmp_path: Path) -> None:
    older = run(date="2025-01-01", rows=[])
    for name, content in (("x-2025-01-01", older), ("x-2026-01-02", run())):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    text = report.tables(tmp_path)
    assert "Nothing has run" not in text
    assert "2025-01-01" not in text  # the newest of each device
    assert "SM at 1980 MHz" in text
    # floor: 2e9 operations at 1e12 a second; compiled beside the products of its own pass
    assert "| smooth_chamfer forward | 2.000 | 2.000 | 1.50 | 1.25 | 15.00 | 4.00 |" in text
    assert "| slot_attention <forward> | 2.000 | 20.0 | 2.00 | not built | out of memory |  |" in text
    assert "largest batch: eager 4,096, ours 131,072." in text
    assert "Stage racecheck: absent, not here." in text
    (_, first), (path, figure) = report.figures(tmp_path)
    assert path == tmp_path / "x-2026-01-02.svg"
    assert re.search(rf"!\[.*\]\(benchmarks/results/{path.name}\)", text)
    for svg in (first, figure):
        xml.etree.ElementTree.fromstring(svg)
    assert doublings(figure) == pytest.approx([math.log2(t) for t in (1.5, 1.25, 15, 4, 2)], abs=0.01)
    assert ">&lt;forward&gt;</text>" in figure


def test_figure_of_a_cpu(tmp_path: Path) -> None:
    """Of each row the newest numbers, ops together; what stands beside no product is left out."""

    def row(op: str, name: str, beside: str, **ms: float) -> dict[str, Any]:
        ratio = {"ratio": ms["ours"] / ms["floor"]} if ms else {"memory_mib": 3.0}
        return {"op": op, "name": name, "floor": beside, **ratio} | ({"milliseconds": ms} if ms else {})

    older = [row("a", "one cpu", "product", floor=1, ours=9), row("b", "two cpu", "product in blocks", floor=1, ours=2)]
    newer = [
        row("a", "one cpu", "product", floor=4, ours=1, eager=8, compiled=16),
        row("a", "three & more cpu, both ways", "two products", floor=2, ours=2.5),
        row("a", "module", "as published", floor=2, ours=1),
        row("a", "peak", ""),
    ]
    for date, rows in (("2026-01-01", older), ("2026-01-02", newer)):
        content = {"device": "X", "date": date, "versions": {"torch": "2", "cuda": None}, "rows": rows}
        (tmp_path / f"x-{date}.json").write_text(json.dumps(content))
    ((path, figure),) = report.figures(tmp_path)
    assert path == tmp_path / "x.svg"
    assert f"![Times beside the plain products](benchmarks/results/{path.name})" in report.tables(tmp_path)
    xml.etree.ElementTree.fromstring(figure)
    assert doublings(figure) == pytest.approx([-2, 1, 2, math.log2(1.25), 1], abs=0.01)
    labels = re.findall(r'text-anchor="end">([a-z&; ,]+)</text>', figure)
    assert labels == ["one", "three &amp; more, both ways", "two"]
    assert re.findall(r'class="g".*>(.+)</text>', figure) == ["a", "b"]


def test_where_the_time_goes(tmp_path: Path) -> None:
    row = {
        "op": "training",
        "name": "where our step spends its time",
        "sections": {"text sets": {"forward": 20.0, "backward": 55.0}, "optimizer": {"update": 25.0}},
    }
    versions = {"torch": "2.11", "cuda": None}
    content = {"device": "CPU", "date": "2026-01-02", "versions": versions, "rows": [row]}
    (tmp_path / "cpu-2026-01-02.json").write_text(json.dumps(content))
    text = report.tables(tmp_path)
    assert "| training where our step spends its time | forward, ms | backward, ms | update, ms | share |" in text
    assert "| text sets | 20 | 55 |  | 75 % |" in text
    assert "| optimizer |  |  | 25 | 25 % |" in text


def test_floors_in_the_notes_are_those_of_the_rows() -> None:
    notes = (report.ROOT / "benchmarks/NOTES.md").read_text()
    for row in gpu_rows("cuda", quick=False):
        (line,) = (line for line in notes.splitlines() if line.startswith(f"| {row.key} |"))
        products, *numbers = (float(cell) for cell in line.split("|")[2:-1])
        assert products == row.products
        expected = [
            row.operations / 1e9,
            row.bytes / 1e6,
            row.operations / 989e9,
            row.bytes / 3.35e9,
            row.bytes / 4.8e9,
        ]
        assert numbers == pytest.approx(expected, rel=0.006), row.key  # three digits
