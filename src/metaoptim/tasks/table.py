"""Few-shot regression and classification from a table: one column says which task a row belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaoptim.core.brief import plural
from metaoptim.core.checks import check_choice, check_counts
from metaoptim.core.types import Batch, Task
from metaoptim.tasks import csv_files
from metaoptim.tasks.base import check_split, choose, located, uniforms
from metaoptim.tasks.splits import divide, fold, told_left_out

Kind = Literal["auto", "regression", "classification"]


class Frame(Protocol):
    """A data frame: names of columns, and a column for each name."""

    columns: Any

    def __getitem__(self, name: str) -> Any: ...


def from_table(
    table: str | Path | Frame,
    task: str,
    target: str,
    shots: int = 5,
    queries: int = 5,
    features: Sequence[str] | None = None,
    kind: Kind = "auto",
    scale_target: bool = True,
    splits: str | None = None,
    split_seed: int = 0,
    short: Literal["refuse", "leave_out"] = "refuse",
    train_shots: int | None = None,
) -> TableTasks:
    """Rows of a table of your own, a task for each value of one column: x [T, S, D], y [T, S, 1], or [T, N·S] classes.

    The tasks are divided into train, val and test. Features are scaled to mean 0 and variance 1 over the rows of the training
    tasks, and by default so is the target of a regression: then 1 is the squared error of always predicting the mean. Tasks may
    have different numbers of rows; an episode draws its rows without replacement. In classification the classes are the values
    of the target, sorted, the same in every task, and an episode draws S + Q rows of each. Missing values are refused.

    Args:
        table: A CSV file with column names in its first line (.csv or .csv.gz), or a data frame.
        task: The column that says which task a row belongs to.
        target: The column to predict.
        shots: Support rows per task; in classification, per class.
        queries: Query rows per task; in classification, per class.
        features: The columns to predict from, all numbers; none: all others.
        kind: `regression`, `classification`, or `auto`: regression if the targets are numbers, as 0 and 1 are too.
        scale_target: Whether the target of a regression is scaled too.
        splits: A file with a line TASK,SPLIT for each task (train, val or test); none: drawn by the seed, 60 / 20 / 20 %.
        split_seed: The seed by which tasks are divided.
        short: What happens to a task with fewer rows than an episode needs: `refuse` the table, or `leave_out` the task.
        train_shots: Support rows per task (and class) in the split `train`, if different.
    """
    check_counts(shots=shots, queries=queries, train_shots=train_shots)
    check_choice(("auto", "regression", "classification"), kind=kind)
    check_choice(("refuse", "leave_out"), short=short)
    data = csv_files.table(table)
    x, used = _inputs(data, features, (task, target))
    y, classes = _targets(data, target, kind)
    least = max(shots, train_shots or 1) + queries
    names, index, sizes = _rows(np.array(data.words(task)), y, classes, least, short, data.source)
    members = divide(names, splits, split_seed, 1, "tasks")
    train = index[members["train"]]
    seen = train[train >= 0]
    center, spread = _scaling(x[seen])
    middle, width = (v.item() for v in _scaling(y[seen])) if scale_target and not classes else (0.0, 1.0)
    options = {
        "reads": "table", "kind": "classification" if classes else "regression", "task": task, "target": target,
        "features": used, "scale_target": scale_target, "split_seed": split_seed, "short": short, "classes": classes,
        "center": center.tolist(), "spread": spread.tolist(), "target_center": middle, "target_spread": width,
    }  # fmt: skip
    inputs = ((x - center) / spread).astype(np.float32)
    outputs = y if classes else ((y[:, None] - middle) / width).astype(np.float32)
    place = {"table": str(table) if isinstance(table, str | Path) else data.source}
    location = place | ({"splits": str(splits)} if splits else {})
    return TableTasks(
        "from_table", inputs, outputs, names, index, sizes, members, shots, queries, train_shots, options, location
    )


@dataclass(frozen=True, eq=False)
class TableTasks:
    """The family that `from_table` builds.

    Args:
        name: The family's name, for records.
        x: All inputs, float32 [rows, D].
        y: All targets, float32 [rows, 1], or classes, int64 [rows].
        names: The name of every task.
        index: The rows of each task, by class: [tasks, C, most rows], then −1; C = 1 in regression.
        sizes: How many they are, [tasks, C].
        members: The tasks of each split, as indices into `names`.
        shots: Support rows per task and class.
        queries: Query rows per task and class.
        train_shots: Support rows per task and class in the split `train`, if different.
        options: Further options, for records.
        location: Where the table lies, as arguments of the builder, for the recipe of a run.
    """

    name: str
    x: NDArray[np.float32]
    y: NDArray[Any]
    names: Sequence[str]
    index: NDArray[np.int64]
    sizes: NDArray[np.int64]
    members: Mapping[str, NDArray[np.int64]]
    shots: int
    queries: int
    train_shots: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    location: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        tasks = ", ".join(f"{split} {len(members)}" for split, members in self.members.items())
        wide = f"{self.x.shape[1]} features" if self.x.shape[1] > 1 else "1 feature"
        return f"TableTasks({self.name}, {wide}, shots={self.shots}, queries={self.queries}; tasks: {tasks})"

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.members)

    def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
        """Episodes start … start+count−1 of the stream (seed, split), stacked: T = count."""
        check_split(split, self.splits)
        _, classes, most = self.index.shape
        shots = self.train_shots if split == "train" and self.train_shots is not None else self.shots
        widths = (1, classes * most, classes * shots)
        keys = uniforms(seed, f"episodes/{split}", start, count, sum(widths))
        of_task, of_row, of_order = np.split(keys, np.cumsum(widths)[:-1], axis=1)
        members = self.members[split]
        tasks = members[(of_task[:, 0] * len(members)).astype(np.intp)]
        there = np.arange(most) < self.sizes[tasks][:, :, None]
        drawn = choose(np.where(there, of_row.reshape(count, classes, most), 1.0), shots + self.queries)
        rows = np.take_along_axis(self.index[tasks], drawn, axis=2)
        support = rows[:, :, :shots].reshape(count, -1)
        # Shuffled, because learners take minibatches of the support in turn.
        support = np.take_along_axis(support, np.argsort(of_order, axis=1), axis=1)
        return Task(self._batch(support), self._batch(rows[:, :, shots:].reshape(count, -1)))

    def training_tasks(self) -> tuple[int, int | None]:
        """The tasks of the split `train`, and the classes, if targets are classes."""
        return len(self.members["train"]), len(self.options["classes"]) or None

    def of_training_tasks(self, which: NDArray[np.intp], rows: int, *, seed: int, start: int) -> Batch:
        """Rows of the training tasks with these numbers, of all classes alike: x [T, rows, D], y [T, rows, 1] or [T, rows]."""
        of_class, of_row = (
            uniforms(seed, "training tasks/rows", start, len(which), 2 * rows).reshape(-1, 2, rows).swapaxes(0, 1)
        )
        tasks, classes = self.members["train"][which][:, None], (of_class * self.index.shape[1]).astype(np.intp)
        return self._batch(self.index[tasks, classes, (of_row * self.sizes[tasks, classes]).astype(np.intp)])

    def describe(self, split: str) -> dict[str, Any]:
        """Family, options, split, its number of tasks, and the sha256 of their names, one per line."""
        check_split(split, self.splits)
        names = "\n".join(self.names[int(i)] for i in self.members[split])
        return {
            "family": self.name,
            "options": {"shots": self.shots, "queries": self.queries, "train_shots": self.train_shots, **self.options},
            "split": split,
            "tasks": len(self.members[split]),
            "tasks_sha256": hashlib.sha256(names.encode()).hexdigest(),
            **located(self.location),
        }

    def fold(self, number: int, count: int) -> TableTasks:
        """The training tasks alone, of which part `number` of `count` is the split "val"; scaled as before."""
        return replace(self, members=fold(self.members["train"], number, count, "tasks"))

    def _batch(self, rows: NDArray[np.int64]) -> Batch:
        return torch.from_numpy(self.x[rows]), torch.from_numpy(self.y[rows])


@dataclass(frozen=True)
class TableReader:
    """Reads what a model adapts to and what it is to predict, scaled as the tables that it was trained on were."""

    options: Mapping[str, Any]

    def support(self, file: Path) -> tuple[Batch, list[str]]:
        """(x [S, D], y [S, 1] or [S]) of a CSV file with the features and the target; the names of the classes, if any."""
        data, known, target = csv_files.table(file), self.options, self.options["target"]
        x = self._inputs(data)
        if known["kind"] == "regression":
            y = (data.numbers(target)[:, None] - known["target_center"]) / known["target_spread"]
            return (x, torch.from_numpy(y.astype(np.float32))), []
        classes = known["classes"]
        if unknown := [word for word in data.words(target) if word not in classes]:
            raise ValueError(f"{file} has the class {unknown[0]!r} in `{target}`; the model knows {', '.join(classes)}.")
        return (x, torch.from_numpy(_places(data.words(target), classes))), list(classes)

    def queries(self, file: Path) -> tuple[Tensor, list[str], list[list[str]]]:
        """x [Q, D]; the heads of the table's columns, and their cells."""
        data = csv_files.table(file)
        return self._inputs(data), list(data.columns), [list(cells) for cells in zip(*data.columns.values(), strict=True)]

    def values(self, outputs: Tensor) -> Tensor:
        """Predictions in the units of the table."""
        spread, center = float(self.options["target_spread"]), float(self.options["target_center"])
        return outputs.double() * spread + center

    def _inputs(self, data: csv_files.Table) -> Tensor:
        x = np.stack([data.numbers(name) for name in self.options["features"]], axis=1)
        return torch.from_numpy(((x - self.options["center"]) / self.options["spread"]).astype(np.float32))


def _inputs(
    data: csv_files.Table, features: Sequence[str] | None, others: tuple[str, str]
) -> tuple[NDArray[np.float64], list[str]]:
    """The columns to predict from, [rows, D], and their names."""
    for name, column in zip(("task", "target"), others, strict=True):
        if not isinstance(column, str):
            raise ValueError(f"{name}={column!r}: it must be the name of one column, a text.")
    data.check(*others)
    if others[0] == others[1]:
        raise ValueError(
            f"task and target are both `{others[0]}`: give the column that says which task a row belongs to, and the column to "
            "predict."
        )
    if isinstance(features, str):
        raise ValueError(f"features={features!r}: it must be a list of columns, such as [{features!r}].")
    used = [name for name in data.columns if name not in others] if features is None else list(features)
    if not used or set(used) & set(others) or len(set(used)) < len(used):
        raise ValueError(
            f"The features of {data.source} must be one or more columns, each once, beside the task `{others[0]}` and the "
            f"target `{others[1]}`; found {', '.join(used) or 'none'}."
        )
    return np.stack([data.numbers(name) for name in used], axis=1), used


def _targets(data: csv_files.Table, target: str, kind: Kind) -> tuple[NDArray[Any], list[str]]:
    """Numbers and no classes, or labels (int64) and the classes in their order; [rows]."""
    if kind == "regression" or (kind == "auto" and data.is_numeric(target)):
        return data.numbers(target), []
    words = data.words(target)
    classes = _sorted(set(words))
    if len(classes) < 2:
        raise ValueError(
            f"The target `{target}` of {data.source} is always {classes[0]!r}; telling classes apart takes 2 or more."
        )
    return _places(words, classes), classes


def _rows(
    owner: NDArray[Any], y: NDArray[Any], classes: Sequence[str], least: int, short: str, source: str
) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """The tasks, their rows by class [tasks, C, most] (then −1), and how many those are; short ones refused or left out."""
    group = y if classes else np.zeros(len(y), np.int64)
    tasks, place = np.unique(owner, return_inverse=True)
    sizes = np.zeros((len(tasks), max(1, len(classes))), np.int64)
    np.add.at(sizes, (place, group), 1)
    whole = sizes.min(1) >= least
    if not whole.all() and (short == "refuse" or not whole.any()):
        first = int(np.flatnonzero(~whole)[0])
        few = int(sizes[first].argmin())
        of = f" of the class {classes[few]!r}" if classes else ""
        others = f" (and {np.sum(~whole) - 1} more tasks have too few)" if np.sum(~whole) > 1 else ""
        leave = ", or leave such tasks out (short='leave_out')" if whole.any() else ""
        raise ValueError(
            f"The task {str(tasks[first])!r} of {source} has {plural(int(sizes[first, few]), 'row')}{of}, and an episode needs "
            f"{least}{others}; ask for fewer shots or queries{leave}."
        )
    told_left_out(int(np.sum(~whole)), f"{len(tasks)} tasks of {source}", f"{least} rows{' of each class' if classes else ''}")
    index = np.full((*sizes.shape, int(sizes.max())), -1, np.int64)
    order = np.lexsort((group, place))
    starts = np.cumsum(sizes.ravel()) - sizes.ravel()
    within = np.arange(len(order)) - np.repeat(starts, sizes.ravel())
    index[place[order], group[order], within] = order
    return [str(name) for name in tasks[whole]], index[whole], sizes[whole]


def _scaling(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation over rows; 1 for a column that is constant."""
    spread = x.std(0)
    return x.mean(0), np.where(spread > 0, spread, 1.0)


def _sorted(words: set[str]) -> list[str]:
    """In the order of numbers if all are numbers, else of letters."""
    numeric = all(np.isfinite(csv_files.number(word)) for word in words)
    return sorted(words, key=csv_files.number) if numeric else sorted(words)


def _places(words: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    place = {name: i for i, name in enumerate(classes)}
    return np.array([place[word] for word in words], np.int64)
