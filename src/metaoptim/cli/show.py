"""What `metaoptim list` and `metaoptim show` print: read from signatures, docstrings and recipes."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from metaoptim.recipes import recipe as config
from metaoptim.recipes.schema import NONE, REQUIRED, nearest, spell

_KINDS = {"algorithm": "algorithms", "tasks": "tasks", "model": "models"}


def overview(kind: str | None = None) -> RenderableType:
    """Everything that has a name, by kind, or one kind alone; one line each, cut to the terminal's width."""
    titles = ["recipes", *_KINDS.values()]
    if kind is not None and kind not in titles:
        raise ValueError(f"unknown kind `{kind}`{nearest(kind, titles)}")
    parts = [_lines(title) for title in titles if kind in (None, title)]
    return Group(*parts, Text("More about each: metaoptim show NAME"))


def _lines(title: str) -> RenderableType:
    if title == "recipes":
        recipes = [config.load(name) for name in config.names()]
        rows = [[r.name, r.description, measured(r.tables["expected"])] for r in recipes]
    else:
        kind = next(kind for kind, plural in _KINDS.items() if plural == title)
        rows = [[n, _doc(b).partition("\n")[0]] for n, b in config.BUILDERS[kind].items()]
    return _section(f"{title} ({len(rows)})", rows, cut=True)


def explain(name: str) -> RenderableType:
    """Everything known about a name; if it is unknown, a ValueError that suggests the nearest one."""
    parts: list[RenderableType] = []
    if name in config.names():
        parts.append(_recipe(config.load(name)))
    parts += [_builder(kind, name) for kind in _KINDS if name in config.BUILDERS[kind]]
    if not parts:
        valid = [*config.names(), *(n for kind in _KINDS for n in config.BUILDERS[kind])]
        raise ValueError(f"unknown name `{name}`{nearest(name, valid)}")
    return Group(*parts)


def measured(expected: dict[str, Any]) -> str:
    """What a recipe states in [expected], in a few words."""
    interval = expected.get("interval")
    if isinstance(interval, list):
        ends = f" [{', '.join(map(str, interval))}]"
    else:
        ends = f" ± {interval}" if interval is not None else ""
    return f"{expected.get('metric', '')} {expected['value']}{ends}".strip() if "value" in expected else ""


def _recipe(recipe: config.Recipe) -> RenderableType:
    reach = measured(recipe.tables["expected"])
    lines = [
        recipe.description,
        f"Measured: {reach}" if reach else "",
        f"Run it: metaoptim train {recipe.name}",
    ]
    return Group(_title("recipe", recipe.name), Text("\n".join(filter(None, lines))), Text(), Text(recipe.text(absent=False)))


def _builder(kind: str, name: str) -> RenderableType:
    build = config.BUILDERS[kind][name]
    rows = (
        [
            o.name,
            spell(o.type),
            "(required)" if o.default is REQUIRED else _value(o.default),
            o.meaning,
        ]
        for o in config.table_options(kind, name)
    )
    parts: list[RenderableType] = [_title(kind, name), _prose(_doc(build).partition("\n\nArgs:")[0])]
    if kind == "algorithm":
        # An algorithm's file is about one paper; its docstring has the equation, the link and the deviations.
        parts.append(_prose(inspect.cleandoc(sys.modules[build.__module__].__doc__ or "")))
    return Group(*parts, _section(f"options, in a recipe's [{kind}]", rows, ("", "value", "default", "meaning")))


def _prose(doc: str) -> RenderableType:
    """A docstring's paragraphs, fitted to the terminal; equations and lists stay as they are."""
    paragraphs = [p if p.startswith((" ", "-")) else p.replace("\n", " ") for p in doc.split("\n\n")]
    return Text("\n\n".join(paragraphs) + "\n")


def _title(kind: str, name: str) -> Text:
    return Text(f"{name} ({kind})", style="bold")


def _section(title: str, rows: Iterable[list[str]], header: tuple[str, ...] = (), cut: bool = False) -> RenderableType:
    """A table without rules; `cut`: one line per row, with descriptions truncated where there is no room."""
    table = Table(*header, box=None, show_header=bool(header), padding=(0, 2, 0, 0))
    for i, row in enumerate(rows):
        if cut and i == 0:
            for column in range(len(row)):
                table.add_column(no_wrap=column != 1)  # the column that may wrap is the one that rich shrinks
        cells = [Text(cell, no_wrap=True, overflow="ellipsis") for cell in row] if cut else row
        table.add_row(*cells)
    return Group(Text(title, style="bold"), Padding(table, (0, 0, 1, 2), expand=False))


def _value(default: Any) -> str:
    return json.dumps(NONE if default is None else default)


def _doc(build: Callable[..., Any]) -> str:
    return inspect.getdoc(build) or ""
