"""Code of the user's own, named on the command line or in a recipe: FILE.py:NAME, or MODULE:NAME."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from metaoptim.core.brief import nearest
from metaoptim.recipes import places
from metaoptim.recipes.schema import REQUIRED, ConfigError, Option, plain_default, toml_type

NAMED = "FILE.py:NAME"


def find(spec: str) -> Any:
    """What FILE.py:NAME or MODULE:NAME is. Errors: ConfigError."""
    file, _, name = places.code(spec, [Path.cwd()]).rpartition(":")
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
