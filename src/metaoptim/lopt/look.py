"""Looks at what a family of training problems gives, once, for what would be wrong silently or fail far from its cause."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.brief import brief
from metaoptim.engine.faults import explained
from metaoptim.tasks.function import other_generators

if TYPE_CHECKING:
    from metaoptim.lopt.problem import Problems

FUNCTIONS = {
    "start": "seed -> weights by name",
    "batches": "(seed, stream, first, count) -> minibatches",
    "loss": "(weights, minibatch) -> (loss, reports)",
}
AGAIN = "draw every random number from a generator that begins with the seed, such as torch.Generator().manual_seed(seed)"


def check_functions(name: Any, **functions: Any) -> None:
    """A name, and the functions of a family."""
    if not isinstance(name, str):
        raise ValueError(f"name={brief(name)}: it must be a text.")
    for what, function in functions.items():
        if not callable(function):
            raise ValueError(f"{what}={brief(function)}: it must be a function, {FUNCTIONS[what]}.")


def look(family: Problems, seed: int) -> None:
    """A ValueError for a start, minibatches or a loss that nothing can be trained with."""
    who = f"the family `{family.name}`"
    start, batch = family.start(seed), family.batches(seed, "query", 0, 2)
    _check_start(start, who)
    _check_batches(batch, 2, who)
    with other_generators():
        if not _same(start, family.start(seed)):
            raise ValueError(f"`start` of {who} gives other weights for the same seed: {AGAIN}.")
        if not _same(batch, family.batches(seed, "query", 0, 2)):
            raise ValueError(f"`batches` of {who} gives other minibatches for the same arguments: {AGAIN}.")
        second = family.batches(seed, "query", 1, 1)
        _check_batches(second, 1, who)
        if not _same(trees.map_tensors(lambda x: x[-1:], batch), second):
            raise ValueError(
                f"`batches` of {who} gives another minibatch for step 1 alone than for steps 0 and 1 together: that of a step "
                "must depend on the seed, the stream and the number of the step, as in default_rng((seed, first + i))."
            )
        weights, minibatch = trees.map_tensors(torch.clone, (start, trees.index(batch, 0)))
        given = {**{f"`{n}`": w for n, w in weights.items()}, "the minibatch": minibatch}
        with explained(given, family), torch.no_grad():
            _check_loss(family.loss(weights, minibatch), who)


def _check_start(start: Any, who: str) -> None:
    named = isinstance(start, dict) and all(isinstance(n, str) and isinstance(w, Tensor) for n, w in start.items())
    if not named or not start or not all(w.is_floating_point() for w in start.values()):
        found = "an empty dictionary" if start == {} else _kind(start)
        raise ValueError(
            f"`start` of {who} returned {found}; it must return a dictionary of weights by name, tensors of floats, such as "
            "{n: p.detach() for n, p in net.named_parameters()}."
        )


def _check_batches(batch: Any, count: int, who: str) -> None:
    leaves = trees.flatten(batch)
    if not leaves or not all(isinstance(x, Tensor) for x in leaves):
        raise ValueError(f"`batches` of {who} returned {_kind(batch)}; it must return tensors, or tuples or dicts of them.")
    if not all(x.ndim and x.shape[0] in (1, count) for x in leaves):
        shapes = " and ".join(str(tuple(x.shape)) for x in leaves)
        raise ValueError(
            f"`batches` of {who} returned shapes {shapes} for count={count}; minibatches must be stacked along a new first "
            f"axis, [{count}, B, …] each, or [1, B, …] where those of all steps are the same."
        )


def _check_loss(found: Any, who: str) -> None:
    loss, reports = found if isinstance(found, tuple) and len(found) == 2 else (None, None)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point() or not isinstance(reports, dict):
        raise ValueError(
            f"`loss` of {who} returned {_kind(found)}; it must return (loss, {{}}): a scalar tensor, the mean over the "
            "minibatch, and what to report beside it."
        )
    if odd := [n for n, x in reports.items() if not isinstance(x, Tensor) or x.ndim]:
        raise ValueError(f"`loss` of {who} reports `{odd[0]}` as {_kind(reports[odd[0]])}; reports must be scalar tensors.")
    if not loss.isfinite():
        raise ValueError(
            f"the loss of {who} is {loss.item()} at the start of a problem, where nothing can be trained; mend its data, its "
            "start or its loss."
        )


def _same(a: Any, b: Any) -> bool:
    return trees.named(a).keys() == trees.named(b).keys() and all(
        torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(trees.flatten(a), trees.flatten(b), strict=True)
    )


def _kind(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    if isinstance(x, tuple):
        return f"({', '.join(map(_kind, x))})"
    return "None" if x is None else type(x).__name__
