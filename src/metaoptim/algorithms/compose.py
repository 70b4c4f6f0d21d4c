"""A meta-optimizer from its choices: what every algorithm's builder calls, and anyone can."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from metaoptim.core import trees
from metaoptim.core.brief import brief
from metaoptim.core.checks import check_counts, check_numbers, check_time
from metaoptim.core.objectives import Objective, objective_called
from metaoptim.core.reductions import Reduce
from metaoptim.core.types import Batch, Estimator, MetaOptimizer, MetaParams, Normalisation, Outer, Params, Rule
from metaoptim.estimators import Unroll, judging
from metaoptim.learners import GradientLearner, Mask, Network, mask, nothing

EXACT, ADAM = Unroll(), Outer()


def compose(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    rule: Rule,
    steps: int = 1,
    adapts: Mask = "all",
    learns: Mask = "all",
    objective: Objective | str | None = None,
    estimator: Estimator = EXACT,
    head: str | None = None,
    batch_size: int | None = None,
    prox: float = 0.0,
    start: Callable[[Params, Batch], Params] | None = None,
    per_step: Callable[[str], bool] = nothing,
    normalisation: Normalisation = "transductive",
    reduction: Reduce = "mean",
    outer: Outer = ADAM,
    name: str = "compose",
) -> MetaOptimizer:
    """A meta-optimizer that adapts by the steps of a rule. Parameters that are frozen in `net` neither adapt nor are learnt.

    Args:
        net: the module that adapts.
        loss: loss(output, target) -> scalar mean.
        rule: how weights move in the inner loop.
        steps: inner steps K in training.
        adapts: which weights the inner loop moves.
        learns: which weights the outer loop moves; the rule's own parameters ψ are always learnt.
        objective: which states of a run the outer loss judges, from `mo.objectives` ("last" and "trajectory_mean" by name too)
            or of your own, beside an estimator that leaves it open, as Unroll does; none: the estimator's own.
        estimator: how the meta-gradient is obtained.
        head: the submodule that reads the features; by default the one called `head`, else the last linear layer.
        batch_size: examples of the support set in each step, in turn (see `GradientLearner`); none: all of them.
        prox: λ of ½λ‖x − θ‖² added to the inner loss.
        start: values that a task's support set gives to some weights before the first step (see `GradientLearner`).
        per_step: names of weights that have a version for each of the states s_0 … s_K (see `Network`).
        normalisation: whose statistics batch norms use on the query set.
        reduction: how the tasks of a batch are put together: "mean" or "sum"; or, where they pull in different directions,
            "upgrad", "pcgrad" or "mgda", or one of `mo.reductions` or of your own.
        outer: the outer optimizer.
        name: what tables call it.
    """
    check_counts(0, steps=steps)
    check_time(steps, f"steps={steps}: an inner run")
    check_counts(batch_size=batch_size)
    check_numbers(0, prox=prox)
    for what, value, method in (("rule", rule, "update"), ("estimator", estimator, "lasts")):
        if isinstance(value, type) or not hasattr(value, method):
            example = "mo.rules.SGD(0.1)" if what == "rule" else "mo.estimators.Unroll()"
            shown = repr(value) if isinstance(value, str | type) else type(value).__name__
            raise ValueError(f"{what}={shown}: it must be an object such as {example}, from mo.{what}s or of your own.")
    network = Network(net, loss, normalisation, head, per_step, 1 if per_step is nothing else int(steps) + 1)
    moves, learnt = mask(network, adapts), mask(network, learns)
    weights = network.weights()
    moving = trees.select(weights, moves)
    if steps and network.learnt and not moving:
        raise ValueError(
            f"nothing adapts: of the {len(weights)} weights none is chosen by adapts={brief(adapts)} and has "
            "requires_grad=True; choose others, free some, or take steps=0."
        )
    judged = objective_called(objective) if isinstance(objective, str) else objective
    learner = GradientLearner(network, rule, int(steps), moves, prox, start, batch_size)
    phi = MetaParams(weights, rule.start(moving, generator()) if moving else {})
    return MetaOptimizer(learner, judging(estimator, judged), phi, learnt, reduction, outer, name)


def generator() -> torch.Generator:
    """A generator that is seeded by torch's own, as `torch.manual_seed` has left it."""
    source = torch.default_generator
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=source, device=source.device)))
