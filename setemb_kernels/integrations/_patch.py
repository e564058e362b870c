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

    def functions(self, module: str, **ours: Function) -> None:
        """Replace functions of a module everywhere that they are held by name: in every module that is loaded (the
        package's, and those that imported them from there), and as default arguments of the package's functions.

        Each is ``ours(own, *args, **kwargs)``: `own` is the package's function.
        """
        holder = importlib.import_module(module)
        current = {name: self._found(holder, name) for name in ours}
        swaps = [(current[name], _standing_in(current[name], function)) for name, function in ours.items()]
        self._functions += swaps
        self._note(_swap(swaps, self.package))

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
        if self._functions:
            _swap([(new, before) for before, new in self._functions], self.package)
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


def _swap(swaps: list[tuple[Function, Function]], package: str) -> list[str]:
    """Put the second of each pair where the first is; says where. One pass over thousands of modules."""
    new_of = {id(old): new for old, new in swaps}
    places = []
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue  # a stand-in of somebody's
        names = vars(module)
        for name in [name for name, value in list(names.items()) if id(value) in new_of]:
            names[name] = new_of[id(names[name])]
            places.append(f"{module.__name__}.{name}")
        if module.__name__.partition(".")[0] == package:
            for function in _functions(module):
                arguments = _swap_defaults(function, new_of)
                places += [f"{module.__name__}.{function.__qualname__}({argument})" for argument in arguments]
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


def _swap_defaults(function: Any, new_of: dict[int, Function]) -> list[str]:
    """The names of the arguments whose defaults were swapped."""
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    found = [parameter.name for parameter in parameters if id(parameter.default) in new_of]
    if found:
        defaults, keywords = function.__defaults__ or (), function.__kwdefaults__ or {}
        function.__defaults__ = tuple(new_of.get(id(value), value) for value in defaults) or None
        function.__kwdefaults__ = {name: new_of.get(id(value), value) for name, value in keywords.items()} or None
    return found
