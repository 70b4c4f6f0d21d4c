"""What the outer loss reads of the inner run: one weight for the loss of each state s_0 … s_K.

An objective maps the number of inner steps K to K + 1 weights; a state with weight 0 is never evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Objective = Callable[[int], tuple[float, ...]]


def last(steps: int) -> tuple[float, ...]:
    """The loss after the last step (MAML)."""
    return (0.0,) * steps + (1.0,)


def trajectory_mean(steps: int) -> tuple[float, ...]:
    """The mean of the losses after steps 1 … K (Andrychowicz 2016, with w_t = 1/K)."""
    return (0.0,) + (1.0 / steps,) * steps if steps else (1.0,)


def multi_step(weights: Sequence[float]) -> Objective:
    """Given weights for the losses after steps 1 … K (Antoniou 2019, multi-step loss)."""

    def objective(steps: int) -> tuple[float, ...]:
        if len(weights) != steps:
            raise ValueError(f"multi_step has {len(weights)} weights for {steps} inner steps: give one per step.")
        if not any(weights):
            raise ValueError(f"multi_step has nothing but zeros for its {steps} weights: give at least one that counts.")
        return (0.0, *weights)

    return objective
