"""What a check says of what it is given, beside its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim as mo

FEW: Any = [("loop", "graph", "eager"), ("vmap", "graph", "eager")]


def small(net: nn.Module | None = None, loss: Any = mo.losses.mse) -> mo.MetaOptimizer:
    torch.manual_seed(0)
    return mo.maml(net or nn.Linear(3, 2), loss, steps=1, lr=0.1)


class Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x).round()


def flat(output: Tensor, target: Tensor) -> Tensor:
    return output.argmax(-1).to(output.dtype).mean()


@pytest.mark.parametrize("method", [small(loss=flat), small(Rounded(3, 2))], ids=["argmax", "round"])
def test_a_gradient_that_is_zero_everywhere_is_not_right(method: mo.MetaOptimizer) -> None:
    report = mo.check(method, input=(3,), modes=FEW)
    assert not report.ok and report.faults[0].startswith("no weight influences the loss: its meta-gradient is zero")


@pytest.mark.parametrize(
    "modes",
    ["eager", ("vmap", "graph", "eager"), [("vmapp", "graph", "eager")], [("vmap", "graph")], [], None, [("loop", 1, "eager")]],
)
def test_modes_of_another_kind_are_refused(modes: Any) -> None:
    with pytest.raises(ValueError, match=r"modes=.*it must be 'quick', 'all', or a list|batching"):
        mo.check(small(), modes=modes)
