"""The gradient doctor: healthy meta-optimizers pass, planted faults are caught and named."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import metaoptim.nn
from metaoptim import rules
from metaoptim.algorithms import ALGORITHMS, fomaml, maml, reptile
from metaoptim.algorithms.example import example_net
from metaoptim.core import trees
from metaoptim.core.gradients import hold
from metaoptim.core.losses import cross_entropy, mse
from metaoptim.core.types import (
    Batch,
    Carry,
    Claim,
    Clock,
    Estimate,
    Info,
    Learner,
    MetaOptimizer,
    MetaParams,
    Params,
    Rule,
    State,
    Step,
    Task,
)  # fmt: skip
from metaoptim.engine import Engine
from metaoptim.estimators import Displacement, Unroll
from metaoptim.estimators.plain import Plain
from metaoptim.gradcheck import check, self_check
from metaoptim.gradcheck.differences import TOLERANCE, probe
from metaoptim.learners import GradientLearner, Network
from metaoptim.tasks import sinusoid

FEW = [("loop", "graph", "eager"), ("vmap", "graph", "eager")]
LOOP = FEW[:1]


def small(layer: nn.Module | None = None) -> nn.Module:
    """An MLP from 3 to 2 with a layer in its middle, under the name `1`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), layer or nn.Tanh(), nn.Tanh(), nn.Linear(6, 2))


def batch(count: int = 2, shape: tuple[int, ...] = (3,), ways: int = 2) -> Task:
    g = torch.Generator().manual_seed(1)

    def draw(rows: int) -> Batch:
        labels = torch.stack([torch.randperm(rows, generator=g) % ways for _ in range(count)])
        return torch.randn(count, rows, *shape, generator=g), labels

    return Task(draw(4), draw(5))


def faults(net: nn.Module, build: Callable[..., MetaOptimizer] = maml, loss: Callable[..., Tensor] = cross_entropy) -> str:
    """What the doctor says of a net with a fault, and that it is wrong."""
    report = check(build(net, loss), batch(), modes=FEW)
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


def test_a_fault_in_a_small_slope_of_a_large_loss_is_as_large_as_it_is() -> None:
    """All steps show it, the longest ones beyond rounding: that it could be rounding in the shortest proves nothing."""
    for share in (1.0, 0.5):
        for size in (1e-3, 1e-4, 1e-5):
            found = along(partial(small_slope, size), partial(share_of_it, size * share))
            assert found <= TOLERANCE if share == 1 else found == pytest.approx(0.5, rel=0.05)


def small_slope(size: float, x: Tensor) -> Tensor:
    return 1 + size * x.sin().sum()


def share_of_it(size: float, x: Tensor) -> Tensor:
    return size * x.cos()


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


NEEDED: dict[str, Callable[[int], nn.Module]] = {
    "cavia": lambda width: metaoptim.nn.FiLM(width, 2),
    "t_net": metaoptim.nn.Transform,
    "mt_net": metaoptim.nn.Transform,
}
"""Layers that an algorithm can't do without."""
WARPS = {"mlp": "2", "batch norms": "block1", "layer norms": "block1", "no norms": "block1"}
"""What WarpGrad takes for a warp layer."""


def smooth() -> list[str]:
    """Algorithms whose gradient is no matter of where the inner run ends: an implicit one needs a minimum there."""
    built = {name: ALGORITHMS[name](example_net(name), cross_entropy) for name in ALGORITHMS}
    return [name for name, method in built.items() if method.estimator.claim != "implicit" and name not in NEEDED]


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", smooth())
def test_healthy_nets_pass(name: str, net: str) -> None:
    torch.manual_seed(0)
    shape = {"mlp": (3,), "layer norms": (1, 16, 16)}.get(net, (1, 8, 8))
    options = {"warp": WARPS[net]} if name == "warpgrad" else {}
    report = check(ALGORITHMS[name](NETS[net](), cross_entropy, **options), batch(shape=shape), modes=FEW)
    assert report.ok, str(report)
    assert [row.verdict for row in report.modes] == ["right", "right"]
    assert not report.faults
    method = ALGORITHMS[name](NETS[net](), cross_entropy, **options)
    assert {row.name for row in report.tensors} >= set(method.split(method.phi)[0].weights)
    assert all((row.error or 0.0) <= TOLERANCE for row in (*report.modes, *report.tensors))


@pytest.mark.slow
def test_every_execution_mode_has_a_row() -> None:
    said: list[str] = []
    report = check(maml(small(), cross_entropy), say=said.append)
    assert report.ok, str(report)
    settings = [set(column) for column in zip(*(row.name.split(" · ") for row in report.modes), strict=True)]
    assert settings == [{"loop", "vmap", "vmap:2", "workers:2"}, {"graph", "steps", "mixed"}, {"eager", "trace"}]
    assert all(row.distance is not None and row.distance <= 1e-9 for row in report.modes[1:])
    assert {row.name for row in report.modes} <= set(said)
    found = json.loads(report.json())
    assert found["ok"] is True and len(found["modes"]) == len(report.modes)
    assert str(report).startswith("right: maml, the exact meta-gradient: 14 execution modes agree")
    console = Console(file=io.StringIO(), width=100)
    console.print(report.table())
    assert all(row.name in cast(io.StringIO, console.file).getvalue() for row in (*report.modes, *report.tensors))


# --- Faults, beyond those of test_check_faults --------------------------------------------------------------------------


class Detaches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.detach().sin()


class Writes(nn.Module):
    """Clamps its weight, in place, whenever it runs."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.full((6,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-1, 1)
        return x * self.weight


class Remembers(nn.Module):
    """Keeps a number, and no buffer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


class Casts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().tanh()


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + float(np.random.default_rng().random())


class OwnCode(nn.Module):
    """Its layer is right; what it does with it isn't."""

    def __init__(self, width: int = 6) -> None:
        nn.Module.__init__(self)
        self.inside = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x).detach()


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(("layer", "words"), [
    (Writes, "writes into its own `weight`"), (Casts, "other floats than it is given"),
    (Draws, "random numbers of its own"), (OwnCode, "no way from `inside.weight`"),
])  # fmt: skip
def test_the_layer_and_the_reason_are_named(layer: type[nn.Module], words: str) -> None:
    said = faults(small(layer()))
    assert said.startswith(f"layer `1` ({layer.__name__}): ") and words in said
    assert "\n" not in said, "nothing else is blamed"


def test_the_code_of_the_module_itself_and_the_loss_are_named_too() -> None:
    torch.manual_seed(0)
    assert faults(OwnCode(3)).startswith("the module itself (OwnCode): ")

    def tampered(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target) + (output * output.detach()).mean()

    assert faults(small(), loss=tampered).startswith("the loss `tampered`: its first derivative in")


@pytest.mark.parametrize("build", [fomaml, reptile])
def test_approximations_are_held_to_what_they_claim(build: Callable[..., MetaOptimizer]) -> None:
    assert "`1` (Detaches)" in faults(small(Detaches()), build)
    report = check(build(small(), cross_entropy, lr=1.0), batch(), modes=LOOP)
    assert report.ok, "far from the exact gradient, but what it says"


def test_a_gradient_that_is_scaled_is_caught_though_no_layer_is_off() -> None:
    optimizer = maml(small(), cross_entropy)
    engine = Engine(optimizer, "loop", "graph", "eager")

    def scaled(meta: MetaParams, tasks: Task) -> Estimate:
        estimate = engine(meta, tasks)
        return estimate._replace(grad=trees.map_tensors(lambda g: 0.999 * g, estimate.grad))

    report = check(optimizer, batch(), gradient=scaled)
    assert not report.ok and "no layer, loss or rule is off by itself" in str(report)
    assert 1e-4 < (report.modes[0].error or 0.0) < 1e-2
    assert check(optimizer, batch(), gradient=engine).ok
    with pytest.raises(ValueError, match="gradient must return an Estimate"):
        check(optimizer, batch(), gradient=lambda meta, tasks: scaled(meta, tasks)._replace(grad=MetaParams({}, {})))


def test_a_displacement_the_wrong_way_is_caught() -> None:
    @dataclass(frozen=True)
    class Backwards(Plain):
        way: Displacement
        claim: ClassVar[Claim] = "displacement"

        def check(self, learner: Learner, learnt: MetaParams) -> None:
            pass

        def __call__(self, learner: Learner, phi: MetaParams, task: Task, carry: Carry, clock: Clock) -> Estimate:
            estimate = self.way(learner, phi, task, carry, clock)
            return estimate._replace(grad=trees.map_tensors(torch.neg, estimate.grad))

    optimizer = replace(reptile(small(), cross_entropy), estimator=Backwards(Displacement()))
    assert not check(optimizer, batch(), modes=LOOP).ok


def test_a_mode_that_torch_refuses_is_no_fault_but_its_layer_is_named() -> None:
    report = check(maml(small(Branches()), cross_entropy), batch(), modes=FEW)
    assert report.ok
    assert [row.verdict for row in report.modes] == ["right", "refused"]
    assert "layer `1` (Branches): vmap can't map its first derivative" in "\n".join(report.notes)


def with_rule(rule: Rule, estimator: Unroll) -> MetaOptimizer:
    network = Network(small(), cross_entropy)
    return MetaOptimizer(GradientLearner(network, rule, 2), estimator, MetaParams(network.weights(), {}))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [Unroll(), Unroll(first_order=True)])
def test_what_a_rule_holds_on_purpose_is_no_fault(estimator: Unroll) -> None:
    optimizer = with_rule(rules.Adam(0.1), estimator)
    report = check(optimizer, batch())
    assert report.ok, report
    assert "holds constant on purpose" in str(report)
    for how in [("loop", "graph", "eager"), ("vmap", "mixed", "trace")]:
        assert self_check(optimizer, optimizer.phi, batch(), how) is None


def test_what_a_rule_detaches_is_one_though_it_holds_something_too() -> None:
    class Detaching(rules.SGD):
        def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
            return {n: -0.5 * (hold(g.abs() + 1) * g + g.detach().sin()) for n, g in grads.items()}, state

    optimizer = with_rule(Detaching(0.1), Unroll())
    report = check(optimizer, batch(), modes=FEW)
    assert "the update rule: its first derivative in its gradients is off" in str(report)
    assert "is off from central differences" in (self_check(optimizer, optimizer.phi, batch()) or "")


# --- What it leaves alone, and what it refuses --------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Dropout, Remembers, Writes])
def test_nothing_of_the_users_changes(layer: type[nn.Module]) -> None:
    optimizer, tasks = maml(net := small(layer()), cross_entropy), batch()
    kept = copy.deepcopy((net.state_dict(), optimizer.phi, tasks))
    state, numbers = torch.get_rng_state(), [vars(m).get("calls") for m in net.modules()]
    check(optimizer, tasks, modes=FEW)
    self_check(optimizer, optimizer.phi, tasks)
    now = (net.state_dict(), optimizer.phi, tasks)
    assert all(torch.equal(a, b) for a, b in zip(trees.flatten(kept), trees.flatten(now), strict=True))
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert numbers == [vars(m).get("calls") for m in net.modules()]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_short_check_finds_nothing_in_what_is_healthy(name: str) -> None:
    layer = nn.Sequential(NEEDED[name](6), nn.Dropout(0.3)) if name in NEEDED else nn.Dropout(0.3)
    options = {"warp": "3"} if name == "warpgrad" else {}
    optimizer = ALGORITHMS[name](small(layer), cross_entropy, **options)
    assert self_check(optimizer, optimizer.phi, batch()) is None


def test_the_short_check_tells_of_weights_that_forward_writes_and_not_of_float64() -> None:
    for layer, said in ((Writes(), "a forward pass writes into the weight `1.weight`"), (Casts(), None)):
        optimizer = fomaml(small(layer), cross_entropy)
        found = self_check(optimizer, optimizer.phi, batch())
        assert found is None if said is None else (found or "").startswith(said)


def test_random_tasks_suit_the_loss_and_the_first_layer() -> None:
    assert check(maml(small(), mse), modes=LOOP).ok
    assert check(maml(metaoptim.nn.conv4(3, filters=3), cross_entropy), input=(1, 16, 16), modes=LOOP).ok
    assert check(maml(metaoptim.nn.mlp((1, 8, 1)), mse), sinusoid(), modes=LOOP).ok


def no_network() -> MetaOptimizer:
    def model(weights: Params, batch: Batch, support: Batch | None, k: Tensor) -> tuple[Tensor, Info]:
        return weights["0.weight"].sum(), {}

    return replace(maml(small(), mse), learner=GradientLearner(model, rules.SGD(0.1), 1))


@pytest.mark.parametrize(("optimizer", "options", "words"), [
    (lambda: maml(small(), cross_entropy), {"input": (4,)}, "can't take these data"),
    (lambda: maml(small(), mse), {"tasks": batch()}, "mse: the model returned shape"),
    (lambda: maml(nn.Bilinear(3, 3, 2), cross_entropy), {"input": (3,)}, "can't be called with one tensor"),
    (lambda: maml(nn.PReLU(), mse), {}, "give tasks, or input="),
    (lambda: maml(nn.LSTM(3, 2), mse), {"input": (5, 3)}, "must return one tensor"),
    (no_network, {}, "give tasks"),
])  # fmt: skip
def test_wrong_input_is_a_sentence(optimizer: Callable[[], MetaOptimizer], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        check(optimizer(), modes=LOOP, **options)
    assert "\n" not in str(raised.value)


class Several(nn.Module):
    """A network that returns its outputs and its features."""

    def __init__(self, kind: type) -> None:
        nn.Module.__init__(self)
        self.kind, self.a, self.b = kind, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        z = torch.tanh(self.a(x))
        return (self.b(z), z, None) if self.kind is tuple else {"out": self.b(z), "z": z}


@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_network_that_returns_several_things_is_checked_with_the_loss_that_picks(kind: type) -> None:
    out: Any = 0 if kind is tuple else "out"
    given = batch()
    fine = check(maml(Several(kind), lambda output, target: cross_entropy(output[out], target)), given, modes=LOOP)
    assert fine.ok and fine.modes[0].error is not None
    off = check(
        maml(Several(kind), lambda output, target: cross_entropy(2 * output[out].detach() - output[out], target)),
        given,
        modes=LOOP,
    )
    assert not off.ok and any("the loss" in told and "hidden" in told for told in off.faults)
    with pytest.raises(ValueError, match="the loss can't take what the model returned"):
        check(maml(Several(kind), lambda output, target: (output * target).mean()), given, modes=LOOP)
    with pytest.raises(ValueError, match=f"the model returned {kind.__name__}; .*give tasks"):
        check(maml(Several(kind), mse), input=(3,), modes=LOOP)
