"""CAVIA: fast context adaptation.

    c_i = 0 − α ∇_c L_i(θ, c; S_i) at c = 0           (K such steps) the context c adapts, the weights θ do not
    θ ← θ − β ∇_θ mean_i L_i(θ, c_i; Q_i)             through the steps; every task starts from c = 0

Paper: Zintgraf, Shiarlis, Kurin, Hofmann and Whiteson 2019, https://arxiv.org/abs/1810.03642, section 3.

Deviations: FiLM layers start from γ = 1, β = 0, where the published code draws both; they stand ahead of pooling and not behind
it. The code clamps each task's meta-gradient to ±10 before they are averaged; here `clip` bounds the norm of the mean. Its
default step size is 1.0, as here; the paper's text also has 0.1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.estimators import Unroll
from metaoptim.learners import Network, named
from metaoptim.nn import BatchNorm, ContextInput, FiLM
from metaoptim.rules import SGD


def example_net(ways: int) -> nn.Module:
    """A context that scales and shifts channels, and one beside the inputs of a layer."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=False),
            norm=BatchNorm(3),
            film=FiLM(3, 4),
            tanh=nn.Tanh(),
            flatten=nn.Flatten(),
            context=ContextInput(2),
            hidden=nn.Linear(14, 5),
            features=nn.Tanh(),
            head=nn.Linear(5, ways),
        )
    )


def cavia(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 1.0,
    steps: int = 2,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a network that a few numbers turn to a task: its weights called `context`, which are 0 at the start.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    advice = "put mo.nn.ContextInput or mo.nn.FiLM into it, or build it with context=100 (mo.nn.mlp, mo.nn.conv4)"
    network = Network(net, loss, normalisation)
    contexts = named(network, "context", advice)
    if moved := [n for n in contexts.names if net.get_parameter(n).any()]:
        raise ValueError(f"the context `{moved[0]}` is not 0, where every task starts from 0; set it to 0.")
    return compose(
        net,
        loss,
        rule=SGD(lr),
        steps=steps,
        adapts=contexts,
        learns=contexts.others,
        estimator=Unroll(),
        normalisation=normalisation,
        name="cavia",
    )
