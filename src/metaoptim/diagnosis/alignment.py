"""Do tasks pull in the same direction at φ? Cosines between the gradients of support and query losses at the start s_0.

One step on a support lowers a query's loss, to first order, by α times the product of their gradients: its own query's, if
learning generalises, and other tasks' as much, if nothing in the step is specific to the task (Nichol, Achiam and Schulman
2018, https://arxiv.org/abs/1803.02999, section 5). Thresholds: a cosine above 0, and one that is 0.1 above that of other tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.gradients import outermost
from metaoptim.core.types import Batch, Info, Loss, Params, Task
from metaoptim.diagnosis.subject import Numbers, Subject

SPECIFIC = 0.1


def measure(subject: Subject) -> Numbers:
    """Mean cosines within a task and between tasks, and all of those between supports and queries."""
    if not subject.adapts:
        raise ValueError("no weight adapts, so that there is no inner gradient.")
    found = [directions(subject, task) for task in subject.episodes()]
    supports, queries = (torch.stack(part) for part in zip(*found, strict=True))
    cross = supports @ queries.mT
    return {
        "episodes": len(found),
        "same_task": cross.diagonal().mean().item(),
        "other_task": _apart(cross),
        "between_supports": _apart(supports @ supports.mT),
        "between_queries": _apart(queries @ queries.mT),
        "support_and_query": cross.tolist(),
    }


def directions(subject: Subject, task: Task) -> tuple[Tensor, Tensor]:
    """Unit vectors of the support's and the query's gradient in all weights that adapt, at s_0."""
    learner, phi = subject.learner, subject.run.phi
    k, state = subject.start(task)
    _, x = learner.inner(phi, state, task.support, k)

    def on(batch: Batch) -> Loss:
        def loss(moved: Params) -> tuple[Tensor, Info]:
            return learner.loss(phi, trees.replaced(state, x, moved), task.support, batch, k)

        return loss

    support, query = (_unit(outermost(on(batch), x)[0]) for batch in task)
    return support, query


def _unit(gradient: Params) -> Tensor:
    flat = torch.cat([g.detach().flatten() for g in gradient.values()])
    size = torch.linalg.vector_norm(flat)
    return flat / torch.where(size > 0, size, 1)


def _apart(cosines: Tensor) -> float:
    """The mean over pairs of different tasks."""
    count = len(cosines)
    return ((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))).item()


def read(numbers: Numbers) -> str:
    """The sentence that follows."""
    own, other = numbers["same_task"], numbers["other_task"]
    seen = f"a support's gradient has a cosine of {own:.2f} with its own query's, and of {other:.2f} with those of other tasks"
    if not own > 0:
        return f"A first step can't help at φ: {seen}."
    if own - other >= SPECIFIC:
        return f"Gradients at φ tell tasks apart: {seen}."
    return f"All tasks pull alike at φ: {seen}."
