"""The reference: a page for each public room, made of docstrings when the site is built; `docs/api/` is in no commit."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import metaoptim

PAGES = Path(__file__).parents[1] / "api"
SECTIONS = ("Args:", "Attributes:", "Example:", "Examples:", "Note:", "Raises:", "Returns:", "Yields:")


def rooms() -> dict[str, tuple[str, list[str]]]:
    """The pages: how a room is reached, its module, and its public names."""
    found: dict[str, tuple[str, list[str]]] = {"mo": ("metaoptim", [])}
    for name in dir(metaoptim):
        thing = getattr(metaoptim, name)
        if isinstance(thing, ModuleType):
            found[f"mo.{name}"] = (thing.__name__, names_in(thing))
        elif name != "__version__":
            found["mo"][1].append(name)
    return found


def names_in(module: ModuleType) -> list[str]:
    """What a module offers: its `__all__`, or what it defines without an underscore."""
    named = getattr(module, "__all__", None)
    if named is None:
        named = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
    return sorted((name for name in named if not name.startswith("_")), key=str.lower)


def write_pages(*_: Any) -> None:
    """Hook of Sphinx: writes the pages that have changed."""
    PAGES.mkdir(exist_ok=True)
    for title, (module, names) in rooms().items():
        blocks = [f"# {title}", _block(f".. automodule:: {module}")]
        blocks += [_block(directive(import_module(module), name)) for name in names]
        text, file = "\n\n".join(blocks) + "\n", PAGES / f"{title.removeprefix('mo.')}.md"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def directive(module: ModuleType, name: str) -> str:
    """How Sphinx documents one name."""
    thing, path = getattr(module, name), f"{module.__name__}.{name}"
    if inspect.isclass(thing):
        return f".. autoclass:: {path}\n   :members:"
    return f".. autofunction:: {path}" if callable(thing) else f".. autodata:: {path}\n   :no-value:"


def _block(directives: str) -> str:
    return f"```{{eval-rst}}\n{directives}\n```"


def as_restructured_text(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Hook of Sphinx: a docstring's indented formulas become literal blocks, and its * and | plain characters."""
    if isinstance(thing, dict) and lines[:1] == (inspect.getdoc(dict) or "").splitlines()[:1]:
        lines[:] = ["By name, " + ", ".join(f"``{key}``" for key in thing) + "."]  # what a dictionary is needs no telling
    found: list[str] = []
    above, literal = "", False
    for line in lines:
        if line.strip():
            after_blank = not found or not found[-1].strip()
            indented = line.startswith("    ")
            if indented and after_blank and not literal and not above.startswith(" ") and above not in SECTIONS:
                found += ["::", ""]
                literal = True
            literal = literal and indented
            above = line
            found.append(line if literal else escaped(line))
        else:
            found.append(line)
    lines[:] = found


def escaped(line: str) -> str:
    """A line of text whose * | and trailing _ mean themselves, outside of backticks."""
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(part if i % 2 else re.sub(r"[*|]|_(?!\w)", r"\\\g<0>", part) for i, part in enumerate(parts))


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Hook of Sphinx: fields of named tuples are in the signature already."""
    return True if (getattr(thing, "__doc__", None) or "").startswith("Alias for field number") else None
