"""What is done with a meta-gradient: a step of a `torch.optim` optimizer, unless something else is given."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any, Protocol, cast

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


Make = str | type[torch.optim.Optimizer] | Callable[[Any], torch.optim.Optimizer]
"""An optimizer: a class of `torch.optim` by name, any class, or a function of the parameters that makes one."""

Scheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class OptimizerStep:
    """A step of an optimizer, with a schedule of its step sizes and gradients clipped to a norm.

    Args:
        outer: the optimizer by name, its step size and schedule, as the algorithm or the user wants them.
        make: an optimizer of the user's own, in place of the one that `outer` names.
        options: further arguments of the optimizer's class.
        rule_lr: the step size for ψ, where it is to be another one.
        scheduler: in place of the schedule: makes one of torch's from the optimizer.
    """

    def __init__(
        self, module: MetaModule, outer: Outer, iterations: int, clip: float | None = None, make: Make | None = None,
        options: Mapping[str, Any] | None = None, rule_lr: float | None = None, scheduler: Scheduler | None = None,
    ) -> None:  # fmt: skip
        self.module, self.outer, self.iterations, self.clip = module, outer, iterations, clip
        factor(outer.schedule, 0.0)  # an unknown one is refused before anything is written
        self.optimizer = make_optimizer(module, outer.lr, make or outer.optimizer, options or {}, rule_lr)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.rate = float(self.rates[0])
        names = ["weights", "rule", *map(str, range(2, len(self.rates)))]
        groups = dict(zip(names, map(_hyperparameters, self.optimizer.param_groups), strict=False))
        self.scheduler = make_scheduler(self.optimizer, scheduler) if scheduler else None
        self._facts = {
            "optimizer": {"kind": type(self.optimizer).__name__, "groups": groups},
            "schedule": outer.schedule if self.scheduler is None else _scheduler_facts(self.scheduler),
            "clip": clip,
        }

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._facts

    def __call__(self, phi: MetaParams, estimate: Estimate, again: Callable[[MetaParams], Estimate]) -> MetaParams:
        grad, size = estimate.grad, grad_norm(estimate)
        if self.clip is not None and size > self.clip:
            shrink = self.clip / size
            grad = trees.map_tensors(lambda g: g * shrink, grad)
        self.optimizer.zero_grad()
        self.module.accumulate(grad)
        if self.scheduler is None:
            # The module has counted the step that is being taken.
            share = factor(self.outer.schedule, (self.module.outer_step - 1) / self.iterations)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * share
        self.optimizer.step()
        self.rate = float(self.optimizer.param_groups[0]["lr"])
        if self.scheduler is not None:
            self.scheduler.step()
        return self.module.phi()

    def state(self) -> dict[str, Any]:
        saved = self.optimizer.state_dict()["state"]
        state = {f"{i}/{name}": value for i, entry in saved.items() for name, value in entry.items()}
        if others := [n for n, x in state.items() if not (x is None or isinstance(x, Tensor | bool | int | float | str))]:
            raise ValueError(
                f"the state of {type(self.optimizer).__name__} holds more than tensors and numbers (`{others[0]}`), so that a "
                "checkpoint can't keep it: choose another optimizer, or train without out=."
            )
        if self.scheduler is not None:
            groups = [_hyperparameters(group) for group in self.optimizer.param_groups]
            state |= {"scheduler": self.scheduler.state_dict(), "groups": groups}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        entries: dict[int, dict[str, Any]] = {}
        for key, value in state.items():
            i, slash, name = key.partition("/")
            if slash:
                entries.setdefault(int(i), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        if self.scheduler is not None:
            self.scheduler.load_state_dict(alike(state["scheduler"], self.scheduler.state_dict()))
            groups = [group | alike(saved, group) for group, saved in zip(groups, state["groups"], strict=True)]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})


def grad_norm(estimate: Estimate) -> float:
    """The Euclidean norm of the meta-gradient."""
    leaves: list[Tensor] = trees.flatten(estimate.grad)
    return trees.norm({str(i): g for i, g in enumerate(leaves)}).item()


def make_optimizer(
    module: MetaModule, lr: float, make: Make, options: Mapping[str, Any], rule_lr: float | None
) -> torch.optim.Optimizer:
    """The outer optimizer; what the rule owns (step sizes, for one) never decays.

    A function of the user's own is given the same groups of parameters as a class: θ and, where there is one, ψ.
    """
    kind: Any = getattr(torch.optim, make, None) if isinstance(make, str) else make
    by_class = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    if isinstance(make, str) and not by_class:
        raise ValueError(f"torch.optim has no optimizer {make!r}; give the name of a class, such as Adam, AdamW or SGD.")
    if not callable(kind):
        raise ValueError(
            f"optimizer is {type(make).__name__}; give a name, a class, or a function that makes one of the parameters it is "
            "given, such as lambda params: torch.optim.AdamW(params, lr=1e-3)."
        )
    if by_class:
        _check_kind(kind, module)
    elif options:
        raise ValueError("optimizer_options go with an optimizer's name or class: a function of your own sets them itself.")
    check_positive(**{"outer lr": lr, "rule_lr": rule_lr})
    groups: list[dict[str, Any]] = [{"params": list(module.weights.parameters())}]
    rule = list(module.rule.parameters())
    if rule_lr is not None and not rule:
        raise ValueError(f"rule_lr={rule_lr}: this method's rule has no parameters of its own; leave it out.")
    own = {} if rule_lr is None else {"lr": float(rule_lr)}
    groups += [{"params": rule, "weight_decay": 0.0, **own}] if rule else []
    try:
        made: Any = kind(groups, lr=float(lr), **options) if by_class else kind(groups)
    except TypeError as error:
        raise ValueError(f"the optimizer can't be made: {error}.") from error
    _check_optimizer(made, module)
    return cast(torch.optim.Optimizer, made)


def _check_kind(kind: type[torch.optim.Optimizer], module: MetaModule) -> None:
    """Raises a ValueError for an optimizer of torch's that can't step this module by a meta-gradient."""
    reason = UNFIT.get(kind.__name__)
    if kind.__name__ == "Muon" and (odd := [(n, p) for n, p in module.named_parameters() if p.ndim != 2]):
        reason = f"it takes matrices alone, and `{odd[0][0]}` has the shape {tuple(odd[0][1].shape)}"
    if reason:
        raise ValueError(f"the optimizer {kind.__name__} can't take outer steps, for {reason}; take another, such as Adam.")


def _check_optimizer(made: Any, module: MetaModule) -> None:
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(f"the function given as optimizer returned {type(made).__name__}; it must return a torch optimizer.")
    held = {id(p) for group in made.param_groups for p in group["params"]}
    if left := [n for n, p in module.named_parameters() if id(p) not in held]:
        raise ValueError(
            f"the optimizer does not hold `{left[0]}`: make it of the parameters that the function is given; to leave weights "
            "as they are, build the method with learns=."
        )
    check_step(made, "write an outer_step= that calls its `again`, or choose another optimizer")


def check_step(optimizer: torch.optim.Optimizer, advice: str) -> None:
    """Raises a ValueError for an optimizer that takes no step without a closure."""
    if inspect.signature(optimizer.step).parameters.get("closure", _OPTIONAL).default is inspect.Parameter.empty:
        raise ValueError(f"{type(optimizer).__name__} evaluates the loss again within a step: {advice}.")


_OPTIONAL = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def make_scheduler(optimizer: torch.optim.Optimizer, make: Scheduler) -> torch.optim.lr_scheduler.LRScheduler:
    """A scheduler of torch's, whose state a checkpoint can keep."""
    made: Any = make(optimizer) if callable(make) else make
    plateau = isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau)
    if not isinstance(made, torch.optim.lr_scheduler.LRScheduler) or plateau or made.optimizer is not optimizer:
        found = (
            f"{type(made).__name__} of another optimizer" if hasattr(made, "optimizer") and not plateau else type(made).__name__
        )
        raise ValueError(
            f"scheduler gave {found}; give a function from the optimizer to a scheduler that steps without a metric, such as "
            "lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1000)."
        )
    state = made.state_dict()
    try:
        kept = alike(json.loads(json.dumps(state, allow_nan=False)), state) == state
    except (TypeError, ValueError):
        kept = False
    if not kept:
        raise ValueError(
            f"the state of {type(made).__name__} holds more than numbers and texts, so that a checkpoint can't keep it; choose "
            "another scheduler, or schedule= linear or cosine."
        )
    return made


def alike(saved: Any, like: Any) -> Any:
    """What JSON made of a value, as it was: dictionaries with keys and types, and sequences with types, as those of `like`."""
    if isinstance(saved, dict) and isinstance(like, dict):
        keys = {str(key): key for key in like}
        return type(like)({keys.get(k, k): alike(v, like.get(keys.get(k, k))) for k, v in saved.items()})
    if isinstance(saved, list) and isinstance(like, list | tuple):
        return type(like)(alike(a, b) for a, b in zip_longest(saved, like[: len(saved)]))
    return saved


def _scheduler_facts(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict[str, Any]:
    return {"kind": type(scheduler).__name__} | {k: v for k, v in scheduler.state_dict().items() if not k.startswith("_")}


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group of parameters is stepped with, as far as it is set."""
    return {k: v for k, v in group.items() if k != "params" and v is not None and v is not False}


def factor(schedule: str, fraction: float) -> float:
    """What the step size is multiplied with once that fraction of the iterations is done."""
    if schedule == "linear":
        return 1 - fraction
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * fraction))
    if schedule == "constant":
        return 1.0
    raise ValueError(f"schedule {schedule!r} is unknown: choose constant, linear or cosine.")
