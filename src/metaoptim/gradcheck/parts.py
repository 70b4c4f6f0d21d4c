"""A part of a meta-optimizer as a function of its own: are its first and second derivative what it says they are?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from metaoptim.core import trees
from metaoptim.core.types import Params
from metaoptim.gradcheck.differences import TOLERANCE, distance, probe, seeded

Function = Callable[[Params], Any]
Scalar = Callable[[Params], Tensor]

INPUT = "input "
"""How the names of a layer's inputs start; its other tensors are weights."""

GRADIENT = "gradient "
"""How the names of a rule's gradients start."""

OLD = "setup_context"  # what torch.func misses in an autograd.Function whose forward takes `ctx`
MANY = 3  # names in a sentence


class Part(NamedTuple):
    """A function of named tensors, at some values of them; `fresh` gives it anew, in the state that it started in."""

    name: str
    fresh: Callable[[], Function]
    at: Params


def fault(part: Part, *, twice: bool = False, mapped: bool = False, outside: bool = False) -> str | None:
    """What is wrong with a part's derivatives, and the fix; None where nothing is found, or where it has none."""
    usable = part.at and all(x.dtype == torch.float64 for x in part.at.values())
    once = _scalar(part) if usable else None
    if once is None:
        return None
    for order in _orders(once, part.at, grad, twice):
        if reason := _wrong(order, part.at):
            old = OLD in reason  # which plain autograd takes: a wrong backward is what is to be told first
            plain = (_wrong(other, part.at) for other in _orders(once, part.at, _by_autograd, twice)) if old else ()
            return next(filter(None, plain), reason)
        if mapped and (reason := _under_vmap(order, part.at)):
            return reason
    return _outside_vmap(once(), part.at) if outside else None


class Order(NamedTuple):
    """A scalar of a part whose gradient is the part's derivative of that order."""

    name: str
    fresh: Callable[[], Scalar]
    grad: Callable[[Scalar], Function]

    def value(self, at: Params) -> float:
        with torch.no_grad(), draws(at):
            return self.fresh()(at).item()

    def gradient(self, at: Params) -> Params:
        with draws(at):
            slope: Params = trees.map_tensors(torch.Tensor.detach, self.grad(self.fresh())(at))
        return slope


def _scalar(part: Part) -> Callable[[], Scalar] | None:
    """Outputs along a fixed random vector, curved, so that a linear part has a second derivative; None without outputs."""
    with torch.no_grad(), draws(part.at):
        outputs = floats(part.fresh()(part.at))
    if not outputs:
        return None
    sizes = {n: x.square().mean().sqrt() + (x == 0).all() for n, x in outputs.items()}
    along = random_like(outputs, 1)

    def fresh() -> Scalar:
        function = part.fresh()

        def scalar(at: Params) -> Tensor:
            scaled = {n: x / sizes[n] for n, x in floats(function(at)).items()}
            return trees.dot(along, {n: x + x.square() / 2 for n, x in scaled.items()})

        return scalar

    return fresh


def _orders(once: Callable[[], Scalar], at: Params, grad: Callable[[Scalar], Function], twice: bool) -> list[Order]:
    """Its first derivative and, if that matters, its second, by torch.func or by plain autograd."""
    along = random_like(at, 2)

    def slope() -> Scalar:
        f = grad(once())
        return lambda x: trees.dot(f(x), along)

    return [Order("first", once, grad)] + [Order("second", slope, grad)] * twice


def _by_autograd(f: Scalar) -> Function:
    """As torch.func.grad."""

    def slope(at: Params) -> Params:
        with torch.enable_grad():
            here = {n: x if x.requires_grad else x.detach().requires_grad_() for n, x in at.items()}
            found = torch.autograd.grad(f(here), list(here.values()), create_graph=True, materialize_grads=True)
        return dict(zip(here, found, strict=True))

    return slope


def _wrong(order: Order, at: Params) -> str | None:
    try:
        slope = order.gradient(at)
    except Exception as error:  # whatever torch and a user's code can say
        old = OLD in str(error)
        who, where = ("torch.func, as vmap and graphs use it,", ", where plain autograd can") if old else ("torch", "")
        return f"{who} can't take its {order.name} derivative{where} ({said(error)}); {_fix(error)}"
    gap = probe(order.value, at, slope)[1]
    if gap <= TOLERANCE:
        return None
    off = [n for n in at if probe(order.value, at, slope, [n])[1] > TOLERANCE] or list(at)
    hidden = [n for n in off if not slope[n].any()]
    if order.name == "second":
        return (
            f"its second derivative in {names_of(off)} is off by {percent(gap)}: what its backward computes is hidden from "
            "autograd (a detach, or @once_differentiable?); write the backward with differentiable operations"
        )
    if hidden:
        return (
            f"autograd sees no way from {names_of(hidden)} to its output, though there is one: a detach, `.data`, no_grad or "
            "numpy; compute with the tensors themselves"
        )
    return (
        f"its first derivative in {names_of(off)} is off by {percent(gap)}: part of it is hidden from autograd (a detach, "
        "`.data`, no_grad), or a custom backward is wrong"
    )


def _under_vmap(order: Order, at: Params) -> str | None:
    rows = [at, trees.add(at, random_like(at, 3), 0.1)]
    try:
        with draws(at):
            inside = vmap(grad(order.fresh()), randomness="same")(trees.stack(rows))
    except Exception as error:
        return f"vmap can't map its {order.name} derivative ({said(error)}); {_fix(error)}"
    gap = distance(inside, trees.stack([order.gradient(row) for row in rows]))
    if gap <= TOLERANCE:
        return None
    return f'its {order.name} derivative under vmap is off by {percent(gap)}; map the tasks with batching="loop"'


def _outside_vmap(f: Scalar, at: Params) -> str | None:
    """A second derivative whose outer gradient is taken outside of vmap: torch's rules for some norms get it wrong."""
    inputs, along = {n: x for n, x in at.items() if n.startswith(INPUT)}, random_like(at, 2)
    if not inputs:
        return None
    shifts = trees.stack([random_like(inputs, seed) for seed in (3, 4)])

    def one(x: Params, shift: Params) -> Tensor:
        return trees.dot(grad(f)(x | {n: x[n] + 0.1 * v for n, v in shift.items()}), along)

    mapped = vmap(one, in_dims=(None, 0), randomness="same")
    inside = vmap(grad(one), in_dims=(None, 0), randomness="same")(at, shifts)
    gap = distance(grad(lambda x: mapped(x, shifts).sum())(at), trees.map_tensors(lambda g: g.sum(0), inside))
    if gap <= TOLERANCE:
        return None
    return (
        f"its second derivative is off by {percent(gap)} with the gradient outside of vmap (pytorch/functorch#534) "
        "and right inside; take vmap(grad(task_loss)), or swap it with metaoptim.nn.convert(module)"
    )


def snapshot(x: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return x.detach().clone() if isinstance(x, Tensor) else x


def floats(output: Any) -> Params:
    """The floating-point tensors among them."""
    leaves = enumerate(trees.flatten(output))
    return {str(i): x for i, x in leaves if isinstance(x, Tensor) and x.is_floating_point()}


def random_like(like: Params, seed: int) -> Params:
    """Random numbers in the shapes of these tensors, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(x.shape, generator=draw, dtype=x.dtype, device=draw.device).to(x.device) for n, x in like.items()}


def draws(at: Params) -> AbstractContextManager[None]:
    """Inside, torch draws the same each time."""
    return seeded(next((x.device for x in at.values()), torch.get_default_device()))


def names_of(names: list[str]) -> str:
    """Tensors of a part, for a sentence."""
    shown = ["its input" if n.startswith(INPUT) else "its gradients" if n.startswith(GRADIENT) else f"`{n}`" for n in names]
    shown = list(dict.fromkeys(shown))
    return ", ".join(shown[:MANY]) + (", …" if len(shown) > MANY else "")


def percent(error: float) -> str:
    """Two digits, or all of a whole number."""
    return f"{100 * error:,.0f} %" if error >= 1 else f"{100 * error:.2g} %"


def said(error: Exception) -> str:
    """What torch says, in one line."""
    return " ".join(str(error.__cause__ or error).split()).partition(". ")[0].rstrip(" .")[:200]


def _fix(error: Exception) -> str:
    text = str(error)
    if OLD in text:
        return "give its autograd.Function a `setup_context`, and `generate_vmap_rule = True`"
    if "once_differentiable" in text:
        return "drop @once_differentiable and write the backward with differentiable operations"
    if "vmap" in text or "batching" in text:
        return 'write it with operations that vmap knows, or map the tasks with batching="loop"'
    return "write it with operations that torch.func can differentiate twice"
