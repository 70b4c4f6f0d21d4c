"""How the gradients of the tasks of a batch become one, in whichever way they were computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.brief import brief, shapes
from metaoptim.core.callers import where
from metaoptim.core.types import Info, MetaOptimizer, MetaParams


class Kept(NamedTuple):
    """What is kept of the gradients of a few tasks: the sum of a part of φ, and of the rest each one, with a leading axis."""

    added: MetaParams
    each: MetaParams


@dataclass(frozen=True)
class Reducer:
    """Puts gradients together as a meta-optimizer's `reduction` says.

    For a mean or a sum they are added up as they come. Where they are weighed, all T are kept until their inner products are
    known; but what is a training task's own (the heads of `Heads`) is shared by none, and is averaged.
    """

    method: MetaOptimizer

    @property
    def weighs(self) -> bool:
        """Whether weights are made of the gradients."""
        return not isinstance(self.method.reduction, str)

    def parted(self, grad: MetaParams) -> Kept:
        """What is added up, and what is weighed."""
        if not self.weighs:
            return Kept(grad, MetaParams({}, {}))
        names = getattr(getattr(self.method.learner, "pooled", None), "own", ())
        own = trees.select(grad.rule, names.__contains__)
        return Kept(MetaParams({}, own), grad._replace(rule=trees.select(grad.rule, lambda n: n not in own)))

    def of_piece(self, grad: MetaParams, stacked: bool) -> Kept:
        """What is kept of the gradients of several tasks, stacked, or of the one of a single task."""
        added, each = self.parted(grad)
        if stacked:
            return Kept(trees.map_tensors(lambda g: g.sum(0), added), each)
        return Kept(added, trees.map_tensors(lambda g: g[None], each))

    def one(self, added: MetaParams, pieces: Sequence[MetaParams], count: int, keys: Tensor) -> tuple[MetaParams, Info]:
        """The gradient of T tasks with these keys, in their order, and what to report of how it was made."""
        scale = 1.0 if self.method.reduction == "sum" else 1.0 / count
        total: MetaParams = trees.map_tensors(lambda g: g * scale, added)
        if isinstance(self.method.reduction, str):
            return total, {}
        each: MetaParams = trees.cat(pieces) if len(pieces) > 1 else pieces[0]
        gram = torch.stack([g.flatten(1) @ g.flatten(1).mT for g in trees.flatten(each)]).sum(0)
        weights = self._weights(gram, int(keys.sum()))
        mixed = trees.map_tensors(lambda g: torch.tensordot(weights.to(g.dtype), g, 1), each)
        pairs = max(1, count * (count - 1))
        told = {"conflicts": (gram < 0).sum().to(gram.dtype) / pairs}
        return MetaParams(mixed.weights, mixed.rule | total.rule), told

    def _weights(self, gram: Tensor, key: int) -> Tensor:
        """What the reduction makes of the inner products. ValueError where its `weigh` fails, or gives others."""
        own: Any = self.method.reduction
        who, given = f"`weigh` of the reduction {brief(own)}", f"the inner products of T gradients, here {tuple(gram.shape)}"
        try:
            weights = own.weigh(gram, key)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, TypeError) as error:
            at = f" ({place})" if (place := where(error)) else ""
            raise ValueError(f"{who} failed{at}: {error}; it is given {given}, and a key.") from error
        if not isinstance(weights, Tensor) or weights.shape != gram.shape[:1]:
            raise ValueError(f"{who} returned {shapes(weights)}; expected a tensor of T weights, of {given}.")
        if bool(gram.isfinite().all()) and not bool(weights.isfinite().all()):
            raise ValueError(f"{who} returned weights that are not finite, of {given}, all of which are.")
        return weights

    def bytes(self, phi: MetaParams, count: int) -> int:
        """Of the T gradients that are kept to be weighed, twice, for they are put together; 0 where none is."""
        return 2 * count * sum(x.nbytes for x in trees.flatten(self.parted(self.method.split(phi)[0]).each))
