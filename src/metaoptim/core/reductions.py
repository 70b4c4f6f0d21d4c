"""How the meta-gradients of T tasks become one: by their mean, their sum, or weights that are a function of them."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any, Literal, Protocol

from torch import Tensor

from metaoptim.core.brief import brief


class Reduction(Protocol):
    """A frozen dataclass that weighs the gradients of a batch of tasks by their inner products: the update is Σ_t w_t g_t.

    Equal weights of 1/T are the mean. What is a training task's own (a head, see `Heads`) takes no part: there each gradient
    counts 1/T, as in the mean.
    """

    def weigh(self, gram: Tensor, key: int) -> Tensor:
        """w (T) of the inner products ⟨g_s, g_t⟩ (T, T) over all that the tasks share; random numbers come from the key."""
        ...


Reduce = Literal["mean", "sum", "upgrad", "pcgrad", "mgda"] | Reduction

NAMED = {
    "upgrad": "metaoptim.reductions:UPGrad",
    "pcgrad": "metaoptim.reductions:PCGrad",
    "mgda": "metaoptim.reductions:MGDA",
}
"""Where those with a name are: they need packages beside torch, which nothing here imports before somebody asks for one."""


def reduction_called(given: Any) -> Literal["mean", "sum"] | Reduction:
    """The reduction of a name, or one of the user's own as it is; a ValueError for anything else."""
    if isinstance(given, str) and given in ("mean", "sum"):
        return "mean" if given == "mean" else "sum"
    found = resolve_name(NAMED[given])() if isinstance(given, str) and given in NAMED else given
    if isinstance(found, type) or not hasattr(found, "weigh"):
        raise ValueError(
            f"reduction {brief(given)} is unknown: choose mean or sum, or one that heeds conflicts between tasks, "
            f"{', '.join(NAMED)} or an object with `weigh`, as those of mo.reductions have."
        )
    weighing: Reduction = found
    return weighing
