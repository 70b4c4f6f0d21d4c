"""Which data are not finite."""

from __future__ import annotations

from typing import Any

from metaoptim.core import trees
from metaoptim.core.types import Task


def in_the_data(batch: Task) -> tuple[int, str] | None:
    """The first task with data that are not finite, and what is where: (1, "NaN, in the targets of its support set")."""
    return next(iter(sorted(odd_tasks(batch).items())), None)


def odd_tasks(batch: Task) -> dict[int, str]:
    """The tasks with data that are not finite, and the first place where."""
    found: dict[int, str] = {}
    for part, tree in zip(Task._fields, batch, strict=True):
        for place, x in _places(tree):
            for t in (~x.isfinite()).unsqueeze(-1).flatten(1).any(1).nonzero().flatten().tolist():
                found.setdefault(t, f"{_what(x[t])}, in {place} of its {part} set")
    return found


def odd_place(batch: Any) -> str | None:
    """What is not finite in a batch, and where: "NaN, in the inputs"; None for finite data."""
    return next((f"{_what(x)}, in {place}" for place, x in _places(batch) if not x.isfinite().all()), None)


def _places(batch: Any) -> list[tuple[str, Any]]:
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    names = {"[0]": "the inputs", "[1]": "the targets"} if pair else {}
    return [(names.get(path, f"`{path}`"), x) for path, x in trees.named(batch).items()]


def _what(x: Any) -> str:
    return "NaN" if x.isnan().any() else "infinity"
