"""MAML with the zeroing trick: the head starts every task at 0.

    (w'_i, h'_i) = (w, 0) − α ∇_(w,h) L_i(w, h; S_i) at h = 0        (K such steps) all weights adapt
    w ← w − β ∇_w mean_i L_i(w'_i, h'_i; Q_i)                        the body alone is learnt

Paper: Kao, Chiu and Chen 2022, https://arxiv.org/abs/2106.15367; head_start="equal": Ye and Chao 2022 (UNICORN-MAML),
https://arxiv.org/abs/2106.16245, whose heads start from one learnt vector, h_n = v for every class n.

Deviations: the zeroing trick sets the head to 0 after every outer step, and at test; here every task starts from 0, which is
the same. "equal": v is the mean of the rows of the module's own head, and the bias starts every task at 0. Under a softmax v
cancels in every step: this is "zero" then, to rounding. "fresh" is no paper's. Tasks are averaged, and losses are means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from metaoptim.algorithms.compose import compose
from metaoptim.core.checks import check_choice
from metaoptim.core.types import MetaOptimizer, Normalisation
from metaoptim.estimators import Unroll
from metaoptim.learners import Names, Network
from metaoptim.learners import head_start as start_of
from metaoptim.rules import SGD


def zero_head_maml(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    steps: int = 1,
    head: str | None = None,
    head_start: Literal["zero", "equal", "fresh"] = "zero",
    normalisation: Normalisation = "transductive",
) -> MetaOptimizer:
    """Learns a body from which a head that tells no class from another is fitted; their order then makes no difference.

    Args:
        lr: inner step size α on the mean loss.
        steps: inner steps K in training.
        head: the submodule that is set to 0; none: the one called `head`, else the last linear layer.
        head_start: what the head starts a task as: "zero", "equal" (one learnt vector for all classes, for losses under which
            it does not cancel), or "fresh" (drawn anew, as torch draws a linear layer).
        normalisation: whose statistics batch norms use on the query set: "transductive" (the query's own), "inductive"
            (the support's) or "frozen" (stored ones).
    """
    check_choice(("zero", "equal", "fresh"), head_start=head_start)
    network = Network(net, loss, normalisation, head)
    start = start_of(network, head_start)
    vector = [n for n, p in network.weights().items() if p.ndim > 1] if head_start == "equal" else []
    forgotten = Names(tuple(n for n in start.names.names if n not in vector))
    return compose(
        net,
        loss,
        rule=SGD(lr),
        steps=steps,
        learns=forgotten.others,
        estimator=Unroll(),
        head=head,
        start=start,
        normalisation=normalisation,
        name="zero_head_maml",
    )
