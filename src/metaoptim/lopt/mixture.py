"""Several families side by side, so that an update rule is trained on all of them in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaoptim.core.brief import brief
from metaoptim.core.types import Batch, Info, Params, Task
from metaoptim.lopt.problem import Problems


@dataclass(frozen=True, eq=False)
class Mixture:
    """The family that `mixture` builds: its problem i is problem i of every member.

    Weights are named "0.NAME", "1.NAME", …; minibatches and scales are tuples, one entry for each member.
    """

    members: tuple[Family, ...]

    def __post_init__(self) -> None:
        for member in self.members:
            check_family(member)
        if len({m.steps for m in self.members}) != 1 or len({m.name for m in self.members}) < len(self.members):
            found = ", ".join(f"{m.name} (steps={m.steps})" for m in self.members) or "none"
            raise ValueError(
                f"mixture: the members are {found}; give one or more, all different by name and with the same steps "
                "(.with_(name=…, steps=…))."
            )

    @property
    def name(self) -> str:
        """The members' names."""
        return f"mixture({', '.join(m.name for m in self.members)})"

    @property
    def steps(self) -> int:
        """K, the steps of a run."""
        return self.members[0].steps

    @property
    def splits(self) -> tuple[str, ...]:
        return self.members[0].splits

    def with_(self, **changes: Any) -> Mixture:
        """The same, each member with these changes."""
        return Mixture(tuple(m.with_(**changes) for m in self.members))

    def fold(self, number: int, count: int) -> Mixture:
        """The same, each member's problems of split "train" alone, of which part `number` of `count` is the split "val"."""
        return Mixture(tuple(m.fold(number, count) for m in self.members))

    def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
        """Whole runs of problems start … start+count−1: T = count, W = K."""
        return self._joined([m.sample(split, seed=seed, start=start, count=count) for m in self.members])

    def stretch(
        self, split: str, seed: int, problems: Sequence[int], firsts: Sequence[int], horizons: Sequence[int], width: int
    ) -> Task:
        """`width` steps of each of T problems, of which problem t has done firsts[t] steps of horizons[t]."""
        return self._joined([m.stretch(split, seed, problems, firsts, horizons, width) for m in self.members])

    def _joined(self, tasks: list[Task]) -> Task:
        supports = [task.support for task in tasks]
        own = {
            "start": {f"{i}.{n}": w for i, support in enumerate(supports) for n, w in support["start"].items()},
            "batches": tuple(support["batches"] for support in supports),
            "scale": tuple(support["scale"] for support in supports),
        }
        return Task({**supports[0], **own}, {"batches": tuple(task.query["batches"] for task in tasks)})

    def describe(self, split: str) -> dict[str, Any]:
        """Members and split, as far as JSON can tell."""
        return {"family": "mixture", "members": [m.describe(split) for m in self.members], "split": split}

    def training(self, weights: Params, scale: Any, batch: Batch) -> tuple[Tensor, Info]:
        """The sum of the members' losses, so that each member's gradient is its own."""
        losses = [m.training(w, s, b)[0] for m, w, s, b in self._each(weights, scale, batch)]
        return torch.stack(losses).sum(), {}

    def judged(self, weights: Params, scale: Any, batch: Batch) -> tuple[Tensor, Info]:
        """The mean of the members' judged losses, and of what all of them report; each is divided and clipped by itself."""
        losses, infos = zip(*(m.judged(w, s, b) for m, w, s, b in self._each(weights, scale, batch)), strict=True)
        shared = [n for n in infos[0] if all(n in info for info in infos)]
        return torch.stack(losses).mean(), {n: torch.stack([info[n] for info in infos]).mean() for n in shared}

    def _each(self, weights: Params, scale: Any, batch: Batch) -> list[tuple[Family, Params, Any, Batch]]:
        parts: list[Params] = [{} for _ in self.members]
        for name, w in weights.items():
            member, _, own = name.partition(".")
            parts[int(member)][own] = w
        return list(zip(self.members, parts, scale, batch, strict=True))


Family = Problems | Mixture
"""What an update rule is meta-trained on."""


def check_family(problems: Any) -> None:
    """Training problems, and neither their name nor another kind of tasks."""
    if not isinstance(problems, Family):
        raise ValueError(
            "training problems are families such as mo.lopt.quadratics() or mo.lopt.from_module(net, loss, data); found "
            f"{brief(problems)}."
        )


def mixture(*families: Family) -> Mixture:
    """A network of each family, trained at once; all with the same steps. ValueError where these differ or one comes twice."""
    return Mixture(families)


def members(family: Family) -> list[Problems]:
    """The families of one problem each that a family consists of."""
    return [family] if isinstance(family, Problems) else [one for part in family.members for one in members(part)]
