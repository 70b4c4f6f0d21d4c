"""Where files are that a recipe names: code of the user's own (FILE.py:NAME) and data (`table`, `root`, `splits` of [tasks]).

A file is looked for beside the recipe or, for a run's recipe, where training was started, and then in the current folder: never
in a run's own folder, which somebody else may have made. What the command line names is looked for in the current folder first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

Named = Callable[[str], str]
DATA = ("table", "root", "splits")
"""Keys of [tasks] that say where data lie."""
_ALGORITHM = ("rule", "estimator", "loss", "reduction")  # which may be code of the user's own


def is_code(name: object) -> TypeGuard[str]:
    """Whether a name is one of code."""
    return isinstance(name, str) and ":" in name


def folders(recipe: Path) -> tuple[Path, ...]:
    """Where the files that a recipe's file names may be, if they are not in the current folder."""
    run = recipe.parent / "environment.json"
    if not run.exists():
        return (recipe.parent,)
    with suppress(OSError, ValueError, KeyError, TypeError):
        started = Path(json.loads(run.read_text(encoding="utf-8"))["folder"])
        return (started,) if started.is_absolute() else ()
    return ()


def found(tables: Mapping[str, Any], within: Sequence[Path]) -> dict[str, Any]:
    """A recipe's tables with files named as seen from the current folder, each taken from the first folder that has it."""
    return _renamed(tables, lambda spec: code(spec, within), lambda file: _data(file, within))


def seen_from(tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe's tables with files named as seen from a folder, for a recipe that is to lie there."""

    def seen(file: str) -> str:
        path = os.path.abspath(file)
        return Path(os.path.relpath(path, folder)).as_posix() if os.path.exists(path) else file

    def seen_code(spec: str) -> str:
        file, _, name = spec.rpartition(":")
        return f"{seen(file)}:{name}" if file.endswith(".py") else spec

    return _renamed(tables, seen_code, lambda file: file if os.path.isabs(file) else seen(file))


def codes(tables: Mapping[str, Any]) -> list[str]:
    """All code of the user's own that a recipe names."""
    return _all_named(tables)[0]


def contents(tables: Mapping[str, Any]) -> str:
    """A hash of what the code and the data hold that a recipe names, "" of none; of a folder, of the names and sizes in it."""
    named, data = _all_named(tables)
    digest = hashlib.sha256()
    for file in dict.fromkeys([*(spec.rpartition(":")[0] for spec in named), *data]):
        path = Path(file)
        if path.is_file():
            digest.update(path.read_bytes())
        for inside in sorted(path.rglob("*")) if path.is_dir() else ():
            digest.update(f"{inside.relative_to(path).as_posix()} {inside.stat().st_size}\n".encode())
    return digest.hexdigest() if named or data else ""


def _all_named(tables: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """All code, and all data, that a recipe names."""

    def into(kept: list[str]) -> Named:
        def seen(name: str) -> str:
            kept.append(name)
            return name

        return seen

    found: tuple[list[str], list[str]] = [], []
    _renamed(tables, *map(into, found))
    return found


def code(spec: str, within: Sequence[Path]) -> str:
    """FILE.py:NAME as seen from the current folder, taken from the first folder that has it."""
    file, _, name = spec.rpartition(":")
    path = _there(file, within) if file.endswith(".py") else None
    if path is None:
        return spec
    if path.parent == (here := Path.cwd()):
        return f"{path.name}:{name}"
    return spec if path == here / file else f"{path.as_posix()}:{name}"


def _data(file: str, within: Sequence[Path]) -> str:
    path = _there(file, within)
    return file if path in (None, Path(os.path.abspath(file))) else Path(os.path.relpath(path)).as_posix()


def _there(file: str, within: Sequence[Path]) -> Path | None:
    """The first that is there; not through links, for a file is called what it is called here."""
    paths = (Path(os.path.abspath(folder / file)) for folder in within)
    return next((path for path in paths if path.exists()), None)


def _renamed(tables: Mapping[str, Any], code: Named, data: Named) -> dict[str, Any]:
    own = {key: _named(value, code, data) for key, value in tables.items() if key in ("model", "tasks")}
    if isinstance(algorithm := tables.get("algorithm"), Mapping):
        named = {key: _named(algorithm[key], code, str) for key in _ALGORITHM if key in algorithm}
        own["algorithm"] = {**algorithm, **named}
    return {**tables, **own}


def _named(value: Any, code: Named, data: Named) -> Any:
    """What names code or data: a text, a table, or a list of these."""
    if isinstance(value, list):
        return [_named(part, code, data) for part in value]
    if isinstance(value, Mapping):
        inside = {key: _named(value[key], code, data) for key in ("name", "families") if key in value}
        return {**value, **inside, **{key: data(value[key]) for key in DATA if isinstance(value.get(key), str)}}
    return code(value) if is_code(value) else value
