"""What is done with a meta-gradient: a step of a `torch.optim` optimizer, unless something else is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.checks import check_positive
from metaoptim.core.types import Estimate, MetaParams, Outer
from metaoptim.training.module import MetaModule

UNFIT = {
    "LBFGS": "it asks for the loss again and again within a step",
    "SparseAdam": "it takes sparse gradients, and meta-gradients are dense",
}


class OuterStep(Protocol):
    """(φ, its estimate) -> the next φ."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What it was told, in JSON's types: a run goes on with the same alone."""
        ...

    def __call__(self, phi: MetaParams, estimate: Estimate, again: Callable[[MetaParams], Estimate]) -> MetaParams:
        """`again(φ)` is the estimate at another φ, on the same tasks with the same draws, as a line search needs it."""
        ...

    def state(self) -> dict[str, Any]:
        """What it remembers between steps: tensors and numbers by name, for a checkpoint."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class OptimizerStep:
    """A step of an optimizer of `torch.optim`, with a schedule of its step size and gradients clipped to a norm."""

    def __init__(self, module: MetaModule, outer: Outer, iterations: int, clip: float | None = None) -> None:
        self.module, self.outer, self.iterations, self.clip = module, outer, iterations, clip
        self.optimizer = make_optimizer(module, outer)
        self.rate = outer.lr

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"outer": self.outer._asdict(), "clip": self.clip}

    def __call__(self, phi: MetaParams, estimate: Estimate, again: Callable[[MetaParams], Estimate]) -> MetaParams:
        grad, size = estimate.grad, grad_norm(estimate)
        if self.clip is not None and size > self.clip:
            shrink = self.clip / size
            grad = trees.map_tensors(lambda g: g * shrink, grad)
        self.optimizer.zero_grad()
        self.module.accumulate(grad)
        # The module has counted the step that is being taken.
        self.rate = self.outer.lr * factor(self.outer.schedule, (self.module.outer_step - 1) / self.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.step()
        return self.module.phi()

    def state(self) -> dict[str, Any]:
        saved = self.optimizer.state_dict()["state"]
        return {f"{i}/{name}": value for i, entry in saved.items() for name, value in entry.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        entries: dict[int, dict[str, Any]] = {}
        for key, value in state.items():
            i, _, name = key.partition("/")
            entries.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({"state": entries, "param_groups": self.optimizer.state_dict()["param_groups"]})


def grad_norm(estimate: Estimate) -> float:
    """The Euclidean norm of the meta-gradient."""
    leaves: list[Tensor] = trees.flatten(estimate.grad)
    return trees.norm({str(i): g for i, g in enumerate(leaves)}).item()


def make_optimizer(module: MetaModule, outer: Outer) -> torch.optim.Optimizer:
    """The outer optimizer by name; what the rule owns (step sizes, for one) never decays."""
    kind = getattr(torch.optim, str(outer.optimizer), None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
        raise ValueError(
            f"torch.optim has no optimizer {outer.optimizer!r}; give the name of a class, such as Adam, AdamW or SGD."
        )
    if outer.optimizer in UNFIT:
        raise ValueError(f"the optimizer {outer.optimizer} can't take outer steps, for {UNFIT[outer.optimizer]}; take another, "
                         "such as Adam.")  # fmt: skip
    check_positive(**{"outer lr": outer.lr})
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
