"""N-way S-shot episodes from images in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaoptim.core.brief import plural
from metaoptim.core.checks import check_counts
from metaoptim.core.types import Batch, Task
from metaoptim.tasks.base import check_split, choose, located, uniforms
from metaoptim.tasks.splits import fold


@dataclass(frozen=True, eq=False)
class ImageTasks:
    """Few-shot classification of images: uint8 [classes, drawings, H, W], or with channels before H.

    Classes may have different numbers of images, `counts`: then the images of one class follow those of another, uint8
    [images, H, W], or with channels before H.

    An episode draws N classes of a split, labels them 0 … N−1 at random, and draws S support and Q query images
    of each, which never overlap: x float32 in [0, 1], [T, N·S, channels, H, W] and [T, N·Q, channels, H, W];
    y int64. The support is shuffled, because learners take minibatches from it in order; the query is sorted by
    label.

    Args:
        name: The family's name, for records.
        images: All images, uint8.
        names: The name of every class.
        members: The classes of each split, as indices into `images`; no class may be in two splits.
        ways: Classes per episode.
        shots: Support images per class.
        queries: Query images per class.
        rotations: Whether each class, rotated by 0, 90, 180 and 270 degrees, counts as four classes.
        train_shots: Support images per class in the split `train`, if different.
        options: Further options of the family, for records.
        counts: How many images each class has, where the numbers differ.
        location: Where the data lie, as arguments of the builder, for the recipe of a run.
    """

    name: str
    images: NDArray[np.uint8]
    names: Sequence[str]
    members: Mapping[str, NDArray[np.int64]]
    ways: int = 5
    shots: int = 1
    queries: int = 5
    rotations: bool = False
    train_shots: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    counts: Sequence[int] | None = None
    location: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_counts(ways=self.ways, shots=self.shots, queries=self.queries, train_shots=self.train_shots)
        if self.ways < 2:
            raise ValueError(f"ways is {self.ways}; telling classes apart takes 2 or more.")
        lead = 2 if self.counts is None else 1
        if self.images.dtype != np.uint8 or self.images.ndim - lead not in (2, 3):
            axes = "classes, drawings" if self.counts is None else "images"
            raise ValueError(
                f"The images are {self.images.dtype} of shape {self.images.shape}; pass uint8 of shape "
                f"[{axes}, height, width] or [{axes}, channels, height, width]."
            )
        if self.counts is not None and sum(self.counts) != len(self.images):
            raise ValueError(f"`counts` add up to {sum(self.counts)}, and there are {len(self.images)} images.")
        if len(self.names) != len(self.sizes):
            raise ValueError(f"There are {len(self.names)} names for {len(self.sizes)} classes; pass one for each.")
        if self.rotations and self.images.shape[-1] != self.images.shape[-2]:
            raise ValueError(f"Images of {self.images.shape[-2:]} can't be turned by 90 degrees; pass rotations=False.")
        for shots in (self.shots, self.train_shots or 1):
            if (few := np.flatnonzero(self.sizes < shots + self.queries)).size:
                has = f"`{self.name}` has" if self.counts is None else f"`{self.names[few[0]]}` of `{self.name}` has"
                raise ValueError(
                    f"{plural(shots, 'shot')} and {plural(self.queries, 'query')} need {shots + self.queries} images of each "
                    f"class, but {has} {self.sizes[few[0]]}; ask for fewer."
                )
        owner: dict[int, str] = {}
        for split, classes in self.members.items():
            if not len(classes) or min(classes) < 0 or max(classes) >= len(self.sizes):
                raise ValueError(f"Split `{split}` must name classes from 0 to {len(self.sizes) - 1}, and at least one.")
            if self.ways > self.classes(split):
                raise ValueError(
                    f"{self.ways} ways were asked for, but split `{split}` of `{self.name}` has "
                    f"{plural(self.classes(split), 'class')}; ask for fewer ways."
                )
            for c in map(int, classes):
                if c in owner:
                    raise ValueError(
                        f"Class {self.names[c]!r} is listed twice (`{owner[c]}`, `{split}`); "
                        "give each class one place in one split."
                    )
                owner[c] = split

    def __repr__(self) -> str:
        classes = ", ".join(f"{split} {self.classes(split)}" for split in self.splits)
        own = f", train_shots={self.train_shots}" if self.train_shots is not None else ""
        return f"ImageTasks({self.name}, ways={self.ways}, shots={self.shots}, queries={self.queries}{own}; classes: {classes})"

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """The number of images of each class, before any rotation."""
        if self.counts is not None:
            return np.asarray(self.counts, np.int64)
        return np.full(len(self.images), self.images.shape[1], np.int64)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each class begins among all images."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def flat(self) -> NDArray[np.uint8]:
        """All images, one after the other: [images, H, W] or [images, channels, H, W]."""
        return self.images if self.counts is not None else self.images.reshape(-1, *self.images.shape[2:])

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.members)

    def classes(self, split: str) -> int:
        """The number of classes in a split, counting rotations."""
        check_split(split, self.splits)
        return len(self.members[split]) * self._turns

    @property
    def _turns(self) -> int:
        return 4 if self.rotations else 1

    def class_names(self, split: str) -> list[str]:
        """The names of a split's classes, in the order of the labels that `batch` gives."""
        check_split(split, self.splits)
        names = [self.names[int(c)] for c in self.members[split]]
        if not self.rotations:
            return names
        return [f"{name}/rot{angle:03d}" for name in names for angle in (0, 90, 180, 270)]

    def support_shots(self, split: str) -> int:
        """Support images per class in a split."""
        return self.train_shots if split == "train" and self.train_shots is not None else self.shots

    def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
        """Episodes start … start+count−1 of the stream (seed, split), stacked: T = count."""
        classes, shots = self.classes(split), self.support_shots(split)
        drawings = int(self.sizes[self.members[split]].max())
        widths = (classes, self.ways * drawings, self.ways * shots)
        keys = uniforms(seed, f"episodes/{split}", start, count, sum(widths))
        of_class, of_drawing, of_row = np.split(keys, np.cumsum(widths)[:-1], axis=1)
        chosen = choose(of_class, self.ways)[:, :, None]
        there = np.arange(drawings) < self._sizes(split, chosen)
        drawn = choose(np.where(there, of_drawing.reshape(count, self.ways, drawings), 1.0), shots + self.queries)
        labels = np.arange(self.ways)[None, :, None]

        def rows(part: NDArray[np.intp]) -> list[NDArray[np.intp]]:
            return [np.broadcast_to(a, part.shape).reshape(count, -1) for a in (chosen, part, labels)]

        order = np.argsort(of_row, axis=1)
        support = [np.take_along_axis(a, order, axis=1) for a in rows(drawn[:, :, :shots])]
        query = rows(drawn[:, :, shots:])
        return Task(self._batch(split, *support), self._batch(split, *query))

    def batch(self, split: str, *, seed: int, start: int, count: int) -> Batch:
        """Images start … start+count−1 of the stream (seed, split), for training an ordinary classifier.

        Drawn uniformly from a split's classes: x [count, channels, H, W], y [count] in 0 … classes(split)−1.
        """
        of_class, of_drawing = uniforms(seed, f"images/{split}", start, count, 2).T
        classes = (of_class * self.classes(split)).astype(np.intp)
        drawings = (of_drawing * self._sizes(split, classes)).astype(np.intp)
        return self._batch(split, classes, drawings, classes)

    @cached_property
    def groups(self) -> list[NDArray[np.intp]]:
        """The classes of each training task: those of a name GROUP/CLASS with the same group, turned by the same angle."""
        found: dict[tuple[str, int], list[int]] = {}
        for number, name in enumerate(self.class_names("train")):
            found.setdefault((name.split("/")[0], number % self._turns), []).append(number)
        return [np.array(classes) for classes in found.values() if len(classes) > 1]

    def training_tasks(self) -> tuple[int, int]:
        """The groups of the split `train`, such as alphabets, and the classes of the largest; a ValueError without groups."""
        if len(self.groups) < 2:
            raise ValueError(
                f"the training classes of `{self.name}` are in no groups that could be training tasks, as alphabets are: take "
                "pretrain, or name the classes GROUP/CLASS."
            )
        return len(self.groups), max(map(len, self.groups))

    def of_training_tasks(self, which: NDArray[np.intp], rows: int, *, seed: int, start: int) -> Batch:
        """Images of the groups with these numbers, labelled within each: x [T, rows, channels, H, W], y [T, rows]."""
        keys = uniforms(seed, "training tasks/images", start, len(which), 2 * rows)
        of_class, of_drawing = keys.reshape(-1, 2, rows).swapaxes(0, 1)
        labels = (of_class * np.array([len(self.groups[i]) for i in which])[:, None]).astype(np.intp)
        classes = np.stack([self.groups[i][own] for i, own in zip(which, labels, strict=True)])
        drawings = (of_drawing * self._sizes("train", classes)).astype(np.intp)
        return self._batch("train", classes, drawings, labels)

    def describe(self, split: str) -> dict[str, Any]:
        """Family, options, split, its number of classes, and the sha256 of their names, one per line."""
        names = "\n".join(self.class_names(split))
        fields = ("ways", "shots", "queries", "rotations", "train_shots")
        return {
            "family": self.name,
            "options": {**{f: getattr(self, f) for f in fields}, **self.options},
            "split": split,
            "classes": self.classes(split),
            "classes_sha256": hashlib.sha256(names.encode()).hexdigest(),
            **located(self.location),
        }

    def fold(self, number: int, count: int) -> ImageTasks:
        """The training classes alone, of which part `number` of `count` is the split "val"."""
        return replace(self, members=fold(self.members["train"], number, count, "classes"))

    def _sizes(self, split: str, classes: NDArray[np.intp]) -> NDArray[np.int64]:
        """How many images there are of classes of a split, rotated ones among them."""
        found: NDArray[np.int64] = self.sizes[self.members[split][classes // self._turns]]
        return found

    def _batch(self, split: str, classes: NDArray[np.intp], drawings: NDArray[np.intp], labels: NDArray[np.intp]) -> Batch:
        base, turn = np.divmod(classes, self._turns)
        x = self.flat[self.starts[self.members[split][base]] + drawings]
        for k in range(1, self._turns):
            x[turn == k] = np.rot90(x[turn == k], k, axes=(-2, -1))
        if self.flat.ndim == 3:
            x = np.expand_dims(x, -3)
        return _tensor(np.divide(x, np.float32(255))), _tensor(labels.astype(np.int64))


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
