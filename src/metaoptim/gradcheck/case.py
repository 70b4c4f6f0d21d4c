"""Whether a meta-gradient is what it claims to be, in every execution mode."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metaoptim.core import gradients, trees
from metaoptim.core.types import Batch, Estimate, GradOp, Info, Learner, Meta, MetaOptimizer, Params, State, Task
from metaoptim.engine.engine import Engine
from metaoptim.engine.graphs.graphs import modules
from metaoptim.gradcheck.differences import EXACT, Probe, distance, probe, seeded
from metaoptim.nn import held

LENIENT = 1e-4  # in training, where an alarm must be beyond doubt
FEW_QUERIES, FEW_STEPS = 16, 3
ASIDE = 1e-3

How = tuple[str, str, str]
"""An execution mode: tasks, memory, runtime."""

REFERENCE: How = ("loop", "graph", "eager")

Kind = Literal["exact", "first order", "displacement"]
"""What an estimate is: the derivative, the derivative with inner gradients held, or the way that the weights went."""


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


@dataclass(frozen=True)
class Held:
    """A learner for which all that passes no meta-gradient is as in a run from the fixed φ `base`, whatever φ it is given:
    what a step holds and, unless `exact`, its gradient.

    Its loss is the function of φ whose derivative the estimate at `base` is. `op` may take the gradients of that run in
    place of the estimator's own operator; `ends` is given the weights that each run ends with.
    """

    learner: Learner
    base: Meta
    op: GradOp | None = None
    ends: list[Params] | None = None
    exact: bool = False

    @property
    def steps(self) -> int:
        return self.learner.steps

    def adapts(self, name: str) -> bool:
        return self.learner.adapts(name)

    def init(self, meta: Meta, support: Batch, memory: State = ()) -> State:
        return self.learner.init(self.base, support, memory), self.learner.init(meta, support, memory)

    def step(self, meta: Meta, state: State, support: Batch, k: int, grad: GradOp) -> State:
        tape: list[Params] = []
        constants: list[Tensor] = []

        def record(f: Callable[[Params], Tensor]) -> Callable[[Params], Params]:
            def gradient(x: Params) -> Params:
                tape.append((self.op or grad)(f)(x))
                return tape[-1]

            return gradient

        def replay(f: Callable[[Params], Tensor]) -> Callable[[Params], Params]:
            return lambda x: tape.pop(0)

        with gradients.recorded(constants):
            first = self.learner.step(self.base, state[0], support, k, record)
        with gradients.replayed(constants):
            second = self.learner.step(meta, state[1], support, k, grad if self.exact else replay)
        if self.ends is not None and k + 1 == self.steps:
            self.ends.append(self.learner.weights(meta, second))
        return first, second

    def loss(self, meta: Meta, state: State, batch: Batch, k: int) -> tuple[Tensor, Info]:
        return self.learner.loss(meta, state[1], batch, k)

    def weights(self, meta: Meta, state: State) -> Params:
        return self.learner.weights(meta, state[1])

    def memory(self, state: State) -> State:
        return self.learner.memory(state[1])


class Overwritten(ValueError):
    """φ is no longer what it was."""


@dataclass(frozen=True)
class Case:
    """A meta-optimizer with its φ and a few tasks, of one float type, none of it the user's own."""

    optimizer: MetaOptimizer
    batch: Task

    @property
    def meta(self) -> Meta:
        return self.optimizer.meta

    def leaves(self, meta: Meta) -> Params:
        """The learnt tensors of φ, or those of its gradient, in one dictionary: ψ's as `rule: NAME`."""
        learnt, _ = self.optimizer.split(meta)
        return learnt.weights | {f"rule: {n}": p for n, p in learnt.rule.items()}

    def filled(self, leaves: Params) -> Meta:
        """φ with these values of its learnt tensors."""
        weights = {n: leaves.get(n, p) for n, p in self.meta.weights.items()}
        for module in modules(self.optimizer):
            weights |= {n: torch.where(fixed, self.meta.weights[n], weights[n]) for n, fixed in held(module).items()}
        return Meta(weights, {n: leaves[f"rule: {n}"] for n in self.meta.rule})

    def holds(self) -> bool:
        """Whether a value is held on purpose, as far as a run comes."""
        constants: list[Tensor] = []
        with suppress(Exception), gradients.recorded(constants):  # what fails is told of where the modes run
            self.run(self.mode(REFERENCE))
        return bool(constants)

    def run(self, gradient: Callable[[Meta, Task], Estimate], meta: Meta | None = None) -> Estimate:
        """The gradient at φ, or at another one; the same draws each time, from copies of φ and the tasks."""
        given = meta or self.meta
        phi, batch = trees.map_tensors(torch.clone, (given, self.batch))
        with seeded(phi.device):
            estimate = gradient(phi, batch)
        for name, x in phi.weights.items():
            if not torch.equal(x, given.weights[name]):
                raise Overwritten(f"a forward pass writes into the weight `{name}`, which is for the optimizer alone to change")
        return estimate

    def mode(self, how: How, learner: Learner | None = None, precision: str = "full") -> Callable[[Meta, Task], Estimate]:
        """The engine's meta-gradient in one execution mode."""
        engine = Engine(replace(self.optimizer, learner=learner or self.optimizer.learner), *how, precision)

        def gradient(meta: Meta, batch: Task) -> Estimate:
            return engine(meta, batch, engine.init(meta, batch.query[0].shape[0]))

        if how[2] != "eager":
            self.run(gradient)  # traces, which would draw random numbers before the first run and not before others
        return gradient

    def loss(self, gradient: Callable[[Meta, Task], Estimate]) -> Callable[[Params], float]:
        """The outer loss that comes with a gradient, as a function of the learnt tensors."""
        return lambda leaves: self.run(gradient, self.filled(leaves)).loss.item()


def prepare(optimizer: MetaOptimizer, meta: Meta, batch: Task, count: int, dtype: torch.dtype = torch.float64) -> Case:
    """A case of at most `count` tasks, few queries and few inner steps, so that an evaluation is quick.

    It stands a little aside of φ: where biases are 0 a dead unit lies on the kink of a ReLU, and there is no derivative.
    """
    with seeded(meta.device):
        near = trees.map_tensors(lambda x: x + ASIDE * torch.randn_like(x), meta)
    few: MetaOptimizer = recast(replace(optimizer, meta=near), dtype)
    learner: Any = few.learner
    if learner.steps > FEW_STEPS:
        with suppress(TypeError, ValueError):  # for steps that are no field, or that the objective counts on
            few = replace(few, learner=replace(learner, steps=FEW_STEPS))
    support = trees.map_tensors(lambda x: x[:count], batch.support)  # whole: a learner may want every class in it
    query = trees.map_tensors(lambda x: x[:count, :FEW_QUERIES], batch.query)
    return Case(few, recast(Task(support, query), dtype))


class Verdict(NamedTuple):
    """An estimate, what it is, its relative error, where that was seen (nowhere for a displacement), and in which mode."""

    estimate: Estimate
    kind: Kind
    error: float
    probe: Probe | None
    how: How = REFERENCE


def judge(case: Case, how: How) -> Verdict:
    """The meta-gradient in an execution mode, held to central differences of the loss that it comes with in that mode."""
    mode = case.mode(how)
    estimate = case.run(mode)
    gradient = case.leaves(estimate.grad)
    first_order: bool | None = getattr(case.optimizer.estimator, "first_order", None)
    if first_order is None:
        with suppress(RuntimeError):  # for an estimator that differentiates what plain autograd can't be used in
            moved, errors = displacement(case)
            if distance(moved, gradient) <= EXACT:
                return Verdict(estimate, "displacement", max(errors.values()), None, how)
    own = constants(case)
    f = case.loss(case.mode(how, own) if own else mode)
    seen, error = probe(f, case.leaves(case.meta), gradient)
    return Verdict(estimate, "first order" if first_order else "exact", error, seen, how)


def truth(case: Case, how: How) -> Callable[[Params], float]:
    """The function of the learnt tensors whose derivative the estimate claims to be."""
    return case.loss(case.mode(how, constants(case)))


def constants(case: Case) -> Held | None:
    """The learner whose loss is that function; None where it is the learner itself."""
    if getattr(case.optimizer.estimator, "first_order", False):
        return Held(case.optimizer.learner, case.meta)
    return Held(case.optimizer.learner, case.meta, gradients.constant, exact=True) if case.holds() else None


def displacement(case: Case, each: bool = False) -> tuple[Params, dict[str, float]]:
    """θ − θ_K with inner gradients by plain `torch.autograd`, and the worst errors of these against central differences.

    each: for every tensor that adapts, by its name; else for all together.
    """
    errors: dict[str, float] = {}
    ends: list[Params] = []
    device = case.meta.device

    def op(f: Callable[[Params], Tensor]) -> Callable[[Params], Params]:
        def value(x: Params) -> float:
            with seeded(device, seed=None), torch.no_grad():
                return f(x).item()

        def gradient(x: Params) -> Params:
            free = {n: p.detach().clone().requires_grad_() for n, p in x.items()}
            with seeded(device, seed=None), torch.enable_grad():
                found = torch.autograd.grad(f(free), list(free.values()), materialize_grads=True)
            g = dict(zip(free, found, strict=True))
            for name, only in {n: [n] for n in x}.items() if each else [("all", [])]:
                errors[name] = max(errors.get(name, 0.0), probe(value, x, g, only)[1])
            f(x)  # so that what comes next draws what it draws in training
            return g

        return gradient

    case.run(case.mode(REFERENCE, Held(case.optimizer.learner, case.meta, op, ends)))
    scale = 1.0 if case.optimizer.reduction == "sum" else 1.0 / len(ends)
    moved = [trees.subtract(case.leaves(case.meta), end) for end in ends]
    return {n: torch.stack([m[n] for m in moved]).sum(0) * scale for n in moved[0]}, errors


def self_check(optimizer: MetaOptimizer, meta: Meta, batch: Task, how: How = REFERENCE) -> str | None:
    """A sentence where the meta-gradient is not what it claims to be, else None: for the start of a training.

    At most four meta-gradients of 2 tasks in float64; more only where the first direction looks wrong. Neither torch's
    generators nor the module's state change.
    """
    try:
        verdict = judge(prepare(optimizer, meta, batch, 2), how)
    except Overwritten as reason:
        return f"{reason}: metaoptim.check(optimizer, tasks) finds the layer."
    except Exception:  # whatever a module can say to float64; training itself tells of the rest
        return None
    error = verdict.error
    if error <= LENIENT or not verdict.estimate.loss.isfinite():  # of which training tells more
        return None
    size = f"{error:.1%}" if math.isfinite(error) else "more than any number"
    return (
        f"the meta-gradient of {optimizer.name} is off from central differences of its own loss by {size}: "
        "metaoptim.check(optimizer, tasks) finds the layer."
    )
