"""How functions of another package are replaced, and put back."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, TracebackType
from typing import Any

Function = Callable[..., Any]


class Patch:
    """What an integration replaced. As a call it lasts until `undo`; as a context manager it ends with the block.

    Patches of one package are undone in the reverse order, as blocks are. A second one in the place of a first replaces
    it until it is undone.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.replaced: list[str] = []
        """``"package.module.name"`` of each place, sorted."""
        self._functions: list[tuple[Function, Function]] = []
        self._attributes: list[tuple[type, str, Any]] = []

    def function(self, module: str, name: str, ours: Function) -> None:
        """Replace a function everywhere that it is held by name: in every module that is loaded (the package's, and
        those that imported it from there), and as a default argument in the package's functions.

        ``ours(own, *args, **kwargs)``: `own` is the package's function.
        """
        current = self._found(importlib.import_module(module), name)
        new = _standing_in(current, ours)
        self._functions.append((current, new))
        self._note(_swap(current, new, self.package))

    def method(self, owner: type, name: str, ours: Function) -> None:
        """Replace a method of a class, a static one by a static one. ``ours(own, *args, **kwargs)``."""
        self._found(owner, name)
        before = inspect.getattr_static(owner, name)
        static = isinstance(before, staticmethod)
        new = _standing_in(before.__func__ if static else before, ours)
        inherited = name not in vars(owner)
        self._attributes.append((owner, name, _INHERITED if inherited else before))
        setattr(owner, name, staticmethod(new) if static else new)
        self._note([f"{owner.__module__}.{owner.__qualname__}.{name}"])

    def undo(self) -> None:
        """Put everything back, also where it came to be held in between."""
        for owner, name, before in reversed(self._attributes):
            if before is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        for before, new in reversed(self._functions):
            _swap(new, before, self.package)
        self._attributes, self._functions, self.replaced = [], [], []

    def __enter__(self) -> list[str]:
        return self.replaced

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"{self.package}, replaced: " + (", ".join(self.replaced) or "nothing")

    def _found(self, holder: ModuleType | type, name: str) -> Function:
        """What is to be replaced; where it is not, nothing stays replaced."""
        if not hasattr(holder, name):
            self.undo()
            where = holder.__name__ if isinstance(holder, ModuleType) else f"{holder.__module__}.{holder.__qualname__}"
            raise ImportError(f"{where}.{name}: expected a function to replace, this version has none")
        function: Function = getattr(holder, name)
        return function

    def _note(self, places: list[str]) -> None:
        self.replaced = sorted({*self.replaced, *places})


_INHERITED = object()


def package(name: str, needed: str, *modules: str) -> None:
    """Import what is about to be patched, or say what is missing.

    Raises:
        ImportError: names the package, the module that is not there and what is needed.
    """
    for module in (name, *modules):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"{needed} is needed: cannot import {module}: {error}") from error


def _standing_in(current: Function, ours: Function) -> Function:
    """`ours` under the name of what it replaces, with the package's own function as its first argument."""
    own = getattr(current, "setemb_replaces", current)

    @functools.wraps(own)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(own, *args, **kwargs)

    function.setemb_replaces = own  # type: ignore[attr-defined]
    return function


def _swap(old: Function, new: Function, package: str) -> list[str]:
    places = []
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue  # a stand-in of somebody's
        names = vars(module)
        for name in [name for name, value in list(names.items()) if value is old]:
            names[name] = new
            places.append(f"{module.__name__}.{name}")
        if module.__name__.partition(".")[0] == package:
            for function in _functions(module):
                argument = _swap_default(function, old, new)
                if argument:
                    places.append(f"{module.__name__}.{function.__qualname__}({argument})")
    return places


def _functions(module: ModuleType) -> Iterator[Any]:
    """The functions that a module defines, and the methods of its classes."""
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield value
        elif isinstance(value, type):
            yield from (method for method in vars(value).values() if inspect.isfunction(method))


def _swap_default(function: Any, old: Function, new: Function) -> str:
    """The name of the argument whose default is `old`; from now on it is `new`."""
    for parameter in inspect.signature(function, follow_wrapped=False).parameters.values():
        if parameter.default is old:
            defaults, keywords = function.__defaults__ or (), function.__kwdefaults__ or {}
            function.__defaults__ = tuple(new if value is old else value for value in defaults) or None
            function.__kwdefaults__ = {k: new if v is old else v for k, v in keywords.items()} or None
            return parameter.name
    return ""
