"""The names of weights, by which some rules tell them apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from torch import Tensor

from metaoptim.core.callers import warn
from metaoptim.core.types import Rule
from metaoptim.optim.settings import family, values


@dataclass(frozen=True)
class Named:
    """Whether a weight's name is like one of some patterns, as those of file names: `Celo2(by_adam=Named("*embed*", "*bias"))`.

    Unlike a function, it can be kept in a file.
    """

    patterns: tuple[str, ...]

    def __init__(self, *patterns: str) -> None:
        if odd := [pattern for pattern in patterns if not isinstance(pattern, str)]:
            raise ValueError(f"Named takes patterns one by one, such as Named('*embed*', '*bias'); found {odd[0]!r}.")
        object.__setattr__(self, "patterns", patterns)

    def __call__(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


def names_of(groups: Sequence[dict[str, Any]]) -> dict[Tensor, str]:
    """Every parameter and its name: its place, where nobody gave it another."""
    found: dict[Tensor, str] = {}
    for g, group in enumerate(groups):
        params = group["params"]
        found |= dict(zip(params, group.get("param_names") or [f"{g}.{i}" for i in range(len(params))], strict=True))
    return found


def check_names(names: dict[Tensor, str]) -> None:
    """No two parameters of one name."""
    seen: set[str] = set()
    for name in names.values():
        if name in seen:
            raise ValueError(
                f"Two parameters are called {name!r}: names must differ, for a rule knows weights by them; give other ones, "
                f"such as ('encoder.{name}', parameter), or parameters without names."
            )
        seen.add(name)


def warn_of_names(rule: Rule, groups: Sequence[dict[str, Any]]) -> None:
    """A warning where a rule goes by names that nobody gave, or by patterns that no name is like."""
    for doubt in islice(_doubts(rule, groups), 1):
        warn(doubt)


def _doubts(rule: Rule, groups: Sequence[dict[str, Any]]) -> Iterator[str]:
    names = list(names_of(groups).values())
    for part in family(rule):
        patterns = [value for value in values(part) if isinstance(value, Named)]
        if "param_names" not in groups[0] and getattr(part, "by_name", False) and Named() not in patterns:
            yield f"{part} tells weights apart by their names, and these have none: give model.named_parameters()."
        for named in patterns:
            if named.patterns and not any(map(named, names)):
                yield f"{part}: no weight has a name like {' or '.join(named.patterns)}; they are such as {names[0]!r}."
