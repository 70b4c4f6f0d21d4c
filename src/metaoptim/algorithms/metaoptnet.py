"""MetaOptNet: a convex learner on features, differentiated through its solution.

    K = X Xᵀ                                          X: f_θ(x) for each of the support's M examples, of classes Y
    svm:    α = argmin ½ Σ_n α_nᵀ (K + I) α_n − Σ_m α_m,y(m)     with α_mn ≤ C [n = y(m)], Σ_n α_mn = 0
    ridge:  α = 2 (K + λI)⁻¹ Y
    f(x) = s · Σ_m α_m ⟨f_θ(x_m), f_θ(x)⟩             logits
    (θ, s) ← (θ, s) − β ∇ mean_i L_i(f; Q_i)          no inner steps

Paper: Lee, Maji, Ravichandran and Soatto 2019, https://arxiv.org/abs/1904.03758, section 3.

Deviations: the dual of the SVM (Crammer and Singer's) is descended by a fixed number of accelerated projected steps, each of
which is differentiated, where the paper solves it by an interior point method (3 iterations in the text, 15 in the code) and
differentiates its optimality conditions; the I beside K is the code's. s is learnt as its logarithm, so that it stays positive.
The paper trains with 15 shots whatever is tested, label smoothing and weight decay. Tasks are averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from metaoptim.core import linalg
from metaoptim.core.checks import check_choice, check_counts, check_positive
from metaoptim.core.types import Batch, MetaOptimizer, MetaParams, Normalisation, State
from metaoptim.estimators import Unroll
from metaoptim.learners import ClosedForm, Network, embedded, logarithms, mask, members


@dataclass(frozen=True)
class Convex:
    """The options of `metaoptnet`; ways: the number of classes, where the network's output is the features."""

    base: Literal["svm", "ridge"]
    bound: float
    iterations: int
    ridge: float
    scale: float
    ways: int | None = None

    def fit(self, network: Network, phi: MetaParams, support: Batch) -> State:
        """Σ_m α_m f_θ(x_m) of each class, (D, N)."""
        x = embedded(network, phi.weights, support[0], None, self.ways)
        y = members(support[1], self.ways or network.outputs).to(x.dtype)
        if self.base == "ridge":
            return 2 * linalg.ridge(x, y, self.ridge)
        return x.mT @ linalg.crammer_singer(x @ x.mT, y, self.bound, self.iterations)

    def predict(self, network: Network, phi: MetaParams, state: State, support: Batch, x: Tensor) -> Tensor:
        """Logits (B, N)."""
        similar: Tensor = embedded(network, phi.weights, x, support, self.ways) @ state
        return phi.rule["log_scale"].exp() * similar


def metaoptnet(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    base: Literal["svm", "ridge"] = "svm",
    bound: float = 0.1,
    iterations: int = 30,
    ridge: float = 50.0,
    scale: float = 1.0,
    head: str | None = None,
    ways: int | None = None,
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns features on which a support vector machine, or ridge regression, tells a task's classes apart.

    Args:
        base: the learner, "svm" or "ridge".
        bound: C of the SVM.
        iterations: steps towards the solution of the SVM.
        ridge: λ of ridge regression.
        scale: s at the start.
        head: the layer that is left out, whose inputs are the features and whose number of outputs is that of the classes;
            none: the one called `head`, else the last linear layer.
        ways: the number of classes, for a network whose output (B, D) is the features: nothing is left out then.
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_choice(("svm", "ridge"), base=base)
    check_positive(bound=bound, ridge=ridge, scale=scale)
    check_counts(ways=ways)
    check_counts(1, iterations=iterations)
    network, convex = Network(net, loss, normalisation, head), Convex(base, bound, iterations, ridge, scale, ways)
    weights, learns = network.weights(), mask(network, "all" if ways else "body")
    phi = MetaParams(weights, logarithms(weights, scale=scale))
    return MetaOptimizer(ClosedForm(network, convex.fit, convex.predict), Unroll(), phi, learns, name="metaoptnet")
