"""A page as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from metaoptim.report.html.document import Chart, Episode, HeatMap, Page, Part, Score, Series, Table
from metaoptim.report.html.svg import draw
from metaoptim.report.html.values import colour_of, table, told

WIDE, HALF, PHONE = 1040.0, 500.0, 330.0  # pixels of a figure over the whole page, half of it, and on a phone
NUMBER = re.compile(r"(–|not finite|never|\*?[+−-]?[\d,]*\.?\d+(e−?\d+)?\*?( ?[%×s])?( [±(].*)?)?")


def render(page: Page) -> str:
    """The page's HTML. Whatever stands in the page is shown as text, never as markup."""
    style, script = _text("style.css"), _text("script.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    found: str = _environment().get_template("page.html").render(page=page, style=style, script=script, policy=policy)
    return found


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("metaoptim.report", "html"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(kind=_kind, drawn=_drawn, numbers=_numbers, table=table, colour=colour_of, data=_data)
    made.filters.update(prose=_prose, shown=_shown, slug=_slug, laid=_laid)
    return made


def _prose(text: str) -> Markup:
    """A text in which what stands between backticks is code."""
    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:  # one that has no partner is a letter
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def _text(name: str) -> str:
    return (resources.files("metaoptim.report.html") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _kind(part: Part) -> str:
    return "figure" if isinstance(part, Chart | HeatMap) else type(part).__name__.lower()


def _laid(parts: Sequence[Part]) -> list[tuple[Part, bool]]:
    """The parts, and whether each has the whole width: two that take half of it stand beside each other, one chart does not."""
    found: list[tuple[Part, bool]] = []
    left = False  # whether the left half of a line is taken
    for i, part in enumerate(parts):
        half = _takes_half(part)
        alone = half and not left and not (i + 1 < len(parts) and _takes_half(parts[i + 1]))
        found.append((part, not half or (alone and isinstance(part, Chart))))
        left = half and not left
    return found


def _takes_half(part: Part) -> bool:
    return isinstance(part, HeatMap | Episode | Score) or (isinstance(part, Chart) and not part.wide)


def _drawn(figure: Chart | HeatMap, wide: bool) -> dict[str, Any]:
    """Two drawings of a figure, for a large and for a small screen, and what their spots tell."""
    both = {"large": draw(figure, WIDE if wide else HALF), "small": draw(figure, PHONE)}
    pictures = {size: {"svg": one.svg, "spots": _spots(one.spots)} for size, one in both.items()}
    return pictures | {"hover": json.dumps(told(figure), ensure_ascii=False, separators=(",", ":"))}


def _spots(spots: tuple[tuple[float, float | None], ...]) -> str:
    return " ".join(f"{x:.0f}" if y is None else f"{x:.0f},{y:.0f}" for x, y in spots)


def _shown(series: tuple[Series, ...]) -> list[Series]:
    """What the legend names: nothing where there is one series alone."""
    named = [s for s in series if s.name]
    return named if len(named) > 1 else []


def _numbers(found: Table) -> list[bool]:
    """Which columns hold numbers alone."""
    columns = list(zip(*found.rows, strict=True)) or [()] * len(found.header)
    return [i > 0 and all(NUMBER.fullmatch(cell) for cell in column) for i, column in enumerate(columns)]


def _data(picture: bytes) -> str:
    """A PNG inside the page."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _slug(part: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") or "part"
