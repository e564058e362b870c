"""What the README says is what the repository holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.report import DOCUMENTS, END, START, figures
from setemb_kernels import backends

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("document", DOCUMENTS)
def test_figures_come_from_the_result_files(document: str) -> None:
    inside = (ROOT / document).read_text().split(START)[1].split(END)[0].lstrip("\n")
    assert inside == DOCUMENTS[document]().lstrip("\n"), "run `python -m benchmarks.report --write`"


def test_drawings_come_from_the_result_files() -> None:
    for path, figure in figures():
        assert path.read_text() == figure, "run `python -m benchmarks.report --write`"


def test_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_backends_of_all_ops_are_shown() -> None:
    sample = (ROOT / "README.md").read_text().split("op              device")[1].split("```")[0]
    shown = [tuple(line.split()[:2]) for line in sample.splitlines()[1:]]
    assert shown == [(b.op, b.device) for b in backends()]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
