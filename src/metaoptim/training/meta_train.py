"""The loop that articles about MAML print, made right."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim.algorithms import ALGORITHMS
from metaoptim.core.callers import warn
from metaoptim.core.losses import cross_entropy, mse
from metaoptim.core.types import Batch, Carry, MetaOptimizer, MetaParams, Task
from metaoptim.engine import Engine, look_at
from metaoptim.gradcheck import in_the_data
from metaoptim.training.module import check_engine, refuse_list
from metaoptim.training.outer_step import check_step, grad_norm

_YIELDS = (
    "the data loader must yield batches of tasks, as Task(support=(x, y), query=(x, y)) with leading axis T, or plain "
    "(data, targets) batches of at least 2 examples"
)


def meta_train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: Iterable[Any],
    num_inner_steps: int,
    inner_lr: float,
    method: str = "maml",
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    engine: Mapping[str, Any] | None = None,
) -> list[float]:
    """One pass over a data loader: for each batch an outer step of `optimizer` on the model's own parameters.

    Args:
        model: adapted from its current weights in every task, and changed by the optimizer alone.
        optimizer: made on `model.parameters()`; Meta-SGD's step sizes are added to it as a group of their own, found
            again in another pass.
        data_loader: yields batches of T tasks, or plain (data, targets) batches, each of which is ONE task: a random half
            of its examples is the support set, the rest the query set. Of those, one of a single example that comes after
            others, as the last of an epoch can be, is left out, with a warning.
        num_inner_steps: inner steps K.
        inner_lr: inner step size α on the mean loss; for "meta_sgd" where every α starts.
        method: the name of an algorithm.
        loss: loss(output, target) -> scalar mean; by default cross-entropy for integer targets, else mean squared error.
        engine: settings of the engine, such as {"runtime": "auto"}; runtime is "eager" unless given.

    Returns:
        The outer loss of each step.

    Raises:
        ValueError: an unknown method, or one with weights for each inner step; a loader that is empty or yields something
            else; an optimizer of other parameters or one that evaluates the loss again within a step.
    """
    check_engine(engine)
    if not all(hasattr(optimizer, name) for name in ("param_groups", "zero_grad", "step")):
        given: Any = optimizer
        found = repr(given) if isinstance(given, str | type) else type(given).__name__
        raise ValueError(
            f"optimizer is {found}; give one made on the model's parameters, such as torch.optim.Adam(model.parameters())."
        )
    check_step(optimizer, "choose another optimizer, such as Adam")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(f"the optimizer does not hold the model's parameter `{missing[0]}`; make it on model.parameters().")
    losses: list[float] = []
    stepper: _Stepper | None = None
    for item in data_loader:
        if stepper is not None and _is_single(item):
            warn(
                "a batch of 1 example can't be divided into a support and a query set, and was left out (drop_last=True in the "
                "data loader leaves it out too)."
            )
            continue
        batch = _tasks(item)
        if stepper is None:
            chosen = loss or (mse if batch.query[1].is_floating_point() else cross_entropy)
            built = _build(method, model, chosen, num_inner_steps, inner_lr)
            _check_shapes(model, built)
            look_at(built, batch)
            stepper = _Stepper(model, optimizer, built, engine or {})
        losses.append(stepper(batch))
    if stepper is None:
        raise ValueError(f"the data loader is empty; {_YIELDS}.")
    return losses


class _Stepper:
    """One outer step on the model's own parameters and, as parameters of its own, on ψ."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, method: MetaOptimizer, engine: Mapping[str, Any]
    ) -> None:
        self.weights = dict(model.named_parameters())
        names = list(method.phi.rule)
        # Found again on another pass, so that an epoch goes on with the step sizes that the one before it learnt.
        known = [group for group in optimizer.param_groups if names and group.get("rule") == names]
        if names and not known:
            values = [nn.Parameter(p.clone()) for p in method.phi.rule.values()]
            optimizer.add_param_group({"params": values, "weight_decay": 0.0, "rule": names})
            known = optimizer.param_groups[-1:]
        self.rule = dict(zip(names, known[0]["params"], strict=True)) if known else {}
        self.optimizer, self.outer_step = optimizer, 0
        self.engine = Engine(method, **({"runtime": "eager"} | dict(engine)))
        self.carry: Carry | None = None

    def __call__(self, batch: Task) -> float:
        phi = MetaParams({n: p.detach() for n, p in self.weights.items()}, {n: p.detach() for n, p in self.rule.items()})
        estimate = self.engine(phi, batch, self.carry, self.outer_step)
        size, loss = grad_norm(estimate), estimate.loss.item()
        if not (isfinite(size) and isfinite(loss)):
            odd = in_the_data(batch)
            cause = f"the data of task {odd[0]} hold {odd[1]}" if odd else f"its loss is {loss}, its meta-gradient {size}"
            cause = cause if odd else _unseen(batch) or cause
            raise ValueError(
                f"step {self.outer_step + 1} is not finite, and was not taken: {cause}; the weights are as before it."
            )
        self.carry, self.outer_step = estimate.carry, self.outer_step + 1
        self.optimizer.zero_grad()
        for leaves, grads in ((self.weights, estimate.grad.weights), (self.rule, estimate.grad.rule)):
            for name, g in grads.items():
                leaves[name].grad = g
        self.optimizer.step()
        return loss


def _unseen(batch: Task) -> str | None:
    """A sentence where a query set has a class that its support set lacks."""
    support, query = batch.support[1], batch.query[1]
    if not all(isinstance(y, Tensor) and not y.is_floating_point() for y in (support, query)):
        return None
    for t, (known, asked) in enumerate(zip(support, query, strict=True)):
        if missing := sorted(set(asked.flatten().tolist()) - set(known.flatten().tolist())):
            return (
                f"class {missing[0]} is in the query set of task {t} and not in its support set, so that nothing "
                "tells of it; give larger batches, or tasks as Task(support, query) with all classes in both"
            )
    return None


def _build(method: str, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], steps: int, lr: float) -> MetaOptimizer:
    if method not in ALGORITHMS:
        raise ValueError(f"method {method!r} is unknown: choose among {', '.join(ALGORITHMS)}.")
    build = ALGORITHMS[method]
    given = {"steps": steps, "lr": lr, "low": lr, "high": lr}
    return build(model, loss, **{name: given[name] for name in inspect.signature(build).parameters if name in given})


def _check_shapes(model: nn.Module, method: MetaOptimizer) -> None:
    """Raises a ValueError where φ has weights that the model's own parameters can't hold."""
    for name, p in model.named_parameters():
        if method.phi.weights[name].shape != p.shape:
            raise ValueError(
                f"{method.name} learns `{name}` for each inner step, and the model's own parameter holds one: use train, or "
                "MetaModule in a loop of your own."
            )


def _tasks(item: Any) -> Task:
    """A batch of tasks from what a loader yielded."""
    refuse_list(item)
    if isinstance(item, Task):
        return item
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ValueError(f"{_YIELDS}; found {type(item).__name__}.")
    first, second = item
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return _split((first, second))
    if all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in (first, second)):
        return Task((first[0], first[1]), (second[0], second[1]))
    raise ValueError(f"{_YIELDS}; found a pair of {type(first).__name__} and {type(second).__name__}.")


def _is_single(item: Any) -> bool:
    """Whether a loader yielded a plain batch of one example."""
    pair = isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(x, Tensor) and x.ndim for x in item)
    return bool(pair and item[0].shape[0] == item[1].shape[0] == 1)


def _split(batch: Batch) -> Task:
    """One task (T = 1) from a plain batch: a random half to adapt on, the rest to be judged on."""
    x, y = batch
    if x.ndim < 1 or y.ndim < 1 or x.shape[0] != y.shape[0] or x.shape[0] < 2:
        raise ValueError(f"{_YIELDS}; found shapes {tuple(x.shape)} and {tuple(y.shape)}.")
    order = torch.randperm(x.shape[0], device=x.device)
    support, query = order[: x.shape[0] // 2], order[x.shape[0] // 2 :]
    return Task((x[support][None], y[support][None]), (x[query][None], y[query][None]))
