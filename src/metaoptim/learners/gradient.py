"""How ONE task is learnt, given φ: by the steps of an update rule, or by a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaoptim.core import trees
from metaoptim.core.types import Batch, GradOp, Info, Meta, Normalisation, Params, Rule, State
from metaoptim.nn import needs_written_out, refuse, statistics, written_out

Objective = Callable[[Params, Batch, Batch | None], tuple[Tensor, Info]]
"""(weights, batch, support whose statistics count or None) -> mean loss, and what to report beside it."""


@dataclass(frozen=True)
class Network:
    """A module with a loss, as a function of its weights.

    Under the policy "inductive" a batch is normalised by the statistics of the support set that is passed along; under
    "transductive" by its own; under "frozen" by the stored ones.
    """

    net: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    normalisation: Normalisation = "transductive"
    learnt: frozenset[str] = field(init=False, repr=False)  # a set's order differs in every process
    unusual: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Read once: what is frozen in the module later, or set free, is another meta-optimizer's affair.
        learnt = frozenset(n for n, p in self.net.named_parameters() if p.requires_grad)
        object.__setattr__(self, "learnt", learnt)
        if self.normalisation not in get_args(Normalisation):
            raise ValueError(
                f"normalisation {self.normalisation!r} is unknown: choose among {', '.join(get_args(Normalisation))}."
            )
        refuse(self.net, self.normalisation)
        object.__setattr__(self, "unusual", needs_written_out(self.net))

    def weights(self) -> Params:
        """The module's weights as they are now, detached copies."""
        return {n: p.detach().clone() for n, p in self.net.named_parameters()}

    def trainable(self, name: str) -> bool:
        """Whether the module's own parameter of that name asked for a gradient."""
        return name in self.learnt

    def __call__(self, weights: Params, batch: Batch, support: Batch | None = None) -> tuple[Tensor, Info]:
        x, y = batch
        rows = None if support is None else support[0].shape[0]
        with statistics(frozen=self.normalisation == "frozen", rows=rows), written_out(self.unusual):
            if support is None:
                output = functional_call(self.net, weights, (x,))
            else:
                output = functional_call(self.net, weights, (torch.cat([support[0], x]),))[support[0].shape[0] :]
        loss = self.loss(output, y)
        if loss.ndim:
            raise ValueError(
                f"the loss returned a tensor of shape {tuple(loss.shape)}; it must return a scalar, the mean over examples."
            )
        if output.ndim == y.ndim + 1 and not y.is_floating_point():
            return loss, {"accuracy": (output.argmax(-1) == y).to(output.dtype).mean()}
        return loss, {}


class Inner(NamedTuple):
    """The state of a gradient learner: fast weights, the rule's state, and what a prox or a policy refers back to."""

    fast: Params
    rule: State
    anchor: Params
    support: tuple[Tensor, ...]


def everything(name: str) -> bool:
    """The mask that holds every weight."""
    return True


@dataclass(frozen=True)
class GradientLearner:
    """K steps of an update rule on the support loss.

    objective: usually a `Network`; rule and steps: how weights move; adapts: which do; prox: λ of ½λ‖θ' − θ‖² added to the
    inner loss (iMAML, eq. 3); start: values that the task's own support set gives to some weights before the first step;
    batch_size: rows of the support per step, taken in the order in which the task brings them, cycling (None: all of
    them). Task families shuffle their supports, so that order is a draw without replacement.
    """

    objective: Objective
    rule: Rule
    steps: int
    adapts: Callable[[str], bool] = everything
    prox: float = 0.0
    start: Callable[[Params, Batch], Params] | None = None
    batch_size: int | None = None
    inductive: bool = field(init=False)

    def __post_init__(self) -> None:
        if self.steps < 0 or self.prox < 0 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(
                f"steps={self.steps}, prox={self.prox}, batch_size={self.batch_size}: steps and prox must be >= 0, "
                "batch_size >= 1."
            )
        network = self.objective
        object.__setattr__(self, "inductive", isinstance(network, Network) and network.normalisation == "inductive")

    def init(self, meta: Meta, support: Batch, memory: State = ()) -> Inner:
        fast = trees.select(meta.weights, self.adapts)
        if self.start is not None:
            fast = fast | self.start(meta.weights, support)
        return Inner(
            fast,
            memory or self.rule.init(meta.rule, fast),
            fast if self.prox else {},
            support if self.inductive else (),
        )

    def step(self, meta: Meta, state: Inner, support: Batch, k: int, grad: GradOp) -> Inner:
        batch = self.minibatch(support, k)

        def inner(fast: Params) -> Tensor:
            loss, _ = self.objective(meta.weights | fast, batch, None)
            if self.prox:
                gap = trees.subtract(fast, state.anchor)
                loss = loss + 0.5 * self.prox * trees.dot(gap, gap)
            return loss

        updates, rule = self.rule.update(meta.rule, grad(inner)(state.fast), state.rule, state.fast, k)
        return state._replace(fast=trees.add(state.fast, updates), rule=rule)

    def loss(self, meta: Meta, state: Inner, batch: Batch, k: int) -> tuple[Tensor, Info]:
        support = (state.support[0], state.support[1]) if state.support else None
        return self.objective(self.weights(meta, state), batch, support)

    def weights(self, meta: Meta, state: Inner) -> Params:
        return meta.weights | state.fast

    def memory(self, state: Inner) -> State:
        return state.rule

    def minibatch(self, support: Batch, k: int) -> Batch:
        """The rows of step k."""
        x, y = support
        rows, size = x.shape[0], self.batch_size
        if size is None or size >= rows:
            return support
        first = k * size % rows
        if first + size <= rows:
            return x[first : first + size], y[first : first + size]
        wrapped = first + size - rows
        return torch.cat([x[first:], x[:wrapped]]), torch.cat([y[first:], y[:wrapped]])


@dataclass(frozen=True)
class ClosedForm:
    """A learner whose inner loop is a formula: fit(weights, support) -> state, score(weights, state, batch) -> loss, info."""

    fit: Callable[[Params, Batch], State]
    score: Callable[[Params, State, Batch], tuple[Tensor, Info]]
    steps: int = 0

    def adapts(self, name: str) -> bool:
        return False

    def init(self, meta: Meta, support: Batch, memory: State = ()) -> State:
        return self.fit(meta.weights, support)

    def step(self, meta: Meta, state: State, support: Batch, k: int, grad: GradOp) -> State:
        return state

    def loss(self, meta: Meta, state: State, batch: Batch, k: int) -> tuple[Tensor, Info]:
        return self.score(meta.weights, state, batch)

    def weights(self, meta: Meta, state: State) -> Params:
        return meta.weights

    def memory(self, state: State) -> State:
        return ()
