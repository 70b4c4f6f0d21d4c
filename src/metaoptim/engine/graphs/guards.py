"""What a graph depends on besides its inputs, and whether that is still so.

A graph holds whatever the traced code read: attributes of modules, of the loss and of the rule, what their functions take from
closures, globals and classes, and tensors, whose contents may change in place. Code that is installed (torch, the standard
library, other packages, this one) is taken for fixed; the attributes of its objects are not.
"""

from __future__ import annotations

import dis
import enum
import os
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from io import IOBase
from logging import Logger
from numbers import Number
from pathlib import Path
from threading import Lock, RLock
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

CLOCKS = {"time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time", "now", "today"}
SIGHTLESS = {"eval", "exec", "globals", "open", "__import__"}
"""Built-in functions that give code values from where nobody can look beforehand; and methods of files and loggers."""
SIGHTLESS_METHODS = {"read_text", "read_bytes", "isEnabledFor"}
BY_NAME = {"getattr", "vars", "__dict__"}
MANY = 8  # states of the code for which graphs are kept; beyond, it changes from step to step

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size, torch.layout,
    Number,  # NumPy's too
)  # fmt: skip
_FIXED = (BuiltinFunctionType, property, Logger, IOBase, type(Lock()), type(RLock()))
_TORCHS = frozenset(vars(nn.Module())) - {"training"}
_MISSING = object()


class Unsteady(ValueError):
    """Code that no graph can be kept for; the message says why."""


class Guards:
    """Tells the states of some code apart: `state()` is equal as long as nothing changes that the code reads.

    Args:
        roots: learner, estimator, and whatever else the code begins at, by name.
    """

    def __init__(self, roots: Mapping[str, Any]) -> None:
        self.roots = roots
        self.seen: list[_Snapshot] = []

    def state(self) -> int:
        """The number of the present state. Raises Unsteady where it can't be read, or where it has been too many."""
        for i in range(len(self.seen) - 1, -1, -1):  # the latest first
            if self.seen[i].holds():
                return i
        found = _Snapshot()
        for name, root in self.roots.items():
            found.walk(name, root)
        if found.unreadable:
            raise Unsteady(
                f"{found.unreadable} is read by the model, the loss or the rule, and what changes in it can't be seen"
            )
        if len(self.seen) == MANY:
            raise Unsteady(f"{self.seen[-1].changed()} changes from step to step")
        self.seen.append(found)
        return len(self.seen) - 1

    def changed(self, state: int) -> str:
        """What is no longer as it was in that state, in words; nothing: all is."""
        return "" if not self.seen or self.seen[state].holds() else self.seen[state].changed()


class _Snapshot:
    """Values as they were: entries of dictionaries, cells of closures, contents of containers, versions of tensors."""

    def __init__(self) -> None:
        self.entries: list[tuple[Mapping[str, Any], Any, Any]] = []
        self.sizes: list[tuple[Any, int]] = []
        self.cells: list[tuple[CellType, Any]] = []
        self.sequences: list[tuple[Any, list[Any]]] = []
        self.tensors: list[tuple[Tensor, int]] = []
        self.names: dict[int, str] = {}
        self.known: dict[int, Any] = {}  # holds the objects, so that no other one gets their id
        self.unreadable = ""

    def holds(self) -> bool:
        return next(self.differences(), None) is None

    def changed(self) -> str:
        """What is no longer as it was, in words."""
        holder, key = next(self.differences(), (None, ""))
        return f"`{self.names.get(id(holder), '')}{key}`"

    def differences(self) -> Iterator[tuple[Any, str]]:
        for own, key, value in self.entries:
            now = own.get(key, _MISSING)
            if now is not value and not _equal(now, value):
                yield own, f".{key}"
        for own, size in self.sizes:
            if len(own) != size:
                yield own, ""
        for cell, value in self.cells:
            now = _contents(cell)
            if now is not value and not _equal(now, value):
                yield cell, ""
        for sequence, values in self.sequences:
            if len(sequence) != len(values) or any(
                a is not b and not _equal(a, b) for a, b in zip(sequence, values, strict=True)
            ):
                yield sequence, ""
        for tensor, before in self.tensors:
            if version(tensor) != before:
                yield tensor, ""

    def walk(self, name: str, value: Any) -> None:
        """Remembers a value, and what can be reached from it. name: how a message calls it."""
        if isinstance(value, _ATOMS) or id(value) in self.known or self.unreadable:
            return
        self.known[id(value)] = value
        self.names[id(value)] = name
        match value:
            case Tensor():
                self.tensors.append((value, version(value)))
            case nn.Module():
                self.module(name, value)
            case FunctionType():
                self.function(name, value)
            case MethodType():
                self.walk(name, value.__func__)
                self.walk(name, value.__self__)
            case partial():
                self.walk(name, (value.func, value.args, value.keywords))
            case staticmethod() | classmethod():
                self.walk(name, value.__func__)
            case type():
                if not _installed(value.__module__):
                    self.dictionary(name, value.__dict__, inside=lambda n: not (n.startswith("__") and n != "__call__"))
            case ModuleType():
                pass  # what is read of it is watched where it is read
            case dict():
                self.dictionary(name, value)
            case list() | tuple() | set() | frozenset():
                self.sequences.append((value, list(value)))
                for i, item in enumerate(value):
                    self.walk(f"{name}[{i}]", item)
            case _:
                self.instance(name, value)

    def module(self, name: str, module: nn.Module) -> None:
        """A module's attributes, buffers and children; its weights are inputs of the graph."""
        own = module.__dict__
        self.names[id(own)] = name
        self.sizes += [(own, len(own)), (own["_parameters"], len(own["_parameters"]))]
        for key in own.keys() - _TORCHS:
            self.read(own, key, name)
        for part in ("_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks"):
            self.dictionary(name, own[part])
        self.walk(type(module).__name__, type(module))

    def instance(self, name: str, value: Any) -> None:
        own = getattr(value, "__dict__", None)
        slots = [n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ())]
        if isinstance(value, _FIXED):
            return
        if isinstance(value, random.Random) or (own is None and not slots and not callable(value)):
            self.unreadable = f"`{name}` ({type(value).__name__})"
            return
        if own is not None:
            self.dictionary(name, own)
        for slot in slots:
            self.walk(f"{name}.{slot}", getattr(value, slot, None))
        self.walk(type(value).__name__, type(value))

    def dictionary(self, name: str, own: Mapping[str, Any], inside: Callable[[str], bool] = lambda n: True) -> None:
        self.names[id(own)] = name
        self.known[id(own)] = own
        self.sizes.append((own, len(own)))
        for key, value in own.items():
            self.entries.append((own, key, value))
            if not isinstance(key, str) or inside(key):
                self.walk(f"{name}.{key}", value)

    def function(self, name: str, function: FunctionType) -> None:
        for cell, variable in zip(function.__closure__ or (), function.__code__.co_freevars, strict=True):
            self.names[id(cell)] = variable
            self.cells.append((cell, _contents(cell)))
            self.walk(variable, _contents(cell))
        self.walk(name, (function.__defaults__, function.__kwdefaults__, function.__dict__))
        if _installed(function.__module__):
            return
        names, own = _names(function.__code__), function.__globals__
        if sightless := (_globals(function.__code__) & SIGHTLESS - own.keys()) | names & SIGHTLESS_METHODS:
            self.unreadable = f"what `{min(sightless)}` gives"
        if names & {"environ", "getenv"}:
            self.walk("os.environ", os.environ)
        for used in _globals(function.__code__) & own.keys():
            self.read(own, used, "")
            value = own[used]
            home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if home in ("time", "datetime") and names & CLOCKS:
                self.unreadable = f"the time (`{used}`)"
            elif value is sys and "modules" in names:
                self.unreadable = "`sys.modules`"
            elif isinstance(value, ModuleType) and not _installed(value.__name__):
                if by_name := names & BY_NAME:
                    self.unreadable = f"the module `{used}`, perhaps by `{min(by_name)}`,"
                for inside in names & value.__dict__.keys():
                    self.read(value.__dict__, inside, value.__name__)

    def read(self, own: dict[str, Any], key: str, name: str) -> None:
        """One entry alone of a dictionary, such as a module's globals."""
        self.names.setdefault(id(own), name)
        self.entries.append((own, key, own[key]))
        self.walk(f"{name}.{key}".lstrip("."), own[key])


def version(x: Tensor) -> int:
    """Another number once a tensor was written into; 0 for inference tensors, of which it isn't known."""
    return 0 if x.is_inference() else x._version


def _equal(a: Any, b: Any) -> bool:
    """Whether two plain values are equal; of other objects, no two are."""
    return type(a) is type(b) and isinstance(a, _ATOMS) and bool(a == b)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet bound
        return _MISSING


@cache
def _globals(code: CodeType) -> frozenset[str]:
    """The names alone that code takes from its module or from Python, that of functions inside it too: not attributes."""
    inside = [_globals(c) for c in code.co_consts if isinstance(c, CodeType)]
    taken = (i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return frozenset(taken).union(*inside)


@cache
def _names(code: CodeType) -> frozenset[str]:
    """The globals and attributes that code names, that of functions inside it too."""
    inside = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return frozenset(code.co_names).union(*inside)


@cache
def _installed(module: str | None) -> bool:
    """Whether a module of that name is this package's, or installed with Python or beside it."""
    top = (module or "").partition(".")[0]
    if top in ("metaoptim", "builtins", "torch") or top in sys.stdlib_module_names:
        return top != "__main__"
    file = getattr(sys.modules.get(top), "__file__", None)
    folders = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    return file is not None and any(Path(folder) in Path(file).parents for folder in folders)
