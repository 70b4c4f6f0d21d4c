"""Every type that the library shares, in one file.

A task brings a support set S (to adapt on) and a query set Q (to be judged on). With everything that is meta-learned
written φ = (θ, ψ), a meta-optimizer is

    inner:   s_0 = init(φ, S);   s_{k+1} = apply(φ, s_k, ∇ inner(φ, s_k, S, k), k)         k = 0 … K−1
    outer:   minimise over φ     E_task [ Σ_k v_k · loss(φ, s_k, Q) ]

Shapes use fixed letters everywhere: T tasks, N ways, S shots, Q queries, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from metaoptim.core.brief import brief, shapes
from metaoptim.core.reductions import Reduce, reduction_called

Params = dict[str, Tensor]
"""Tensors by name, flat: the keys are those of `named_parameters()`."""

Batch = Any
"""A tree of tensors (nested tuples, lists and dicts) whose leading axis counts examples: (x, y), a dict, trajectories.
Only what computes a loss opens it."""

State = Any
"""What a learner or a rule carries from step to step: a tree of tensors, with nothing of the task's data in it."""

Carry = Any
"""What an estimator carries from one outer step to the next, for one task slot: a tree of tensors."""

Info = dict[str, Tensor]
"""Scalars to report beside a loss, by name, such as `accuracy` (a fraction)."""

Loss = Callable[[Params], tuple[Tensor, Info]]
"""A loss as a function of the weights that adapt."""

Gradient = Callable[[Loss, Params], tuple[Params, Tensor]]
"""(f, x) -> (∇f(x), f(x)), in the way that the estimator needs: differentiable, or held constant."""

Order = bool | Callable[[Tensor], Tensor]
"""Whether inner gradients are constants of the meta-gradient (first order); or what share of their derivatives is left out, as
a function of the number of outer steps done (0-dim int64): 1 is first order, 0 second."""

Memory = Literal["graph", "steps", "mixed"]
"""What is kept of an inner run until it is differentiated."""

Claim = Literal["exact", "first_order", "displacement", "implicit", "truncated", "stochastic"]
"""What an estimate says it is; the gradient doctor and the contract tests hold an estimator to it."""

Normalisation = Literal["transductive", "inductive", "frozen"]


class MetaParams(NamedTuple):
    """φ, everything that is meta-learned: θ (`weights` of the model) and ψ (`rule`: what the update rule or the head owns)."""

    weights: Params
    rule: Params

    def __repr__(self) -> str:
        counts = {name: sum(x.numel() for x in part.values()) for name, part in zip(self._fields, self, strict=True)}
        return f"MetaParams({', '.join(f'{count:,} numbers in {name}' for name, count in counts.items() if count)})"

    @property
    def device(self) -> torch.device:
        """Where φ is."""
        return next(x.device for part in self for x in part.values())


class Task(NamedTuple):
    """A support set to adapt on and a query set to be judged on; batched, every tensor has a leading axis T."""

    support: Batch
    query: Batch

    def __repr__(self) -> str:
        return shapes(self)


class Step(NamedTuple):
    """Where an inner run stands: `k` steps done (0-dim int64, so that one graph serves all), the inner loss there (0-dim)."""

    k: Tensor
    loss: Tensor


class Clock(NamedTuple):
    """When an estimate is taken: the number of outer steps done (0-dim int64), and this task's own key for noise, an int64
    in 0 … 2^31 − 1 that is another one in every outer step."""

    outer_step: Tensor
    key: Tensor


class Rule(Protocol):
    """An update rule: a frozen dataclass of pure functions, with its meta-parameters ψ as an explicit argument.

    What it may have besides: `read_out` (see below); `separable`, true where each weight moves by itself and ψ knows none by
    its name, so that weights of one shape can be moved at once; `by_name`, true where it tells weights apart by their names;
    `takes_step`, whether it turns gradients into steps down the loss; `decays_weights`, true where `decay` is that of the
    weights, times the step size; `quick`, `update` for those who differentiate nothing (and whether it is compiled as a graph).
    """

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        """ψ at the start, for these adapting weights; random numbers come from the generator."""
        ...

    def init(self, psi: Params, weights: Params) -> State: ...

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        """Updates to ADD to the weights, and the state after them."""
        ...


def read_out(rule: Rule, psi: Params, state: State, weights: Params) -> Params:
    """The weights that a run is judged at: those where its gradients are taken, unless the rule has a method of this name."""
    own = getattr(rule, "read_out", None)
    judged: Params = weights if own is None else own(psi, state, weights)
    return judged


class Learner(Protocol):
    """How ONE task is learnt, given φ: it names the inner objective, and the estimator takes its gradient."""

    @property
    def steps(self) -> int: ...

    def length(self, support: Batch) -> int | Tensor:
        """The steps of this task's own run, for estimators that go through it in windows: `steps`, unless tasks differ."""
        ...

    def adapts(self, name: str) -> bool:
        """Whether the weight of that name moves in the inner loop."""
        ...

    def init(self, phi: MetaParams, support: Batch) -> State:
        """s_0; may look at the data, but keeps nothing of them."""
        ...

    def inner(self, phi: MetaParams, state: State, support: Batch, k: Tensor) -> tuple[Loss, Params]:
        """The inner objective f of step k, prox included, and the point x at which its gradient is due.

        x holds tensors of the state itself; it is empty where a step needs no gradient.
        """
        ...

    def apply(self, phi: MetaParams, state: State, grads: Params, loss: Tensor, k: Tensor) -> State:
        """s_{k+1}, from ∇f(x) and f(x)."""
        ...

    def loss(self, phi: MetaParams, state: State, support: Batch, batch: Batch, k: Tensor) -> tuple[Tensor, Info]:
        """The mean loss of s_k on a batch, and what to report beside it.

        support: None, with a state of (), for examples of many tasks, to which nothing has adapted (`Joint`).
        """
        ...

    def weights(self, phi: MetaParams, state: State) -> Params:
        """All weights of the adapted model."""
        ...

    def heritage(self, state: State) -> State:
        """What a later task could go on from (momentum, second moments): nothing of the weights."""
        ...

    def inherit(self, state: State, heritage: State) -> State:
        """A starting state that goes on from an earlier task's heritage."""
        ...


_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Estimate(NamedTuple):
    """What an estimator returns: the outer loss, ∇φ (keys: those of φ as it was given), its carry, and scalars to report."""

    loss: Tensor
    grad: MetaParams
    carry: Carry = ()
    info: Mapping[str, Tensor] = _NOTHING

    def __repr__(self) -> str:
        return f"Estimate(loss={self.loss.detach()!r}, grad={self.grad}, info={list(self.info)})"


Call = Callable[..., Any]
"""call(part, learner, *args) = part(learner, *args), computed in whatever way: `part` can be hashed, and says, with the
structure of the arguments (trees of tensors), which function of them it is."""


def directly(part: Callable[..., Any], learner: Learner, *args: Any) -> Any:
    """The `Call` that just calls."""
    return part(learner, *args)


class Estimator(Protocol):
    """How ∇φ of the outer loss is obtained; written for ONE task: the engine maps it over the batch and averages.

    The φ that it is given is the learnt part; its learner knows the weights that are not learnt.
    """

    memories: ClassVar[tuple[Memory, ...]]
    """The memory modes it has, all with the same numbers."""

    @property
    def claim(self) -> Claim: ...

    def keeping(self, memory: Memory, call: Call = directly) -> Estimator:
        """The same estimate in one of its memory modes; `call` is offered for what it computes part by part."""
        ...

    def check(self, learner: Learner, learnt: MetaParams) -> None:
        """Raises a ValueError that says what to change where this estimator can't train `learnt` with `learner`."""
        ...

    def lasts(self, learner: Learner) -> int:
        """Outer steps for which a task slot keeps its task."""
        ...

    def init(self, learner: Learner, phi: MetaParams, task: Task, key: Tensor) -> Carry:
        """The carry before the first outer step, of the structure that every later one has."""
        ...

    def inherit(self, carry: Carry) -> State:
        """The heritage that a NEW task starts from (see `Learner.inherit`); () for none."""
        ...

    def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Carry, clock: Clock) -> Estimate: ...


class Outer(NamedTuple):
    """The outer optimizer that an algorithm asks for: a class of `torch.optim` by name, its step size, its schedule."""

    optimizer: str = "Adam"
    lr: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"


def everything(name: str) -> bool:
    """The mask that holds every weight."""
    return True


@dataclass(frozen=True)
class MetaOptimizer:
    """What every algorithm's builder returns and training takes.

    `phi` is φ at the start, with every weight of the model; `learns(name)` says which of `phi.weights` the outer loop moves
    (ψ always is), as `learner.adapts(name)` says which ones the inner loop does; `reduction` is how the tasks of a batch are
    put together; `name` is what tables call it.
    """

    learner: Learner
    estimator: Estimator
    phi: MetaParams = field(repr=False)
    learns: Callable[[str], bool] = everything
    reduction: Reduce = "mean"
    outer: Outer = field(default=Outer())
    name: str = "custom"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reduction", reduction_called(self.reduction))
        learnt, _ = self.split(self.phi)
        if not learnt.weights and not learnt.rule:
            raise ValueError(
                "nothing is learnt: every weight has requires_grad=False or is left out by `learns`, or there is none; free "
                "some of them."
            )
        self.estimator.check(self.learner, learnt)

    def __repr__(self) -> str:
        learner: Any = self.learner
        rule = [brief(learner.rule)] if hasattr(learner, "rule") else []
        steps = [f"steps={learner.steps}"] if learner.steps else []
        policy = getattr(getattr(learner, "model", None), "normalisation", "transductive")
        others = [f"normalisation={policy!r}"] if policy != "transductive" else []
        others += [f"reduction={brief(self.reduction)}"] if self.reduction != "mean" else []
        adapting = sum(p.numel() for n, p in self.phi.weights.items() if learner.adapts(n))
        counts = {"weights": sum(p.numel() for p in self.phi.weights.values()), "of them adapt": adapting}
        counts |= {"in the rule": sum(p.numel() for p in self.phi.rule.values())}
        if adapting in (0, counts["weights"]):
            del counts["of them adapt"]
        sizes = [f"{count:,} {what}" for what, count in counts.items() if count]
        return f"MetaOptimizer({', '.join([self.name, *rule, *steps, brief(self.estimator), *others, *sizes])})"

    @property
    def adapting(self) -> tuple[str, ...]:
        """The names of the weights that adapt."""
        return tuple(n for n in self.phi.weights if self.learner.adapts(n))

    def split(self, phi: MetaParams) -> tuple[MetaParams, Params]:
        """The learnt part of φ, and the weights that only adapt or stay as they are."""
        learnt = {n: p for n, p in phi.weights.items() if self.learns(n)}
        return MetaParams(learnt, phi.rule), {n: p for n, p in phi.weights.items() if n not in learnt}
