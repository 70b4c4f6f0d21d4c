"""The code of the user's own that a run was trained by, as a digest for each function: so that an edited one can be told."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from metaoptim.core.callers import is_users, warn
from metaoptim.core.types import MetaOptimizer

CALLED: tuple[type, ...] = (FunctionType, MethodType, partial, nn.Module)
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"  # other versions compile to other bytes


def digests(method: MetaOptimizer) -> dict[str, str]:
    """By name, of the functions of model, loss, rule, estimator and reduction, and of those that these call."""
    found: dict[str, set[str]] = {}
    for function in _functions((method.learner, method.estimator, method.reduction), {}):
        found.setdefault(function.__qualname__, set()).add(_digest(function.__code__, function.__doc__))
    return {"Python": PYTHON} | {name: " ".join(sorted(of_name)) for name, of_name in sorted(found.items())}


def warn_of_code(path: object, recorded: Mapping[str, str], method: MetaOptimizer) -> None:
    """One warning where functions are other ones than those that the run in `path` was trained by."""
    here = digests(method)
    edited = [n.replace("<locals>.", "") for n in here if n in recorded and recorded[n] != here[n]]
    if edited and recorded.get("Python") == PYTHON:
        shown = ", ".join(edited[:4]) + (f" and {len(edited) - 4} more" if len(edited) > 4 else "")
        warn(f"the run in {path} was trained by other code of {shown}; go on only if it computes the same.")


def _functions(x: Any, seen: dict[int, Any]) -> Iterator[FunctionType]:
    """The user's own functions that can be reached from anything."""
    if id(x) in seen:
        return
    seen[id(x)] = x  # held, so that no other object gets its id
    match x:
        case FunctionType():
            if is_users(x.__code__, x.__module__):
                yield x
                read = (x.__globals__.get(name) for name in x.__code__.co_names)
                held = (cell.cell_contents for cell in x.__closure__ or () if _bound(cell))
                yield from _functions([other for other in (*read, *held) if isinstance(other, CALLED)], seen)
        case MethodType():
            yield from _functions((x.__func__, x.__self__), seen)
        case partial():
            yield from _functions((x.func, x.args, x.keywords), seen)
        case type():
            kinds = [kind for kind in x.__mro__ if kind.__module__.partition(".")[0] not in ("torch", "builtins", "metaoptim")]
            for name, part in ((name, part) for kind in kinds for name, part in vars(kind).items()):
                if name == "__call__" or not name.startswith("__"):
                    yield from _functions(_inside(part), seen)
        case Mapping():
            for part in x.values():
                yield from _functions(part, seen)
        case tuple() | list():
            for part in x:
                yield from _functions(part, seen)
        case nn.Module():
            for module in x.modules():
                called = [part for part in vars(module).values() if isinstance(part, CALLED)]
                yield from _functions((type(module), called), seen)
        case ModuleType():
            pass
        case _:
            own = vars(x).values() if hasattr(x, "__dict__") else ()
            yield from _functions((type(x), [part for part in own if is_dataclass(x) or isinstance(part, CALLED)]), seen)


def _inside(part: Any) -> Any:
    """The function of a method of a class."""
    return part.fget if isinstance(part, property) else getattr(part, "__func__", part)


def _bound(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _digest(code: CodeType, doc: str | None = None) -> str:
    """Equal for code that does the same, wherever it stands and whatever its documentation says."""
    constants = [None if c == doc else _digest(c) if isinstance(c, CodeType) else c for c in code.co_consts]
    written = [sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c) for c in constants]
    told = (code.co_code.hex(), code.co_names, len(code.co_varnames), written)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
