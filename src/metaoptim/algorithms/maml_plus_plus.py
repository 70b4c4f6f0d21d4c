"""MAML++.

    θ_(l,k+1) = θ_(l,k) − α_(l,k) ∇_(θ_l) L_i(θ_k; S_i)      batch norms with scale and shift of their own for s_0 … s_K
    (θ, α) ← (θ, α) − β ∇_(θ,α) mean_i Σ_k v_k(t) L_i(θ_k; Q_i)      β by a cosine; v(t) goes from 1/K each to v_K = 1

Paper: Antoniou, Edwards and Storkey 2019, https://arxiv.org/abs/1810.09502, section 4.

Deviations: both annealings count outer steps, where the code counts epochs of 500 (10 of them are the default for the loss).
β falls to 0, in the code to 1e-5. Scale and shift of batch norms are learnt and don't adapt, as in its configurations, which
also take second derivatives throughout, as the default here. Running statistics per step, which the code stores and never
uses, are left out, as is its ensemble of the five best checkpoints at test. Layers are modules: see `lslr`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.checks import check_counts, check_flags
from metaoptim.core.objectives import AnnealedMultiStep, Objective, last
from metaoptim.core.types import MetaOptimizer, Normalisation, Outer
from metaoptim.estimators import Unroll
from metaoptim.learners import Names, Network, nothing
from metaoptim.nn import batch_norms
from metaoptim.rules import SGD, LayerStepSizes


@dataclass(frozen=True)
class FirstOrderUntil:
    """All derivatives of inner gradients are left out until an outer step, and none from it on."""

    first_order_until: int

    def __call__(self, outer_step: Tensor) -> Tensor:
        return (outer_step < self.first_order_until).float()


def maml_plus_plus(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 5,
    layer_step_sizes: bool = True,
    per_step_norms: bool | None = None,
    multi_step_until: int = 5000,
    first_order_until: int = 0,
    cosine: bool = True,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a start as MAML does, with what makes that stable; each part can be left out.

    Args:
        lr: every inner step size α at the start, on the mean loss.
        steps: inner steps K in training.
        layer_step_sizes: learn a step size for every layer and inner step; else all are `lr`.
        per_step_norms: learn scale and shift of batch norms for each of s_0 … s_K, and don't adapt them; else they adapt.
            None: where there are any.
        multi_step_until: outer steps until which the losses after all inner steps count, less and less but for the last; 0: it
            alone counts from the first.
        first_order_until: outer steps until which inner gradients are constants; 0: second order throughout.
        cosine: the outer step size follows a cosine to 0; else it is constant.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_counts(steps=steps)
    check_counts(0, multi_step_until=multi_step_until, first_order_until=first_order_until)
    asked = per_step_norms is not None
    check_flags(layer_step_sizes=layer_step_sizes, per_step_norms=per_step_norms if asked else True, cosine=cosine)
    norms = Names(() if per_step_norms is False else batch_norms(Network(net, loss, normalisation).net))
    if per_step_norms and not norms.names:
        raise ValueError("per_step_norms=True: the network has no batch norm with scale and shift; leave it out, or add one.")
    objective: Objective = AnnealedMultiStep(multi_step_until) if multi_step_until else last
    return compose(
        net,
        loss,
        rule=LayerStepSizes(lr, steps) if layer_step_sizes else SGD(lr),
        steps=steps,
        adapts=norms.others,
        per_step=norms if norms.names else nothing,
        estimator=Unroll(FirstOrderUntil(first_order_until) if first_order_until else False, objective),
        normalisation=normalisation,
        outer=Outer(schedule="cosine" if cosine else "constant"),
        name="maml_plus_plus",
    )
