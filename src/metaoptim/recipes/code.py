"""Code of the user's own, named on the command line or in a recipe: FILE.py:NAME, or MODULE:NAME.

A file is looked for in the current folder, then beside the recipe or, for a run's recipe, where training was started: never
in a run's own folder, which somebody else may have made.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard, cast

from metaoptim.core.brief import nearest
from metaoptim.recipes.schema import REQUIRED, ConfigError, Option, plain_default, toml_type

NAMED = "FILE.py:NAME"


def is_code(name: object) -> TypeGuard[str]:
    """Whether a name is one of code."""
    return isinstance(name, str) and ":" in name


def folders(recipe: Path) -> tuple[Path, ...]:
    """Where else the code that a recipe's file names may be."""
    run = recipe.parent / "environment.json"
    if not run.exists():
        return (recipe.parent,)
    with suppress(OSError, ValueError, KeyError, TypeError):
        started = Path(json.loads(run.read_text(encoding="utf-8"))["folder"])
        return (started,) if started.is_absolute() else ()
    return ()


def located(spec: str, others: Sequence[Path]) -> str:
    """FILE.py:NAME as seen from the current folder: a file that is not there is looked for in others, too."""
    file, _, name = spec.rpartition(":")
    if file.endswith(".py"):
        here = Path.cwd()
        for path in (folder / file for folder in (here, *others)):
            if path.is_file():
                full = Path(os.path.abspath(path))  # not through links: a file is called what it is called here
                if full.parent == here:
                    return f"{full.name}:{name}"
                return spec if full == here / file else f"{full.as_posix()}:{name}"
    return spec


def seen_from(spec: str, folder: Path) -> str:
    """FILE.py:NAME, as a recipe names it that is to lie in another folder than the current one."""
    file, _, name = spec.rpartition(":")
    path = Path(os.path.abspath(file))
    return f"{Path(os.path.relpath(path, folder)).as_posix()}:{name}" if file.endswith(".py") and path.is_file() else spec


def find(spec: str) -> Any:
    """What FILE.py:NAME or MODULE:NAME is. Errors: ConfigError."""
    file, _, name = located(spec, ()).rpartition(":")
    if not file.removesuffix(".py") or not name:
        raise ConfigError(f"{spec}: expected MODULE:NAME, as in my_module:Net.")
    module = explained(spec, lambda: _module(file))
    if not hasattr(module, name):
        raise ConfigError(f"there is no `{name}` in {file.removesuffix('.py')}{nearest(name, _callables(module))}")
    return getattr(module, name)


def _module(file: str) -> Any:
    """The module of a file in the current folder or with an absolute path, or one that is installed."""
    path = Path(file)
    if not path.is_absolute():
        return importlib.import_module(file.removesuffix(".py").replace("/", "."))
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"  # other folders may have a file of the same name
    if name in sys.modules:
        return sys.modules[name]
    spec: Any = importlib.util.spec_from_file_location(name, path)
    if spec is None or not path.is_file():
        raise ConfigError(f"there is no file {path}; expected {NAMED}.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def explained(spec: str, run: Callable[[], Any]) -> Any:
    """Runs code of the user's own, which may import from the current folder; ConfigError says how it stopped."""
    sys.path.insert(0, os.getcwd())
    try:
        return run()
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        where = f"there is no module {error.name} in this folder or the recipe's, nor one that is installed"
        raise ConfigError(f"{spec}: {where}.") from error
    except Exception as error:  # the user's own code
        raise ConfigError(f"{spec}: it stopped with {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())


def options_of(spec: str) -> list[Option]:
    """The keyword arguments of a class or function, as a recipe's keys; those without a type may be anything."""
    found = find(spec)
    if not inspect.isroutine(found) and not isinstance(found, type):
        return []  # an object, which is taken as it is
    try:
        parameters = explained(spec, lambda: inspect.signature(found, eval_str=True)).parameters.values()
    except ConfigError:  # a type that can't be looked up
        parameters = inspect.signature(found).parameters.values()
    known = []
    for p in parameters:
        kind = Any if p.annotation is p.empty or isinstance(p.annotation, str) else toml_type(p.annotation)
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and kind and (p.default is p.empty or _plain(p.default)):
            default = REQUIRED if p.default is p.empty else plain_default(p.default)
            known.append(Option(p.name, kind, default, f"see {spec}"))
    return known


def build(spec: str, options: Mapping[str, Any], expected: type | tuple[str, ...], what: str) -> Any:
    """What the code is or builds: an object of a type, or one with these attributes. Errors: ConfigError."""

    def fits(x: Any) -> bool:
        if isinstance(expected, type):
            return isinstance(x, expected)
        return not isinstance(x, type) and all(hasattr(x, name) for name in expected)

    found = find(spec)
    if fits(found):
        return found
    if not callable(found):
        raise ConfigError(f"{spec}: it is {type(found).__name__}; expected {what}, or a class or function that builds one.")
    made = explained(spec, lambda: found(**options))
    if not fits(made):
        raise ConfigError(f"{spec}: it gave {type(made).__name__}; expected {what}.")
    return made


def function(spec: str, what: str) -> Callable[..., Any]:
    """What the code is if that can be called, or an object of a class that needs no arguments. Errors: ConfigError."""
    found = find(spec)
    made = explained(spec, found) if isinstance(found, type) else found
    if not callable(made):
        raise ConfigError(f"{spec}: it is {type(made).__name__}; expected {what}.")
    return cast(Callable[..., Any], made)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple | dict)


def _callables(module: Any) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
