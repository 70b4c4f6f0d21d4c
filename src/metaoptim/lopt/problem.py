"""Families of training problems, on which an update rule is meta-trained and judged.

A problem is a network to be trained: weights at the start, a stream of minibatches, a loss. Problems of one family share all
shapes, so that T of them are trained side by side. As a `Task`, a stretch of W steps of a problem's training is a support set
of one (the problem) and a query set of one:

    support:  start    the weights at the start, [T, 1, …] each
              batches  minibatches of steps first … first+W−1, [T, 1, W, B, …] each
              first    the steps that are done before, [T, 1]; `horizon`, the steps of the whole run, [T, 1]
              scale    the factor between the weights that the rule sees and those of the network, [T, 1]
    query:    batches  minibatches that s_first … s_{first+W} are judged on, [T, 1, W+1, B, …] each
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.brief import brief, nearest
from metaoptim.core.checks import check_counts, check_positive
from metaoptim.core.types import Batch, Info, Params, Task
from metaoptim.lopt.look import check_functions, look
from metaoptim.tasks.base import check_split, in_fold, raw, uniforms

SPLITS = ("train", "val", "test")
CEILING = 3.0  # of a judged loss, in units of what knowing nothing costs
FLOOR = 1e-3  # what is added to it under a logarithm
_SEEN: WeakSet[Problems] = WeakSet()  # families that have been looked at


@dataclass(frozen=True, eq=False)
class Problems:
    """A family of training problems.

    Every number is a function of (seed, split, problem, step) alone: whoever trains on problem i of a seed has the same start
    and the same minibatches. What the functions give is looked at once, when the first problem is drawn.

    Args:
        name: of the family, for records; its random numbers depend on it.
        start: seed -> the weights of one problem at its start. Seeds go to 2⁶⁴ − 1, which torch's and NumPy's generators take.
        batches: (seed, stream, first, count) -> the minibatches of steps first … first+count−1 of one problem, stacked:
            [count, B, …] each, or [1, …] where all are the same; those of the stream "support" are trained on, those of
            "query" judge.
        loss: (weights, minibatch) -> the mean loss, and what to report beside it.
        unit: the loss of knowing nothing (log N for N classes), by which judged losses are divided.
        steps: inner steps K of a run.
        rescaled: the rule sees weights divided by a factor that is log-uniform in this range, one for each problem
            (augmentation by re-parametrisation, Moudgil et al. 2025, https://arxiv.org/abs/2501.12670); 1 and 1: none.
        logarithm: whether the meta-loss is the logarithm of the loss (and 0.001): then a tenth less counts as much at the end
            of a run, where losses are small, as at its beginning.
        options: what else makes the family what it is, for records, in JSON types.
        part: of a fold, which part of the problems of split "train", and of how many, is its split "val".
    """

    name: str
    start: Callable[[int], Params] = field(repr=False)
    batches: Callable[[int, str, int, int], Batch] = field(repr=False)
    loss: Callable[[Params, Batch], tuple[Tensor, Info]] = field(repr=False)
    unit: float = 1.0
    steps: int = 100
    rescaled: tuple[float, float] = (1.0, 1.0)
    logarithm: bool = False
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    part: tuple[int, int] | None = field(default=None, repr=False, metadata={"later": True})

    __repr__ = brief

    def __post_init__(self) -> None:
        check_functions(name=self.name, start=self.start, batches=self.batches, loss=self.loss)
        check_counts(steps=self.steps)
        check_positive(unit=self.unit)
        if len(self.rescaled) != 2 or not 0 < self.rescaled[0] <= self.rescaled[1] < math.inf:
            raise ValueError(f"rescaled={self.rescaled}: it must be two positive numbers, the smaller one first.")

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS if self.part is None else SPLITS[:2]

    def with_(self, **changes: Any) -> Problems:
        """The same family with other steps, another range of scales, another name, or the meta-loss as a logarithm."""
        known = [f.name for f in fields(self)]
        if odd := [name for name in changes if name not in known]:
            raise ValueError(f"with_: a family of training problems has no `{odd[0]}`{nearest(odd[0], known)}")
        return replace(self, **changes)

    def fold(self, number: int, count: int) -> Problems:
        """The problems of split "train" alone, of which part `number` of `count` is the split "val"."""
        return self.with_(part=(number, count))

    def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
        """Whole runs of problems start … start+count−1: T = count, W = K."""
        return self.stretch(split, seed, range(start, start + count), [0] * count, [self.steps] * count, self.steps)

    def stretch(
        self, split: str, seed: int, problems: Sequence[int], firsts: Sequence[int], horizons: Sequence[int], width: int
    ) -> Task:
        """`width` steps of each of T problems, of which problem t has done firsts[t] steps of horizons[t]."""
        check_split(split, self.splits)
        low, high = map(math.log, self.rescaled)
        found = []
        stream, numbers = (split, problems) if self.part is None else ("train", in_fold(split, problems, *self.part))
        for number, first, horizon in zip(numbers, firsts, horizons, strict=True):
            own = int(raw(seed, f"{self.name}/{stream}", number, 1, 1)[0, 0])
            if self not in _SEEN:
                look(self, own)
                _SEEN.add(self)
            scale = math.exp(low + (high - low) * uniforms(seed, f"{self.name}/{stream}/scale", number, 1, 1)[0, 0])
            weights = self.start(own)
            dtype = next(iter(weights.values())).dtype
            support = {
                "start": {n: w.detach() / scale for n, w in weights.items()},
                "batches": self.batches(own, "support", first, width),
                "first": torch.tensor(first),
                "horizon": torch.tensor(horizon),
                "scale": torch.tensor(scale, dtype=dtype),
            }
            found.append(Task(support, {"batches": self.batches(own, "query", first, width + 1)}))
        try:
            tasks: Task = trees.map_tensors(lambda x: x.unsqueeze(1), trees.stack(found))
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"the problems of the family `{self.name}` have different shapes ({error}); all must have the same, to be "
                "trained side by side: make several families of them."
            ) from error
        return tasks

    def describe(self, split: str) -> dict[str, Any]:
        """Family and split, as far as JSON can tell."""
        check_split(split, self.splits)
        known = {"steps": self.steps, "rescaled": list(self.rescaled), "logarithm": self.logarithm, "unit": self.unit}
        fold = {} if self.part is None else {"fold": list(self.part)}
        return {"family": self.name, "options": known | self.options, "split": split, **fold}

    def training(self, weights: Params, scale: Tensor, batch: Batch) -> tuple[Tensor, Info]:
        """The loss that is trained on, as a function of the weights that the rule sees."""
        return self.loss({n: w * scale for n, w in weights.items()}, batch)

    def judged(self, weights: Params, scale: Tensor, batch: Batch) -> tuple[Tensor, Info]:
        """The loss in units of knowing nothing, at most `CEILING`; where it isn't below, the run counts as diverged."""
        loss, info = self.training(weights, scale, batch)
        loss = loss / self.unit
        diverged = ~(loss < CEILING)  # true where it is not a number
        loss = torch.where(diverged, CEILING, loss)
        return (loss + FLOOR).log() if self.logarithm else loss, {**info, "diverged": diverged.to(loss.dtype)}
