"""The gradient doctor: healthy meta-optimizers pass, planted faults are caught and named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim.nn
from metaoptim.algorithms import ALGORITHMS, maml
from metaoptim.design import check
from metaoptim.engine.differences import TOLERANCE, probe
from metaoptim.losses import cross_entropy
from metaoptim.types import Batch, MetaOptimizer, Task

FEW = [("loop", "graph", "eager"), ("vmap", "graph", "eager")]
LOOP = FEW[:1]


def small(layer: nn.Module | None = None) -> nn.Module:
    """An MLP from 3 to 2 with a layer in its middle, under the name `1`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), layer or nn.Tanh(), nn.Tanh(), nn.Linear(6, 2))


def batch(count: int = 2, shape: tuple[int, ...] = (3,), ways: int = 2) -> Task:
    g = torch.Generator().manual_seed(1)

    def draw(rows: int) -> Batch:
        return torch.randn(count, rows, *shape, generator=g), torch.randint(ways, (count, rows), generator=g)

    return Task(draw(4), draw(5))


def faults(layer: nn.Module, build: Callable[..., MetaOptimizer] = maml, **options: Any) -> str:
    """What the doctor says of a net with that layer, and that it is wrong."""
    report = check(build(small(layer), cross_entropy, **options), batch(), modes=FEW)
    assert not report.ok, str(report)
    return "\n".join(report.faults)


# --- Numbers ------------------------------------------------------------------------------------------------------------


def along(f: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor], size: int = 5) -> float:
    x = {"x": torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)}
    return probe(lambda at: f(at["x"]).item(), x, {"x": gradient(x["x"])})[1]


def test_a_right_gradient_is_right_and_a_wrong_one_is_wrong() -> None:
    assert along(lambda x: x.sin().sum(), torch.cos) <= TOLERANCE
    assert 1e-3 < along(lambda x: x.sin().sum(), lambda x: 1.01 * x.cos()) < 2e-2
    assert along(lambda x: x.sin().sum(), lambda x: x.cos() * (torch.arange(5) > 0)) > 1e-2
    assert along(lambda x: x.sin().sum(), torch.zeros_like) == pytest.approx(1.0)
    assert along(lambda x: x.sin().sum(), lambda x: x * math.nan) == math.inf
    assert along(lambda x: x.sum() * math.nan, torch.ones_like) == math.inf


def test_a_flat_function_is_flat() -> None:
    noise = iter(range(1000))
    assert along(lambda x: 1 + 1e-16 * next(noise) + 0 * x.sum(), torch.zeros_like) <= TOLERANCE
    assert along(lambda x: 1 + 0 * x.sum(), torch.zeros_like) == 0.0
    assert along(lambda x: 1e-3 * x.sum(), torch.zeros_like) == 1.0


def test_a_kink_at_the_first_steps_is_no_fault() -> None:
    """|x − a| with kinks that lie within the longer steps along every direction, off by a jump there."""
    a = torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1e-6

    def f(x: Tensor) -> Tensor:
        return (x - a).abs().sum() + 0.1 * (x[0] > a[0])

    assert along(f, lambda x: torch.sign(x - a)) <= TOLERANCE


# --- Healthy ones -------------------------------------------------------------------------------------------------------

NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: metaoptim.nn.mlp((3, 8, 8, 2)),
    "batch norms": lambda: metaoptim.nn.conv4(2, size=8, filters=4),
    "layer norms": lambda: metaoptim.nn.conv4(2, size=16, filters=3, norm="layer", pool=True),
    "no norms": lambda: metaoptim.nn.conv4(2, size=8, filters=4, norm="none", features="flatten"),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_healthy_nets_pass(name: str, net: str) -> None:
    torch.manual_seed(0)
    shape = {"mlp": (3,), "layer norms": (1, 16, 16)}.get(net, (1, 8, 8))
    report = check(ALGORITHMS[name](NETS[net](), cross_entropy), batch(shape=shape), modes=FEW)
    assert report.ok, str(report)
    assert [row.verdict for row in report.modes] == ["right", "right"]
    assert not report.faults
    assert {row.name for row in report.tensors} >= {n for n, _ in NETS[net]().named_parameters()}
    assert all((row.error or 0.0) <= TOLERANCE for row in (*report.modes, *report.tensors))


def test_every_execution_mode_has_a_row() -> None:
    said: list[str] = []
    report = check(maml(small(), cross_entropy, steps=2), say=said.append)
    assert report.ok, str(report)
    settings = [set(column) for column in zip(*(row.name.split(" · ") for row in report.modes), strict=True)]
    assert settings == [{"loop", "vmap", "vmap:2", "workers:2"}, {"graph", "steps", "mixed"}, {"eager", "trace"}]
    assert all(row.distance is not None and row.distance <= 1e-9 for row in report.modes[1:])
    assert {row.name for row in report.modes} <= set(said)
