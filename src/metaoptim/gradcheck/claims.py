"""Whether a meta-gradient is what its estimator claims it to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.finite import in_the_data
from metaoptim.core.gradients import holding
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.objectives import trajectory_mean
from metaoptim.core.types import Estimate, Estimator, Loss, MetaOptimizer, MetaParams, Params, Task
from metaoptim.engine import Engine, count_tasks
from metaoptim.engine.bound import Bound
from metaoptim.engine.executor import keys, starts
from metaoptim.estimators import Implicit, Unroll
from metaoptim.gradcheck.case import REFERENCE, Case, How, Overwritten, prepare, unguarded
from metaoptim.gradcheck.causes import in_the_rule
from metaoptim.gradcheck.differences import TOLERANCE, Probe, distance, probe, seeded
from metaoptim.gradcheck.held import Held
from metaoptim.gradcheck.minimum import AtMinimum, Direct
from metaoptim.gradcheck.parts import random_like

LENIENT = 1e-4  # in training, where an alarm must be beyond doubt
SURE = 5.0  # standard errors by which a stochastic estimate may be off
REPEATS, PAIRS, SIGMA = 32, 100, 1e-3  # of one that is checked; its mean is off by about σ²
DIRECTIONS = 8
ENOUGH = 1000  # iterations of a solver, for any number of weights that a check can take
SPARE = 4  # times as many iterations as would do if nothing were rounded


class Verdict(NamedTuple):
    """An estimate, its error, the slope that it was seen along (None: elsewhere), in which mode, and what error is none.

    The error is relative; that of a stochastic estimate is in standard errors.
    """

    estimate: Estimate
    error: float
    probe: Probe | None
    how: How = REFERENCE
    limit: float = TOLERANCE


def judge(case: Case, how: How, whole: bool = True) -> Verdict:
    """The meta-gradient in an execution mode, held to what its estimator claims.

    exact, first_order: central differences of the loss that it comes with in that mode, with what it holds held.
    truncated: the same, of a window that begins the run, and of the one after it with its start held, where the tasks hold
        whole runs; where only the end of a run is seen, of that end, with all before it held.
    displacement: the same run with inner gradients by plain autograd, and those against central differences.
    implicit: central differences of the loss at the minimum of the inner objective, found by Newton's method.
    stochastic: the exact gradient that it is an estimate of, in standard errors.
    """
    mode = case.mode(how)
    estimate = case.run(mode)
    gradient = case.leaves(estimate.grad)
    if case.claim == "displacement":
        moved, errors = displacement(case)
        return Verdict(estimate, max(distance(moved, gradient), *errors.values()), None, how)
    if case.claim == "implicit":
        f, found = minimum(case)
        return Verdict(estimate, probe(f, case.leaves(case.phi), found)[1], None, how)
    if case.claim == "stochastic":
        return Verdict(estimate, stochastic(case), None, how, SURE)
    own = constants(case)
    f = case.loss(case.mode(how, own) if own else mode)
    seen, error = probe(f, case.leaves(case.phi), gradient)
    if case.claim == "truncated" and own is None and whole:
        later = case.mode(how, carry=estimate.carry)
        error = max(error, probe(case.loss(later), case.leaves(case.phi), case.leaves(case.run(later).grad))[1])
    return Verdict(estimate, error, seen, how)


def truth(case: Case, how: How) -> Callable[[Params], float]:
    """The function of the learnt tensors whose derivative the estimate claims to be."""
    return case.loss(case.mode(how, constants(case)))


def constants(case: Case) -> Held | None:
    """The learner whose loss is that function; None where it is the learner itself."""
    learner, estimator = case.method.learner, case.method.estimator
    if case.claim == "first_order":
        return Held(learner, case.phi, "stepwise" if getattr(estimator, "stepwise", False) else "held")
    if case.claim == "truncated" and hasattr(estimator, "target"):  # the end of a run, as far as it is seen
        return Held(learner, case.phi, "exact", learner.steps - getattr(estimator, "window", learner.steps))
    holds = getattr(estimator, "holds", True) and case.holds()
    return Held(learner, case.phi, "exact") if holds else None


def displacement(case: Case, each: bool = False) -> tuple[Params, dict[str, float]]:
    """θ − θ_K with inner gradients by plain `torch.autograd`, and the worst errors of these against central differences.

    each: for every tensor that adapts, by its name; else for all together.
    """
    errors: dict[str, float] = {}
    device = case.phi.device

    def gradient(f: Loss, x: Params) -> tuple[Params, Tensor]:
        def value(x: Params) -> float:
            with seeded(device, seed=None), torch.no_grad():
                return f(x)[0].item()

        free = {n: p.detach().clone().requires_grad_() for n, p in x.items()}
        with torch.enable_grad():
            loss = f(free)[0]
            found = torch.autograd.grad(loss, list(free.values()), materialize_grads=True)
        g = dict(zip(free, found, strict=True))
        for name, only in {n: [n] for n in x}.items() if each else [("all", [])]:
            errors[name] = max(errors.get(name, 0.0), probe(value, x, g, only)[1])
        return g, loss.detach()

    _, fixed = case.method.split(case.phi)
    batch, learner = case.batch, case.method.learner
    moved: list[Params] = []
    with seeded(device):
        carried = starts(case.method, case.phi, batch)
        for t, key in enumerate(keys(count_tasks(batch), device)):
            bound, support = Bound(learner, fixed, key), trees.index(batch, t).support
            state = learner.inherit(learner.init(case.phi, support), trees.index(carried, t)) if carried else None
            start = None if state is None else (torch.zeros_like(key), state)
            *_, (_, end) = inner_loop(bound, case.phi, support, gradient, start=start)
            moved.append(trees.subtract(case.leaves(case.phi), learner.weights(case.phi, end)))
    scale = 1.0 if case.method.reduction == "sum" else 1.0 / len(moved)
    return {n: torch.stack([m[n] for m in moved]).sum(0) * scale for n in moved[0]}, errors


def each_tensor(case: Case, first: Verdict) -> dict[str, float]:
    """The error in every learnt tensor, along a direction in it alone; {} for a claim that is judged as a whole."""
    if case.claim == "displacement":
        return displacement(case, each=True)[1]
    if case.claim == "stochastic":
        return {}
    f, at, found = truth(case, first.how), case.leaves(case.phi), case.leaves(first.estimate.grad)
    if case.claim == "implicit":
        f, found = minimum(case)
    return {name: probe(f, at, found, [name])[1] for name in at}


def minimum(case: Case) -> tuple[Callable[[Params], float], Params]:
    """The loss at the minimum of the inner objective, and the implicit gradient there."""
    estimator: Any = case.method.estimator
    if type(estimator) is Implicit:
        estimator = Direct()
    else:
        adapting = sum(case.phi.weights[n].numel() for n in case.method.adapting)
        with suppress(TypeError):  # for an estimator of the user's own, which is taken as it is
            estimator = replace(estimator, solver="cg", iterations=min(ENOUGH, SPARE * adapting), damping=0.0)
    method = replace(case.method, learner=AtMinimum(case.method.learner), estimator=estimator)
    there = replace(case, method=method)
    mode = there.mode(REFERENCE)
    return there.loss(mode), case.leaves(there.run(mode).grad)


def stochastic(case: Case) -> float:
    """How far the mean of many estimates over a whole run is from the exact gradient, in standard errors: the most of a few
    directions."""
    estimator: Any = case.method.estimator
    target: Estimator = getattr(estimator, "target", Unroll(objective=trajectory_mean))
    with suppress(TypeError):
        estimator = replace(estimator, sigma=SIGMA, pairs=PAIRS)
    at = case.leaves(case.phi)
    directions = [random_like(at, seed) for seed in range(DIRECTIONS)]

    def slopes(estimator: Estimator, seed: int) -> Tensor:
        grad = case.leaves(over_a_run(replace(case.method, estimator=estimator), case.batch, seed))
        return torch.stack([trees.dot(d, grad) for d in directions])

    with holding(lambda x: x):  # nothing is held where inner runs are only looked at
        exact = slopes(target, 0)
    found = torch.stack([slopes(estimator, seed) for seed in range(REPEATS)])
    error = (found.mean(0) - exact).abs() / (found.std(0) / math.sqrt(REPEATS) + 1e-9 * exact.abs())
    return error.max().item()


def by_design(case: Case, first: Verdict) -> tuple[float, str] | None:
    """How far an approximation is from what it approximates, here, and what that is; None for no approximation."""
    estimator: Any = case.method.estimator
    approximated = getattr(estimator, "target", None)
    if case.claim == "first_order" or (case.claim == "truncated" and approximated):
        approximated = approximated or replace(estimator, first_order=False)
        exact = replace(case, method=replace(case.method, estimator=approximated))
        found, target = first.estimate.grad, exact.run(exact.mode(first.how)).grad
        name = "the exact meta-gradient"
    elif case.claim == "implicit":
        return distance(case.leaves(first.estimate.grad), minimum(case)[1]), "the implicit gradient at the minimum"
    elif case.method.estimator.lasts(case.method.learner) > 1:
        windows = getattr(estimator, "target", estimator)
        found, target = (
            over_a_run(replace(case.method, estimator=e), case.batch, 0) for e in (windows, Unroll(objective=trajectory_mean))
        )
        name = "the exact meta-gradient of the whole run"
    else:
        return None
    return distance(case.leaves(found), case.leaves(target)), name


def over_a_run(method: MetaOptimizer, batch: Task, seed: int) -> MetaParams:
    """The mean of the estimates of all windows of a run, one after the other."""
    engine, found = Engine(method, *REFERENCE), list[MetaParams]()
    with seeded(method.phi.device, seed):
        carry = engine.init(method.phi, batch)
        for step in range(method.estimator.lasts(method.learner)):
            estimate = engine(method.phi, batch, carry, step)
            found.append(estimate.grad)
            carry = estimate.carry
    mean: MetaParams = trees.map_tensors(lambda x: x.mean(0), trees.stack(found))
    return mean


def self_check(method: MetaOptimizer, phi: MetaParams, batch: Task, how: How = REFERENCE, whole: bool = True) -> str | None:
    """A sentence where the meta-gradient is not what it claims to be, else None: for the start of a training.

    At most four meta-gradients of 2 tasks in float64; more only where the first direction looks wrong. Neither torch's
    generators nor the module's state change. Tasks that aren't whole hold what one window reads, and nothing of the next.
    """
    if method.estimator.claim in ("implicit", "stochastic"):
        return None  # `check` takes its time for these
    try:
        case = prepare(unguarded(method), phi, batch, 2)
        verdict = judge(case, how, whole)
    except Overwritten as reason:
        return f"{reason}: metaoptim.check(method, tasks) finds the layer."
    except Exception:  # whatever a module can say to float64; training itself tells of the rest
        return None
    error = verdict.error
    if error <= LENIENT or not verdict.estimate.loss.isfinite():  # of which training tells more
        return None
    if not math.isfinite(error) and (odd := in_the_data(case.batch)):
        return f"the data of task {odd[0]} hold {odd[1]}, with which no meta-gradient can be right."
    if (cause := in_the_rule(method, phi)) and not math.isfinite(trees.norm(case.leaves(verdict.estimate.grad)).item()):
        return f"the meta-gradient of {method.name} is not finite: {cause}."
    size = f"{error:.1%}" if math.isfinite(error) else "more than any number"
    return (
        f"the meta-gradient of {method.name} is off from central differences of its own loss by {size}: "
        f"metaoptim.check(method, tasks) finds the {'layer' if phi.weights else 'part'}."
    )
