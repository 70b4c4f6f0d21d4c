"""What a page consists of: plain data, which knows nothing of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Number = float | None
"""A value; None where there is none, such as one that was not finite."""

GREY = -1
"""The colour of what is shown for comparison only."""


@dataclass(frozen=True)
class Axis:
    """One axis: what it shows, with its unit; names: categories at 0, 1, 2, … in place of numbers."""

    label: str
    log: bool = False
    whole: bool = False
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Series:
    """Points (x, y) that belong together.

    low, high: the ends of each point's interval, along the axis of values (that of x where y has names). A line shows them as
    a band, dots and bars as whiskers. colour counts the colours of the page; `GREY` is for comparison only. faint: drawn
    behind all others, without hover values. colours: of each dot, in place of the series' one. notes: what to say of each point
    beside its numbers.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    shape: Literal["line", "dots", "bars"] = "line"
    colour: int = 0
    dashed: bool = False
    marked: bool = False
    faint: bool = False
    colours: Sequence[int] = ()
    notes: Sequence[str] = ()

    def of_point(self, i: int) -> Series:
        """The same in the colour of one of its points."""
        return replace(self, colour=self.colours[i]) if self.colours else self


@dataclass(frozen=True)
class Guide:
    """A straight line of reference at a value of x or of y."""

    value: float
    label: str
    along: Literal["x", "y"] = "x"


@dataclass(frozen=True)
class Chart:
    """Series in common axes. wide: it takes the whole width of the page; bounds: the ends of the axis of values."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    guides: tuple[Guide, ...] = ()
    about: str = ""
    wide: bool = False
    bounds: tuple[Number, Number] = (None, None)


@dataclass(frozen=True)
class HeatMap:
    """A value for each pair of categories, rows along y; the colours go from low to high. picked: column and row of a star."""

    title: str
    x: Axis
    y: Axis
    rows: tuple[tuple[Number, ...], ...]
    low: float
    high: float
    label: str
    about: str = ""
    picked: tuple[int, int] | None = None


@dataclass(frozen=True)
class Picture:
    """An image as the bytes of a PNG, what it shows in words, what stands below it, and whether that is right."""

    png: bytes
    alt: str
    text: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Episode:
    """One episode of images: for each class its name, its support images and its query images."""

    title: str
    classes: tuple[tuple[str, tuple[Picture, ...], tuple[Picture, ...]], ...]
    about: str = ""


@dataclass(frozen=True)
class Table:
    """Cells are texts; a column whose cells are numbers is aligned as such."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    about: str = ""


@dataclass(frozen=True)
class Score:
    """The one number that counts: its value, its interval and what they are, all in words."""

    value: str
    interval: str
    unit: str
    about: str


@dataclass(frozen=True)
class Note:
    """A sentence: news, something that is missing, or a doubt; and the command that helps."""

    text: str
    tone: Literal["plain", "missing", "doubt", "good"] = "plain"
    command: str = ""


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is, folded up."""

    title: str
    text: str


Part = Chart | HeatMap | Episode | Table | Score | Note | Code


@dataclass(frozen=True)
class Section:
    """Parts under a heading."""

    title: str
    parts: tuple[Part, ...]
    about: str = ""


@dataclass(frozen=True)
class Chapter:
    """All that is told of one run, one comparison or one study."""

    title: str
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Page:
    """A whole page. refresh: seconds after which it loads itself again (0: never)."""

    title: str
    chapters: tuple[Chapter, ...]
    footer: str = ""
    refresh: int = 0
