"""One's own training problem as a meta-optimizer: its weights adapt, its hyper-parameters are learnt.

    inner:   w_{k+1} = w_k + rule(ψ, ∇_w train_loss(w_k, h, batch_k), …)           k = 0 … K−1
    outer:   minimise over h and ψ     val_loss(w_K, h, batch)

It is a training problem of the engine as any other, with one task, whose support set is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaoptim.core.brief import brief
from metaoptim.core.checks import check_called, check_counts, check_time
from metaoptim.core.losses import mse
from metaoptim.core.types import Batch, Estimator, Info, MetaOptimizer, MetaParams, Params, Rule
from metaoptim.estimators import Unroll
from metaoptim.learners import GradientLearner, Network
from metaoptim.learners.masks import Names
from metaoptim.nn import refuse, written_out

PREFIX = "hyper."
"""How the names of hyper-parameters begin among the weights of φ."""

EXACT = Unroll()


@dataclass(frozen=True)
class Called:
    """A module with other weights: called with x, it gives what the module makes of x; `weights` are these, by name."""

    network: Network
    weights: Params

    def __call__(self, x: Any) -> Any:
        return self.network.output(self.weights, x, None)


@dataclass(frozen=True)
class Losses:
    """The two losses of a training problem, as the model of a learner; the networks are those of what was given as a module."""

    train: Callable[..., Tensor]
    val: Callable[..., Tensor]
    weights: Network | None
    hyper: Network | None

    def __call__(self, weights: Params, batch: Batch, support: Batch | None, k: Tensor) -> tuple[Tensor, Info]:
        hyper = {n.removeprefix(PREFIX): x for n, x in weights.items() if n.startswith(PREFIX)}
        own = {n: x for n, x in weights.items() if not n.startswith(PREFIX)}
        name, f = ("train_loss", self.train) if support is None else ("val_loss", self.val)
        with written_out():
            loss: Any = f(_view(self.weights, own), _view(self.hyper, hyper), batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else _kind(loss)
            raise ValueError(f"{name} returned {found}; it must return a scalar tensor.")
        return loss, {}


def bilevel(
    train_loss: Callable[..., Tensor],
    val_loss: Callable[..., Tensor],
    weights: Mapping[str, Tensor] | nn.Module,
    hyper: Mapping[str, Tensor] | nn.Module,
    *,
    rule: Rule,
    steps: int,
    estimator: Estimator = EXACT,
    batch_size: int | None = None,
    psi: Mapping[str, Tensor] | None = None,
) -> MetaOptimizer:
    """A training problem as a meta-optimizer with one task, for `check`, `Engine` and `MetaModule`.

    The task is `Task(support=data, query=val_data)`, with tensors of a leading axis T = 1 before that of the rows. φ has the
    hyper-parameters, called `hyper.NAME`, and the rule's own parameters ψ, which are learnt; and the weights, which adapt.

    Args:
        train_loss, val_loss: functions of (weights, hyper, batch); a scalar each.
        weights, hyper, rule, steps, batch_size, psi: see `hypergradient`.
        estimator: how the gradient is obtained.

    Raises:
        ValueError: losses, weights, hyper-parameters, a rule or ψ of another kind; clashing names; nothing to differentiate by.
    """
    check_counts(0, steps=steps)
    check_time(steps, f"steps={steps}: a training")
    check_counts(batch_size=batch_size)
    for name, loss in (("train_loss", train_loss), ("val_loss", val_loss)):
        check_loss(name, loss, batch=True)
    if isinstance(rule, type) or not hasattr(rule, "update"):
        raise ValueError(f"rule={brief(rule)}: it must be an object such as mo.rules.SGD(0.1), from mo.rules or of your own.")
    own, learnt = _given(weights, "weights"), _given(hyper, "hyper")
    if clash := [n for n in own.tensors if n.startswith(PREFIX)]:
        raise ValueError(f"the weight `{clash[0]}` has the name of a hyper-parameter: rename what begins with {PREFIX!r}.")
    if steps and not own.free:
        raise ValueError("no weight adapts: there is none, or all have requires_grad=False; free some, or take steps=0.")
    known = _psi(rule, {n: own.tensors[n] for n in own.free}, psi)
    if not learnt.free and not known:
        raise ValueError("there is nothing to differentiate by: hyper is empty, and the rule has no parameters of its own.")
    phi = MetaParams(own.tensors | {PREFIX + n: x for n, x in learnt.tensors.items()}, known)
    model = Losses(train_loss, val_loss, own.network, learnt.network)
    learner = GradientLearner(model, rule, int(steps), Names(own.free), batch_size=batch_size)
    return MetaOptimizer(learner, estimator, phi, Names(tuple(PREFIX + n for n in learnt.free)), name="bilevel")


def check_loss(name: str, loss: Any, batch: bool) -> None:
    """A ValueError for what can't be called with weights, hyper-parameters and, if there is one, a batch."""
    given = ("weights", "hyper", "batch") if batch else ("weights", "hyper")
    if not callable(loss):
        raise ValueError(f"{name}={brief(loss)}: it must be a function of ({', '.join(given)}).")
    check_called(name, loss, *given, advice="; what is given data gets them as a batch")


class _Given(NamedTuple):
    """What a user gave as a dictionary or a module: its tensors, the names of those that are free to move, its network."""

    tensors: Params
    free: tuple[str, ...]
    network: Network | None


def _given(source: Any, what: str) -> _Given:
    """A ValueError for something else, or for tensors that can't be differentiated."""
    if isinstance(source, nn.Module) and not isinstance(source, nn.ParameterDict):
        refuse(source, "transductive", choice=False)
        network = Network(source, mse)  # for what it makes of inputs; its loss is not asked
        tensors = network.weights()
        return _Given(tensors, tuple(filter(network.trainable, tensors)), network)
    if not isinstance(source, Mapping | nn.ParameterDict):
        raise ValueError(f"{what} is a dictionary of tensors by name, or a torch.nn.Module; found {_kind(source)}.")
    for name, x in source.items():
        if not isinstance(name, str) or not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"{what} is a dictionary of tensors of floats by name; found {_kind(x)} for {name!r}.")
    return _Given({n: x.detach() for n, x in source.items()}, tuple(source), None)


def _view(network: Network | None, tensors: Params) -> Any:
    """What a loss is given: tensors by name, or, for those of a module, something to call."""
    return tensors if network is None else Called(network, tensors)


def _psi(rule: Rule, moving: Params, given: Mapping[str, Tensor] | None) -> Params:
    """ψ as it was given, or as the rule starts."""
    start = rule.start(moving, torch.Generator().manual_seed(0)) if moving else {}
    if given is None:
        return start
    if {n: x.shape for n, x in given.items()} != {n: x.shape for n, x in start.items()}:
        found, wanted = (", ".join(f"{n} {tuple(x.shape)}" for n, x in psi.items()) or "none" for psi in (given, start))
        raise ValueError(f"psi has the parameters {found}, and {type(rule).__name__} wants {wanted}.")
    return {n: x.detach() for n, x in given.items()}


def _kind(x: Any) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
