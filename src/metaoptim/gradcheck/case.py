"""What a check runs on: a meta-optimizer with its φ and a few tasks, in one float type."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim import estimators
from metaoptim.core import gradients, trees
from metaoptim.core.types import Carry, Claim, Estimate, Learner, MetaOptimizer, MetaParams, Params, Task
from metaoptim.engine import Engine
from metaoptim.gradcheck.differences import seeded
from metaoptim.learners import modules
from metaoptim.nn import held

FEW_QUERIES, FEW_STEPS, FEW_WINDOWS = 16, 3, 3
ASIDE = 1e-3

How = tuple[str, str, str]
"""An execution mode: batching, memory, runtime."""

REFERENCE: How = ("loop", "graph", "eager")

Mapped = Callable[[MetaParams, Task], Estimate]


def recast(x: Any, dtype: torch.dtype) -> Any:
    """A copy with other floats of anything that has tensors or modules in its fields; what has none is returned as it is."""
    if isinstance(x, nn.Module):
        try:
            module = copy.deepcopy(x).to(dtype)
        except RuntimeError as error:  # such as for what an old-style weight_norm computed, which is no leaf
            raise ValueError(f"{type(x).__name__} can't be copied, so it can't be checked: {error}") from error
        for part in module.modules():
            for name, value in vars(part).items():
                if isinstance(value, Tensor):
                    setattr(part, name, recast(value, dtype))
        return module
    if isinstance(x, Tensor):
        return x.detach().to(dtype) if x.is_floating_point() else x
    if isinstance(x, tuple | dict) and all(isinstance(leaf, Tensor) for leaf in trees.flatten(x)):
        return trees.map_tensors(lambda leaf: recast(leaf, dtype), x)
    if is_dataclass(x) and not isinstance(x, type):
        pairs = {f.name: (getattr(x, f.name), recast(getattr(x, f.name), dtype)) for f in fields(x) if f.init}
        new = {name: after for name, (before, after) in pairs.items() if after is not before}
        return replace(x, **new) if new else x
    return x


def unguarded(method: MetaOptimizer) -> MetaOptimizer:
    """The same without a guard, which changes gradients that are not finite or long, and those alone; and with the mean of the
    tasks' gradients where they are weighed, for a weighed sum is the gradient of no loss."""
    reduction = method.reduction if isinstance(method.reduction, str) else "mean"
    return replace(method, estimator=estimators.unguarded(method.estimator), reduction=reduction)


class Mixed(ValueError):
    """Something stays in other floats."""


@contextmanager
def in_doubles() -> Iterator[None]:
    """Says what is at fault where floats of two kinds meet, though all that could be found was recast."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        said = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
        if not re.search(r"float\b.*\bdouble|double\b.*\bfloat", said, re.I):
            raise
        raise Mixed(
            f"a check computes in float64, and the model, the loss or the rule holds a float32 tensor where it can't be seen "
            f"({said}): make it a buffer of the module or a part of the batch, or convert it where it is used, as in "
            "t.to(output.dtype)."
        ) from error


class Overwritten(ValueError):
    """φ is no longer what it was."""


@dataclass(frozen=True)
class Case:
    """A meta-optimizer with its φ and a few tasks, of one float type, none of it the user's own."""

    method: MetaOptimizer
    batch: Task

    @property
    def phi(self) -> MetaParams:
        return self.method.phi

    @property
    def claim(self) -> Claim:
        return self.method.estimator.claim

    def leaves(self, phi: MetaParams) -> Params:
        """The learnt tensors of φ, or those of its gradient, in one dictionary: ψ's as `rule: NAME`."""
        learnt, _ = self.method.split(phi)
        return learnt.weights | {f"rule: {n}": p for n, p in learnt.rule.items()}

    def filled(self, leaves: Params) -> MetaParams:
        """φ with these values of its learnt tensors."""
        weights = {n: leaves.get(n, p) for n, p in self.phi.weights.items()}
        for module in modules(self.method):
            masks = {n: fixed for n, fixed in held(module).items() if n in weights}
            weights |= {n: torch.where(fixed, self.phi.weights[n], weights[n]) for n, fixed in masks.items()}
        return MetaParams(weights, {n: leaves[f"rule: {n}"] for n in self.phi.rule})

    def holds(self) -> bool:
        """Whether a value is held on purpose, as far as a run comes."""
        constants: list[Tensor] = []
        with suppress(Exception), gradients.recorded(constants):  # what fails is told of where the modes run
            self.run(self.mode(REFERENCE))
        return bool(constants)

    def run(self, gradient: Mapped, phi: MetaParams | None = None) -> Estimate:
        """The gradient at φ, or at another one; the same draws each time, from copies of φ and the tasks."""
        given = phi or self.phi
        own, batch = trees.map_tensors(torch.clone, (given, self.batch))
        with seeded(own.device):
            estimate = gradient(own, batch)
        for name, x in own.weights.items():
            if not torch.equal(x, given.weights[name]):
                raise Overwritten(f"a forward pass writes into the weight `{name}`, which is for the optimizer alone to change")
        return estimate

    def mode(self, how: How, learner: Learner | None = None, precision: str = "full", carry: Carry | None = None) -> Mapped:
        """The engine's meta-gradient in one execution mode: of a run that begins, or that goes on with a carry."""
        engine = Engine(replace(self.method, learner=learner or self.method.learner), *how, precision)
        engine.inspected = True  # a check looks for itself, and names the layer

        def gradient(phi: MetaParams, batch: Task) -> Estimate:
            return engine(phi, batch, carry)

        if how[2] != "eager":
            self.run(gradient)  # traces, which would draw random numbers before the first run and not before others
        return gradient

    def loss(self, gradient: Mapped) -> Callable[[Params], float]:
        """The outer loss that comes with a gradient, as a function of the learnt tensors."""
        return lambda leaves: self.run(gradient, self.filled(leaves)).loss.item()


def prepare(method: MetaOptimizer, phi: MetaParams, batch: Task, count: int, dtype: torch.dtype = torch.float64) -> Case:
    """A case of at most `count` tasks, few queries and few inner steps, so that an evaluation is quick.

    It stands a little aside of φ: where biases are 0 a dead unit lies on the kink of a ReLU, and there is no derivative.
    """
    with seeded(phi.device):
        near = trees.map_tensors(lambda x: x + ASIDE * torch.randn_like(x), phi)
    few: MetaOptimizer = recast(replace(method, phi=near), dtype)
    learner: Any = few.learner
    lasts = method.estimator.lasts(learner)
    steps = FEW_STEPS if lasts == 1 else FEW_WINDOWS * (learner.steps // lasts)
    if learner.steps > steps and method.estimator.claim != "implicit":  # whose run must come near a minimum
        with suppress(TypeError, ValueError):  # for steps that are no field, or that the objective counts on
            few = replace(few, learner=replace(learner, steps=steps))
    support = trees.map_tensors(lambda x: x[:count], batch.support)  # whole: a learner may want every class in it
    query = trees.map_tensors(lambda x: x[:count, :FEW_QUERIES], batch.query)
    return Case(few, recast(Task(support, query), dtype))
