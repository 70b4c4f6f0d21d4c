"""CSV files and data frames as columns of numbers or words; what is wrong with one is told in a sentence, with its line."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaoptim.core.brief import plural
from metaoptim.core.folders import searched

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "nat", "<na>", "?"})
DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Table:
    """Columns by name, all of one length; `source` and `rows` are what sentences call the table and its rows."""

    source: str
    columns: dict[str, list[Any]]
    rows: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def check(self, *names: str) -> None:
        """A ValueError for a column that isn't there; it lists those that are, the likest first."""
        for name in names:
            if name not in self.columns:
                known = sorted(self.columns, key=lambda own: -SequenceMatcher(None, name.lower(), own.lower()).ratio())
                raise ValueError(f"{self.source} has no column `{name}`; its columns are {', '.join(known)}.")

    def column(self, name: str) -> list[Any]:
        """The values of a column, none of them missing."""
        self.check(name)
        values = self.columns[name]
        for row, value in zip(self.rows, values, strict=True):
            if is_missing(value):
                shown = f" ({str(value)!r})" if isinstance(value, str) and value else ""
                raise ValueError(
                    f"{row} of {self.source} has no value in `{name}`{shown}; fill it in, or leave the row out, for missing "
                    "values are not guessed."
                )
        return values

    def words(self, name: str) -> list[str]:
        """A column as text, such as the names of tasks."""
        return [value.strip() if isinstance(value, str) else str(value) for value in self.column(name)]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column of finite numbers, [rows]."""
        values = self.column(name)
        found = np.array([number(value) for value in values])
        if (odd := np.flatnonzero(~np.isfinite(found))).size:
            value = values[odd[0]]
            shown = value if isinstance(value, float) else repr(str(value))
            raise ValueError(
                f"{self.rows[odd[0]]} of {self.source} has {shown} in `{name}`, which is no finite number; turn words into "
                "numbers, or leave the column out."
            )
        return found

    def is_numeric(self, name: str) -> bool:
        """Whether a column holds numbers, though others may be among them by mistake; True and False are none."""
        return any(math.isfinite(number(value)) for value in self.column(name) if not isinstance(value, bool))


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, an empty text, NA and the like."""
    return str(value).strip().casefold() in MISSING


def number(value: Any) -> float:
    """A value as a number; NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def table(source: Any) -> Table:
    """A CSV file (its path; .gz too), or anything with `columns` that gives one for a name, such as a pandas data frame."""
    if isinstance(source, str | Path):
        return _read(Path(source).expanduser())
    if not hasattr(source, "columns") or not hasattr(source, "__getitem__"):
        raise ValueError(f"A table is the path of a CSV file or a data frame with `columns`; found {type(source).__name__}.")
    columns = {str(name): np.asarray(source[name]).tolist() for name in source.columns}
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError("The data frame is empty, or its columns have different lengths; it needs rows.")
    return Table("the data frame", columns, [f"Row {i}" for i in range(lengths.pop())])


def records(file: Path) -> list[tuple[int, list[str]]]:
    """The lines of a CSV file that are not empty, each with its number; fields are divided by comma, semicolon or tab."""
    text = _text(file)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found: list[tuple[int, list[str]]] = []
    try:
        found.extend((reader.line_num, fields) for fields in reader if fields)
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num} of {file} can't be read ({error}); expected a CSV file.") from error
    return found


def _read(file: Path) -> Table:
    lines = records(file)
    if len(lines) < 2:
        raise ValueError(f"{file} has no rows; expected a CSV file with a line of column names and a line for each example.")
    header = [name.strip() for name in lines[0][1]]
    if odd := [name for name in header if not name or header.count(name) > 1]:
        fault = f"names the column `{odd[0]}` twice" if odd[0] else "leaves a column without a name"
        raise ValueError(f"The first line of {file} {fault}; give each column a name of its own.")
    for line, fields in lines[1:]:
        if len(fields) != len(header):
            there, named = plural(len(fields), "field"), plural(len(header), "column")
            raise ValueError(f"Line {line} of {file} has {there}, and the first line names {named}.")
    columns = {name: [fields[i] for _, fields in lines[1:]] for i, name in enumerate(header)}
    return Table(str(file), columns, [f"Line {line}" for line, _ in lines[1:]])


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} isn't UTF-8 text; expected a CSV file.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} can't be unpacked ({error}); expected a CSV file, packed by gzip.") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {file}{searched(file)}; expected a CSV file.") from error
    except OSError as error:
        raise OSError(f"{file} can't be read ({error.strerror}); expected a CSV file.") from error
