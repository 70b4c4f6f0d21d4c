"""What learned optimizers are compared with: the rules of the library, each with the step size that is best for a family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_called, check_counts, check_fractions, check_positive
from metaoptim.core.types import Params, Rule, Task
from metaoptim.lopt.checks import check_rule
from metaoptim.lopt.mixture import Family
from metaoptim.lopt.trained import final_losses
from metaoptim.rules import Adam, AdamW, Momentum, Muon, ScheduleFreeAdamW

Build = Callable[[float, int], Rule]
"""(step size, steps of warm-up) -> rule."""
_BUILD = "it must be a function of a step size and steps of warm-up, such as lambda lr, warmup: mo.rules.SGD(lr)"


@dataclass(frozen=True)
class Baseline:
    """Args:
    build: from a step size and steps of warm-up to a rule.
    low, high: between which step sizes are swept, in equal ratios.
    warmups: shares of the run, each of which is tried with every step size.
    """

    build: Build
    low: float
    high: float
    warmups: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if not callable(self.build):
            raise ValueError(f"build={brief(self.build)}: {_BUILD}.")
        check_called("build", self.build, "lr", "warmup", advice=f"; {_BUILD}")
        check_positive(low=self.low, high=self.high)
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}: step sizes are swept from low to high.")
        if not isinstance(self.warmups, tuple | list) or not self.warmups:
            raise ValueError(f"warmups={self.warmups!r}: it must be shares of the run, such as (0.0, 0.1).")
        for share in self.warmups:
            check_fractions(warmups=share)

    def check(self, name: str, steps: int, weights: Params) -> None:
        """ValueError for rules with something to learn, which nobody has learnt."""
        rule = self.build(self.low, round(self.warmups[0] * steps))
        check_rule(rule, f"judging the baseline {name!r}")
        if learnt := rule.start(weights, torch.Generator()):
            raise ValueError(
                f"baselines: {name!r} builds {brief(rule)}, which has something to learn ({min(learnt)}); take a rule that has "
                "not, or judge it by itself, as in lopt.evaluate(rule, psi)."
            )

    def step_sizes(self, count: int) -> list[float]:
        """`count` step sizes from low to high, in equal ratios, to six digits; a single one in the middle."""
        check_counts(step_sizes=count)
        whole = math.log(self.high / self.low)
        shares = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
        return [float(f"{self.low * math.exp(whole * share):.6g}") for share in shares]


BASELINES: Mapping[str, Baseline] = {
    "SGD, momentum 0.9": Baseline(lambda lr, warmup: Momentum(lr), 1e-3, 10.0),
    "Adam": Baseline(lambda lr, warmup: Adam(lr), 1e-4, 1.0),
    "AdamW": Baseline(lambda lr, warmup: AdamW(lr), 1e-4, 1.0),
    "Muon": Baseline(lambda lr, warmup: Muon(lr, adam_lr=0.1 * lr), 1e-3, 10.0),
    "ScheduleFreeAdamW": Baseline(lambda lr, warmup: ScheduleFreeAdamW(lr, warmup=warmup), 1e-4, 1.0, (0.0, 0.1)),
}


class Tuned(NamedTuple):
    """What a sweep has found: the rule, what it was built of, the final loss it was chosen for, and whether the best step
    size was the first or the last of the sweep, so that a better one may lie beyond."""

    rule: Rule
    lr: float
    warmup: int
    loss: float
    edge: bool


def tune(
    baseline: Baseline, family: Family, tasks: Task, psis: Sequence[Params] = ({},), step_sizes: int = 14
) -> Tuned:  # fmt: skip
    """The step size and warm-up with the lowest final loss, in the mean over these problems and these ψ."""
    sizes = baseline.step_sizes(step_sizes)
    settings = [(lr, round(share * family.steps)) for lr, share in product(sizes, baseline.warmups)]
    rules = [baseline.build(lr, warmup) for lr, warmup in settings]
    count = len(baseline.warmups)
    alike = [rules[j::count] for j in range(count)]  # those of one warm-up, which differ in their step size alone
    losses = torch.stack([torch.stack([final_losses(family, some, psi, tasks) for some in alike], 1) for psi in psis])
    loss, i = min((loss, i) for i, loss in enumerate(losses.mean((0, 3)).flatten().tolist()))
    lr, warmup = settings[i]
    return Tuned(rules[i], lr, warmup, loss, lr in (sizes[0], sizes[-1]))
