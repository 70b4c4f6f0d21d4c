"""Are steps too long? The largest eigenvalue λ of the inner objective's Hessian along the path, and α·λ against 2.

By power iteration with Hessian-vector products; the Hessian is never made. A step of size α multiplies the distance to the
minimum along an eigenvector by 1 − α·λ, and overshoots further every time where α·λ > 2. α is what the rule applies along the
sharpest direction; where its step is not proportional to the gradient (Adam, a clip that is active) there is none.
Threshold: 2, for the mean over episodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.gradients import Inspection, autograd, exact, held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import Loss, Params, State, Step, Task
from metaoptim.diagnosis.subject import Numbers, Subject
from metaoptim.learners import GradientLearner

LIMIT = 2.0
POINTS = 6  # of a path
ITERATIONS = 50
TOLERANCE = 1e-3  # relative, for an eigenvalue from one iteration to the next
LINEAR = 1e-3  # relative, for the step of twice a gradient against twice the step

Matvec = Callable[[Params], Params]


def measure(subject: Subject) -> Numbers:
    """λ, α and their product at up to six states of the path: mean and largest over episodes."""
    last = subject.learner.steps
    if not subject.adapts or not last:
        raise ValueError("no inner step is taken, so that there is no path.")
    points = sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)})
    found = [along(subject, task, points) for task in subject.episodes()]
    values = torch.tensor([[value for value, _ in path] for path in found], dtype=torch.float64)
    known = all(size is not None for path in found for _, size in path)
    alphas = torch.tensor([[size for _, size in path] for path in found], dtype=torch.float64) if known else None
    return {
        "episodes": len(found),
        "limit": LIMIT,
        "steps": points,
        "largest_eigenvalue": _over_episodes(values),
        "step_size": None if alphas is None else _over_episodes(alphas),
        "product": None if alphas is None else _over_episodes(alphas * values),
    }


def _over_episodes(x: Tensor) -> dict[str, Any]:
    return {"mean": x.mean(0).tolist(), "most": x.amax(0).tolist()}


def along(subject: Subject, task: Task, points: list[int]) -> list[tuple[float, float | None]]:
    """λ and α at some steps of the path of one task."""
    learner, phi, found = subject.learner, subject.run.phi, []
    path = inner_loop(learner, phi, task.support, held, start=subject.start(task))
    for i, (k, state) in enumerate(path):
        if i in points:
            f, x = learner.inner(phi, state, task.support, k)
            product, gradient, loss = hessian(f, x)
            value, direction = largest(product, {n: torch.randn_like(p) for n, p in x.items()})
            size = step_size(subject, state, Step(k, loss), direction, trees.norm(gradient))
            found.append((value, size))
    return found


def hessian(f: Loss, x: Params) -> tuple[Matvec, Params, Tensor]:
    """(v ↦ ∇²f(x) v, ∇f(x), f(x)), of which the products are taken by differentiating one graph again and again."""
    own = {n: p.detach().requires_grad_() for n, p in x.items()}
    with autograd(), torch.enable_grad():
        gradient, loss = exact(f, own)
    moving = [n for n, g in gradient.items() if g.requires_grad]
    (graph := Inspection()).look([gradient[n] for n in moving])
    if graph.once:  # torch would pass over it in silence
        raise ValueError(
            "the model or the loss has a function marked @once_differentiable, and a Hessian differentiates twice."
        )

    def product(v: Params) -> Params:
        if not moving:
            return {n: torch.zeros_like(p) for n, p in x.items()}
        outputs, along = [gradient[n] for n in moving], [v[n] for n in moving]
        found = torch.autograd.grad(outputs, list(own.values()), along, retain_graph=True, materialize_grads=True)
        return dict(zip(own, found, strict=True))

    return product, {n: g.detach() for n, g in gradient.items()}, loss.detach()


def largest(matvec: Matvec, start: Params, iterations: int = ITERATIONS, tolerance: float = TOLERANCE) -> tuple[float, Params]:
    """The largest eigenvalue of a symmetric matrix that is known by its products, and its unit vector."""
    value, v = _dominant(matvec, start, iterations, tolerance)
    if value < 0:  # the largest in size is the smallest of all: less that one, no eigenvalue is negative
        least = value
        value, v = _dominant(lambda u: trees.add(matvec(u), u, -least), start, iterations, tolerance)
        value += least
    return value, v


def _dominant(matvec: Matvec, v: Params, iterations: int, tolerance: float) -> tuple[float, Params]:
    """The eigenvalue of largest size by power iteration, as a Rayleigh quotient, and its unit vector."""
    v, value = _scaled(v, 1 / trees.norm(v)), 0.0
    for _ in range(iterations):
        w = matvec(v)
        before, value = value, trees.dot(v, w).item()
        size = trees.norm(w)
        if not size > 0:
            break
        v = _scaled(w, 1 / size)
        if abs(value - before) <= tolerance * abs(value):
            break
    return value, v


def step_size(subject: Subject, state: State, step: Step, direction: Params, size: Tensor) -> float | None:
    """What the rule multiplies a gradient of this size along a unit vector by; None where that is no number."""
    learner = subject.learner
    if not isinstance(learner, GradientLearner):
        return None
    rule, psi = learner.rule, subject.run.phi.rule
    size = torch.where(size > 0, size, 1)

    def update(scale: Tensor | float) -> Params:
        return rule.update(psi, _scaled(direction, scale), state.rule, state.fast, step)[0]

    with torch.no_grad():
        none = update(0.0)
        once, twice = (trees.subtract(none, update(scale)) for scale in (size, 2 * size))
        if trees.norm(trees.add(twice, once, -2.0)) > LINEAR * trees.norm(twice):
            return None
        return (trees.dot(once, direction) / size).item()


def _scaled(v: Params, scale: Tensor | float) -> Params:
    return {n: scale * p for n, p in v.items()}


def read(numbers: Numbers) -> str:
    """The sentence that follows."""
    values, products, at = numbers["largest_eigenvalue"]["mean"], numbers["product"], numbers["steps"]
    if not all(map(math.isfinite, values)):
        lost = next(k for k, value in zip(at, values, strict=True) if not math.isfinite(value))
        return f"The steps diverge: the curvature is no longer finite at step {lost}."
    if products is None:
        return (
            f"The largest eigenvalue is {values[0]:.3g} at the start and {values[-1]:.3g} after the last step; the rule's "
            "step is not proportional to the gradient, so that there is no α to hold it to."
        )
    peak = max(range(len(values)), key=products["mean"].__getitem__)
    seen = f"α·λ is {products['mean'][peak]:.2g} at step {at[peak]}"
    if products["mean"][peak] > LIMIT:
        return f"Steps are too long for the sharpest direction: {seen}, above 2, where each overshoots more than the last."
    return f"Steps are short enough for the sharpest direction: {seen}, and nowhere more; the limit is 2."
