"""What the outer loss reads of the inner run: one weight v_k for the loss of each state s_0 … s_K.

An objective maps the number of inner steps K, and the number of outer steps done (0-dim int64), to K + 1 weights. Each is a
number, of which 0 means that the state is never judged, or a 0-dim tensor, for weights that change with the outer step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from numbers import Number

import torch
from torch import Tensor

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_counts, check_numbers

Weight = float | Tensor
Objective = Callable[[int, Tensor], Sequence[Weight]]


def counts(weight: Weight) -> bool:
    """Whether a state with this weight is judged."""
    return isinstance(weight, Tensor) or weight != 0


def scaled(weight: Weight, loss: Tensor) -> Tensor:
    """weight · loss, in the loss's float type."""
    return (weight.to(loss.dtype) if isinstance(weight, Tensor) else weight) * loss


def weights_of(objective: Objective, steps: int, outer_step: Tensor) -> list[Weight]:
    """The K + 1 weights; a ValueError for something else, for another number of them, or where none counts."""
    try:
        found = list(objective(steps, outer_step))
        odd = [w for w in found if not isinstance(w, Number) and not (isinstance(w, Tensor) and w.ndim == 0)]
        reason = f"it gave {odd[0]!r} among its weights" if odd else ""
    except TypeError as error:
        found, reason = [], str(error)
    if reason:
        raise ValueError(
            f"objective={brief(objective)} ({reason}): it must be a function of (steps, outer_step) that returns {steps + 1} "
            f"numbers or 0-dim tensors, the weights of s_0 … s_{steps}, as those of mo.objectives do."
        )
    if len(found) != steps + 1:
        raise ValueError(
            f"the objective gave {len(found)} weights for {steps} inner steps: give {steps + 1}, for s_0 … s_{steps}."
        )
    if not any(counts(weight) for weight in found):
        raise ValueError(f"the objective gave nothing but zeros for {steps} inner steps: give at least one weight that counts.")
    return found


def last(steps: int, outer_step: Tensor) -> tuple[float, ...]:
    """The loss after the last step (MAML)."""
    return (0.0,) * steps + (1.0,)


def trajectory_mean(steps: int, outer_step: Tensor) -> tuple[float, ...]:
    """The mean of the losses after steps 1 … K (Andrychowicz 2016, with w_t = 1/K)."""
    return (0.0,) + (1.0 / steps,) * steps if steps else (1.0,)


@dataclass(frozen=True)
class MultiStep:
    """Given weights for the losses after steps 1 … K (Antoniou 2019, multi-step loss)."""

    weights: tuple[float, ...]

    def __call__(self, steps: int, outer_step: Tensor) -> tuple[float, ...]:
        if len(self.weights) != steps:
            raise ValueError(f"multi_step has {len(self.weights)} weights for {steps} inner steps: give one per step.")
        if not any(self.weights):
            raise ValueError(f"multi_step has nothing but zeros for its {steps} weights: give at least one that counts.")
        return (0.0, *self.weights)


def multi_step(weights: Sequence[float]) -> MultiStep:
    """Given weights for the losses after steps 1 … K."""
    return MultiStep(tuple(weights))


@dataclass(frozen=True)
class AnnealedMultiStep:
    """Weights for the losses after steps 1 … K that go from all alike to the last one alone (Antoniou 2019, section 4).

    With t outer steps done and E = `multi_step_until`, while t < E

        v_k = max(1/K − t / (K·E), 0.03 / K)  for k < K,   v_K = min(1/K + t (K − 1) / (K·E), 1 − (K − 1) · 0.03 / K)

    and from then on v_K = 1 and the others are 0. They are tensors: every state is judged throughout, at its cost.
    """

    multi_step_until: int

    def __post_init__(self) -> None:
        check_counts(multi_step_until=self.multi_step_until)

    def __call__(self, steps: int, outer_step: Tensor) -> list[Weight]:
        if not steps:
            return [1.0]
        share, floor = outer_step / self.multi_step_until, 0.03 / steps
        over = outer_step >= self.multi_step_until
        early = torch.where(over, 0, ((1 - share) / steps).clamp(min=floor))
        late = torch.where(over, 1, ((1 + share * (steps - 1)) / steps).clamp(max=1 - (steps - 1) * floor))
        return [0.0, *[early] * (steps - 1), late]


@dataclass(frozen=True)
class Ramp:
    """Weights for the losses after steps 1 … K that rise towards the last one: v_k ∝ (k/K)^power, with a sum of 1.

    A power of 0 is `trajectory_mean`, and the larger it is, the closer to `last`: about the last K / (power + 1) states count.
    """

    power: float

    def __post_init__(self) -> None:
        check_numbers(0, power=self.power)

    def __call__(self, steps: int, outer_step: Tensor) -> tuple[float, ...]:
        if not steps:
            return (1.0,)
        rising = [(k / steps) ** self.power for k in range(1, steps + 1)]
        return (0.0, *(v / sum(rising) for v in rising))


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "last": lambda: last,
    "trajectory_mean": lambda: trajectory_mean,
    "multi_step": multi_step,
    "annealed_multi_step": AnnealedMultiStep,
    "ramp": Ramp,
}
"""What makes each objective, by its name."""


def objective_called(name: str) -> Objective:
    """The objective of a name; a ValueError for one that is unknown, or that wants arguments."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective={name!r} is unknown: choose one of {', '.join(OBJECTIVES)}, or give a function.")
    if wanted := signature(OBJECTIVES[name]).parameters:
        made = f"mo.objectives.{OBJECTIVES[name].__name__}({', '.join(wanted)})"
        raise ValueError(f"objective={name!r} wants {', '.join(wanted)}: give {made} in its place.")
    return OBJECTIVES[name]()
