"""A learner whose run begins, and ends, at the minimum of the inner objective, and the implicit gradient there, in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jacrev

from metaoptim.core import trees
from metaoptim.core.gradients import held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import Batch, Info, Learner, Loss, MetaParams, Params, State, Task
from metaoptim.estimators import Implicit

NEWTON = 12  # steps, from where the learner's own run ends
MANY = 2000  # adapting numbers, whose Hessian is made in full
LEAST = 1e-9  # of the gradient ahead of the last step, relative to the length of the weights
FLAT = 1e-10  # of a curvature, relative to the Hessian's norm


class NoMinimum(ValueError):
    """There is nothing that an implicit gradient could be held to."""


@dataclass(frozen=True)
class AtMinimum:
    """s_0 is the minimum near which the learner's own run ends, by Newton's method with the Hessian in full; no steps."""

    learner: Learner

    @property
    def steps(self) -> int:
        return 0

    def length(self, support: Batch) -> int | Tensor:
        return self.learner.length(support)

    def adapts(self, name: str) -> bool:
        return self.learner.adapts(name)

    def init(self, phi: MetaParams, support: Batch) -> State:
        *_, (k, state) = inner_loop(self.learner, phi, support, held)
        for done in range(NEWTON):
            f, x = self.learner.inner(phi, state, support, k)
            if (size := sum(p.numel() for p in x.values())) > MANY:
                raise NoMinimum(
                    f"{size} numbers adapt, and the check of an implicit gradient takes {MANY} at most: take a smaller network."
                )
            value, flat = _flattened(f, x)
            gradient, hessian = grad(value)(flat), jacrev(grad(value))(flat)
            if not done and not gradient.isfinite().all():
                raise NoMinimum(
                    f"the inner run diverges (its end has the loss {value(flat).item():.2g}), so that there is no implicit "
                    "gradient to compare with: take a smaller step size."
                )
            if not hessian.isfinite().all() or not _is_positive(hessian):
                break
            state = trees.replaced(state, x, _parts(flat - torch.linalg.solve(hessian, gradient), x))
            if gradient.norm() <= LEAST * (1 + flat.norm()):
                # A rule at rest: where it is judged at a mean of the run, that has come to the minimum too.
                return self.learner.inherit(state, self.learner.heritage(self.learner.init(phi, support)))
        if gradient.isfinite().all() and hessian.isfinite().all() and _is_positive(hessian):
            raise NoMinimum(
                f"the inner objective curves upwards where {NEWTON} steps of Newton's method end, but its gradient is still "
                f"{gradient.norm():.2g} long there: it has a part that its second derivative doesn't see, such as one behind "
                "detach() in the model or the loss, or the run ends too far from the minimum, and more steps bring it nearer."
            )
        lowest = torch.linalg.eigvalsh(hessian)[0] if hessian.isfinite().all() else torch.tensor(torch.nan)
        raise NoMinimum(
            f"the inner objective has no minimum near the run's end (its gradient is {gradient.norm():.2g} long, the least "
            f"curvature {lowest:.2g}), so that there is no implicit gradient to compare with: a larger prox gives it one, more "
            "steps may come near one, and damping beyond that curvature at least keeps the solver from exploding."
        )

    def inner(self, phi: MetaParams, state: State, support: Batch, k: Tensor) -> tuple[Loss, Params]:
        return self.learner.inner(phi, state, support, k)

    def apply(self, phi: MetaParams, state: State, grads: Params, loss: Tensor, k: Tensor) -> State:
        return self.learner.apply(phi, state, grads, loss, k)

    def loss(self, phi: MetaParams, state: State, support: Batch, batch: Batch, k: Tensor) -> tuple[Tensor, Info]:
        return self.learner.loss(phi, state, support, batch, k)

    def weights(self, phi: MetaParams, state: State) -> Params:
        return self.learner.weights(phi, state)

    def heritage(self, state: State) -> State:
        return self.learner.heritage(state)

    def inherit(self, state: State, heritage: State) -> State:
        return self.learner.inherit(state, heritage)


@dataclass(frozen=True, repr=False)
class Direct(Implicit):
    """The implicit gradient with the Hessian in full, in place of a solver that knows its products alone."""

    def solve(self, learner: Learner, phi: MetaParams, state: State, task: Task, k: Tensor, b: Params) -> Params:
        value, flat = _flattened(*learner.inner(phi, state, task.support, k))
        slopes = torch.cat([b[n].reshape(-1) for n in b])
        return _parts(torch.linalg.solve(jacrev(grad(value))(flat), slopes), b)


def _flattened(f: Loss, x: Params) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """f as a function of one vector, and the vector at x."""
    return lambda flat: f(_parts(flat, x))[0], torch.cat([p.reshape(-1) for p in x.values()])


def _parts(flat: Tensor, x: Params) -> Params:
    pieces: tuple[Tensor, ...] = torch.split(flat, [p.numel() for p in x.values()])
    return {n: piece.view(p.shape) for piece, (n, p) in zip(pieces, x.items(), strict=True)}


def _is_positive(hessian: Tensor) -> bool:
    """Whether it curves upwards in all directions, beyond rounding."""
    least = FLAT * hessian.norm() * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return not torch.linalg.cholesky_ex(hessian - least).info.any()
