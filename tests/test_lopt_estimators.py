"""Estimators of ∇ψ on training problems, in float64: who is biased and who is not, where runs end, what is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import metaoptim as mo
from metaoptim import lopt
from metaoptim.core import trees
from metaoptim.core.types import Estimate, Estimator, MetaOptimizer, MetaParams, Params, Rule, State, Step, Task
from metaoptim.engine import Engine
from metaoptim.estimators import Guarded, Truncated, Unroll, nres, pes, truncated_es
from metaoptim.gradcheck.claims import over_a_run
from metaoptim.gradcheck.compare import EXACT
from metaoptim.lopt.data import Data

WINDOW, STEPS = 3, 9
SIGMA, PAIRS, REPEATS = 1e-3, 200, 10

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("doubles")]


@dataclass(frozen=True)
class Tiny:
    """Momentum whose step size and decay are learnt: ψ = (log lr, logit decay)."""

    lr: float = 0.05

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {"psi": next(iter(weights.values())).new_tensor([math.log(self.lr), 0.3])}

    def init(self, psi: Params, weights: Params) -> State:
        return trees.map_tensors(torch.zeros_like, weights)

    def update(self, psi: Params, grads: Params, state: State, weights: Params, step: Step) -> tuple[Params, State]:
        m = {n: psi["psi"][1].sigmoid() * state[n] + g for n, g in grads.items()}
        return {n: -psi["psi"][0].exp() * x for n, x in m.items()}, m


@cache
def toy() -> Data:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(30, 1, 3, 3, generator=draw, dtype=torch.float64)
    return Data("toy", x, torch.arange(30) % 3, 3)


PROBLEMS: dict[str, tuple[Callable[[], lopt.Problems], float]] = {
    "quadratic": (lambda: lopt.quadratics(3, steps=STEPS), 0.02),
    "logistic": (lambda: lopt.logistic(toy(), batch=5, steps=STEPS), 0.5),
    "perceptron": (lambda: lopt.mlp(toy(), (4,), "tanh", batch=5, steps=STEPS), 0.5),
}


def built(name: str, estimator: Estimator) -> MetaOptimizer:
    family, lr = PROBLEMS[name]
    return lopt.learned_optimizer(Tiny(lr), family(), estimator)


def gradient(name: str, estimator: Estimator, seed: int = 0) -> Tensor:
    """∇ψ over a whole run of one problem, (2)."""
    method = built(name, estimator)
    batch = method.learner.problems.sample("train", seed=0, start=0, count=1)
    return over_a_run(method, batch, seed).rule["psi"]


def errors(name: str, estimator: Estimator, exact: Tensor) -> tuple[Tensor, Tensor]:
    """How far the mean over fresh seeds is from a gradient, and its standard error, either relative to the gradient's norm."""
    found = torch.stack([gradient(name, estimator, seed) for seed in range(100, 100 + REPEATS)])
    size = torch.linalg.vector_norm(exact)
    return (found.mean(0) - exact) / size, found.std(0) / math.sqrt(REPEATS) / size


@pytest.mark.parametrize("name", PROBLEMS)
def test_unbiased_estimators_agree_with_the_exact_gradient(name: str) -> None:
    exact = gradient(name, EXACT)
    unbiased = pes(WINDOW, SIGMA, PAIRS), nres(WINDOW, SIGMA, PAIRS), truncated_es(STEPS, SIGMA, PAIRS)
    for estimator in unbiased:
        gap, error = errors(name, estimator, exact)
        assert (gap.abs() < 4 * error).all() and error.max() < 0.1, estimator


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_window_is_biased_and_by_as_much_as_backpropagation_through_it(name: str) -> None:
    exact, windows = gradient(name, EXACT), gradient(name, Truncated(WINDOW))
    gap, error = errors(name, truncated_es(WINDOW, SIGMA, PAIRS), exact)
    assert (gap.abs() > 5 * error).any()
    near, error = errors(name, truncated_es(WINDOW, SIGMA, PAIRS), windows)
    assert (near.abs() < 4 * error).all() and error.max() < 0.1


def test_with_one_window_for_the_run_they_are_the_same() -> None:
    method = built("perceptron", Truncated(STEPS))
    batch = method.learner.problems.sample("train", seed=0, start=0, count=2)
    found = []
    for make in (truncated_es, pes, nres):
        engine, carry, own = Engine(built("perceptron", make(STEPS, 0.1, 2)), "vmap", "graph", "eager"), None, []
        torch.manual_seed(0)
        for step in range(2):
            estimate = engine(method.phi, batch, carry, step)
            carry = estimate.carry
            own.append(estimate.grad.rule["psi"])
        found.append(torch.stack(own))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=0.0)
    assert not torch.allclose(found[0][0], found[0][1])


def streamed(estimator: Estimator, count: int = 3, steps: int = 12) -> list[tuple[Task, Estimate]]:
    """Outer steps at one ψ on a stream of runs of several lengths, each step with the same keys for every estimator."""
    method = built("quadratic", Guarded(estimator))
    source = lopt.Streams(method.learner.problems, 0, count, WINDOW, (WINDOW, 4 * WINDOW))
    engine, carry, found = Engine(method, "vmap", "graph", "eager"), None, []
    for step in range(steps):
        torch.manual_seed(step)
        batch = source(step, method.phi)
        estimate = engine(method.phi, batch, carry, step)
        carry = estimate.carry
        found.append((batch, estimate))
    return found


def test_the_perturbation_of_a_run_that_begins_is_that_of_its_first_window_alone() -> None:
    fresh, sums, kept = (streamed(make(WINDOW, 0.1, 2)) for make in (truncated_es, pes, nres))
    restarts, before = 0, None
    for (batch, drawn), (_, summed), (_, reused) in zip(fresh, sums, kept, strict=True):
        first = batch.support["first"][:, 0]
        assert (first + WINDOW <= batch.support["horizon"][:, 0]).all()
        eps, xi, one = (e.carry.perturbation.rule["psi"] for e in (drawn, summed, reused))
        for t, begins in enumerate((first == 0).tolist()):
            if begins or before is None:
                assert torch.equal(xi[t], eps[t]) and torch.equal(one[t], eps[t])
                restarts += before is not None
            else:
                torch.testing.assert_close(xi[t], before[0][t] + eps[t], rtol=1e-13, atol=0.0)
                assert torch.equal(one[t], before[1][t])
        before = xi, one
    assert restarts > 4


def test_at_the_start_of_a_run_persistent_is_truncated_and_later_it_is_not() -> None:
    for (batch, a), (_, b) in zip(streamed(truncated_es(WINDOW, 0.1), 1), streamed(pes(WINDOW, 0.1), 1), strict=True):
        same = torch.allclose(a.grad.rule["psi"], b.grad.rule["psi"], rtol=1e-12)
        assert same == (int(batch.support["first"]) == 0)


@pytest.mark.parametrize("estimator", [Truncated(WINDOW), pes(WINDOW, 0.1)], ids=["truncated", "pes"])
def test_runs_of_two_lengths_in_one_batch_end_by_themselves(estimator: Estimator) -> None:
    method = built("quadratic", estimator)
    problems, lengths, psi = method.learner.problems, (2 * WINDOW, 3 * WINDOW), method.phi

    def window(slots: list[int], step: int) -> Task:
        windows = [step * WINDOW // lengths[s] for s in slots], [step * WINDOW % lengths[s] for s in slots]
        numbers = [2 * run + s for run, s in zip(windows[0], slots, strict=True)]
        found: Task = problems.stretch("train", 0, numbers, windows[1], [lengths[s] for s in slots], WINDOW)
        return found

    def estimates(slots: list[int], batching: str) -> list[Estimate]:
        engine, carry, found = Engine(replace(method, reduction="sum"), batching, "graph", "eager"), None, []
        for step in range(6):
            torch.manual_seed(step)
            if slots == [1]:
                torch.randint(2**31, (1,))  # the key of slot 0
            found.append(engine(psi, window(slots, step), carry, step))
            carry = found[-1].carry
        return found

    alone = [estimates([s], "loop") for s in (0, 1)]
    for batching in ("loop", "vmap"):
        for step, together in enumerate(estimates([0, 1], batching)):
            done = [int(k) for k in together.carry.k]
            assert done == [(step + 1) * WINDOW % n for n in lengths] == [int(a[step].carry.k) for a in alone]
            expected = sum(a[step].grad.rule["psi"] for a in alone)
            torch.testing.assert_close(together.grad.rule["psi"], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("estimator", [Truncated(WINDOW), Unroll()], ids=["truncated", "unroll"])
def test_a_diverged_problem_counts_as_zero_and_leaves_the_others_alone(estimator: Estimator, batching: str) -> None:
    method = replace(built("quadratic", Guarded(estimator)), reduction="sum")
    batch = method.learner.problems.sample("train", seed=0, start=0, count=3)
    others = trees.map_tensors(lambda x: x[[0, 2]], batch)
    batch.support["start"]["theta"][1] = math.inf
    engine = Engine(method, batching, "graph", "eager")
    found, alone = engine(method.phi, batch), Engine(method, batching, "graph", "eager")(method.phi, others)
    assert torch.equal(found.grad.rule["psi"], alone.grad.rule["psi"]) and alone.info["discarded"] == 0
    assert found.info["discarded"].item() == pytest.approx(1 / 3) == found.info["diverged"].item()
    assert torch.isfinite(found.loss)


def test_long_gradients_are_clipped_problem_by_problem() -> None:
    method = replace(built("quadratic", Truncated(WINDOW)), reduction="sum")
    batch = method.learner.problems.sample("train", seed=0, start=0, count=3)

    def found(estimator: Estimator, batch: Task) -> Estimate:
        return Engine(replace(method, estimator=estimator), "loop", "graph", "eager")(method.phi, batch)

    single = [found(method.estimator, trees.index(batch, slice(t, t + 1))).grad.rule["psi"] for t in range(3)]
    sizes = sorted(float(torch.linalg.vector_norm(g)) for g in single)
    clip = (sizes[0] + sizes[1]) / 2
    estimate = found(Guarded(method.estimator, clip), batch)
    expected = sum(g * min(1.0, clip / float(torch.linalg.vector_norm(g))) for g in single)
    torch.testing.assert_close(estimate.grad.rule["psi"], expected, rtol=1e-12, atol=0.0)
    assert estimate.info["clipped"].item() == pytest.approx(2 / 3) and estimate.info["discarded"] == 0


RULES: dict[str, Callable[[], Rule]] = {
    "LSTM": lambda: lopt.LSTM(hidden=3, first_order=False),
    "SmallFC": lopt.SmallFC,
    "Celo2": lambda: lopt.Celo2(lr=0.05),
}


@pytest.mark.parametrize("name", RULES)
def test_the_meta_gradient_of_a_learned_rule_is_that_of_central_differences_in_every_mode(name: str) -> None:
    family = lopt.mlp(toy(), (4,), "tanh", batch=5, steps=3)
    method = lopt.learned_optimizer(RULES[name](), family, EXACT)
    batch, engine = family.sample("train", seed=0, start=0, count=2), Engine(method, "loop", "graph", "eager")
    # Aside of the start: where biases are 0, a weight for which the first layer is dead lies on the kink of the second.
    at = trees.map_tensors(lambda x: x + 0.01 * torch.randn_like(x), method.phi.rule)
    exact = engine(MetaParams({}, at), batch).grad.rule
    # Steps along the gradient are seen best; a part of each other direction is in it, so that none is left out.
    noise = {n: torch.randn_like(p) for n, p in at.items()}
    along = trees.add({n: g / trees.norm(exact) for n, g in exact.items()}, noise, 0.3 / trees.norm(noise).item())

    def loss(h: float) -> Tensor:
        return engine(MetaParams({}, trees.add(at, along, h)), batch).loss

    h = 1e-6
    slope = (loss(h) - loss(-h)) / (2 * h)
    torch.testing.assert_close(trees.dot(exact, along), slope, rtol=1e-6, atol=0.0)
    for how in (("vmap", "graph"), ("loop", "steps"), ("vmap", "steps")):
        other = Engine(method, *how, "eager")(MetaParams({}, at), batch).grad.rule
        for n, g in exact.items():
            torch.testing.assert_close(other[n], g, rtol=1e-9, atol=1e-12 * float(trees.norm(exact)))


def test_estimators_are_compared_on_a_problem_of_ones_own() -> None:
    method = built("quadratic", Truncated(WINDOW))
    batch = method.learner.problems.sample("train", seed=0, start=0, count=1)
    found = mo.compare_estimators(method, batch, sigma=SIGMA, pairs=PAIRS, repeats=REPEATS)
    exact, truncated, biased, persistent, reused = found.rows
    windows, whole = (over_a_run(replace(method, estimator=e), batch, 0).rule["psi"] for e in (Truncated(WINDOW), EXACT))
    bias = float(torch.linalg.vector_norm(windows - whole) / torch.linalg.vector_norm(whole))
    assert truncated.bias == pytest.approx(bias) and truncated.spread == truncated.error == 0 and exact.bias == 0
    assert abs(biased.bias - bias) < 4 * biased.error and biased.bias > 5 * biased.error
    for row in (persistent, reused):
        assert row.bias < 3 * row.error and row.error == pytest.approx(row.spread / math.sqrt(REPEATS))
    drawn = [over_a_run(replace(method, estimator=pes(WINDOW, SIGMA, PAIRS)), batch, s).rule["psi"] for s in range(REPEATS)]
    gap, noise = torch.stack(drawn).mean(0) - whole, torch.stack(drawn).var(0).sum() / REPEATS
    square = float((gap.square().sum() - noise) / whole.square().sum())  # of the bias: noise is taken off
    assert persistent.bias == pytest.approx(math.sqrt(max(square, 0.0)), rel=1e-9)
    assert all(row.seconds > 0 for row in found.rows)
    assert all(word in str(found) for word in ("exact", "pes(3, 0.001, 200)", "nres", "truncated_es", "bias"))
    assert json.loads(json.dumps(found.json()))["facts"]["steps"] == STEPS


def test_the_spread_of_an_estimate_falls_with_the_root_of_its_pairs() -> None:
    method = built("logistic", pes(WINDOW, SIGMA))
    found = mo.compare_estimators(
        method, method.learner.problems, repeats=40, estimators={"1": nres(WINDOW, SIGMA, 1), "16": nres(WINDOW, SIGMA, 16)}
    )
    assert found.rows[1].spread / found.rows[2].spread == pytest.approx(4, rel=0.3)


def test_the_gradient_doctor_tells_bias_and_spread() -> None:
    method = built("quadratic", Guarded(pes(WINDOW, 0.01)))
    report = mo.check(method, method.learner.problems, modes=[("vmap", "graph", "eager")])
    assert report.ok and any("spread of" in note and "compare_estimators" in note for note in report.notes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"repeats": 1}, "repeats=1"),
        ({"window": 2}, "window=2.*divide"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"pairs": 0}, "pairs=0"),
    ],
)
def test_a_comparison_refuses_what_makes_no_sense(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="protonet takes no inner steps"):
        mo.compare_estimators(mo.protonet(mo.nn.mlp((1, 4, 2)), mo.losses.cross_entropy))
    method = built("quadratic", pes(WINDOW, 0.1))
    with pytest.raises(ValueError, match=sentence):
        mo.compare_estimators(method, method.learner.problems, **changes)
