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

    A later patch covers earlier ones, and patches may be undone in any order. Where a block ends, what it covered is
    there again. A call takes the place of the calls before it for good, so that a cell of a notebook may run twice: its
    `undo` ends those too, back to the block that they are in, else to the package's own.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.replaced: list[str] = []
        """``"package.module.name"`` of each place, sorted."""
        self._layers: list[tuple[_Stack, Any]] = []
        self._is_block = False

    def functions(self, module: str, **ours: Function) -> None:
        """Replace functions of a module everywhere that they are held by name: in every module that is loaded (the
        package's, and those that imported them from there), and as default arguments of the package's functions.

        Each is ``ours(own, *args, **kwargs)``: `own` is the package's function.
        """
        holder = importlib.import_module(module)
        current = {name: self._found(holder, name) for name in ours}
        swaps = []
        for name, function in ours.items():
            stack = _stack_under(current[name]) or _Stack(current[name])
            swaps.append((current[name], _standing_in(stack.own, function)))
            self._cover(stack, swaps[-1][1])
        self._note(_swap(swaps, self.package))

    def method(self, owner: type, name: str, ours: Function) -> None:
        """Replace a method of a class, a static one by a static one. ``ours(own, *args, **kwargs)``."""
        self._found(owner, name)
        current = inspect.getattr_static(owner, name)
        stack = _stack_under(current, (owner, name)) or _Stack(current, (owner, name))
        static = isinstance(stack.own, staticmethod)
        new = _standing_in(stack.own.__func__ if static else stack.own, ours)
        layer = staticmethod(new) if static else new
        setattr(owner, name, layer)
        self._cover(stack, layer)
        self._note([f"{owner.__module__}.{owner.__qualname__}.{name}"])

    def undo(self) -> None:
        """Put back what was before, also where ours came to be held in between."""
        for patch in self._remove():
            if not self._is_block and not patch._is_block:
                patch.undo()

    def _cover(self, stack: _Stack, layer: Any) -> None:
        stack.layers.append((self, layer))
        self._layers.append((stack, layer))

    def _remove(self) -> list[Patch]:
        """Take this patch out, wherever it lies; returns those that it covered directly."""
        covered: list[Patch] = []
        functions = []
        for stack, layer in reversed(self._layers):
            beneath = stack.remove(layer)
            if beneath is not None and beneath not in covered:
                covered.append(beneath)
            if stack.place is None:
                functions.append((layer, stack.top))
        if functions:
            _swap(functions, self.package)
        self._layers, self.replaced = [], []
        return covered

    def __enter__(self) -> list[str]:
        self._is_block = True
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
            self._remove()
            where = holder.__name__ if isinstance(holder, ModuleType) else f"{holder.__module__}.{holder.__qualname__}"
            raise ImportError(f"{where}.{name}: expected a function to replace, this version has none")
        function: Function = getattr(holder, name)
        return function

    def _note(self, places: list[str]) -> None:
        self.replaced = sorted({*self.replaced, *places})


class _Stack:
    """A function or a method of a package and what covers it, the last on top."""

    def __init__(self, own: Any, place: tuple[type, str] | None = None) -> None:
        self.own = own
        self.place = place
        """Of a method; a function is put back wherever it is held."""
        self.inherited = place is not None and place[1] not in vars(place[0])
        self.layers: list[tuple[Patch, Any]] = []
        _STACKS.append(self)

    @property
    def top(self) -> Any:
        return self.layers[-1][1] if self.layers else self.own

    def remove(self, layer: Any) -> Patch | None:
        """Returns the patch beneath; a method that shows `layer` shows what is on top then."""
        (i,) = (i for i, (_, own) in enumerate(self.layers) if own is layer)
        beneath = self.layers[i - 1][0] if i else None
        del self.layers[i]
        if not self.layers:
            _STACKS.remove(self)
        if self.place is not None and vars(self.place[0]).get(self.place[1]) is layer:
            if self.layers or not self.inherited:
                setattr(*self.place, self.top)
            else:
                delattr(*self.place)
        return beneath


_STACKS: list[_Stack] = []
"""Of all patches that were not undone."""


def _stack_under(current: Any, place: tuple[type, str] | None = None) -> _Stack | None:
    """That on top of which is what was found; none where it is the package's, or somebody else's over ours."""
    return next((stack for stack in _STACKS if stack.place == place and stack.top is current), None)


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


def _standing_in(own: Function, ours: Function) -> Function:
    """`ours` under the name of what it replaces, with the package's own function as its first argument."""

    @functools.wraps(own)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(own, *args, **kwargs)

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
