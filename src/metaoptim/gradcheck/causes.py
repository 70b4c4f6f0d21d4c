"""Why training can't begin well, and what to do: where numbers that are not finite, or too large a step, come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from metaoptim.core import trees
from metaoptim.core.finite import in_the_data
from metaoptim.core.gradients import held
from metaoptim.core.types import MetaOptimizer, MetaParams, Params, Rule, Step, Task
from metaoptim.engine import count_tasks
from metaoptim.estimators import Joint
from metaoptim.gradcheck.case import Case, prepare
from metaoptim.gradcheck.differences import seeded

HALVINGS = 60
TASKS = 2  # of the first batch that a step is tried on

INFINITE = (
    "the rule {rule} has an infinite slope where a gradient is 0, as at dead units (that of v.sqrt() at v = 0): put the small "
    "constant inside the root, as in (v + eps).sqrt(), or make the root a constant with mo.rules.hold"
)


def in_the_rule(method: MetaOptimizer, phi: MetaParams) -> str | None:
    """A sentence, without its end, where the slope of an update is not finite at a gradient of 0."""
    rule: Any = getattr(method.learner, "rule", None)
    weights = {n: p.detach() for n, p in phi.weights.items() if method.learner.adapts(n)}
    with suppress(Exception):  # whatever a rule of the user's own can raise is told of elsewhere
        if rule is not None and weights and _infinite(rule, phi.rule, weights):
            return INFINITE.format(rule=type(rule).__name__)
    return None


def _infinite(rule: Rule, psi: Params, weights: Params) -> bool:
    like = next(iter(weights.values()))
    grads = {n: torch.zeros_like(w).requires_grad_() for n, w in weights.items()}
    step = Step(torch.zeros((), dtype=torch.int64, device=like.device), like.new_ones(()))
    with torch.enable_grad():
        updates, _ = rule.update(psi, grads, rule.init(psi, weights), weights, step)
        total = torch.stack([u.sum() for u in updates.values()]).sum()
        slopes = torch.autograd.grad(total, list(grads.values()), allow_unused=True) if total.requires_grad else ()
    return bool(total.isfinite()) and any(s is not None and not s.isfinite().all() for s in slopes)


def overshoot(method: MetaOptimizer, phi: MetaParams, batch: Task) -> str | None:
    """A sentence where the first inner step raises the support loss of the first tasks: with the step that doesn't."""
    if not method.learner.steps or isinstance(method.estimator, Joint):  # which takes no inner step
        return None
    if not phi.weights:  # a rule alone is learnt, whose steps mean nothing yet
        return None
    try:
        with torch.no_grad():
            return _overshoot(method, phi, batch)
    except Exception:  # whatever a module can say; training itself tells of it
        return None


def _overshoot(method: MetaOptimizer, phi: MetaParams, batch: Task) -> str | None:
    case = prepare(method, phi, batch, TASKS, next(iter(phi.weights.values())).dtype)
    if in_the_data(case.batch):  # of which training tells, where they do harm
        return None
    steps = [_first_step(case, t) for t in range(count_tasks(case.batch))]
    if not all(x for _, x, _ in steps):
        return None

    def loss(share: float) -> float:
        """The mean inner loss after a share of the step."""
        return sum(f(trees.add(x, moved, share)) for f, x, moved in steps) / len(steps)

    before, after = loss(0.0), loss(1.0)
    if after <= before or not math.isfinite(before):
        return None
    start = (
        f"the first inner step raises the support loss from {before:.3g} to {after:.3g} (the mean over {len(steps)} tasks): "
    )
    lower = next((i for i in range(1, HALVINGS) if loss(0.5**i) < before), None)
    if lower is None:
        return f"{start}no shorter one lowers it either; does the rule return updates to add, such as -lr * gradient?"
    rate = getattr(getattr(method.learner, "rule", None), "lr", None)
    named = f" (lr={rate / 2**lower:.3g})" if isinstance(rate, float | int) else ""
    return f"{start}one 1/{2**lower} as long{named} lowers it."


def _first_step(case: Case, t: int) -> tuple[Callable[[Params], float], Params, Params]:
    """The inner objective of a task, with the same draws each time, the point at which it starts, and the step from there."""
    learner, support = case.method.learner, trees.index(case.batch, t).support
    k = torch.tensor(0, device=case.phi.device)
    with seeded(case.phi.device):
        state = learner.init(case.phi, support)
    f, x = learner.inner(case.phi, state, support, k)

    def value(x: Params) -> float:
        with seeded(case.phi.device):
            return f(x)[0].item()

    if not x:
        return value, {}, {}
    with seeded(case.phi.device):
        grads, loss = held(f, x)
    after = learner.apply(case.phi, state, grads, loss, k)
    return value, x, trees.subtract(learner.inner(case.phi, after, support, k + 1)[1], x)
