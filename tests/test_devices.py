"""Tensors are made on the device of the inputs: under a default device without memory, any other one shows itself at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metaoptim as mo
from metaoptim import estimators
from metaoptim.algorithms.example import INPUT, example_net
from metaoptim.core import trees

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
WAYS = [("loop", "graph", "eager"), ("vmap", "graph", "eager"), ("vmap:2", "steps", "eager"), ("vmap", "mixed", "eager"),
        ("workers:2", "graph", "trace"), ("vmap", "steps", "trace"), ("loop", "mixed", "trace")]  # fmt: skip


class Rich(nn.Module):
    """Layers whose functions are written out, and one that draws."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.a, self.drop, self.norm = nn.Linear(4, 8), nn.Dropout(0.2), mo.nn.BatchNorm(8)
        self.groups, self.lstm, self.attention = nn.GroupNorm(2, 8), nn.LSTM(8, 8), nn.MultiheadAttention(8, 2)
        self.b = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        h = self.groups(self.norm(self.drop(torch.tanh(self.a(x)))))
        h = self.lstm(h[None])[0]
        return self.b(self.attention(h, h, h, need_weights=False)[0][0])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where inputs are; what is made without a device of its own has no memory."""
    torch.manual_seed(0)
    found: str = request.param
    with torch.device("meta"):
        yield torch.device(found)


def made(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    with device:
        return build()


def tasks(device: torch.device, shape: tuple[int, ...] = (4,), classes: bool = False) -> mo.Task:
    draw = torch.Generator(device).manual_seed(0)

    def part(rows: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(3, rows, *shape, generator=draw, device=device)
        y = torch.randn(3, rows, 2, generator=draw, device=device)
        return x, torch.arange(rows, device=device).expand(3, rows) % 3 if classes else y

    return mo.Task(part(6), part(4))


def check_there(tree: Any, device: torch.device) -> None:
    assert {x.device.type for x in trees.flatten(tree)} == {device.type}


@pytest.mark.parametrize("how", [*WAYS[:-2], *(pytest.param(how, marks=pytest.mark.slow) for how in WAYS[-2:])], ids=" ".join)
def test_every_way(how: tuple[str, str, str], device: torch.device) -> None:
    module = mo.MetaModule(mo.maml(made(Rich, device), F.mse_loss, steps=2), *how)
    module.backward(tasks(device))
    check_there([p.grad for p in module.parameters()], device)


@pytest.mark.parametrize("name", mo.ALGORITHMS)
def test_every_algorithm_is_trained_judged_and_adapted(name: str, device: torch.device) -> None:
    build = mo.ALGORITHMS[name]
    options = {"classes": 3} if "classes" in inspect.signature(build).parameters else {}
    method = build(made(lambda: example_net(name), device), mo.losses.cross_entropy, **options)
    batch = tasks(device, INPUT, classes=True)
    module = mo.MetaModule(method)
    module.backward(batch)
    check_there([p.grad for p in module.parameters()], device)
    run = mo.Run(method, module.phi())
    adapted = run.adapt(trees.index(batch.support, 0))
    check_there(adapted(batch.query[0][0]), device)


@pytest.mark.parametrize("estimator", [estimators.Truncated(2), estimators.pes(2, 0.1), estimators.nres(2, 0.1, pairs=2)])
def test_estimators_that_carry(estimator: Any, device: torch.device) -> None:
    net = made(lambda: nn.Linear(4, 2), device)
    module = mo.MetaModule(mo.compose(net, F.mse_loss, rule=mo.rules.Adam(0.1), steps=4, estimator=estimator))
    for _ in range(2):
        module.backward(tasks(device))
    check_there((module.carry, [p.grad for p in module.parameters()]), device)


@pytest.mark.parametrize("method", ["exact", "truncated", "sama", "implicit", "finite_differences"])
def test_hypergradients(method: str, device: torch.device) -> None:
    net = made(lambda: nn.Linear(4, 2), device)
    x, y = trees.index(tasks(device), 0).support
    options = {"window": 2} if method == "truncated" else {}
    steps = 200 if method == "implicit" else 3  # which is for a minimum
    found = mo.hypergradient(
        lambda net, hyper: hyper["scale"] * F.mse_loss(net(x), y), lambda net, hyper: F.mse_loss(net(x), y), net,
        {"scale": torch.ones((), device=device)}, rule=mo.rules.SGD(0.1), steps=steps, method=method, **options,
    )  # fmt: skip
    check_there(found, device)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch's own Adam counts its steps on the default device")
@pytest.mark.parametrize("engine", [{"runtime": "eager"}, {"batching": "vmap", "memory": "steps", "runtime": "trace"}])
def test_training_and_evaluation(engine: dict[str, str], device: torch.device) -> None:
    net, family = made(lambda: mo.nn.mlp((1, 8, 1)), device), mo.tasks.sinusoid()
    run = mo.train(mo.maml(net, F.mse_loss), family, iterations=2, tasks_per_step=3, validate_every=1, validate_episodes=2,
                   progress=False, engine=engine)  # fmt: skip
    check_there(run.phi, device)
    result = mo.evaluate(run, family, episodes=2, baselines=["untrained", "pretrained"], pretrain_iterations=2, progress=False)
    assert result.mean == result.mean


@pytest.mark.slow
def test_the_check(device: torch.device) -> None:
    method = mo.maml(made(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), device), F.mse_loss)
    assert mo.check(method, tasks(device)).ok


def test_the_loop_of_articles(device: torch.device) -> None:
    net = made(lambda: nn.Linear(4, 2), device)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    assert len(mo.meta_train(net, optimizer, [tasks(device)], 1, 0.1)) == 1


@pytest.mark.parametrize("where", DEVICES)
def test_the_device_is_an_argument_and_the_network_stays(where: str) -> None:
    net, family = mo.nn.mlp((1, 8, 1)), mo.tasks.sinusoid()
    run = mo.train(mo.maml(net, F.mse_loss), family, iterations=2, tasks_per_step=2, validate_every=0, progress=False,
                   device=where)  # fmt: skip
    assert run.phi.device.type == where and next(net.parameters()).device.type == "cpu"
    assert mo.evaluate(run, family, episodes=2, device=where, progress=False).mean > 0
    with pytest.raises(ValueError, match=r"device='nowhere' can't be used here .*: give one that torch has"):
        mo.train(mo.maml(net, F.mse_loss), family, iterations=1, device="nowhere", progress=False)
    with pytest.raises(ValueError, match="device='nowhere'"):
        mo.evaluate(run, family, episodes=2, device="nowhere", progress=False)
