"""The outer optimizer: a class of `torch.optim` by name, and the schedule of its step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from metaoptim.core.types import Outer
from metaoptim.training.module import MetaModule


def make_optimizer(module: MetaModule, outer: Outer) -> torch.optim.Optimizer:
    """The outer optimizer by name; what the rule owns (step sizes, for one) never decays."""
    kind = getattr(torch.optim, outer.optimizer, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
        raise ValueError(
            f"torch.optim has no optimizer {outer.optimizer!r}; give the name of a class, such as Adam, AdamW or SGD."
        )
    if not outer.lr > 0:
        raise ValueError(f"the outer step size is lr={outer.lr}; it must be positive.")
    factor(outer.schedule, 0.0)  # an unknown one is refused before anything is written
    groups: list[dict[str, Any]] = [{"params": list(module.weights.parameters())}]
    rule = list(module.rule.parameters())
    groups += [{"params": rule, "weight_decay": 0.0}] if rule else []
    make: Callable[..., torch.optim.Optimizer] = kind
    return make(groups, lr=outer.lr)


def factor(schedule: str, fraction: float) -> float:
    """What the step size is multiplied with once that fraction of the iterations is done."""
    if schedule == "linear":
        return 1 - fraction
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * fraction))
    if schedule == "constant":
        return 1.0
    raise ValueError(f"schedule {schedule!r} is unknown: choose constant, linear or cosine.")
