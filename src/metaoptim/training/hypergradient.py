"""The gradient of a validation loss with respect to hyper-parameters, through the training of one's own problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from metaoptim.core import trees
from metaoptim.core.callers import warn
from metaoptim.core.gradients import autograd
from metaoptim.core.types import (
    Batch,
    Clock,
    Estimator,
    Info,
    Learner,
    Loss,
    Memory,
    MetaOptimizer,
    MetaParams,
    Params,
    Rule,
    State,
    Task,
)
from metaoptim.engine.bound import Bound
from metaoptim.engine.executor import keys
from metaoptim.engine.faults import explained
from metaoptim.engine.inspect import inspect
from metaoptim.estimators import SAMA, FiniteDifferences, Implicit, LastSteps, Unroll
from metaoptim.nn import steady
from metaoptim.training.bilevel import PREFIX, bilevel, check_loss
from metaoptim.training.doubts import check_read, check_start, doubts

METHODS: dict[str, Callable[..., Estimator]] = {
    "exact": Unroll,
    "truncated": LastSteps,
    "sama": SAMA,
    "implicit": Implicit,
    "finite_differences": FiniteDifferences,
}
"""The estimators by name; their arguments are options of `hypergradient`."""

_SEEN: WeakKeyDictionary[Any, WeakKeyDictionary[Any, set[Any]]] = WeakKeyDictionary()
"""What was looked at: by training loss and validation loss, for which estimator and hyper-parameters."""

End = tuple[Tensor, State]
"""(k, s_k): the steps that are done, and the state after them."""


class Hypergradient(NamedTuple):
    """What `hypergradient` returns.

    loss: the validation loss after the last step (0-dim). hyper: its gradient, by the names and in the shapes of the
    hyper-parameters. psi: its gradient in the rule's own parameters. weights: all weights after the last step. end: what the
    next call goes on from, as its `start`.
    """

    loss: Tensor
    hyper: Params
    psi: Params
    weights: Params
    end: End

    def __repr__(self) -> str:
        known = {"hyper": self.hyper, "psi": self.psi, "weights": self.weights}
        counts = {part: sum(x.numel() for x in tensors.values()) for part, tensors in known.items() if tensors}
        sizes = [f"{part}: {count:,} number{'s' * (count != 1)}" for part, count in counts.items()]
        return f"Hypergradient(loss={self.loss.item():.4g}, {', '.join(sizes)})"


def hypergradient(
    train_loss: Callable[..., Tensor],
    val_loss: Callable[..., Tensor],
    weights: Mapping[str, Tensor] | nn.Module,
    hyper: Mapping[str, Tensor] | nn.Module,
    data: Batch = None,
    val_data: Batch = None,
    *,
    rule: Rule,
    steps: int,
    method: str | Estimator = "exact",
    batch_size: int | None = None,
    psi: Mapping[str, Tensor] | None = None,
    start: End | None = None,
    memory: Memory = "graph",
    **options: Any,
) -> Hypergradient:
    """d val_loss(w_K, h) / d(h, ψ) through K steps w_{k+1} = w_k + rule(ψ, ∇_w train_loss(w_k, h, batch_k)) from given weights.

    Nothing that is given is changed, and nothing is written to `.grad`.

    Args:
        train_loss: (weights, hyper, batch) -> scalar; (weights, hyper) where there are no data.
        val_loss: (weights, hyper, val_data) -> scalar; (weights, hyper) where there are no val_data.
        weights: w_0: tensors by name, or a module, which the losses get as something to call, `weights(x)`, whose tensors are
            `weights.weights`. A module's parameters with requires_grad=False stay as they are.
        hyper: h: tensors by name, or a module, as above.
        data: rows to train on, as any tree of tensors with a leading axis S, such as (x, y, torch.arange(len(x))).
        val_data: what val_loss is given, of the same kind.
        rule: how weights move: one of mo.rules, or of your own.
        steps: K.
        method: "exact" (backpropagation through all steps), "truncated" (through the last `window` of them), "sama" (through
            the last one, without second derivatives), "implicit" (at a minimum: solver, iterations, damping, scale),
            "finite_differences" (two trainings for each number), or an estimator of mo.estimators.
        batch_size: rows per step, in the order of the data, cycling; none: all of them.
        psi: the rule's own parameters; none: as `rule.start` has them.
        start: the `end` of an earlier result, to go on from with its weights, its rule's state and its count of steps.
        memory: what is kept of the run for "exact": "graph" (all of it), "steps" (the states alone) or "mixed".
        options: arguments of the estimator that `method` names, such as window=5 or iterations=20.

    Raises:
        ValueError: losses, weights, hyper-parameters, data or a rule of another kind; an unknown method or option; a method
            that can't differentiate by what is given, as "implicit" can't by ψ.
    """
    for name, loss, given in (("train_loss", train_loss, data), ("val_loss", val_loss, val_data)):
        check_loss(name, loss, given is not None)
    train = train_loss if data is not None else Without(train_loss)
    val = val_loss if val_data is not None else Without(val_loss)
    estimator = _estimator(method, options)
    problem = bilevel(train, val, weights, hyper, rule=rule, steps=steps, estimator=estimator, batch_size=batch_size, psi=psi)
    if memory not in estimator.memories:
        raise ValueError(f"memory={memory!r} is not offered here: choose {' or '.join(estimator.memories)}.")
    task = Task(_rows(data, "data", problem.phi.device), _rows(val_data, "val_data", problem.phi.device))
    given = {name: part for name, part in (("data", data), ("val_data", val_data)) if part is not None}
    key = keys(1, problem.phi.device)[0]
    learnt, fixed = problem.split(problem.phi)
    with explained(given, problem), autograd(), steady():
        _look(_seen(train_loss, val_loss), problem, task, key)
        check_start(start, problem.learner.init(problem.phi, task.support))
        learner = Bound(Reporting(problem.learner, start), fixed, key)
        if trees.flatten(estimator.init(learner, learnt, task, key)):
            raise ValueError(f"{type(estimator).__name__} carries runs on from call to call: give mo.bilevel to mo.MetaModule.")
        found = estimator.keeping(memory)(learner, learnt, task, (), Clock(torch.zeros_like(key), key))
        state = trees.filled(learner.init(learnt, task.support), _ending(found.info))
        for doubt in doubts(problem, learner, learnt, task, state, found, given):
            warn(doubt)
    end = found.info["k"], state
    after = {n: x for n, x in learner.weights(learnt, state).items() if not n.startswith(PREFIX)}
    slopes = {n.removeprefix(PREFIX): g for n, g in found.grad.weights.items()}
    return Hypergradient(found.loss, slopes, found.grad.rule, after, end)


@dataclass(frozen=True)
class Without:
    """A loss that has its data elsewhere."""

    loss: Callable[..., Tensor]

    def __call__(self, weights: Any, hyper: Any, batch: Batch) -> Tensor:
        return self.loss(weights, hyper)


@dataclass(frozen=True)
class Reporting:
    """A learner whose run goes on from the end of an earlier one, if any, and that reports its own beside the loss."""

    learner: Learner
    start: End | None

    @property
    def steps(self) -> int:
        return self.learner.steps

    def length(self, support: Batch) -> int | Tensor:
        return self.learner.length(support)

    def adapts(self, name: str) -> bool:
        return self.learner.adapts(name)

    def init(self, phi: MetaParams, support: Batch) -> State:
        return self.learner.init(phi, support) if self.start is None else self.start[1]

    def inner(self, phi: MetaParams, state: State, support: Batch, k: Tensor) -> tuple[Loss, Params]:
        return self.learner.inner(phi, state, support, self._count(k))

    def apply(self, phi: MetaParams, state: State, grads: Params, loss: Tensor, k: Tensor) -> State:
        return self.learner.apply(phi, state, grads, loss, self._count(k))

    def loss(self, phi: MetaParams, state: State, support: Batch, batch: Batch, k: Tensor) -> tuple[Tensor, Info]:
        now = self._count(k)
        loss, info = self.learner.loss(phi, state, support, batch, now)
        return loss, {**info, "k": now, **{f"end/{path}": x for path, x in trees.named(state).items()}}

    def weights(self, phi: MetaParams, state: State) -> Params:
        return self.learner.weights(phi, state)

    def heritage(self, state: State) -> State:
        return self.learner.heritage(state)

    def inherit(self, state: State, heritage: State) -> State:
        return self.learner.inherit(state, heritage)

    def _count(self, k: Tensor) -> Tensor:
        return k if self.start is None else self.start[0] + k


def _ending(info: Mapping[str, Tensor]) -> Params:
    return {name.removeprefix("end/"): x for name, x in info.items() if name.startswith("end/")}


def _rows(data: Batch, name: str, device: torch.device) -> Batch:
    """The data, or what stands for none; a ValueError where they are no tensors, or have no common leading axis."""
    if data is None:
        return torch.zeros(1, device=device)
    leaves = trees.flatten(data)
    if not leaves or any(not isinstance(x, Tensor) or x.ndim < 1 for x in leaves) or len({len(x) for x in leaves}) > 1:
        found = ", ".join(f"{tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in leaves) or "none"
        raise ValueError(
            f"{name} must be tensors with a common leading axis, one or any tree of them, such as (x, y); found {found}."
        )
    return data


def _estimator(method: str | Estimator, options: Mapping[str, Any]) -> Estimator:
    given: Any = method  # by somebody whose type checker is off
    if not isinstance(method, str):
        if options or isinstance(given, type) or not hasattr(given, "lasts"):
            what = f"{', '.join(options)}: these belong to the estimator itself" if options else f"method={method!r} is none"
            raise ValueError(f"{what}; give one of {', '.join(METHODS)}, or an estimator such as mo.estimators.LastSteps(5).")
        return method
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}, or give an estimator.")
    try:
        return METHODS[method](**options)
    except TypeError as error:
        known = signature(METHODS[method]).parameters.values()
        takes = ", ".join(f"{p.name}={'…' if p.default is p.empty else repr(p.default)}" for p in known) or "none"
        given = ", ".join(f"{name}={value!r}" for name, value in options.items()) or "none"
        raise ValueError(f"method={method!r} takes the options {takes}; found {given}.") from error


def _seen(train_loss: Any, val_loss: Any) -> set[Any]:
    """How two losses were looked at."""
    try:
        return _SEEN.setdefault(train_loss, WeakKeyDictionary()).setdefault(val_loss, set())
    except TypeError:  # what can't be remembered
        return set()


def _look(seen: set[Any], problem: MetaOptimizer, task: Task, key: Tensor) -> None:
    """Once for each problem, looks for what would be wrong silently, by two steps of it and a gradient."""
    twice = isinstance(problem.estimator, Unroll | LastSteps | Implicit)
    how = type(problem.estimator), tuple(filter(problem.learns, problem.phi.weights))
    if how in seen:
        return
    learner: Any = problem.learner
    short = replace(problem, learner=replace(learner, steps=min(learner.steps, 2)), estimator=Unroll(first_order=not twice))
    one: Task = trees.map_tensors(lambda x: x[None], task)
    inspect(short, problem.phi, one, (), parts=("data", "val_data"))
    if learner.steps:
        check_read(problem, task, key, twice)
    seen.add(how)
