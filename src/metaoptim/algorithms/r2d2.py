"""R2-D2: ridge regression as the base learner.

    W = Xᵀ (X Xᵀ + λI)⁻¹ Y                            X: f_θ(x) and a 1 for each of the support's examples; Y: classes
    f(x) = s · [f_θ(x), 1] W                          logits
    (θ, λ, s) ← (θ, λ, s) − β ∇ mean_i L_i(f; Q_i)    through the solution, no inner steps

Paper: Bertinetto, Henriques, Torr and Vedaldi 2019, https://arxiv.org/abs/1805.08136, section 3.

Deviations: λ and s are learnt as their logarithms, so that they stay positive; the paper adds a learnt number to all logits,
which no softmax sees. The published code divides X and Y by √M for M examples, and keeps λ at 50, which is λ = 50 M here. Its
networks have more features, and it trains with more ways than it tests. Where M exceeds the number of features, the same
solution is that of the smaller system (XᵀX + λI) W = XᵀY. Tasks are averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import pad

from metaoptim.core import linalg
from metaoptim.core.checks import check_counts, check_flags, check_positive
from metaoptim.core.types import Batch, MetaOptimizer, MetaParams, Normalisation, State
from metaoptim.estimators import Unroll
from metaoptim.learners import ClosedForm, Network, embedded, logarithms, mask, members

SCALE = 10.0  # of classes


@dataclass(frozen=True)
class Ridge:
    """λ and s, where they are not learnt (s = None: 10 for classes, 1 for numbers, times what is learnt); ways: the number of
    classes, where the network's output is the features."""

    ridge: float
    scale: float | None
    learn_ridge: bool = True
    learn_scale: bool = True
    ways: int | None = None

    def fit(self, network: Network, phi: MetaParams, support: Batch) -> State:
        """W (D + 1, N)."""
        x, y = self.bordered(network, phi, support[0], None), support[1]
        target = y if isinstance(y, Tensor) and y.is_floating_point() else members(y, self.ways or network.outputs).to(x.dtype)
        return linalg.ridge(x, target, phi.rule["log_ridge"].exp() if self.learn_ridge else self.ridge)

    def predict(self, network: Network, phi: MetaParams, state: State, support: Batch, x: Tensor) -> Tensor:
        """Logits (B, N), or numbers like the support's targets."""
        learnt = phi.rule["log_scale"].exp() if self.learn_scale else self.scale or 1.0
        scale = SCALE * learnt if self.scale is None and not support[1].is_floating_point() else learnt
        logits: Tensor = scale * (self.bordered(network, phi, x, support) @ state)
        return logits

    def bordered(self, network: Network, phi: MetaParams, x: Tensor, support: Batch | None) -> Tensor:
        """Features and a 1 (B, D + 1)."""
        return pad(embedded(network, phi.weights, x, support, self.ways), (0, 1), value=1.0)


def r2d2(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    ridge: float = 1.0,
    scale: float | None = None,
    learn_ridge: bool = True,
    learn_scale: bool = True,
    head: str | None = None,
    ways: int | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns features on which ridge regression fits a task: to classes, or to numbers.

    Args:
        ridge: λ, at the start or throughout.
        scale: s, at the start or throughout: regression to 0 and 1 makes small logits. None: 10 for classes, and 1 for targets
            that are floats, which are predicted as they are.
        learn_ridge: whether λ is learnt.
        learn_scale: whether s is learnt.
        head: the layer that is left out, whose inputs are the features and whose number of outputs is that of the classes;
            none: the one called `head`, else the last linear layer.
        ways: the number of classes, for a network whose output (B, D) is the features: nothing is left out then.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_positive(ridge=ridge, scale=scale)
    check_flags(learn_ridge=learn_ridge, learn_scale=learn_scale)
    check_counts(ways=ways)
    network, base = Network(net, loss, normalisation, head), Ridge(ridge, scale, learn_ridge, learn_scale, ways)
    learnt = {"ridge": ridge} if learn_ridge else {}
    learnt |= {"scale": scale or 1.0} if learn_scale else {}
    weights, learns = network.weights(), mask(network, "all" if ways else "body")
    phi = MetaParams(weights, logarithms(weights, **learnt))
    return MetaOptimizer(ClosedForm(network, base.fit, base.predict), Unroll(), phi, learns, name="r2d2")
