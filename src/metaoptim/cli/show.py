"""What `metaoptim list` and `metaoptim show` print: read from signatures, docstrings and recipes."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from metaoptim.core.brief import nearest
from metaoptim.recipes import recipe as config
from metaoptim.recipes.experiment import Experiment
from metaoptim.recipes.parts import PARTS
from metaoptim.recipes.schema import NONE, REQUIRED, Option, options, spell

_PLURALS = {"algorithm": "algorithms", "tasks": "tasks", "model": "models"}


def overview(kind: str | None = None) -> RenderableType:
    """Everything that has a name, by kind, or one kind alone; one line each, cut to the terminal's width."""
    titles = ["recipes", *_PLURALS.values()]
    if kind is not None and kind not in titles:
        raise ValueError(f"unknown kind `{kind}`{nearest(kind, titles)}")
    parts = [_lines(title) for title in titles if kind in (None, title)]
    return Group(*parts, Text("More about each: metaoptim show NAME"))


def _lines(title: str) -> RenderableType:
    if title == "recipes":
        recipes = [config.load(name) for name in config.names()]
        rows = [[r.name, r.description, measured(r.tables["expected"])] for r in recipes]
    else:
        table = next(table for table, plural in _PLURALS.items() if plural == title)
        known = [pair for kind in config.KINDS for pair in kind.builders.get(table, {}).items()]
        rows = [[name, _doc(build).partition("\n")[0]] for name, build in known]
    return _section(f"{title} ({len(rows)})", rows, cut=True)


def explain(name: str) -> RenderableType:
    """Everything known about a name; if it is unknown, a ValueError that suggests the nearest one."""
    parts: list[RenderableType] = []
    if name in config.names():
        parts.append(_recipe(config.load(name)))
    parts += [_builder(k, table, name) for table in _PLURALS for k in config.KINDS if name in k.builders.get(table, {})]
    parts += [_explained(kind, name, known[name], options(known[name])) for kind, known in PARTS.items() if name in known]
    if not parts:
        valid = [*config.names(), *(n for table in _PLURALS for n in config.builders(table)), *chain(*PARTS.values())]
        raise ValueError(f"unknown name `{name}`{nearest(name, valid, 'metaoptim list')}")
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


def _builder(kind: type[Experiment], table: str, name: str) -> RenderableType:
    # An algorithm's file is about one paper; its docstring has the equation, the link and the deviations.
    build = kind.builders[table][name]
    head = inspect.cleandoc(sys.modules[build.__module__].__doc__ or "") if table == "algorithm" else ""
    return _explained(table, name, build, kind.options(table, name), head)


def _explained(kind: str, name: str, build: Callable[..., Any], known: Iterable[Option], head: str = "") -> RenderableType:
    rows = (
        [
            o.name,
            spell(o.type),
            "(required)" if o.default is REQUIRED else _value(o.default),
            o.meaning,
        ]
        for o in known
    )
    texts = [_prose(text) for text in (_doc(build).partition("\n\nArgs:")[0], head) if text]
    where = f"[{kind}]" if kind in _PLURALS else f"[algorithm.{kind}]"
    return Group(
        _title(kind, name), *texts, _section(f"options, in a recipe's {where}", rows, ("", "value", "default", "meaning"))
    )


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
