"""Algorithms that must agree, with one another or with a loop written out in plain autograd."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import metaoptim.nn
from metaoptim.algorithms import article_maml, article_reptile, compose, fomaml, maml, meta_sgd, reptile, warpgrad
from metaoptim.core import trees
from metaoptim.core.losses import mse
from metaoptim.core.types import Batch, Estimate, MetaOptimizer, MetaParams, Params, Task
from metaoptim.engine import Engine
from metaoptim.estimators import Truncated, Unroll
from metaoptim.rules import SGD

pytestmark = pytest.mark.usefixtures("doubles", "empty_cache")


def small_net() -> nn.Module:
    return metaoptim.nn.mlp((3, 5, 2), "tanh")


def tasks(count: int = 4, rows: int = 6) -> Task:
    return Task(
        (torch.randn(count, rows, 3), torch.randn(count, rows, 2)), (torch.randn(count, 7, 3), torch.randn(count, 7, 2))
    )


def run(optimizer: MetaOptimizer, batch: Task, how: str = "vmap") -> Estimate:
    return Engine(optimizer, how, "graph", "eager")(optimizer.phi, batch)


def same(a: Params, b: Params, tolerance: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert torch.allclose(x, b[name], rtol=tolerance, atol=tolerance), f"{name}: {x} is not {b[name]}"


def plain_loss(net: nn.Module, weights: Params, batch: Batch) -> Tensor:
    loss: Tensor = (functional_call(net, weights, (batch[0],)) - batch[1]).square().mean()
    return loss


def plain_gradient(
    net: nn.Module, batch: Task, lr: float, steps: int, second_order: bool = True, judged_on: str = "query"
) -> Params:
    """The mean meta-gradient by torch.autograd, task by task; the detached step is what makes it first order."""
    theta = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    count, total = batch.query[0].shape[0], torch.zeros(())
    for t in range(count):
        task: Task = trees.index(batch, t)
        fast = dict(theta)
        for _ in range(steps):
            grads = torch.autograd.grad(
                plain_loss(net, fast, task.support), list(fast.values()), create_graph=second_order, allow_unused=True
            )
            fast = {n: w - lr * g for (n, w), g in zip(fast.items(), grads, strict=True) if g is not None}
        total = total + plain_loss(net, fast, task.query if judged_on == "query" else task.support) / count
    return dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))


@pytest.mark.parametrize("how", ["loop", "vmap", "vmap:3"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_maml_is_the_plain_loop(steps: int, how: str) -> None:
    net, batch = small_net(), tasks()
    same(run(maml(net, mse, lr=0.3, steps=steps), batch, how).grad.weights, plain_gradient(net, batch, 0.3, steps))


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_maml_is_the_plain_loop_with_batch_norm(how: str) -> None:
    # Plain autograd over torch's own layer, one task at a time, is right; ours must agree with it under vmap too.
    torch_net = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3, track_running_stats=False), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    )
    nn.init.uniform_(torch_net.get_parameter("1.weight"), 0.5, 2)
    nn.init.normal_(torch_net.get_parameter("1.bias"))
    batch = Task((torch.randn(3, 6, 1, 4, 4), torch.randn(3, 6, 2)), (torch.randn(3, 5, 1, 4, 4), torch.randn(3, 5, 2)))
    expected = plain_gradient(torch_net, batch, 0.3, 2)
    same(run(maml(torch_net, mse, lr=0.3, steps=2), batch, how).grad.weights, expected)
    same(run(maml(metaoptim.nn.convert(torch_net), mse, lr=0.3, steps=2), batch, how).grad.weights, expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_fomaml_is_the_mean_gradient_at_the_adapted_weights(steps: int) -> None:
    net, batch = small_net(), tasks()
    expected = plain_gradient(net, batch, 0.3, steps, second_order=False)
    same(run(fomaml(net, mse, lr=0.3, steps=steps), batch).grad.weights, expected)
    difference = trees.norm(trees.subtract(expected, plain_gradient(net, batch, 0.3, steps)))
    assert difference > 0.01 * trees.norm(expected), "first and second order are told apart"


def test_fomaml_tends_to_maml_as_the_step_shrinks() -> None:
    net, batch = small_net(), tasks()
    gaps = []
    for lr in (1e-2, 1e-3):
        a, b = (run(build(net, mse, lr=lr), batch).grad.weights for build in (maml, fomaml))
        gaps.append(trees.norm(trees.subtract(a, b)).item())
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_sgd_with_a_constant_step_size_is_maml(steps: int, first_order: bool) -> None:
    net, batch = small_net(), tasks()
    reference = fomaml if first_order else maml
    found = run(meta_sgd(net, mse, low=0.2, high=0.2, steps=steps, first_order=first_order), batch)
    expected = run(reference(net, mse, lr=0.2, steps=steps), batch)
    same(found.grad.weights, expected.grad.weights)
    torch.testing.assert_close(found.loss, expected.loss)


def test_meta_sgd_draws_its_step_sizes_between_low_and_high() -> None:
    sizes = torch.cat([a.flatten() for a in meta_sgd(metaoptim.nn.mlp((3, 50, 2)), mse, low=0.1, high=0.3).phi.rule.values()])
    assert 0.1 <= sizes.min() < 0.11
    assert 0.29 < sizes.max() <= 0.3


def test_the_articles_maml_made_right_is_maml() -> None:
    net, batch = small_net(), tasks()
    made_right = article_maml(net, mse, lr=0.3, steps=2, judged_on="query", first_order=False, reduction="mean")
    found, expected = run(made_right, batch), run(maml(net, mse, lr=0.3, steps=2), batch)
    same(found.grad.weights, expected.grad.weights)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_sum_is_the_number_of_tasks_times_the_mean(how: str) -> None:
    net, batch = small_net(), tasks(4)
    total, mean = run(article_maml(net, mse), batch, how), run(article_maml(net, mse, reduction="mean"), batch, how)
    same(total.grad.weights, {n: 4 * g for n, g in mean.grad.weights.items()})
    torch.testing.assert_close(total.loss, 4 * mean.loss)


def test_the_articles_maml_ignores_the_query_set() -> None:
    net, batch, other = small_net(), tasks(), tasks()
    found = run(article_maml(net, mse, lr=0.3, reduction="mean"), batch).grad.weights
    same(found, run(article_maml(net, mse, lr=0.3, reduction="mean"), batch._replace(query=other.query)).grad.weights)
    same(found, plain_gradient(net, batch, 0.3, 1, second_order=False, judged_on="support"))


def test_the_articles_maml_descends_the_loss_less_its_squared_slope() -> None:
    # ∇L(θ − α∇L) = ∇(L − (α/2)‖∇L‖²) + O(α²): ten times smaller a step leaves a hundred times smaller a gap.
    net, batch = small_net(), tasks(1)
    theta = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    gaps = []
    for lr in (1e-2, 1e-3):
        loss = plain_loss(net, theta, trees.index(batch, 0).support)
        slope = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        surrogate = loss - lr / 2 * sum((g.square().sum() for g in slope), torch.zeros(()))
        expected = dict(zip(theta, torch.autograd.grad(surrogate, list(theta.values())), strict=True))
        found = run(article_maml(net, mse, lr=lr), batch).grad.weights
        gaps.append(trees.norm(trees.subtract(found, expected)).item())
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.1)


def one_step_reptile(net: nn.Module) -> MetaOptimizer:
    return reptile(net, mse, lr=0.3, steps=1, inner="sgd", batch_size=None)


def one_step_of_the_article(net: nn.Module) -> MetaOptimizer:
    return article_reptile(net, mse, lr=0.3, steps=1)


@pytest.mark.parametrize("build", [one_step_reptile, one_step_of_the_article])
def test_reptile_with_one_step_is_joint_training_and_says_so(build: Callable[[nn.Module], MetaOptimizer]) -> None:
    net, batch = small_net(), tasks()
    with pytest.warns(UserWarning, match="steps=1.* joint training.*Use steps >= 2"):
        optimizer = build(net)
    theta = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    pooled = (batch.support[0].flatten(0, 1), batch.support[1].flatten(0, 1))  # all tasks have as many rows
    joint = torch.autograd.grad(plain_loss(net, theta, pooled), list(theta.values()))
    same(run(optimizer, batch).grad.weights, {n: 0.3 * g for n, g in zip(theta, joint, strict=True)})


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_the_articles_reptile_goes_towards_the_mean_of_the_adapted_weights(how: str) -> None:
    net, batch = small_net(), tasks()
    optimizer = article_reptile(net, mse, lr=0.2, steps=3, beta=0.25)
    assert (optimizer.outer.optimizer, optimizer.outer.lr, optimizer.outer.schedule) == ("SGD", 0.25, "constant")
    ends = []
    for t in range(4):
        own = small_net()
        own.load_state_dict(net.state_dict())
        sgd = torch.optim.SGD(own.parameters(), lr=0.2)
        for _ in range(3):
            sgd.zero_grad()
            torch.autograd.backward(mse(own(batch.support[0][t]), batch.support[1][t]))
            sgd.step()
        ends.append({n: p.detach() for n, p in own.named_parameters()})
    expected = {n: p.detach() - sum(e[n] for e in ends) / 4 for n, p in net.named_parameters()}
    same(run(optimizer, batch, how).grad.weights, expected)


@pytest.mark.parametrize("how", ["loop", "vmap"])
@pytest.mark.parametrize("moments", ["carried", "reset"])
def test_reptile_is_torchs_adam_with_its_moments_carried_or_reset(moments: str, how: str) -> None:
    net, slots, lr, steps, size = small_net(), 3, 0.01, 4, 4
    optimizer = reptile(net, mse, lr=lr, steps=steps, batch_size=size, moments="carried" if moments == "carried" else "reset")
    engine = Engine(optimizer, how, "graph", "eager")
    meta, carry = optimizer.phi, engine.init(optimizer.phi, tasks(slots))
    nets = [small_net() for _ in range(slots)]
    adams = [torch.optim.Adam(own.parameters(), lr=lr, betas=(0.0, 0.999)) for own in nets]
    for _ in range(3):
        batch = tasks(slots)
        estimate = engine(meta, batch, carry)
        ends = []
        for i, own in enumerate(nets):
            with torch.no_grad():
                for n, p in own.named_parameters():
                    p.copy_(meta.weights[n])
            if moments == "reset":
                adams[i] = torch.optim.Adam(own.parameters(), lr=lr, betas=(0.0, 0.999))
            for k in range(steps):
                rows = [(k * size + j) % 6 for j in range(size)]  # in order, cycling
                adams[i].zero_grad()
                torch.autograd.backward(mse(own(batch.support[0][i, rows]), batch.support[1][i, rows]))
                adams[i].step()
            ends.append({n: p.detach().clone() for n, p in own.named_parameters()})
        mean = {n: torch.stack([e[n] for e in ends]).mean(0) for n in meta.weights}
        same(estimate.grad.weights, trees.subtract(meta.weights, mean))
        meta, carry = MetaParams({n: w - 0.5 * estimate.grad.weights[n] for n, w in meta.weights.items()}, {}), estimate.carry


def test_meta_sgd_in_windows_is_its_rule_with_truncated_backpropagation() -> None:
    net, batch = small_net(), tasks()
    windows = meta_sgd(net, mse, low=0.1, high=0.1, steps=6, window=2)
    composed = compose(net, mse, rule=SGD(0.1), steps=6, estimator=Truncated(2))
    assert windows.estimator == composed.estimator and windows.estimator.lasts(windows.learner) == 3
    engines, carries = [], []
    for method in (windows, composed):
        engines.append(Engine(method, "vmap", "graph", "eager"))
        carries.append(engines[-1].init(method.phi, batch))
    for _ in range(3):
        mine, other = (e(e.method.phi, batch, carry) for e, carry in zip(engines, carries, strict=True))
        same(mine.grad.weights, other.grad.weights)
        assert all(g.norm() > 1e-6 for g in mine.grad.rule.values())
        carries = [mine.carry, other.carry]
    with pytest.raises(ValueError, match=r"window=4: it must be at least 1 and divide the inner steps, which are 6"):
        meta_sgd(net, mse, steps=6, window=4)
    with pytest.raises(ValueError, match="first_order=True goes with the whole run alone, and window=2 was given"):
        meta_sgd(net, mse, steps=6, window=2, first_order=True)


def warped() -> nn.Module:
    names = {"a": nn.Linear(3, 4), "tanh": nn.Tanh(), "warp_a": nn.Linear(4, 4), "b": nn.Linear(4, 2)}
    return nn.Sequential(OrderedDict(names))


def test_one_step_of_warpgrad_is_maml_for_the_warp_layers_and_fomaml_for_the_start() -> None:
    net, batch = warped(), tasks()
    method = warpgrad(net, mse, lr=0.3, steps=1)
    assert method.adapting == ("a.weight", "a.bias", "b.weight", "b.bias")
    options = {"rule": SGD(0.3), "adapts": lambda name: "warp" not in name}
    exact, first = (run(compose(net, mse, estimator=Unroll(first_order=order), **options), batch) for order in (False, True))
    found = run(method, batch).grad.weights
    same(found, {n: (exact if "warp" in n else first).grad.weights[n] for n in found})
    assert (exact.grad.weights["warp_a.weight"] - first.grad.weights["warp_a.weight"]).norm() > 1e-4
    alone = warpgrad(net, mse, lr=0.3, steps=1, learns="warp")
    same(run(alone, batch).grad.weights, {n: g for n, g in found.items() if "warp" in n})


def test_a_network_without_warp_layers_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no layer's name begins with warp='warp': name those that warp so, as conv4\(warp=True\)"
    ):
        warpgrad(small_net(), mse)
    assert warpgrad(small_net(), mse, warp="2").adapting == ("0.weight", "0.bias")
