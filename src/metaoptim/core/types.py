"""Every type that the library shares, in one file.

A task brings a support set S (to adapt on) and a query set Q (to be judged on). With all that is meta-learned written
φ = (θ, ψ), a meta-optimizer is

    inner:   s_0 = init(φ, S);   s_{k+1} = step(φ, s_k, S, k)         k = 0 … K−1
    outer:   minimise over φ     E_task [ Σ_k v_k · loss(φ, s_k, Q) ]

Shapes use fixed letters everywhere: T tasks, N ways, S shots, Q queries, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Tensors by name, flat: the keys are those of `named_parameters()`."""

Batch = tuple[Tensor, Tensor]
"""Inputs and targets; the leading axis of both counts examples."""

State = Any
"""What a learner or a rule carries from step to step: tensors in nested tuples and dicts."""

Carry = Any
"""What an estimator carries from one outer step to the next, for one task slot: tensors in nested tuples and dicts."""

Info = dict[str, Tensor]
"""Scalars to report beside a loss, by name, such as `accuracy` (a fraction)."""

GradOp = Callable[[Callable[[Params], Tensor]], Callable[[Params], Params]]
"""Turns a scalar function of the adapted weights into its gradient; the estimator chooses which."""

Memory = Literal["graph", "steps", "mixed"]
"""What is kept of an inner run until it is differentiated."""

Normalisation = Literal["transductive", "inductive", "frozen"]


class Meta(NamedTuple):
    """φ, all that is meta-learned: θ (`weights` of the model, adapted or shared) and ψ (`rule`: what the rule owns)."""

    weights: Params
    rule: Params

    @property
    def device(self) -> torch.device:
        """Where θ is."""
        return next(iter(self.weights.values())).device


class Task(NamedTuple):
    """A support set to adapt on and a query set to be judged on; batched, every tensor has a leading axis T."""

    support: Batch
    query: Batch


class Rule(NamedTuple):
    """An update rule: pure functions, with its meta-parameters ψ as an explicit argument.

    meta(weights) -> ψ at the start; init(ψ, weights) -> state; update(ψ, grads, state, weights, k) -> (updates to ADD
    to the weights, state).
    """

    meta: Callable[[Params], Params]
    init: Callable[[Params, Params], State]
    update: Callable[[Params, Params, State, Params, int], tuple[Params, State]]


class Learner(Protocol):
    """How ONE task is learnt, given φ."""

    @property
    def steps(self) -> int: ...

    def adapts(self, name: str) -> bool:
        """Whether the weight of that name moves in the inner loop."""
        ...

    def init(self, meta: Meta, support: Batch, memory: State = ()) -> State:
        """s_0; may look at the data, and goes on from the rule's `memory` of an earlier run where one is given."""
        ...

    def step(self, meta: Meta, state: State, support: Batch, k: int, grad: GradOp) -> State: ...

    def loss(self, meta: Meta, state: State, batch: Batch, k: int) -> tuple[Tensor, Info]:
        """The mean loss of the state on a batch, after k inner steps, and what to report beside it."""
        ...

    def weights(self, meta: Meta, state: State) -> Params:
        """All weights of the adapted model."""
        ...

    def memory(self, state: State) -> State:
        """What the rule remembers (momentum, second moments), apart from the weights."""
        ...


class Estimate(NamedTuple):
    """What an estimator returns: the outer loss, ∇φ (keys: the learnt part of φ), its carry, and scalars to report."""

    loss: Tensor
    grad: Meta
    carry: Carry = ()
    info: Mapping[str, Tensor] = {}


Run = Callable[..., Any]
"""run(part, learner, k, *args) = part(learner, k, *args), computed in whatever way: `part` can be hashed, and says with the
structure of the arguments (tensors in nested tuples, lists and dicts) which function it is of them and of k."""


def directly(part: Callable[..., Any], learner: Learner, k: int, *args: Any) -> Any:
    """The `Run` that calls."""
    return part(learner, k, *args)


class Estimator(Protocol):
    """How ∇φ of the outer loss is obtained; written for ONE task: the engine maps it over the batch and averages."""

    @property
    def memories(self) -> tuple[Memory, ...]:
        """The memory modes it has, all with the same numbers."""
        ...

    def keeping(self, memory: Memory, run: Run = directly) -> Estimator:
        """The same estimator in one of its memory modes; `run` is offered for what it computes part by part."""
        ...

    def check(self, learner: Learner, learnt: Meta) -> None:
        """Raises a ValueError that says what to change where this estimator can't train `learnt` with `learner`."""
        ...

    def init(self, learner: Learner, meta: Meta) -> Carry: ...

    def start(self, learner: Learner, meta: Meta, support: Batch, carry: Carry) -> State:
        """The state from which adaptation starts: `learner.init`, plus what the carry brings."""
        ...

    def __call__(self, learner: Learner, meta: Meta, task: Task, carry: Carry) -> Estimate: ...


class Outer(NamedTuple):
    """The outer optimizer that an algorithm asks for: a class of `torch.optim` by name, its step size, its schedule."""

    optimizer: str = "Adam"
    lr: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"


ADAM = Outer()


@dataclass(frozen=True)
class MetaOptimizer:
    """What every algorithm's builder returns and the loop trains.

    `meta` is φ at the start; `learns(name)` says which of `meta.weights` the outer loop moves (ψ always is);
    `reduction` is how the tasks of a batch are put together; `name` is what tables call it.
    """

    learner: Learner
    estimator: Estimator
    meta: Meta
    learns: Callable[[str], bool] = lambda name: True
    reduction: Literal["mean", "sum"] = "mean"
    outer: Outer = ADAM
    name: str = "custom"

    def __post_init__(self) -> None:
        learnt = self.split(self.meta)[0]
        if not learnt.weights and not learnt.rule:
            raise ValueError("nothing is learnt: every weight has requires_grad=False, or there is none; free some of them.")
        self.estimator.check(self.learner, learnt)

    def split(self, meta: Meta) -> tuple[Meta, Params]:
        """The learnt part of φ, and the weights that only adapt or stay as they are."""
        learnt = {n: p for n, p in meta.weights.items() if self.learns(n)}
        return Meta(learnt, meta.rule), {n: p for n, p in meta.weights.items() if n not in learnt}
