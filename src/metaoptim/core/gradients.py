"""In which way a gradient is taken, as far as later differentiation goes.

`exact`, `held` and what is `between` them are for the inner loop; `outermost` and `pullback` for what nothing differentiates
again. `hold` is for a value in a rule that is to be a constant of the meta-gradient.

All of them are function transforms of torch, which can be mapped and traced; but inside `autograd`, where nothing maps or
traces, they are ordinary autograd: what runs then is the loop that people write, as fast, and with all that it can take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vjp

from metaoptim.core import trees
from metaoptim.core.types import Gradient, Loss, Order, Params

_AUTOGRAD: ContextVar[bool] = ContextVar("_AUTOGRAD", default=False)

_NO_HOOKS = (
    "the model computes values again in the backward pass (torch.utils.checkpoint, or hooks on saved tensors), with weights "
    'that are no longer those of the step: leave that out, and use memory="steps" of the engine in its place'
)


@contextmanager
def autograd(on: bool = True) -> Iterator[None]:
    """Inside, gradients are ordinary autograd's; with on=False, function transforms again."""
    token = _AUTOGRAD.set(on)
    try:
        yield
    finally:
        _AUTOGRAD.reset(token)


def by_autograd() -> bool:
    """Whether gradients are ordinary autograd's here."""
    return _AUTOGRAD.get()


def exact(f: Loss, x: Params) -> tuple[Params, Tensor]:
    """(∇f(x), f(x)), to be differentiated again."""
    if _AUTOGRAD.get():
        # Views, because f may read φ's own tensors in another role, in which they are no part of x.
        here = {n: p if p.grad_fn is not None else p.view_as(p) if p.requires_grad else _leaf(p) for n, p in x.items()}
        loss = f(here)[0]
        return dict(zip(here, _slopes([loss], list(here.values()), again=True), strict=True)), loss
    grads, (loss, _) = grad_and_value(f, has_aux=True)(x)
    return grads, loss


def held(f: Loss, x: Params) -> tuple[Params, Tensor]:
    """(∇f(x), f(x)) as constants of every outer differentiation, for which no graph is recorded."""
    with torch.no_grad():
        grads, (loss, _) = outermost(f, x)
        return grads if _AUTOGRAD.get() else {n: g.detach() for n, g in grads.items()}, loss.detach()


def between(share: Tensor) -> Gradient:
    """(∇f(x), f(x)), of whose later derivatives a share is left out: 1 is `held`, 0 is `exact` (0-dim, as a rule in 0 … 1)."""

    def gradient(f: Loss, x: Params) -> tuple[Params, Tensor]:
        grads, loss = exact(f, x)
        return {n: blended(g, share) for n, g in grads.items()}, blended(loss, share)

    return gradient


def blended(x: Tensor, share: Tensor) -> Tensor:
    """x, of whose derivatives a share is left out."""
    constant = x.detach()
    return constant + (1 - share.to(x.dtype)) * (x - constant)


def taken(first_order: Order, outer_step: Tensor) -> Gradient:
    """How inner gradients are taken in an outer step."""
    if isinstance(first_order, bool):
        return held if first_order else exact
    return between(first_order(outer_step))


def outermost(f: Callable[[Any], tuple[Tensor, Any]], x: Any) -> tuple[Any, tuple[Tensor, Any]]:
    """(∇f(x), (f(x), what else f returned)) where nothing differentiates again: no graph of the backward pass is built."""
    if _AUTOGRAD.get() and type(x) is dict:  # at every inner step: with less ado than a pullback of trees
        own = {n: _leaf(p) for n, p in x.items()}
        value, others = _run(f, own)
        return dict(zip(own, _slopes([value], list(own.values())), strict=True)), (value.detach(), _detached(others))
    value, pull, others = pullback(f, x)
    return pull(torch.ones_like(value))[0], (value, others)


def pullback(f: Callable[..., tuple[Any, Any]], *args: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]], Any]:
    """(y, a function from a cotangent of y to those of the arguments, what else f returned), for (y, others) = f(*args).

    The function may be called once.
    """
    if not _AUTOGRAD.get():
        differentiated: Any = vjp(f, *args, has_aux=True)
        value, pull, others = differentiated
        return value, partial(pull, retain_graph=False, create_graph=False), others
    leaves: list[Tensor] = []
    structure = trees.take(args, leaves)
    own = [_leaf(x) for x in leaves]
    y, others = _run(f, *trees.put(structure, iter(own)))

    def back(cotangent: Any) -> tuple[Any, ...]:
        slopes = _slopes(trees.flatten(y), own, trees.flatten(cotangent))
        return cast(tuple[Any, ...], trees.put(structure, iter(slopes)))

    return _detached(y), back, _detached(others)


def _run(f: Callable[..., tuple[Any, Any]], *args: Any) -> tuple[Any, Any]:
    """f(*args) with a graph of autograd."""
    with torch.enable_grad(), torch.autograd.graph.disable_saved_tensors_hooks(_NO_HOOKS):
        y, others = f(*args)
    if (found := _INSPECTED.get()) is not None:
        found.look([x for x in trees.flatten(y) if x.requires_grad])
    return y, others


def _detached(tree: Any) -> Any:
    return trees.map_tensors(Tensor.detach, tree)


class Inspection:
    """What is found in the graphs of autograd while it looks at them: only at gradients that nothing differentiates again.

    once: whether a function that can be differentiated once was differentiated once already, which `torch.autograd.grad` passes
        over. parameters: those that were read beside the arguments, for which no gradient is taken. reached: whether the result
        depends on an argument. outputs: how many classes a model's outputs choose among.
    """

    def __init__(self) -> None:
        self.once, self.looked, self.reached, self.outputs = False, False, False, 0
        self.parameters: dict[int, nn.Parameter] = {}

    def look(self, outputs: list[Tensor]) -> None:
        self.looked, self.reached = True, self.reached or bool(outputs)
        nodes: list[Any] = [x.grad_fn for x in outputs if x.grad_fn is not None]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            self.once |= type(node).__name__ == "Error"
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, nn.Parameter):
                self.parameters[id(leaf)] = leaf
            fresh = {before for before, _ in node.next_functions if before is not None} - seen
            seen |= fresh
            nodes += fresh


_INSPECTED: ContextVar[Inspection | None] = ContextVar("_INSPECTED", default=None)


@contextmanager
def inspected() -> Iterator[Inspection]:
    """Inside, graphs are looked at, where gradients are autograd's."""
    token = _INSPECTED.set(found := Inspection())
    try:
        yield found
    finally:
        _INSPECTED.reset(token)


def shown(output: Tensor, axis: int) -> None:
    """Tells an inspection, if there is one, of a model's outputs with classes along an axis: of those that can win."""
    if (found := _INSPECTED.get()) is not None:
        found.outputs = int(output.detach().movedim(axis, -1).flatten(0, -2).isfinite().any(0).sum())


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point() or x.is_complex())


def _slopes(ys: list[Tensor], xs: list[Tensor], cotangents: list[Tensor] | None = None, again: bool = False) -> list[Tensor]:
    """Autograd's gradient; zeros for tensors on which nothing depends."""
    moving = [x for x in xs if x.requires_grad]
    reached = [i for i, y in enumerate(ys) if y.requires_grad]
    if not moving or not reached:
        return [torch.zeros_like(x) for x in xs]
    along = None if cotangents is None else [cotangents[i] for i in reached]
    found = iter(torch.autograd.grad([ys[i] for i in reached], moving, along, create_graph=again, materialize_grads=True))
    return [next(found) if x.requires_grad else torch.zeros_like(x) for x in xs]


_HOLDER: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("_HOLDER", default=None)


def hold(x: Tensor) -> Tensor:
    """x as a constant of the meta-gradient, on purpose: a check holds it too, while it takes a `detach` for a fault."""
    holder = _HOLDER.get()
    return x.detach() if holder is None else holder(x)


@contextmanager
def holding(holder: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `hold` returns what the holder makes of a value."""
    token = _HOLDER.set(holder)
    try:
        yield
    finally:
        _HOLDER.reset(token)


@contextmanager
def recorded(tape: list[Tensor]) -> Iterator[None]:
    """Inside, the values that are held are put on a tape."""

    def record(x: Tensor) -> Tensor:
        tape.append(x.detach())
        return tape[-1]

    with holding(record):
        yield


@contextmanager
def replayed(tape: list[Tensor]) -> Iterator[None]:
    """Inside, the values that are held are those of a tape, in their order, whatever they would be."""
    left = iter(tape)
    with holding(lambda x: next(left)):
        yield
