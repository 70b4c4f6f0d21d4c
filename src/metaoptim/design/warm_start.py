"""Points that a search tries first: as they are given, or of a file, as `recommend` writes one."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaoptim.core.brief import nearest
from metaoptim.design.space import TEST_STEPS, Space
from metaoptim.recipes.schema import ConfigError

Points = Sequence[Mapping[str, Any]]


def points(given: str | Path | Points, space: Space, recipe: str) -> list[dict[str, Any]]:
    """The points, as they would have been drawn; recipe: the name of the one that is searched from.

    Errors: ConfigError, for points that are not in the space; ValueError, for a file that holds none.
    """
    if not isinstance(given, str | Path):
        return [_drawn(space, point) for point in given]
    found, of = _read(Path(given))
    try:
        return [_drawn(space, point) for point in found]
    except ConfigError as error:
        if of in (None, recipe):
            raise ConfigError(f"{given}: {error}") from error
        raise ConfigError(f"{given} holds points for the recipe {of}, and they don't fit {recipe}: {error}") from error


def _read(file: Path) -> tuple[Points, str | None]:
    """The points of a file of tables [[start]], each with keys such as "algorithm.lr" = 0.4; and which recipe they are for."""
    try:
        told = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid TOML: {error}.") from error
    found = told.get("start")
    if not isinstance(found, list) or not found or not all(isinstance(point, dict) for point in found):
        raise ValueError(f'{file}: expected tables [[start]] with values by key, as in "algorithm.lr" = 0.4.')
    return found, told.get("recipe")


def _drawn(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in point.items():
        if key not in space or key == TEST_STEPS:
            raise ConfigError(f"warm start: `{key}` isn't searched{nearest(key, [k for k in space if k != TEST_STEPS])}")
        if space[key].drawn(value) is None:
            raise ConfigError(f"warm start: {key} = {value!r} is not in {space[key]}.")
    return {key: space[key].drawn(value) for key, value in point.items()}
