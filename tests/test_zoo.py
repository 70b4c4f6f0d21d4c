"""What an algorithm alone promises: closed forms, loops written out, and what it is where its extra is nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metaoptim as mo
from metaoptim.algorithms.alfa import Generated
from metaoptim.algorithms.meta_curvature import Curvature
from metaoptim.algorithms.mt_net import Masked
from metaoptim.core import trees
from metaoptim.core.gradients import exact, held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.losses import cross_entropy, mse
from metaoptim.core.objectives import trajectory_mean
from metaoptim.core.types import Batch, Estimate, MetaOptimizer, MetaParams, Params, Step, Task
from metaoptim.engine import Engine, offered
from metaoptim.estimators import Unroll
from metaoptim.gradcheck import check
from metaoptim.nn import BatchNorm, ContextInput, FiLM, Transform, mlp, noise

pytestmark = pytest.mark.usefixtures("doubles", "empty_cache")

Loss = Callable[[Params, Batch], Tensor]
Stepped = Callable[[Params, Params, int], Params]
NOTHING = {"layer_step_sizes": False, "per_step_norms": False, "multi_step_until": 0, "first_order_until": 0, "cosine": False}


def regression(count: int = 3) -> Task:
    return Task((torch.randn(count, 6, 3), torch.randn(count, 6, 2)), (torch.randn(count, 5, 3), torch.randn(count, 5, 2)))


def classes(count: int = 3) -> Task:
    y = torch.arange(3).repeat(2).expand(count, -1).clone()
    return Task((torch.randn(count, 6, 3) + y[..., None], y), (torch.randn(count, 6, 3) + y[..., None], y))


def net(classes: int = 2) -> nn.Module:
    torch.manual_seed(1)
    return mlp((3, 5, classes), "tanh")


def normed() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5, bias=False), BatchNorm(5), nn.Tanh(), nn.Linear(5, 2))


def run(method: MetaOptimizer, batch: Task, way: tuple[str, str, str] = ("vmap", "graph", "eager"), step: int = 0) -> Estimate:
    return Engine(method, *way)(method.phi, batch, None, step)


def close(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    for x, y in zip(trees.flatten(a), trees.flatten(b), strict=True):
        assert (x - y).norm() <= tolerance * (1 + y.norm()), f"{x} is not {y}"


def same(found: Params, expected: Params, tolerance: float = 1e-10) -> None:
    assert expected.keys() <= found.keys()
    close([found[n] for n in expected], list(expected.values()), tolerance)


def judged(module: nn.Module) -> Loss:
    def loss(weights: Params, batch: Batch) -> Tensor:
        return mse(functional_call(module, weights, (batch[0],)), batch[1])

    return loss


def written_out(phi: Params, loss: Loss, batch: Task, steps: int, stepped: Stepped, share: float = 0.0) -> Params:
    """The mean meta-gradient in plain autograd, of steps (leaves, inner gradients, k) -> weights that moved.

    share: of the derivatives of inner gradients, what is left out.
    """
    leaves = {n: p.detach().clone().requires_grad_() for n, p in phi.items()}
    count, total = len(batch.query[0]), torch.zeros(())
    for t in range(count):
        task: Task = trees.index(batch, t)
        here = dict(leaves)
        for k in range(steps):
            grads = torch.autograd.grad(
                loss(here, task.support), list(here.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
            mixed = {n: g.detach() + (1 - share) * (g - g.detach()) for n, g in zip(here, grads, strict=True)}
            here = here | stepped(leaves | here, mixed, k)
        total = total + loss(here, task.query) / count
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


# --- Masks: BOIL --------------------------------------------------------------------------------------------------------


def test_boil_is_maml_whose_head_has_step_size_0() -> None:
    method, batch = mo.boil(net(), mse, lr=0.3, steps=2), regression()
    assert method.adapting == ("0.weight", "0.bias")
    sizes = {"0.weight": 0.3, "0.bias": 0.3, "2.weight": 0.0, "2.bias": 0.0}
    expected = written_out(
        method.phi.weights, judged(net()), batch, 2, lambda w, g, k: {n: w[n] - sizes[n] * g[n] for n in sizes}
    )
    same(run(method, batch).grad.weights, expected)


# --- Step sizes per layer and step, and what MAML++ adds to them ---------------------------------------------------------


def test_step_sizes_that_are_all_alike_are_mamls_and_each_has_a_gradient_of_its_own() -> None:
    method, batch = mo.lslr(net(), mse, lr=0.3, steps=3), regression()
    found = run(method, batch)
    same(found.grad.weights, run(mo.maml(net(), mse, lr=0.3, steps=3), batch).grad.weights)
    assert {n: p.tolist() for n, p in method.phi.rule.items()} == {"0.lr": [0.3] * 3, "2.lr": [0.3] * 3}
    psi = {n: torch.rand(3) for n in ("0.lr", "2.lr")}
    sized = replace(method, phi=MetaParams(method.phi.weights, psi))

    def stepped(w: Params, g: Params, k: int) -> Params:
        return {n: w[n] - w[f"{n[0]}.lr"][k] * g[n] for n in method.phi.weights}

    def loss(w: Params, pair: Batch) -> Tensor:
        return judged(net())({n: p for n, p in w.items() if not n.endswith("lr")}, pair)

    expected = written_out(method.phi.weights | psi, loss, batch, 3, stepped)
    same(run(sized, batch).grad.weights | run(sized, batch).grad.rule, expected)


def test_maml_plus_plus_without_its_parts_is_maml() -> None:
    batch = regression()
    method = mo.maml_plus_plus(normed(), mse, lr=0.3, steps=2, **NOTHING)
    expected = mo.maml(normed(), mse, lr=0.3, steps=2)
    assert method.outer == expected.outer and method.adapting == expected.adapting
    close(run(method, batch)[:2], run(expected, batch)[:2])


def test_each_part_of_maml_plus_plus_is_switched_alone() -> None:
    def built(**on: Any) -> MetaOptimizer:
        return mo.maml_plus_plus(normed(), mse, lr=0.3, steps=2, **NOTHING | on)

    batch, maml = regression(), mo.maml(normed(), mse, lr=0.3, steps=2)
    sizes = built(layer_step_sizes=True)
    close(run(sizes, batch).grad, run(mo.lslr(normed(), mse, lr=0.3, steps=2), batch).grad)
    mean = replace(maml, estimator=Unroll(objective=trajectory_mean))
    for step, other in ((0, mean), (10, maml), (99, maml)):
        close(run(built(multi_step_until=10), batch, step=step)[:2], run(other, batch)[:2])
    fomaml = mo.fomaml(normed(), mse, lr=0.3, steps=2)
    for step, other in ((0, fomaml), (9, fomaml), (10, maml)):
        for way in (("loop", "graph", "eager"), ("vmap", "steps", "eager"), ("loop", "mixed", "eager")):
            close(run(built(first_order_until=10), batch, way, step)[:2], run(other, batch)[:2])
    assert built(cosine=True).outer.schedule == "cosine" and built().outer.schedule == "constant"
    norms = built(per_step_norms=True)
    assert norms.phi.weights["1.weight"].shape == norms.phi.weights["1.bias"].shape == (3, 5)
    assert norms.adapting == ("0.weight", "3.weight", "3.bias")
    shared = mo.compose(normed(), mse, rule=mo.rules.SGD(0.3), steps=2, adapts=lambda n: not n.startswith("1."))
    found, expected = run(norms, batch), run(shared, batch)
    close(found.loss, expected.loss)  # all versions start alike, and their gradients sum up to that of the one
    same({n: g.sum(0) if n.startswith("1.") else g for n, g in found.grad.weights.items()}, expected.grad.weights)


@pytest.mark.parametrize("runtime", ["eager", pytest.param("trace", marks=pytest.mark.slow)])
def test_the_order_of_an_annealed_gradient_is_any_share_in_every_way_with_one_graph(runtime: str) -> None:
    batch, module = regression(), net()

    def estimator(outer_step: Tensor) -> Tensor:
        return (1 - outer_step / 10).clamp(min=0.0)

    method = mo.compose(module, mse, rule=mo.rules.Momentum(0.3, 0.5), steps=3, estimator=Unroll(estimator))
    weights = method.phi.weights

    def expected(share: float) -> Params:
        leaves, total = {n: p.clone().requires_grad_() for n, p in weights.items()}, torch.zeros(())
        for t in range(3):
            here, m = dict(leaves), {n: torch.zeros_like(p) for n, p in weights.items()}
            task: Task = trees.index(batch, t)
            for _ in range(3):
                grads = torch.autograd.grad(judged(module)(here, task.support), list(here.values()), create_graph=True)
                mixed = {n: g.detach() + (1 - share) * (g - g.detach()) for n, g in zip(here, grads, strict=True)}
                m = {n: 0.5 * m[n] + g for n, g in mixed.items()}
                here = {n: p - 0.3 * m[n] for n, p in here.items()}
            total = total + judged(module)(here, task.query) / 3
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    traced = [("vmap", "graph", "trace"), ("loop", "steps", "trace"), ("loop", "mixed", "trace")]
    for way in traced if runtime == "trace" else [way for way in offered(method) if way[2] == "eager"]:
        engine = Engine(method, *way)
        for step, share in ((0, 1.0), (4, 0.6), (30, 0.0)):
            same(engine(method.phi, batch, None, step).grad.weights, expected(share))
        if way == ("vmap", "graph", "trace"):
            assert engine.choice is not None
            assert len(engine.executor(engine.choice).graphs.graphs) == 1


def test_an_annealed_order_passes_its_check_as_first_order() -> None:
    method = mo.maml_plus_plus(normed(), mse, lr=0.3, steps=2, first_order_until=10)
    assert method.estimator.claim == "first_order"
    report = check(method, regression(2), modes=[("loop", "graph", "eager"), ("vmap", "mixed", "eager")])
    assert report.ok and "from the exact" in str(report), report


# --- Contexts -----------------------------------------------------------------------------------------------------------


def contextual() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(ContextInput(2), nn.Linear(5, 4), FiLM(4, 3), nn.Tanh(), nn.Linear(4, 2))


def test_cavia_moves_the_context_alone_and_learns_all_else() -> None:
    method, batch = mo.cavia(contextual(), mse, lr=0.7, steps=2), regression()
    contexts = ("0.context", "2.context")
    assert method.adapting == contexts
    learnt, fixed = method.split(method.phi)
    assert tuple(fixed) == contexts and not any(x.any() for x in fixed.values())
    expected = written_out(
        method.phi.weights, judged(contextual()), batch, 2, lambda w, g, k: {n: w[n] - 0.7 * g[n] for n in contexts}
    )
    found = run(method, batch).grad.weights
    assert found.keys() == learnt.weights.keys()
    same(expected, found)
    *_, (_, state) = inner_loop(method.learner, method.phi, trees.index(batch.support, 0), held, steps=1)
    assert all(state.fast[n].all() for n in contexts), "a context of 0 has a gradient, because what reads it is not 0"


def test_cavia_without_numbers_in_its_context_is_joint_training() -> None:
    torch.manual_seed(1)
    module, batch = nn.Sequential(ContextInput(0), nn.Linear(3, 2)), regression()
    found = run(mo.cavia(module, mse), batch).grad.weights
    pooled = (batch.query[0].flatten(0, 1), batch.query[1].flatten(0, 1))
    leaves = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters() if p.numel()}
    loss = mse(F.linear(pooled[0], leaves["1.weight"], leaves["1.bias"]), pooled[1])
    same(found, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))


def test_a_context_must_be_there_and_be_0() -> None:
    with pytest.raises(ValueError, match=r"no weight called `context`: put mo\.nn\.ContextInput or mo\.nn\.FiLM into it"):
        mo.cavia(net(), mse)
    module = contextual()
    nn.init.ones_(module.get_parameter("2.context"))
    with pytest.raises(ValueError, match=r"the context `2\.context` is not 0, where every task starts from 0"):
        mo.cavia(module, mse)
    with pytest.raises(ValueError, match=r"FiLM: channels=3, size=0: both must be at least 1"):
        FiLM(3, 0)


def test_layers_with_a_context_are_a_concatenation_and_a_scale_and_shift() -> None:
    x, image = torch.randn(4, 3), torch.randn(4, 3, 2, 2)
    beside, film = ContextInput(2), FiLM(3, 2)
    close(film(image), image)
    close(beside(x), F.pad(x, (0, 2)))
    nn.init.normal_(beside.context)
    nn.init.normal_(film.context)
    close(beside(x), torch.cat([x, beside.context.repeat(4, 1)], 1))
    scale, shift = F.linear(film.context, film.weight, film.bias).view(2, 3)
    close(film(x), scale * x + shift)
    close(film(image)[:, 1], scale[1] * image[:, 1] + shift[1])


# --- Heads that tell no class from another --------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["zero", "equal"])
def test_the_order_of_classes_makes_no_difference(start: Any) -> None:
    batch = classes()
    relabelled = [
        Task((batch.support[0], torch.tensor(p)[batch.support[1]]), (batch.query[0], torch.tensor(p)[batch.query[1]]))
        for p in permutations(range(3))
    ]
    method = mo.zero_head_maml(net(3), cross_entropy, lr=0.5, steps=3, head_start=start)
    maml = mo.maml(net(3), cross_entropy, lr=0.5, steps=3)
    found, others = ([run(m, task) for task in relabelled] for m in (method, maml))
    for estimate in found[1:]:
        close(estimate[:2], found[0][:2])
    assert max(abs(e.loss - others[0].loss) for e in others) > 1e-3, "which it does to MAML"
    *_, (_, state) = inner_loop(method.learner, method.phi, trees.index(batch.support, 0), held, steps=0)
    support, query = (trees.index(part, 0) for part in batch)
    loss, _ = method.learner.loss(method.phi, state, support, query, torch.tensor(0))
    assert loss.item() == pytest.approx(math.log(3), rel=1e-12)


def test_one_vector_for_all_classes_is_none_under_a_softmax() -> None:
    equal, zero = (mo.zero_head_maml(net(3), cross_entropy, lr=0.5, steps=3, head_start=start) for start in ("equal", "zero"))
    batch = classes()
    found, expected = run(equal, batch), run(zero, batch)
    close(found.loss, expected.loss)
    same(found.grad.weights, expected.grad.weights)
    assert found.grad.weights.keys() - expected.grad.weights.keys() == {"2.weight"}
    assert found.grad.weights["2.weight"].norm() < 1e-15


def test_one_vector_is_learnt_where_it_does_not_cancel() -> None:
    method, batch = mo.zero_head_maml(net(2), mse, lr=0.5, steps=2, head_start="equal"), regression()
    assert set(run(method, batch).grad.weights) == {"0.weight", "0.bias", "2.weight"}
    rows = run(method, batch).grad.weights["2.weight"]
    close(rows, rows[:1].expand(2, -1))
    vector = method.phi.weights["2.weight"].mean(0)

    begin = {n: method.phi.weights[n] for n in ("0.weight", "0.bias")} | {"2.bias": torch.zeros(2)}
    leaves = {n: p.clone().requires_grad_() for n, p in (begin | {"v": vector}).items()}
    total = torch.zeros(())
    for t in range(3):
        task: Task = trees.index(batch, t)
        here = {n: leaves[n] for n in begin} | {"2.weight": leaves["v"].expand(2, -1)}
        for _ in range(2):
            grads = torch.autograd.grad(judged(net(2))(here, task.support), list(here.values()), create_graph=True)
            here = {n: p - 0.5 * g for (n, p), g in zip(here.items(), grads, strict=True)}
        total = total + judged(net(2))(here, task.query) / 3
    expected = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    close(rows.sum(0), expected["v"])
    same(run(method, batch).grad.weights, {n: expected[n] for n in ("0.weight", "0.bias")})
    assert rows.norm() > 1e-3


def test_a_zero_head_is_not_learnt_and_a_fresh_one_is_another_in_every_task_and_outer_step() -> None:
    batch = trees.map_tensors(lambda x: x[:1].expand(3, *x.shape[1:]).clone(), classes())  # three times the same task
    zero = mo.zero_head_maml(net(3), cross_entropy)
    assert set(run(zero, batch).grad.weights) == {"0.weight", "0.bias"} and len(zero.adapting) == 4
    fresh, losses = mo.zero_head_maml(net(3), cross_entropy, head_start="fresh"), list[Tensor]()
    for way in offered(fresh):
        if way[2] == "eager":
            estimates = []
            for seed in (0, 0, 1):  # of the tasks' keys, which are others in every call
                torch.manual_seed(seed)
                estimates.append(run(fresh, batch, way))
            assert len({round(x, 9) for x in estimates[0].info["losses"].tolist()}) == 3
            close(estimates[0][:2], estimates[1][:2])
            losses.append(estimates[0].loss)
            assert abs(estimates[0].loss - estimates[2].loss) > 1e-6
    assert all(torch.allclose(loss, losses[0], rtol=1e-12) for loss in losses), "in every way the same"
    drawn = []
    for key in range(50):
        with noise(torch.tensor(key)):
            drawn.append(fresh.learner.init(fresh.phi, trees.index(batch.support, 0)).fast["2.weight"])
    bound = 5**-0.5
    assert 0.95 * bound < torch.stack(drawn).abs().max() <= bound
    assert abs(torch.stack(drawn).mean()) < 0.05


def test_a_head_that_starts_anew_must_be_one_layer() -> None:
    deep = nn.Sequential()
    deep.add_module("body", nn.Linear(3, 5))
    deep.add_module("head", nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"the head `head` has 2 layers with matrices, and must have one, .* with head="):
        mo.zero_head_maml(deep, cross_entropy)
    learner: Any = mo.zero_head_maml(deep, cross_entropy, head="head.2").learner
    assert learner.start.names.names == ("head.2.weight", "head.2.bias")


def test_norms_per_step_want_norms_where_they_are_asked_for() -> None:
    with pytest.raises(ValueError, match="per_step_norms=True: the network has no batch norm"):
        mo.maml_plus_plus(net(), mse, per_step_norms=True)
    with pytest.raises(ValueError, match="per_step_norms=3: it must be True or False"):
        mo.maml_plus_plus(net(), mse, per_step_norms=3)  # type: ignore[arg-type]
    assert mo.maml_plus_plus(net(), mse).adapting == mo.maml_plus_plus(net(), mse, per_step_norms=False).adapting
    asked, left = (mo.maml_plus_plus(normed(), mse, **given) for given in ({"per_step_norms": True}, {}))
    assert asked.adapting == left.adapting == ("0.weight", "3.weight", "3.bias")


def test_a_head_that_pretraining_zeroes_must_be_one_layer() -> None:
    deep = nn.Sequential()
    deep.add_module("body", nn.Linear(3, 5))
    deep.add_module("head", nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"the head `head` has 2 layers with matrices, and must have one, .* with head="):
        mo.pretrain(deep, cross_entropy)
    learner: Any = mo.pretrain(deep, cross_entropy, head="head.3").learner
    assert learner.start.names.names == ("head.3.weight", "head.3.bias")


class Swapped(nn.Module):
    """The layer that makes the output is defined first."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.out, self.hidden = nn.Linear(5, 3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.hidden(x).tanh())
        return found


@pytest.mark.parametrize("name", ["zero_head_maml", "anil", "boil", "proto_maml", "protonet", "r2d2"])
def test_a_head_that_was_guessed_must_be_called_last(name: str) -> None:
    batch, module = classes(), Swapped()
    before = [dict(m._forward_hooks) for m in module.modules()]
    with pytest.raises(ValueError, match=r"`hidden` is the last .* defines, .* calls is `out`: name .* as in head='out'\."):
        run(mo.ALGORITHMS[name](module, cross_entropy), batch)
    assert before == [dict(m._forward_hooks) for m in module.modules()] == [{}] * 3
    run(mo.ALGORITHMS[name](module, cross_entropy, head="out"), batch)


@pytest.mark.parametrize("name", ["maml", "meta_sgd", "lslr", "reptile", "maml_plus_plus"])
def test_no_head_is_asked_for_where_none_is_set_apart(name: str) -> None:
    run(mo.ALGORITHMS[name](Swapped(), cross_entropy), classes())


# --- Gradients that are mixed, made or masked -----------------------------------------------------------------------------


def test_meta_curvature_starts_as_maml() -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    batch = Task((torch.randn(3, 6, 1, 3, 3), torch.randn(3, 6, 2)), (torch.randn(3, 5, 1, 3, 3), torch.randn(3, 5, 2)))
    found = run(mo.meta_curvature(module, mse, lr=0.3, steps=2), batch)
    same(found.grad.weights, run(mo.maml(module, mse, lr=0.3, steps=2), batch).grad.weights)


def test_meta_curvature_is_a_kronecker_product() -> None:
    weights = {"conv": torch.randn(3, 2, 2, 2), "linear": torch.randn(4, 3), "bias": torch.randn(4)}
    rule = Curvature(0.5)
    psi = {n: torch.randn_like(p) for n, p in rule.start(weights, torch.Generator()).items()}
    shapes = {n: tuple(p.shape) for n, p in psi.items()}
    assert shapes == {"out.conv": (3, 3), "in.conv": (2, 2), "filter.conv": (4, 4), "out.linear": (4, 4), "in.linear": (3, 3),
                      "scale.bias": (4,)}  # fmt: skip
    found, _ = rule.update(psi, weights, {}, weights, Step(torch.tensor(0), torch.tensor(0.0)))
    conv = torch.kron(torch.kron(psi["out.conv"], psi["in.conv"]), psi["filter.conv"]) @ weights["conv"].flatten()
    close(found["conv"], -0.5 * conv.view(3, 2, 2, 2))
    close(found["linear"], -0.5 * psi["out.linear"] @ weights["linear"] @ psi["in.linear"].mT)
    close(found["bias"], -0.5 * psi["scale.bias"] * weights["bias"])


def test_alfa_is_a_network_of_means_written_out() -> None:
    method, batch = mo.alfa(net(), mse, lr=0.3, decay=0.2, steps=3), regression()
    names = sorted(method.phi.weights)
    psi = {n: p + 0.1 * torch.randn_like(p) for n, p in method.phi.rule.items()}
    assert {n: tuple(p.shape) for n, p in psi.items() if "." in n and n.split(".")[0] in ("hidden", "out")} == {
        "hidden.weight": (8, 8), "hidden.bias": (8,), "out.weight": (8, 8), "out.bias": (8,),
    }  # fmt: skip
    assert method.phi.rule["size.0.weight"].tolist() == [0.3] * 3
    assert method.phi.rule["decay.0.weight"].tolist() == pytest.approx([0.06] * 3)

    def stepped(w: Params, g: Params, k: int) -> Params:
        means = torch.stack([w[n].mean() for n in names] + [g[n].mean() for n in names])
        a_b = F.linear(F.linear(means, w["hidden.weight"], w["hidden.bias"]).relu(), w["out.weight"], w["out.bias"])
        return {
            n: (1 - a_b[4 + i] * w[f"decay.{n}"][k]) * w[n] - a_b[i] * w[f"size.{n}"][k] * g[n] for i, n in enumerate(names)
        }

    def loss(w: Params, pair: Batch) -> Tensor:
        return judged(net())({n: w[n] for n in names}, pair)

    expected = written_out(method.phi.weights | psi, loss, batch, 3, stepped)
    found = run(replace(method, phi=MetaParams(method.phi.weights, psi)), batch).grad
    same(found.weights | found.rule, expected)
    assert expected["hidden.weight"].norm() > 1e-6, "the gradient passes through the network's inputs"


def test_alfa_that_makes_ones_is_descent_with_weight_decay() -> None:
    weights, grads = {"a": torch.randn(3), "b": torch.randn(2, 2)}, {"b": torch.randn(2, 2), "a": torch.randn(3)}
    rule = Generated(0.3, 0.2, 2)
    psi = rule.start(weights, torch.Generator().manual_seed(0)) | {"out.weight": torch.zeros(4, 4)}
    for k in (0, 1, 7):
        found, _ = rule.update(psi, grads, {}, weights, Step(torch.tensor(k), torch.tensor(0.0)))
        for n, g in grads.items():
            close(found[n], -0.3 * (g + 0.2 * weights[n]))


def test_a_transform_is_a_1x1_convolution_that_starts_as_nothing() -> None:
    x, image, layer = torch.randn(4, 3), torch.randn(4, 3, 5, 2), Transform(3)
    close([layer(x), layer(image)], [x, image])
    nn.init.normal_(layer.transform)
    close(layer(image), F.conv2d(image, layer.transform[..., None, None]))
    close(layer(x), F.linear(x, layer.transform))


def test_t_net_shapes_gradients_and_starts_as_maml() -> None:
    torch.manual_seed(1)
    module, batch = nn.Sequential(nn.Linear(3, 2, bias=False), Transform(2)), regression()
    plain = nn.Sequential(nn.Linear(3, 2, bias=False))
    plain.load_state_dict({"0.weight": module.get_parameter("0.weight").detach()})
    method = mo.t_net(module, mse, lr=0.3, steps=2)
    assert method.adapting == ("0.weight",)
    same(run(method, batch).grad.weights, run(mo.maml(plain, mse, lr=0.3, steps=2), batch).grad.weights)
    # y = T W x: a step moves T W along T Tᵀ times the gradient that it would have by itself.
    nn.init.normal_(module.get_parameter("1.transform"))
    t, w = (module.get_parameter(n).detach() for n in ("1.transform", "0.weight"))
    method, (x, y) = mo.t_net(module, mse, lr=0.3, steps=1), trees.index(batch.support, 0)
    *_, (_, state) = inner_loop(method.learner, method.phi, (x, y), exact)
    product = (t @ w).requires_grad_()
    slope = torch.autograd.grad(mse(x @ product.mT, y), product)[0]
    close(t @ state.fast["0.weight"], t @ w - 0.3 * t @ t.mT @ slope)
    with pytest.raises(ValueError, match=r"no weight called `transform`: put mo\.nn\.Transform after its layers"):
        mo.t_net(net(), mse)
    with pytest.raises(ValueError, match=r"no weight called `transform`: put mo\.nn\.Transform after its layers"):
        mo.mt_net(net(), mse)


def transformed() -> nn.Module:
    torch.manual_seed(1)
    return mlp((3, 5, 2), "tanh", transforms=True)


def test_mt_net_whose_units_all_move_is_a_t_net_and_whose_units_stay_moves_nothing() -> None:
    batch, method = regression(), mo.mt_net(transformed(), mse, lr=0.3, steps=2)
    assert {n: p.tolist() for n, p in method.phi.rule.items()} == {"0.logits_5": [0.0] * 5, "3.logits_2": [0.0] * 2}

    def with_logits(value: float) -> MetaOptimizer:
        psi = {n: torch.full_like(p, value) for n, p in method.phi.rule.items()}
        return replace(method, phi=MetaParams(method.phi.weights, psi))

    same(run(with_logits(60.0), batch).grad.weights, run(mo.t_net(transformed(), mse, lr=0.3, steps=2), batch).grad.weights)
    still = with_logits(-60.0)
    *_, (_, state) = inner_loop(still.learner, still.phi, trees.index(batch.support, 0), held)
    assert all(torch.equal(state.fast[n], still.phi.weights[n]) for n in still.adapting)


def test_mt_net_masks_units_as_often_as_it_says_once_for_a_task() -> None:
    rule, weights = Masked(1.0), {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2)}
    psi, ones = {"a.logits_2": torch.tensor([0.0, 1.5])}, {n: torch.ones_like(w) for n, w in weights.items()}

    def masks(key: Tensor) -> tuple[Tensor, Tensor]:
        with noise(key):
            state = rule.init(psi, weights)
        first, state = rule.update(psi, ones, state, weights, Step(torch.tensor(0), torch.tensor(0.0)))
        second, _ = rule.update(psi, ones, state, weights, Step(torch.tensor(1), torch.tensor(0.0)))
        return torch.cat([-first["a.weight"], -first["a.bias"][:, None]], 1), -second["a.bias"]

    count = 4000
    drawn, again = torch.func.vmap(masks)(torch.arange(count))
    assert torch.equal(drawn, drawn[:, :, :1].expand_as(drawn)), "a unit's weights and its bias go together"
    assert torch.equal(drawn[:, :, 0], again), "all steps of a task have one mask"
    assert set(drawn.unique().tolist()) <= {0.0, 1.0} or (drawn - drawn.round()).abs().max() < 1e-12
    for unit, logit in enumerate((0.0, 1.5)):
        p = 1 / (1 + math.exp(-logit))
        assert abs(drawn[:, unit, 0].mean() - p) < 4 * math.sqrt(p * (1 - p) / count)


# --- Models -------------------------------------------------------------------------------------------------------------


def test_models_have_contexts_and_transforms() -> None:
    deep = mlp((3, 4, 2), context=5, transforms=True)
    kinds = [type(m).__name__ for m in deep.children()]
    assert kinds == ["ContextInput", "Linear", "Transform", "ReLU", "Linear", "Transform"]
    assert deep(torch.randn(7, 3)).shape == (7, 2)
    for pool in (False, True):
        x, plain = torch.randn(3, 1, 16, 16), mo.nn.conv4(2, size=16, filters=4, pool=pool)
        rich = mo.nn.conv4(2, size=16, filters=4, pool=pool, context=6, transforms=True)
        names = {n.rpartition(".")[2]: n.partition(".")[0] for n, _ in rich.named_parameters() if n.endswith("context")}
        assert names == {"context": "block2"}
        assert sum(n.endswith("transform") for n, _ in rich.named_parameters()) == 5
        own = dict(plain.named_parameters())
        with torch.no_grad():  # the same weights, and what was added does nothing at the start
            added = ("context", "transform")
            rest = [p for n, p in rich.named_parameters() if not n.endswith(added) and not n.startswith("block2.3")]
            for p, q in zip(rest, own.values(), strict=True):
                p.copy_(q)
        close(rich(x), plain(x))
    for build in (partial(mlp, (3, 2)), partial(mo.nn.conv4, 2)):
        with pytest.raises(ValueError, match=r"(mlp|conv4): context=-1: it must be at least 0, the size of a vector"):
            build(context=-1)
