"""Packages that are patched: as installed, and stand-ins of the same names and signatures where they may be absent."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.integrations import import_without_models

STAND_INS = Path(__file__).parent / "stand_ins"


def modules_of(name: str) -> list[str]:
    return [module for module in sys.modules if module.partition(".")[0] == name]


@pytest.fixture(params=["package", "stand-in"])
def pylate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from _provide("pylate", request.param, monkeypatch)


@pytest.fixture(params=["package", "stand-in"])
def colpali(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from _provide("colpali_engine", request.param, monkeypatch)


def _provide(name: str, which: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if which == "package":
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
        import_without_models(name)
        yield which
        return
    for module in modules_of(name):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(STAND_INS))
    importlib.import_module(name)
    yield which
    for module in modules_of(name):
        del sys.modules[module]
