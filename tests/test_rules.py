"""Update rules against torch.optim, written-out formulas and their own contract."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

from metaoptim import lopt, rules
from metaoptim.algorithms.alfa import Generated
from metaoptim.algorithms.meta_curvature import Curvature
from metaoptim.algorithms.meta_sgd import StepSizes
from metaoptim.algorithms.mt_net import Masked
from metaoptim.core import trees
from metaoptim.core.losses import cross_entropy, mse
from metaoptim.core.types import MetaParams, Params, Rule, State, Step
from metaoptim.learners import GradientLearner, Network
from metaoptim.nn import mlp

pytestmark = pytest.mark.usefixtures("doubles")


def start() -> Params:
    return {"a": torch.randn(3, 2), "b": torch.randn(4)}


def curvature() -> Params:
    return {"a": 0.2 + torch.rand(3, 2), "b": 0.2 + torch.rand(4)}


Optimizer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
PAIRS: dict[str, tuple[Rule, Optimizer]] = {
    "sgd": (rules.SGD(0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
    "momentum": (rules.Momentum(0.1, 0.8), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
    "nesterov": (rules.Nesterov(0.05, 0.8), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True)),
    "rmsprop": (rules.RMSprop(0.1), lambda p: torch.optim.RMSprop(p, lr=0.1)),
    "rmsprop with its constants": (rules.RMSprop(0.2, 0.9, 1e-3), lambda p: torch.optim.RMSprop(p, 0.2, 0.9, 1e-3)),
    "adam": (rules.Adam(0.1), lambda p: torch.optim.Adam(p, lr=0.1)),
    "adamw": (rules.AdamW(0.1), lambda p: torch.optim.AdamW(p, lr=0.1)),
    "adamw with its constants": (
        rules.AdamW(0.2, 0.5, 0.9, 1e-3, decay=0.3),
        lambda p: torch.optim.AdamW(p, 0.2, (0.5, 0.9), 1e-3, weight_decay=0.3),
    ),
    "adam with its constants": (rules.Adam(0.2, 0.5, 0.9, 1e-3), lambda p: torch.optim.Adam(p, 0.2, (0.5, 0.9), 1e-3)),
    "adam without momentum": (rules.Adam(0.1, b1=0.0), lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.999))),
    "chain of one": (rules.chain(rules.Adam(0.1)), lambda p: torch.optim.Adam(p, lr=0.1)),
    "step sizes": (StepSizes(0.3, 0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
    "step sizes per layer": (rules.LayerStepSizes(0.3, 100), lambda p: torch.optim.SGD(p, lr=0.3)),
    "schedule": (rules.chain(rules.Momentum(1.0, 0.8), rules.Schedule(0.1, 4)), lambda p: torch.optim.SGD(p, 0.1, 0.8)),
}


def at(k: int) -> Step:
    return Step(torch.tensor(k), torch.tensor(0.0))


@pytest.mark.parametrize("pair", PAIRS)
def test_a_hundred_steps_on_a_quadratic_are_those_of_torch(pair: str) -> None:
    rule, optimizer = PAIRS[pair]
    weights, scale = start(), curvature()
    theirs = [x.clone().requires_grad_() for x in weights.values()]
    torchs, psi = optimizer(theirs), rule.start(weights, torch.Generator())
    state: State = rule.init(psi, weights)
    for k in range(100):
        updates, state = rule.update(psi, {n: scale[n] * x for n, x in weights.items()}, state, weights, at(k))
        weights = trees.add(weights, updates)
        for p, c in zip(theirs, scale.values(), strict=True):
            p.grad = (c * p).detach()
        torchs.step()
        for x, p in zip(weights.values(), theirs, strict=True):
            torch.testing.assert_close(x, p.detach(), rtol=1e-12, atol=1e-12)


DIFFERENTIABLE: dict[str, tuple[Rule, Optimizer]] = {
    "momentum": (rules.Momentum(0.1, 0.8), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, differentiable=True)),
    "nesterov": (
        rules.Nesterov(0.05, 0.8),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True, differentiable=True),
    ),
    "rmsprop": (rules.RMSprop(0.05, 0.9), lambda p: torch.optim.RMSprop(p, lr=0.05, alpha=0.9, differentiable=True)),
    "adamw": (
        rules.AdamW(0.05, decay=0.3),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3, differentiable=True),
    ),
}


@pytest.mark.parametrize("pair", DIFFERENTIABLE)
def test_meta_gradients_through_ten_steps_are_those_of_torchs_differentiable_optimizers(pair: str) -> None:
    """Of a loss of the last weights, in the start and in the curvature of the inner loss, which is no quadratic."""
    rule, optimizer = DIFFERENTIABLE[pair]
    begin, scale = start(), curvature()

    def loss(w: Params, c: Params) -> torch.Tensor:
        return sum(((c[n] * x).cosh().sum() for n, x in w.items()), torch.zeros(()))

    def ours(w: Params, c: Params) -> torch.Tensor:
        state: State = rule.init({}, w)
        for k in range(10):
            grads: Params = torch.func.grad(loss)(w, c)
            updates, state = rule.update({}, grads, state, w, at(k))
            w = trees.add(w, updates)
        return sum((x.sin().sum() for x in w.values()), torch.zeros(()))

    found = torch.func.grad(ours, argnums=(0, 1))(begin, scale)
    leaves = [{n: x.clone().requires_grad_() for n, x in part.items()} for part in (begin, scale)]
    w = {n: x.clone() for n, x in leaves[0].items()}
    torchs = optimizer(list(w.values()))
    if isinstance(torchs, torch.optim.SGD):  # which would begin with a copy of the first gradient without its graph
        for x in w.values():
            torchs.state[x]["momentum_buffer"] = torch.zeros_like(x)
    for _ in range(10):
        here = {n: x.clone() for n, x in w.items()}  # the optimizer writes into w
        grads = torch.autograd.grad(loss(here, leaves[1]), list(here.values()), create_graph=True)
        for x, g in zip(w.values(), grads, strict=True):
            x.grad = g
        torchs.step()
    after = sum((x.sin().sum() for x in w.values()), torch.zeros(()))
    expected = torch.autograd.grad(after, [x for part in leaves for x in part.values()])
    for g, e in zip(trees.flatten(found), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bound", [0.5, 50.0])
def test_clip_by_norm_is_torchs_over_all_weights_together(bound: float) -> None:
    grads = start()
    rule = rules.Clip(norm=bound)
    found, _ = rule.update({}, grads, rule.init({}, grads), grads, at(0))
    theirs = [torch.zeros_like(g).requires_grad_() for g in grads.values()]
    for p, g in zip(theirs, grads.values(), strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(theirs, bound)
    for g, p in zip(found.values(), theirs, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(g, p.grad, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm
    assert trees.norm(found) == pytest.approx(min(bound, trees.norm(grads).item()), rel=1e-12)


def test_clip_by_value_is_elementwise() -> None:
    found, _ = rules.Clip(value=0.5).update({}, {"a": torch.tensor([-2.0, -0.5, 0.1, 3.0])}, {}, {}, at(0))
    assert found["a"].tolist() == [-0.5, -0.5, 0.1, 0.5]


@pytest.mark.parametrize(("norm", "value"), [(None, None), (1.0, 1.0), (0.0, None), (None, -1.0)])
def test_clip_takes_one_positive_bound(norm: float | None, value: float | None) -> None:
    with pytest.raises(ValueError, match=f"clip takes norm= or value=.*found norm={norm}, value={value}"):
        rules.Clip(norm, value)


NO_STEP = {
    "a clip": (
        lambda: rules.Clip(value=1.0),
        r"Clip\(value=1\.0\) takes no step: .*climbs the loss; chain it with a rule that does",
    ),
    "a schedule": (lambda: rules.Schedule(0.1), "Schedule.* takes no step"),
    "a chain of clips": (lambda: rules.chain(rules.Clip(norm=1.0), rules.chain(rules.Clip(1.0))), "Chain.* takes no step"),
    "an empty chain": (
        lambda: rules.chain(),
        "a chain needs one rule that takes the step, such as SGD or Adam, and it is empty",
    ),
    "two steps": (lambda: rules.chain(rules.SGD(0.1), rules.Adam(0.2)), r"SGD\(lr=0\.1\) and Adam\(lr=0\.2\) both take one"),
    "two steps, nested": (lambda: rules.chain(rules.SGD(0.1), rules.chain(rules.Clip(1.0), rules.Muon(0.1))), "both take one"),
}


@pytest.mark.parametrize("kind", NO_STEP)
def test_a_rule_takes_one_step_down_the_loss(kind: str) -> None:
    made, words = NO_STEP[kind]
    with pytest.raises(ValueError, match=words):
        GradientLearner(Network(mlp((1, 3, 1)), mse), made(), 1)


def test_rules_that_do_not_say_whether_they_take_a_step_go_on_working_in_chains() -> None:
    for chained in ((Own(), rules.SGD(0.1)), (rules.Clip(norm=1.0), Own()), (Own(), Own()), (Own(),)):
        GradientLearner(Network(mlp((1, 3, 1)), mse), rules.chain(*chained), 1)
    for rule in (
        rules.SGD(1.0),
        rules.Adam(1.0),
        rules.LayerStepSizes(0.1, 1),
        rules.sgd_hd(0.1, 0.0),
        lopt.Celo2(),
        lopt.LSTM(),
        StepSizes(0.1, 0.1),
        Curvature(0.1),
        Generated(0.1, 0.0, 1),
        Masked(0.1),
    ):
        assert rules.chain(rules.Clip(norm=1.0), rules.chain(rule, rules.Schedule(1.0))).takes_step is True


class Own:
    """A rule as a user writes it."""

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> State:
        return {}

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        return grads, state


def zero_gradient_rules() -> dict[str, Rule]:
    return {
        "adam": rules.Adam(0.1),
        "adamw": rules.AdamW(0.1, decay=0.0),
        "rmsprop": rules.RMSprop(0.1),
        "momentum": rules.Momentum(0.1),
        "nesterov": rules.Nesterov(0.1),
        "clip by norm": rules.chain(rules.Clip(norm=1.0), rules.SGD(0.1)),
        "clip by value": rules.chain(rules.Clip(value=1.0), rules.SGD(0.1)),
    }


@pytest.mark.parametrize("name", zero_gradient_rules())
def test_meta_gradients_are_finite_where_the_gradient_is_zero(name: str) -> None:
    # Unused weights have gradients of exactly 0, where square roots have infinite slopes.
    rule = zero_gradient_rules()[name]

    def after_three_steps(w: Params) -> torch.Tensor:
        state: State = rule.init({}, w)
        for k in range(3):
            grads = {"a": w["a"] * torch.tensor([0.0, 1.0]) * (k > 0), "b": 0 * w["b"]}
            updates, state = rule.update({}, grads, state, w, at(k))
            w = trees.add(w, updates)
        return w["a"].square().sum() + w["b"].sum()

    gradient = torch.func.grad(after_three_steps)({"a": torch.tensor([1.0, 2.0]), "b": torch.ones(2)})
    assert all(g.isfinite().all() for g in gradient.values())
    torch.testing.assert_close(gradient["b"], torch.ones(2))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's hessian warns of itself
def test_adams_denominator_passes_no_gradient_through_any_transform() -> None:
    rule, w = rules.Adam(0.1, b1=0.0, b2=0.5), {"a": torch.randn(3)}

    def step(g: torch.Tensor) -> torch.Tensor:
        return rule.update({}, {"a": g}, rule.init({}, w), w, at(0))[0]["a"].sum()

    g = torch.tensor([[0.5, -2.0, 3.0], [1.0, 4.0, -0.1]])
    expected = -0.1 / (g.abs() + 1e-8)  # at the first step m̂ = g and √v̂ = |g|
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(step))(g), expected)
    torch.testing.assert_close(torch.func.grad(lambda g: torch.func.vmap(step)(g).sum())(g), expected)
    assert torch.func.vmap(torch.func.hessian(step))(g).abs().max() == 0


def test_adam_counts_steps_in_its_state() -> None:
    rule, w, g = rules.Adam(0.1), start(), start()
    state: State = rule.init({}, w)
    for _ in range(3):
        once, state = rule.update({}, g, state, w, at(0))  # k never counts
    assert state["t"] == 3
    for n, u in once.items():  # the gradient never changed, so that m̂ = g and v̂ = g²
        torch.testing.assert_close(u, -0.1 * g[n].sign(), rtol=1e-6, atol=0)


def test_a_schedule_has_a_size_for_each_step_and_group_and_the_last_for_later_steps() -> None:
    rule = rules.Schedule(0.5, 2, group=lambda name: name[0])
    weights = {"a1": torch.ones(2), "a2": torch.ones(3), "b": torch.ones(())}
    psi = rule.start(weights, torch.Generator())
    torch.testing.assert_close(psi, {"log_lr.a": torch.full((2,), 0.5).log(), "log_lr.b": torch.full((2,), 0.5).log()})
    psi = {"log_lr.a": torch.tensor([2.0, 3.0]).log(), "log_lr.b": torch.tensor([5.0, 7.0]).log()}
    for k, (a, b) in enumerate([(2.0, 5.0), (3.0, 7.0), (3.0, 7.0)]):
        updates, state = rule.update(psi, {n: -w for n, w in weights.items()}, {}, weights, at(k))
        torch.testing.assert_close(updates, {"a1": torch.full((2,), -a), "a2": torch.full((3,), -a), "b": torch.tensor(-b)})
        assert state == {}
    for wrong, words in (({"lr": 0.0}, "lr=0.0"), ({"lr": 0.1, "steps": 0}, "steps=0")):
        with pytest.raises(ValueError, match=words):
            rules.Schedule(**wrong)


def test_an_average_is_a_running_mean_of_the_weights_that_begins_short() -> None:
    rule, weights = rules.chain(rules.Momentum(0.3, 0.5), rules.Average(0.8)), {"a": torch.tensor([1.0, -2.0])}
    psi = rule.start(weights, torch.Generator())
    assert psi["1.logit"].sigmoid().item() == pytest.approx(0.8)
    state, mean = rule.init(psi, weights), weights["a"]
    for k in range(60):
        updates, state = rule.update(psi, {"a": weights["a"] + 0.1 * k}, state, weights, at(k))
        weights = {"a": weights["a"] + updates["a"]}
        d = min(0.8, (k + 1) / (k + 10))
        mean = d * mean + (1 - d) * weights["a"]
        torch.testing.assert_close(rule.read_out(psi, state, weights)["a"], mean)
    assert not torch.allclose(mean, weights["a"], atol=0.1), "the mean is behind"
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match="decay="):
            rules.Average(wrong)


class Scales(StepSizes):
    """Step sizes that don't say that they take a step, so that several can be chained."""

    takes_step: ClassVar[Any] = None


def test_chain_feeds_each_rule_with_what_came_before_and_keeps_their_parameters_apart() -> None:
    rule = rules.chain(Scales(0.1, 0.2), rules.Momentum(2.0, 0.5), Scales(0.3, 0.4))
    weights, grads = start(), start()
    psi = rule.start(weights, torch.Generator())
    assert psi.keys() == {"0.lr.a", "0.lr.b", "2.lr.a", "2.lr.b"}
    state: State = rule.init(psi, weights)
    m = {n: torch.zeros_like(g) for n, g in grads.items()}
    for k in range(3):
        updates, state = rule.update(psi, grads, state, weights, at(k))
        m = {n: 0.5 * m[n] - psi[f"0.lr.{n}"] * g for n, g in grads.items()}
        for n, u in updates.items():
            torch.testing.assert_close(u, -psi[f"2.lr.{n}"] * (-2.0) * m[n])


def test_chain_of_more_than_ten_rules_tells_their_parameters_apart() -> None:
    rule = rules.chain(*[Scales(-1.0, -1.0)] * 11, Scales(3.0, 3.0))
    weights = {"a": torch.ones(2)}
    psi = rule.start(weights, torch.Generator())
    updates, _ = rule.update(psi, {"a": torch.ones(2)}, rule.init(psi, weights), weights, at(0))
    assert updates["a"].tolist() == [-3.0, -3.0]


def test_layers_have_step_sizes_for_each_step_and_the_last_goes_on() -> None:
    rule = rules.LayerStepSizes(0.5, 3)
    weights = {n: torch.ones(2) for n in ("conv.weight", "conv.bias", "block.0.weight", "block.bias", "scale")}
    psi = rule.start(weights, torch.Generator())
    assert {n: p.tolist() for n, p in psi.items()} == {n: [0.5] * 3 for n in ("conv.lr", "block.0.lr", "block.lr", "lr")}
    psi = {n: i + torch.arange(3.0) for i, n in enumerate(psi)}
    for k, row in ((0, 0), (1, 1), (2, 2), (3, 2), (9, 2)):
        updates, _ = rule.update(psi, weights, {}, weights, at(k))
        found = {n: -u[0].item() for n, u in updates.items()}
        expected = {"conv.weight": 0, "conv.bias": 0, "block.0.weight": 1, "block.bias": 2, "scale": 3}
        assert found == {n: first + row for n, first in expected.items()}


# --- The learner's own arithmetic ---------------------------------------------------------------------------------------


def test_minibatches_go_through_the_support_in_order_and_around() -> None:
    learner = GradientLearner(Network(mlp((1, 1)), mse), rules.SGD(0.1), 4, batch_size=2)
    x = torch.arange(5.0)[:, None]
    seen = [learner.minibatch((x, 10 * x), torch.tensor(k)) for k in range(4)]
    assert [a.flatten().tolist() for a, _ in seen] == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert all(torch.equal(b, 10 * a) for a, b in seen)
    whole = GradientLearner(Network(mlp((1, 1)), mse), rules.SGD(0.1), 1, batch_size=9).minibatch((x, x), torch.tensor(3))
    assert torch.equal(whole[0], x)


@pytest.mark.parametrize(
    ("steps", "prox", "size", "found"), [(-1, 0.0, None, "steps=-1"), (1, -0.5, None, "prox=-0.5"), (1, 0.0, 0, "batch_size=0")]
)
def test_a_learner_says_which_numbers_it_takes(steps: int, prox: float, size: int | None, found: str) -> None:
    with pytest.raises(ValueError, match=rf"{found}.*must be >= 0, batch_size >= 1"):
        GradientLearner(Network(mlp((1, 1)), mse), rules.SGD(0.1), steps, prox=prox, batch_size=size)


# --- Losses -------------------------------------------------------------------------------------------------------------


def test_losses_are_torchs_means() -> None:
    logits, classes = torch.randn(7, 3), torch.arange(7) % 3
    torch.testing.assert_close(cross_entropy(logits, classes), torch.nn.functional.cross_entropy(logits, classes))
    assert cross_entropy(1000 * logits, classes).isfinite()
    y = torch.randn(7, 3)
    torch.testing.assert_close(mse(logits, y), torch.nn.functional.mse_loss(logits, y))
    with pytest.raises(ValueError, match=r"mse: the model returned shape \(7, 3\) for targets of shape \(7, 1\)"):
        mse(logits, y[:, :1])


def test_a_loss_that_is_no_mean_is_refused() -> None:
    network = Network(mlp((1, 1)), lambda output, target: (output - target).square())
    with pytest.raises(ValueError, match=r"the loss returned a tensor of shape \(4, 1\); it must return a scalar"):
        network(network.weights(), (torch.ones(4, 1), torch.ones(4, 1)), None, torch.tensor(0))


def test_accuracy_is_reported_for_classes_alone() -> None:
    network = Network(torch.nn.Identity(), cross_entropy)
    info = network({}, (torch.eye(4), torch.tensor([0, 1, 0, 0])), (), torch.tensor(0))[1]
    assert info["accuracy"] == 0.5
    assert Network(torch.nn.Identity(), mse)({}, (torch.eye(4), torch.eye(4)), (), torch.tensor(0))[1] == {}


def test_trees_are_taken_apart_and_put_together_again() -> None:
    a, b, c, d = torch.arange(4.0)
    tree = (MetaParams({"a": a}, {}), {"moments": {"b": b, "none": ()}, "pair": [c, (d,)]})
    leaves: list[torch.Tensor] = []
    structure = trees.take(tree, leaves)
    assert leaves == [a, b, c, d] == trees.flatten(tree)
    assert trees.put(structure, iter(leaves)) == tree == trees.unflatten(leaves, tree)
    assert isinstance(trees.put(structure, iter(leaves))[0], MetaParams) and hash(structure)
    ordered = OrderedDict(z=a, y={"x": b})
    found = trees.map_tensors(lambda x: x + 1, ordered)
    assert type(found) is OrderedDict and found == {"z": a + 1, "y": {"x": b + 1}} and ordered["z"] is a
