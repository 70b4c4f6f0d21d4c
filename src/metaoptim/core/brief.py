"""What things are called where they are printed: one short line, with what differs from the defaults."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from numbers import Number
from typing import Any

from torch import Tensor

LONGEST = 60


def brief(x: Any, name: str = "", leave: tuple[str, ...] = ()) -> str:
    """A dataclass with those of its fields that differ from their defaults, if they are short and not left out."""
    if not is_dataclass(x) or isinstance(x, type):
        return getattr(x, "__name__", None) or _plain(x)
    named = [f for f in fields(x) if f.init and f.repr and f.name not in leave]
    shown = {f.name: brief(getattr(x, f.name)) for f in named if _differs(getattr(x, f.name), f)}
    inside = ", ".join(f"{key}={value}" for key, value in shown.items() if len(value) <= LONGEST)
    return f"{name or type(x).__name__}({inside})"


def shapes(x: Any) -> str:
    """A structure of tensors, with their types and shapes in place of their numbers."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{name}: {shapes(part)}" for name, part in x.items()) + "}"
    if isinstance(x, tuple | list):
        names, parts = getattr(x, "_fields", ()), [shapes(part) for part in x]
        named = [f"{name}={part}" for name, part in zip(names, parts, strict=True)] if names else parts
        return f"{type(x).__name__ if names else ''}({', '.join(named)})"
    return brief(x)


def plural(count: int, what: str) -> str:
    """A count in a sentence, as in 1 query or 2 queries."""
    many = f"{what}es" if what.endswith("s") else f"{what[:-1]}ies" if what.endswith("ry") else f"{what}s"
    return f"{count} {what if count == 1 else many}"


def nearest(word: str, valid: Iterable[str], lister: str = "") -> str:
    """The end of a sentence about an unknown name: the valid one that was probably meant, else all of them, or what lists
    them.
    """
    known = list(valid)
    rest = f"; `{lister}` lists those that there are." if lister else f"; expected one of: {', '.join(known) or 'none'}."
    return meant(word, known) or rest


def meant(word: str, valid: Iterable[str]) -> str:
    """The end of a sentence that asks for the valid name that was probably meant; "" for none."""
    lower = {v.lower(): v for v in valid}
    close = difflib.get_close_matches(word.lower(), lower, n=1)
    return f"; did you mean `{lower[close[0]]}`?" if close else ""


def _plain(x: Any) -> str:
    if isinstance(x, Number):
        return str(x)  # which is short for NumPy's too
    simple = x is None or isinstance(x, str | list | tuple | dict | set | frozenset)
    text = repr(x) if simple else type(x).__name__
    return text if "\n" not in text else type(x).__name__


def _differs(value: Any, field: Field[Any]) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    different = default is MISSING or value != default
    return different if isinstance(different, bool) else True  # of a tensor, say
