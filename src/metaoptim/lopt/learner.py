"""The training of a network by an update rule, as the engine, the estimators and the gradient doctor know it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.types import Batch, Info, Loss, MetaParams, Params, Rule, State, Step, read_out
from metaoptim.learners import Network
from metaoptim.learners.gradient import Inner
from metaoptim.lopt.mixture import Family
from metaoptim.lopt.problem import Problems
from metaoptim.rules import Chain


def called(rule: Rule) -> str:
    """What a learned rule is called in tables: a chain by its parts, "learned Celo2, Average"."""
    parts = rule.rules if isinstance(rule, Chain) else (rule,)
    return f"learned {', '.join(type(part).__name__ for part in parts)}"


@dataclass(frozen=True)
class Optimizee:
    """K steps of a rule on a problem. φ is ψ alone: where the weights start, the problem says.

    Args:
        problems: the family, whose tasks' layout `problem` describes.
        rule: the rule that is learnt.
    """

    problems: Family
    rule: Rule

    @property
    def steps(self) -> int:
        return self.problems.steps

    def length(self, support: Batch) -> Tensor:
        horizon: Tensor = support["horizon"][0]
        return horizon

    def adapts(self, name: str) -> bool:
        return True

    def init(self, phi: MetaParams, support: Batch) -> Inner:
        start = trees.index(support["start"], 0)
        return Inner(start, self.rule.init(phi.rule, start))

    def inner(self, phi: MetaParams, state: Inner, support: Batch, k: Tensor) -> tuple[Loss, Params]:
        batch, scale = _at(k, support, support), trees.index(support["scale"], 0)
        return lambda x: self.problems.training(x, scale, batch), state.fast

    def apply(self, phi: MetaParams, state: Inner, grads: Params, loss: Tensor, k: Tensor) -> Inner:
        updates, rule = self.rule.update(phi.rule, grads, state.rule, state.fast, Step(k, loss))
        return Inner(trees.add(state.fast, updates), rule)

    def loss(self, phi: MetaParams, state: Inner, support: Batch, batch: Batch, k: Tensor) -> tuple[Tensor, Info]:
        return self.problems.judged(self.weights(phi, state), trees.index(support["scale"], 0), _at(k, support, batch))

    def weights(self, phi: MetaParams, state: Inner) -> Params:
        return read_out(self.rule, phi.rule, state.rule, state.fast)

    @property
    def network(self) -> Network | None:
        """What the problems train, where it is known: its weights are no part of φ."""
        return getattr(self.problems.loss, "network", None) if isinstance(self.problems, Problems) else None

    def network_at(self, support: Batch) -> tuple[Network, Params, Batch] | None:
        """That network, its weights at the start of a problem, and a minibatch."""
        if self.network is None:
            return None
        x, y = trees.map_tensors(lambda t: t[0, 0], support["batches"])
        return self.network, trees.index(support["start"], 0), (x, y)

    def heritage(self, state: Inner) -> State:
        return state.rule

    def inherit(self, state: Inner, heritage: State) -> Inner:
        return state._replace(rule=heritage)


def _at(k: Tensor, support: Batch, batch: Batch) -> Batch:
    """The minibatch of step k; of a stream that never changes, its one."""
    row = (k - support["first"][0]).reshape(1)
    return trees.map_tensors(lambda x: x[0, 0] if x.shape[1] == 1 else x[0].index_select(0, row).squeeze(0), batch["batches"])
