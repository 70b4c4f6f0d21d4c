"""Muon, SOAP, schedule-free AdamW and hypergradient descent, against torch and against what their papers write down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import metaoptim as mo
from metaoptim import rules
from metaoptim.core import gradients, trees
from metaoptim.core.types import Params, Rule, State, Step
from metaoptim.gradcheck.case import prepare
from metaoptim.gradcheck.claims import judge
from metaoptim.gradcheck.rules import inert
from metaoptim.learners import GradientLearner, Network
from metaoptim.recipes.parts import PARTS
from metaoptim.rules.newton_schulz import orthogonalise

pytestmark = pytest.mark.usefixtures("doubles")

# No factor of SOAP has two eigenvalues of 0, so that every basis is known up to signs. The second convolution is a tall matrix.
SHAPES = {"scale": (), "body.bias": (4,), "body.weight": (4, 3), "conv.weight": (3, 2, 2, 2), "head.weight": (2, 3)}
SHAPES |= {"conv2.weight": (3, 1, 2, 1)}


def start() -> Params:
    return {n: torch.randn(shape) for n, shape in SHAPES.items()}


def curvature() -> Params:
    return {n: 0.2 + torch.rand(shape) for n, shape in SHAPES.items()}


def batch() -> mo.Task:
    """Two tasks of regression, with a support and a query set of 5 examples each."""
    x, y = torch.randn(2, 2, 5, 1), torch.randn(2, 2, 5, 1)
    return mo.Task((x[0], y[0]), (x[1], y[1]))


def at(k: int) -> Step:
    return Step(torch.tensor(k), torch.tensor(0.0))


def slopes(weights: Params, scale: Params) -> Params:
    """Of an inner loss that is no quadratic, and couples all elements of a weight."""
    return {n: (scale[n] * x).sinh() * scale[n] + 0.1 * x.sum() for n, x in weights.items()}


# --- What the papers say ------------------------------------------------------------------------------------------------

Steps = Callable[[Params, Params], list[Params]]
"""(start, curvature) -> the weights after each of a hundred steps, by another's code or a written-out loop."""
COUNT = 100


def by_torch(make: Callable[[dict[str, Tensor]], list[torch.optim.Optimizer]]) -> Steps:
    def steps(weights: Params, scale: Params) -> list[Params]:
        own = {n: (w.flatten(1) if w.ndim == 4 else w).clone().requires_grad_() for n, w in weights.items()}
        optimizers, seen = make(own), []
        for _ in range(COUNT):
            here = {n: x.detach().reshape(SHAPES[n]) for n, x in own.items()}
            for n, g in slopes(here, scale).items():
                own[n].grad = g.reshape(own[n].shape)
            for optimizer in optimizers:
                optimizer.step()
            seen.append({n: x.detach().clone().reshape(SHAPES[n]) for n, x in own.items()})
        return seen

    return steps


def muons(own: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    matrices = [own[n] for n in ("body.weight", "conv.weight", "conv2.weight")]
    others = [own[n] for n in ("scale", "body.bias", "head.weight")]
    return [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.9),
        torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1),
    ]


def soaps(weights: Params, scale: Params, lr: float = 0.02, b1: float = 0.9, b2: float = 0.8, every: int = 3) -> list[Params]:
    """By NumPy: algorithms 3 and 4 of the paper for any number of axes, from bases that are the identity."""
    w = {n: x.numpy().copy() for n, x in weights.items()}
    axes = {n: range(x.ndim) if x.ndim > 1 else range(0) for n, x in w.items()}
    m, v = ({n: np.zeros_like(x) for n, x in w.items()} for _ in range(2))
    factors: dict[tuple[str, int], Any] = {}
    bases: dict[tuple[str, int], Any] = {(n, i): np.eye(x.shape[i]) for n, x in w.items() for i in axes[n]}
    seen = []

    def to_basis(n: str, x: Any, back: bool = False) -> Any:
        for i in axes[n]:
            q = bases[n, i] if back else bases[n, i].T
            x = np.moveaxis(np.tensordot(q, x, axes=(1, i)), 0, i)
        return x

    for t in range(1, COUNT + 1):
        grads = slopes({n: torch.from_numpy(x) for n, x in w.items()}, scale)
        for n, gradient in grads.items():
            g = gradient.numpy()
            m[n] = b1 * m[n] + (1 - b1) * g
            v[n] = b2 * v[n] + (1 - b2) * to_basis(n, g) ** 2
            normalised = to_basis(n, m[n]) / (1 - b1**t) / (np.sqrt(v[n] / (1 - b2**t)) + 1e-8)
            w[n] = np.asarray(w[n] - lr * (to_basis(n, normalised, back=True) + 0.1 * w[n]))
            for i in axes[n]:
                others = [j for j in axes[n] if j != i]
                outer = np.tensordot(g, g, axes=(others, others))
                factors[n, i] = b2 * factors.get((n, i), 0.0) + (1 - b2) * outer
                if t == 1:
                    bases[n, i] = np.linalg.eigh(factors[n, i])[1][:, ::-1]
                elif t % every == 0:
                    values = np.einsum("ij,ik,kj->j", bases[n, i], factors[n, i], bases[n, i])
                    order = np.argsort(-values, kind="stable")
                    bases[n, i] = np.linalg.qr(factors[n, i] @ bases[n, i][:, order])[0]
                    v[n] = np.take(v[n], order, axis=i)
        seen.append({n: torch.tensor(x) for n, x in w.items()})
    return seen


def schedule_frees(weights: Params, scale: Params, lr: float = 0.02, b1: float = 0.8, b2: float = 0.9) -> list[Params]:
    """Three sequences, as algorithm 1 of the paper has them, with a warm-up of 7 steps; y, and x beside it."""
    x, z, v, total = dict(weights), dict(weights), trees.subtract(weights, weights), 0.0
    y, seen = dict(weights), []
    for k in range(1, COUNT + 1):
        grads, step = slopes(y, scale), lr * min(k / 7, 1) * (1 - b2**k) ** 0.5
        total += step**2
        c = step**2 / total
        for n, g in grads.items():
            v[n] = b2 * v[n] + (1 - b2) * g**2
            z[n] = z[n] - step * g / (v[n].sqrt() + 1e-8) - step * 0.1 * y[n]
            x[n] = (1 - c) * x[n] + c * z[n]
            y[n] = (1 - b1) * z[n] + b1 * x[n]
        seen.append(y | {f"judged {n}": w for n, w in x.items()})
    return seen


def hypergradients(direction: Callable[[int, Params, Params], Tensor], lr: float, beta: float) -> Steps:
    """Algorithms 4 and 6 of the paper on one long vector; direction(t, g, memory) is what is subtracted, times lr."""

    def steps(weights: Params, scale: Params) -> list[Params]:
        w, rate, seen = dict(weights), lr, []
        last, memory = torch.zeros(sum(x.numel() for x in w.values())), {"m": torch.zeros(()), "v": torch.zeros(())}
        for t in range(1, COUNT + 1):
            g = torch.cat([x.flatten() for x in slopes(w, scale).values()])
            rate += beta * float(g @ last)
            last = direction(t, {"g": g}, memory)
            parts = (rate * last).split([x.numel() for x in w.values()])
            w = {n: x - d.reshape(x.shape) for (n, x), d in zip(w.items(), parts, strict=True)}
            seen.append(dict(w))
        return seen

    return steps


def adams(t: int, g: Params, memory: Params) -> Tensor:
    memory["m"] = 0.9 * memory["m"] + 0.1 * g["g"]
    memory["v"] = 0.99 * memory["v"] + 0.01 * g["g"] ** 2
    return memory["m"] / (1 - 0.9**t) / ((memory["v"] / (1 - 0.99**t)).sqrt() + 1e-8)


MUON = rules.Muon(0.01, momentum=0.9, decay=0.1, adam_lr=0.01)
SOAP = rules.SOAP(0.02, b1=0.9, b2=0.8, decay=0.1, every=3)
FREE = rules.ScheduleFreeAdamW(0.02, b1=0.8, b2=0.9, decay=0.1, warmup=7)
PAIRS: dict[str, tuple[Rule, Steps]] = {
    "muon": (MUON, by_torch(muons)),
    "soap": (SOAP, soaps),
    "schedule_free_adamw": (FREE, schedule_frees),
    "sgd_hd": (rules.sgd_hd(0.01, 1e-4), hypergradients(lambda t, g, memory: g["g"], 0.01, 1e-4)),
    "adam_hd": (rules.adam_hd(0.01, 1e-4, b2=0.99), hypergradients(adams, 0.01, 1e-4)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_hundred_steps_are_those_of_torch_or_of_the_paper(pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)  # in which torch orthogonalises
    rule, steps = PAIRS[pair]
    weights, scale = start(), curvature()
    expected, state = steps(weights, scale), rule.init({}, weights)
    for k in range(COUNT):
        updates, state = rule.update({}, slopes(weights, scale), state, weights, at(k))
        weights = trees.add(weights, updates)
        judged = {f"judged {n}": x for n, x in mo.core.types.read_out(rule, {}, state, weights).items()}
        for n, x in expected[k].items():
            torch.testing.assert_close((weights | judged)[n], x, rtol=1e-8, atol=1e-8)
    assert all((x - y).abs().max() > 0.1 for x, y in zip(weights.values(), expected[0].values(), strict=False))


# --- Derivatives and transforms -----------------------------------------------------------------------------------------

SMALL: dict[str, Rule] = {name: rule for name, (rule, _) in PAIRS.items()} | {
    "soap, new bases in each step": rules.SOAP(0.02, every=1),
    "muon, then clipped": rules.chain(rules.Clip(norm=0.5), MUON),
}


def after_steps(rule: Rule, weights: Params, scale: Params, count: int = 3) -> Params:
    """The weights at which a run of a few steps is judged."""
    state: State = rule.init({}, weights)
    for k in range(count):
        updates, state = rule.update({}, slopes(weights, scale), state, weights, at(k))
        weights = trees.add(weights, updates)
    return mo.core.types.read_out(rule, {}, state, weights)


def outcome(rule: Rule, weights: Params, scale: Params) -> Tensor:
    return sum((x.sin().sum() for x in after_steps(rule, weights, scale).values()), torch.zeros(()))


@pytest.mark.parametrize("name", SMALL)
def test_meta_gradients_are_central_differences_of_three_steps(name: str) -> None:
    """In the start and in the inner loss; what SOAP holds, its bases, is held."""
    rule, point, step = SMALL[name], (start(), curvature()), 1e-6
    tape: list[Tensor] = []
    with gradients.recorded(tape):
        found = torch.func.grad(lambda a: outcome(rule, *a))(point)
    assert bool(tape) == name.startswith("soap")
    held = [x.clone() for x in tape]
    for _ in range(3):
        way = trees.map_tensors(torch.randn_like, point)
        ends = []
        for size in (step, -step):
            with gradients.replayed(held):
                ends.append(outcome(rule, *trees.zip_tensors(lambda x, d, size=size: x + size * d, point, way)))
        slope = trees.flatten(trees.zip_tensors(lambda g, d: (g * d).sum(), found, way))
        torch.testing.assert_close(torch.stack(slope).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SMALL)
def test_tasks_can_be_mapped(name: str) -> None:
    rule, count = SMALL[name], 4
    weights, scale = (trees.stack([make() for _ in range(2)]) for make in (start, curvature))
    found = torch.func.vmap(lambda w, c: after_steps(rule, w, c, count))(weights, scale)
    for i in range(2):
        expected = after_steps(rule, trees.index(weights, i), trees.index(scale, i), count)
        torch.testing.assert_close(trees.index(found, i), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_meta_gradients_are_finite_where_a_whole_weight_has_no_gradient(name: str) -> None:
    rule, weights = SMALL[name], start()

    def ended(w: Params) -> Tensor:
        state: State = rule.init({}, w)
        for k in range(3):
            updates, state = rule.update({}, {n: 0 * x for n, x in w.items()}, state, w, at(k))
            w = trees.add(w, updates)
        return sum((x.sum() for x in w.values()), torch.zeros(()))

    assert all(g.isfinite().all() for g in torch.func.grad(ended)(weights).values())


@pytest.mark.parametrize("name", ["adam", "adamw", *SMALL])
def test_brief_floats_keep_their_kind_and_come_near_to_long_ones(name: str) -> None:
    rule = {"adam": rules.Adam(0.02), "adamw": rules.AdamW(0.02)}.get(name) or SMALL[name]
    weights, scale = start(), curvature()
    brief = [trees.map_tensors(lambda x: x.bfloat16(), part) for part in (weights, scale)]
    state: State = rule.init({}, brief[0])
    updates, state = rule.update({}, slopes(*brief), state, brief[0], at(0))
    found, expected = after_steps(rule, *brief), after_steps(rule, weights, scale)
    for n, w in found.items():
        assert w.dtype is updates[n].dtype is torch.bfloat16
        torch.testing.assert_close(w.double(), expected[n], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rule", [rules.Adam(0.1), rules.AdamW(0.1, decay=0.0)])
def test_adam_counts_and_corrects_in_brief_floats(rule: Rule) -> None:
    """The first step is lr long, where 1 - 0.999 would be 0; and the count goes beyond the 256 that bfloat16 can hold."""
    g = {"a": torch.tensor([0.5, -2.0], dtype=torch.bfloat16), "b": torch.tensor(3.0, dtype=torch.bfloat16)}
    state: State = rule.init({}, g)
    updates, state = rule.update({}, g, state, g, at(0))
    for n, u in updates.items():
        torch.testing.assert_close(u, -0.1 * g[n].sign(), rtol=0.02, atol=0)
    state["t"] = state["t"] + 999
    assert rule.update({}, g, state, g, at(0))[1]["t"] == 1001


# --- Muon ---------------------------------------------------------------------------------------------------------------


def test_orthogonalised_matrices_keep_their_directions_and_lose_their_sizes() -> None:
    for shape in ((6, 3), (3, 6), (5, 5)):
        u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        sizes = torch.linspace(1.0, 0.2, len(v))
        found = u.mT @ orthogonalise(u @ sizes.diag() @ v, 5) @ v.mT
        torch.testing.assert_close(found, found.diag().diag(), rtol=0, atol=1e-12)
        assert found.diag().min() > 0.65 and found.diag().max() < 1.25


def test_muon_takes_matrices_that_are_no_head_or_embedding_or_those_that_are_named() -> None:
    weights = {n: torch.randn(4, 3) for n in ("0.weight", "head.weight", "token_embedding.weight")} | {"0.bias": torch.randn(4)}

    def matrices(rule: rules.Muon) -> set[str]:
        updates, _ = rule.update({}, weights, rule.init({}, weights), weights, at(0))
        sign = {n for n, u in updates.items() if torch.allclose(u, -rule.adam_lr * weights[n].sign())}
        return set(updates) - sign

    assert matrices(rules.Muon(0.1)) == {"0.weight"}
    assert matrices(rules.Muon(0.1, hidden=lambda name: name.startswith("head"))) == {"head.weight"}
    assert matrices(rules.Muon(0.1, hidden=lambda name: False)) == set()
    alone = {"0.weight": weights["0.weight"]}
    assert rules.Muon(0.1).init({}, alone)["others"] == {}


# --- SOAP ---------------------------------------------------------------------------------------------------------------


def test_soap_begins_as_adam_and_goes_on_in_eigenbases_but_for_long_axes() -> None:
    weights, grads = start(), slopes(start(), curvature())
    updates, state = SOAP.update({}, grads, SOAP.init({}, weights), weights, at(0))
    adam = rules.AdamW(0.02, 0.9, 0.8, decay=0.1)
    torch.testing.assert_close(updates, adam.update({}, grads, adam.init({}, weights), weights, at(0))[0])
    for name, q in state["bases"].items():
        values = q.mT @ state["factors"][name] @ q
        torch.testing.assert_close(q @ q.mT, torch.eye(len(q)))
        torch.testing.assert_close(values, values.diag().sort(descending=True).values.diag())
    short = rules.SOAP(0.1, largest=3).init({}, weights)
    assert "body.weight.0" not in short["factors"] and short["factors"]["body.weight.1"].shape == (3, 3)


# --- Schedule-free AdamW ------------------------------------------------------------------------------------------------


def test_a_schedule_free_run_is_judged_at_the_mean() -> None:
    """Not at the weights where gradients are taken: by the learner, in a chain, and in all that adapts a model."""
    net, rule = mo.nn.mlp((1, 8, 1)), rules.ScheduleFreeAdamW(0.05)
    task = mo.Task(*((x, x.sin()) for x in (torch.randn(6, 1), torch.randn(7, 1))))
    phi = mo.compose(net, mo.losses.mse, rule=rule, steps=3).phi
    losses = {}
    for name, own in {"alone": rule, "in a chain": rules.chain(rules.Clip(norm=100.0), rule)}.items():
        learner = GradientLearner(Network(net, mo.losses.mse), own, 3)
        state = learner.init(phi, task.support)
        assert learner.weights(phi, state).keys() == phi.weights.keys()
        for k in range(3):
            f, x = learner.inner(phi, state, task.support, torch.tensor(k))
            assert x is state.fast
            state = learner.apply(phi, state, *gradients.exact(f, x), torch.tensor(k))
        mean = own.read_out(phi.rule, state.rule, state.fast)
        assert all((mean[n] - x).abs().max() > 1e-4 for n, x in state.fast.items())
        losses[name] = learner.loss(phi, state, task.support, task.query, torch.tensor(3))[0]
        expected = torch.func.functional_call(net, mean, (task.query[0],))
        torch.testing.assert_close(losses[name], mo.losses.mse(expected, task.query[1]))
    torch.testing.assert_close(losses["alone"], losses["in a chain"])


def test_a_schedule_free_state_holds_nothing_of_the_weights() -> None:
    """A later task may go on from it, wherever that one starts."""
    weights = start()
    state = FREE.init({}, weights)
    for x in trees.flatten(state):
        assert (x == 0).all()


@pytest.mark.slow
def test_at_a_minimum_a_schedule_free_run_is_judged_there() -> None:
    """Which is what an implicit gradient is held to; a rule that has come to rest has a mean that is where it is."""
    torch.manual_seed(0)
    rule, estimator = rules.ScheduleFreeAdamW(0.1, eps=0.1), mo.estimators.Implicit(iterations=40)
    net = mo.nn.mlp((1, 3, 1), "tanh")
    method = mo.compose(net, mo.losses.mse, rule=rule, steps=2, prox=2.0, estimator=estimator)
    verdict = judge(prepare(method, method.phi, batch(), 2), ("loop", "graph", "eager"))
    assert verdict.error <= verdict.limit


# --- Recipes, ways of running, mistakes ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_each_rule_is_right_mapped_and_traced_and_has_a_name_in_recipes(name: str) -> None:
    options = {"lr": 0.01} | ({"hyper_lr": 1e-3} if name.endswith("hd") else {})
    torch.manual_seed(0)
    method = mo.compose(mo.nn.mlp((1, 2, 1)), mo.losses.mse, rule=PARTS["rule"][name](**options), steps=2)
    verdict = judge(prepare(method, method.phi, batch(), 2), ("vmap", "graph", "trace"))
    assert verdict.error <= verdict.limit
    assert inert(PARTS["rule"][name](**options), {}, start()) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rules.Muon(-0.1), "lr=-0.1"),
        (lambda: rules.Muon(0.1, momentum=1.0), "momentum=1.0"),
        (lambda: rules.Muon(0.1, iterations=0), "iterations=0"),
        (lambda: rules.SOAP(0.1, every=0), "every=0"),
        (lambda: rules.ScheduleFreeAdamW(0.1, warmup=-1), "warmup=-1"),
        (lambda: rules.sgd_hd(0.1, -1.0), "hyper_lr=-1.0"),
    ],
)
def test_constants_that_can_t_be_are_refused(make: Callable[[], Rule], words: str) -> None:
    with pytest.raises(ValueError, match=f"{words}: it must be"):
        make()
