"""Which classes, or tasks, belong to which split: drawn from a seed, or read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metaoptim.core.brief import plural
from metaoptim.core.callers import warn
from metaoptim.tasks.base import raw
from metaoptim.tasks.csv_files import records

SPLITS = ("train", "val", "test")
HELD_OUT = 0.2  # the share of each of val and test, where a seed divides

Members = dict[str, NDArray[np.int64]]


def divide(names: Sequence[str], file: str | Path | None, seed: int, least: int, what: str) -> Members:
    """The indices of the names in each split; ValueError where they can't be divided.

    Args:
        names: classes or tasks, sorted, so that their order in a file doesn't matter.
        file: lines NAME,SPLIT, one for each name; none: shuffled by the seed, 60 / 20 / 20 %.
        seed: of the shuffling.
        least: how many each split needs.
        what: what they are called in sentences, in the plural.
    """
    if not isinstance(file, str | Path | None):
        raise ValueError(f"splits is a {type(file).__name__}: it must be the path of a file with lines NAME,SPLIT.")
    return _drawn(names, seed, least, what) if file is None else _listed(names, Path(file).expanduser(), what)


def fold(classes: NDArray[np.int64], number: int, count: int, what: str) -> Members:
    """Classes, or tasks, of the split train divided anew: part `number` of `count` is "val", and the others are "train".

    The parts are those of one shuffling, so that no class is in two of them, and all are as large, up to one.
    what: what they are called in sentences, in the plural. ValueError where there are fewer of them than parts.
    """
    if len(classes) < count:
        raise ValueError(f"the {len(classes)} {what} of split train can't be divided into {count} parts; ask for fewer.")
    order = np.argsort(raw(0, "folds", 0, len(classes), 1)[:, 0], kind="stable")
    held = np.zeros(len(classes), bool)
    held[order[number::count]] = True
    return {"train": classes[~held], "val": classes[held]}


def told_left_out(lost: int, of: str, needed: str) -> None:
    """Warns of classes or tasks, if any, that are left out because an episode needs more of each."""
    if lost:
        are = "is" if lost == 1 else "are"
        warn(f"{lost} of the {of} {are} left out, for an episode needs {needed} (short='leave_out').")


def _drawn(names: Sequence[str], seed: int, least: int, what: str) -> Members:
    held = max(least, round(HELD_OUT * len(names)))
    if len(names) < 2 * held + least:
        raise ValueError(
            f"There are too few {what} ({len(names)}) to divide into train, val and test with {least} or more in each; add "
            "some, ask for less, or say in a file which split each belongs to (splits=)."
        )
    order = np.argsort(raw(seed, "splits", 0, len(names), 1)[:, 0], kind="stable")
    parts = {"test": order[:held], "val": order[held : 2 * held], "train": order[2 * held :]}
    return {split: np.sort(parts[split]).astype(np.int64) for split in SPLITS}


def _listed(names: Sequence[str], file: Path, what: str) -> Members:
    place, members = {name: i for i, name in enumerate(names)}, dict[str, list[int]]()
    seen: set[str] = set()
    for line, fields in records(file):
        if len(fields) != 2:
            raise ValueError(
                f"Line {line} of {file} has {plural(len(fields), 'field')}; expected two, as in `{names[0]},train`."
            )
        name, split = (field.strip() for field in fields)
        if split == "split" and not seen:
            continue  # a header
        if split not in SPLITS:
            raise ValueError(f"Line {line} of {file} names the split {split!r}; expected one of {', '.join(SPLITS)}.")
        if name not in place or name in seen:
            fault = "twice" if name in seen else f"and there is none of that name among the {what}"
            raise ValueError(f"Line {line} of {file} names {name!r}, {fault}; give each of the {what} one line.")
        seen.add(name)
        members.setdefault(split, []).append(place[name])
    if missing := [name for name in names if name not in seen]:
        raise ValueError(f"{file} has no line for {missing[0]!r}; give each of the {len(names)} {what} one line.")
    if "train" not in members:
        raise ValueError(f"{file} puts none of the {what} into the split train; training needs some.")
    return {split: np.sort(np.array(members[split], np.int64)) for split in SPLITS if split in members}
