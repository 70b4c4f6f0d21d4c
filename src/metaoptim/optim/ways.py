"""The ways in which a step may call its rule, the quickest first: from where one fails, the next is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.callers import warn
from metaoptim.core.random import rewinder
from metaoptim.core.types import Params, Rule, State
from metaoptim.engine.faults import sentence
from metaoptim.engine.graphs.graphs import Graphs
from metaoptim.engine.graphs.guards import Guards
from metaoptim.optim.call import Work, update
from metaoptim.optim.settings import own_decay

Found = TypeVar("Found")
Calls = Sequence[tuple[Rule, bool]]  # a rule, and whether what it is given is stacked

COMPILED, STACKED, APART = "compiled", "stacked", "apart"
_WITHOUT = {COMPILED: "steps are not compiled", STACKED: "weights of one shape are moved one by one"}


class Ways:
    """Takes a step in the quickest way that the rule lets it take.

    Args:
        rule: the rule.
        compiled: whether one graph, which Inductor compiles, is tried first.
    """

    def __init__(self, rule: Rule, compiled: bool) -> None:
        self.rule, self.left = rule, [COMPILED, STACKED, APART] if compiled else [STACKED, APART]
        self.graphs = Graphs(Guards({"the rule": rule}), compiled=True, as_made=True) if compiled else None

    def taken(self, run: Callable[[str], Found]) -> Found:
        """run(way), in the first way that works, which is the first from here on; what fails in all raises its own error."""
        failed: list[Exception] = []
        for way in self.left[:-1]:
            back = rewinder()
            try:
                found = run(way)
            except Exception as error:  # torch can raise anything where a rule can't be mapped or traced
                back()
                failed.append(error)
            else:
                break
        else:
            found = run(self.left[-1])
        if failed:
            since = " and ".join(_WITHOUT[way] for way, _ in zip(self.left, failed, strict=False))
            warn(f"{sentence(failed[0], self.rule, taken_over=True)}. From here on, {since}.")
        self.left = self.left[len(failed) :]
        return found

    def moved(self, way: str, calls: Calls, work: Sequence[Work]) -> list[tuple[Params, State]]:
        """Updates and states after them, of each call."""
        if self.graphs is None or way != COMPILED or not work:
            return [update(*call, own) for call, own in zip(calls, work, strict=True)]
        leaves: list[Tensor] = []
        structure = trees.take(work, leaves)

        def function(*inputs: Tensor) -> tuple[Sequence[Tensor], object]:
            parts, outputs = trees.put(structure, iter(inputs)), list[Tensor]()
            found = [update(*call, own, compiled=True) for call, own in zip(calls, parts, strict=True)]
            return outputs, trees.take(found, outputs)

        self.graphs.look()
        name = tuple((own_decay(rule), stacked) for rule, stacked in calls), structure  # what else a rule has, guards see
        tensors, beside = self.graphs(name, function, leaves)
        moved: list[tuple[Params, State]] = trees.put(beside, iter(tensors))
        return moved
