"""A diagnosis: every number against a value that is known by construction, and sentences that follow from the numbers."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metaoptim as mo
from metaoptim import report
from metaoptim.algorithms.meta_sgd import StepSizes
from metaoptim.cli.main import main
from metaoptim.core.types import MetaParams, Task
from metaoptim.diagnosis import Diagnosis, alignment, curvature, features, gain, permutations, step_sizes, steps
from metaoptim.diagnosis.diagnose import PARTS
from metaoptim.diagnosis.subject import Changed, Subject
from metaoptim.report.diagnosis import DRAWN, draw_diagnosis
from metaoptim.runs import Run
from metaoptim.tasks import ImageTasks

SMALL: dict[str, Any] = {"episodes": 4, "closely": 3}
ROTATION = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]


class Point(nn.Module):
    """Its weight w, for every example."""

    def __init__(self, size: int = 3) -> None:
        nn.Module.__init__(self)
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return self.w.expand(len(x), -1)


def quadratic(*eigenvalues: float) -> Callable[[Tensor, Tensor], Tensor]:
    """½ (w − c)ᵀ A (w − c) for targets c, where A has these eigenvalues."""
    a = ROTATION @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ ROTATION.mT
    return lambda w, c: 0.5 * ((w - c) @ a * (w - c)).sum(-1).mean()


def points(centre: Callable[[torch.Generator], Tensor]) -> Any:
    """Tasks of two rows, both with the target that the task draws; support and query are alike."""

    def sample(generator: torch.Generator, split: str) -> Any:
        part = torch.zeros(2, 1), centre(generator).double().expand(2, 3)
        return part, part

    return mo.tasks.from_function(sample, name="points")


def drawn(generator: torch.Generator) -> Tensor:
    return torch.randn(3, generator=generator)


def run_of(loss: Any = None, net: nn.Module | None = None, **options: Any) -> Run:
    given: dict[str, Any] = {"rule": mo.rules.SGD(0.5), "steps": 2} | options
    method = mo.compose(net or Point(), loss or quadratic(1.0, 1.0, 1.0), **given)
    return Run(method, method.phi)


def images() -> ImageTasks:
    """Twelve classes of 12×12 noise around a picture of their own, four of them in each split."""
    rng = np.random.default_rng(0)
    drawings = rng.integers(0, 120, (12, 1, 12, 12)) + rng.integers(0, 136, (12, 8, 12, 12))
    members = {split: np.arange(i, i + 4) for split, i in (("train", 0), ("val", 4), ("test", 8))}
    return ImageTasks("blobs", drawings.astype(np.uint8), list("abcdefghijkl"), members, 3, 2, 3)


def classifier(build: Any = mo.maml, net: nn.Module | None = None, **options: Any) -> Run:
    torch.manual_seed(0)
    layers = {"flatten": nn.Flatten(), "hidden": nn.Linear(144, 8), "norm": mo.nn.BatchNorm(8), "tanh": nn.Tanh()}
    net = net or nn.Sequential(OrderedDict(layers | {"head": nn.Linear(8, 3)}))
    method = build(net, mo.losses.cross_entropy, **options)
    return Run(method, method.phi)


def numbers(found: Diagnosis, name: str) -> Any:
    return found[name].numbers


# Features


def test_cka_of_the_same_features_rotated_and_scaled_is_1_and_of_orthogonal_ones_0() -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    assert features.cka(x, x) == pytest.approx(1, abs=1e-12)
    assert features.cka(x, 7 * x @ ROTATION + 5) == pytest.approx(1, abs=1e-12)
    a, b = torch.tensor([1.0, -1, 1, -1])[:, None], torch.tensor([1.0, 1, -1, -1])[:, None]
    assert features.cka(a, b) == pytest.approx(0, abs=1e-12)
    assert math.isnan(features.cka(x, torch.ones(8, 2)))


def test_cka_is_the_published_formula_in_feature_space() -> None:
    x, y = torch.randn(9, 4, 2, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    a, b = x.flatten(1) - x.flatten(1).mean(0), y - y.mean(0)
    expected = (b.mT @ a).norm() ** 2 / ((a.mT @ a).norm() * (b.mT @ b).norm())
    assert features.cka(x, y) == pytest.approx(expected.item(), rel=1e-12)


def test_layers_that_do_not_adapt_keep_their_features_exactly() -> None:
    run = classifier(mo.anil, net=mo.nn.conv4(ways=3, size=12, filters=2), lr=1.0, steps=3)
    found = mo.diagnose(run, images(), episodes=2, closely=2, steps=3)
    layers = {layer["layer"]: layer for layer in numbers(found, "features")["layers"]}
    assert list(layers) == [f"block{i}.{j}" for i in range(4) for j in (0, 1)] + ["head"]
    assert [name for name, layer in layers.items() if layer["head"]] == ["head"]
    assert all(layer["cka"] == pytest.approx(1, abs=1e-6) for layer in layers.values() if not layer["head"])
    assert layers["head"]["cka"] < 0.999
    assert all(layer["by_chance"] < 0.999 for layer in layers.values())
    assert numbers(found, "features")["examples"] == 9


@pytest.mark.parametrize("policy", ["transductive", "inductive", "frozen"])
def test_outputs_are_those_of_the_layers_on_the_query(policy: Any) -> None:
    run = classifier(normalisation=policy)
    task = Task(*((x[0], y[0]) for x, y in images().sample("val", seed=0, start=0, count=1)))
    with torch.no_grad():
        seen = features.outputs(run.network, run.phi.weights, task)
        assert torch.equal(seen["head"], run.network.output(run.phi.weights, task.query[0], task.support))
    assert all(len(x) == 9 for x in seen.values()) and not run.network.net.get_submodule("head")._forward_hooks


# Curvature


def products(a: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda v: {"w": a @ v["w"]}


@pytest.mark.parametrize(("eigenvalues", "expected"), [((5, 2, 0), 5), ((-5, 2, 1), 2), ((-5, -3, -1), -1), ((0, 0, 0), 0)])
def test_the_largest_eigenvalue_not_the_largest_in_size(eigenvalues: tuple[float, ...], expected: float) -> None:
    a = ROTATION @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ ROTATION.mT
    value, v = curvature.largest(products(a), {"w": torch.ones(3, dtype=torch.float64)}, iterations=500, tolerance=0.0)
    assert value == pytest.approx(expected, abs=1e-9)
    assert v["w"].norm().item() == pytest.approx(1)
    torch.testing.assert_close(a @ v["w"], value * v["w"], rtol=0, atol=1e-7)


def test_curvature_of_a_quadratic_and_its_product_with_the_step_size() -> None:
    seen = numbers(mo.diagnose(run_of(quadratic(3.0, 1.0, 0.2)), points(drawn), **SMALL), "curvature")
    assert seen["steps"] == [0, 1, 2]
    assert seen["largest_eigenvalue"]["mean"] == pytest.approx([3.0] * 3, rel=1e-3)
    assert seen["step_size"]["mean"] == pytest.approx([0.5] * 3)
    assert seen["product"]["most"] == pytest.approx([1.5] * 3, rel=1e-3)
    assert len(numbers(mo.diagnose(run_of(steps=30), points(drawn), **SMALL), "curvature")["steps"]) == curvature.POINTS


def test_curvature_follows_the_path() -> None:
    """f(w) = Σ (w − c)⁴ has the Hessian diag(12 (w − c)²), along a path that is written out here."""
    run = run_of(lambda w, c: (w - c).pow(4).sum(-1).mean(), rule=mo.rules.SGD(0.02))
    family = points(lambda generator: torch.tensor([1.0, 2.0, -0.5]))
    w, expected = torch.zeros(3), []
    for _ in range(3):
        gap = w - torch.tensor([1.0, 2.0, -0.5])
        expected.append(12 * gap.square().max().item())
        w = w - 0.02 * 4 * gap**3
    seen = numbers(mo.diagnose(run, family, **SMALL), "curvature")
    assert seen["largest_eigenvalue"]["mean"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(("rule", "alpha"), [
    (mo.rules.SGD(0.5), 0.5), (mo.rules.Momentum(0.5), 0.5), (StepSizes(0.3, 0.3), 0.3), (StepSizes(-0.3, -0.3), -0.3),
    (mo.rules.chain(mo.rules.Clip(norm=1e6), mo.rules.SGD(0.5)), 0.5), (mo.rules.Adam(0.5), None),
    (mo.rules.chain(mo.rules.Clip(norm=1e-3), mo.rules.SGD(0.5)), None),
])  # fmt: skip
def test_the_step_size_is_what_a_rule_makes_of_a_gradient_or_nothing(rule: Any, alpha: float | None) -> None:
    seen = numbers(mo.diagnose(run_of(quadratic(3.0, 1.0, 0.2), rule=rule), points(drawn), **SMALL), "curvature")
    assert (seen["step_size"] is None) == (seen["product"] is None) == (alpha is None)
    if alpha is not None:
        assert seen["step_size"]["mean"] == pytest.approx([alpha] * 3, rel=1e-4)


def test_minibatches_and_the_proximal_term_are_part_of_the_inner_objective() -> None:
    seen = numbers(mo.diagnose(run_of(quadratic(3.0, 1.0, 0.2), prox=2.0, batch_size=1), points(drawn), **SMALL), "curvature")
    assert seen["largest_eigenvalue"]["mean"] == pytest.approx([5.0] * 3, rel=1e-3)


# Alignment


def test_identical_tasks_are_aligned_and_opposite_ones_are_not() -> None:
    same = numbers(mo.diagnose(run_of(), points(lambda generator: torch.tensor([1.0, 2.0, 3.0])), **SMALL), "alignment")
    for name in ("same_task", "other_task", "between_supports", "between_queries"):
        assert same[name] == pytest.approx(1, abs=1e-9)
    assert np.array(same["support_and_query"]) == pytest.approx(np.ones((3, 3)), abs=1e-9)

    def either(generator: torch.Generator) -> Tensor:
        return torch.ones(3) * (1 - 2 * torch.randint(2, (), generator=generator))

    signs = points(either).sample("val", seed=0, start=0, count=6).query[1][:, 0, 0]
    seen = numbers(mo.diagnose(run_of(), points(either), episodes=6, closely=6), "alignment")
    assert signs.unique().numel() == 2
    assert np.array(seen["support_and_query"]) == pytest.approx(np.outer(signs, signs), abs=1e-9)
    assert (seen["same_task"], seen["other_task"]) == pytest.approx((1, (signs.sum().item() ** 2 - 6) / 30), abs=1e-9)


def test_gradients_are_those_of_autograd_at_the_start() -> None:
    run = classifier(normalisation="inductive")
    task = Task(*((x[0], y[0]) for x, y in images().sample("val", seed=0, start=0, count=1)))
    unscored: Any = None
    found = alignment.directions(Subject(run, images(), "val", 0, 2, unscored), task)
    for gradient, (x, y) in zip(found, task, strict=True):
        own = {n: p.clone().requires_grad_() for n, p in run.phi.weights.items()}
        loss = nn.functional.cross_entropy(run.network.output(own, x, task.support), y)
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(own.values()))])
        torch.testing.assert_close(gradient, flat / flat.norm(), rtol=1e-4, atol=1e-6)


# Adaptation


def test_one_exact_step_on_a_quadratic_gains_all_of_the_loss() -> None:
    run = run_of(rule=mo.rules.SGD(1.0), steps=1)
    batch = points(drawn).sample("val", seed=0, start=0, count=6)
    seen = numbers(mo.diagnose(run, points(drawn), episodes=6, closely=2), "gain")
    before = 0.5 * batch.query[1][:, 0].square().sum(-1)
    assert seen["before"]["mean"] == pytest.approx(before.mean().item())
    assert seen["after"]["mean"] == pytest.approx(0, abs=1e-12)
    assert seen["gain"]["mean"] == pytest.approx(before.mean().item())
    assert seen["gain"]["interval"] == pytest.approx(1.96 * before.std().item() / math.sqrt(6))


def test_a_method_that_does_not_adapt_has_gain_0() -> None:
    run = run_of(steps=0)
    known = replace(run, method=replace(run.method, phi=MetaParams({"w": torch.full((3,), 9.0).double()}, {})))
    found = mo.diagnose(known, points(drawn), **SMALL)
    assert numbers(found, "gain")["gain"] == numbers(found, "gain")["cost_of_shuffling"] == {"mean": 0.0, "interval": 0.0}
    assert found["gain"].sentence.startswith("It does not adapt, it knows by heart")
    untrained = mo.diagnose(run, points(drawn), **SMALL)
    assert untrained["gain"].sentence.startswith("Its steps change too little for 4 episodes to tell")
    assert list(untrained) == list(untrained.readings)
    assert numbers(untrained, "gain")["known"]["mean"] == 0 < numbers(found, "gain")["known"]["mean"]
    assert {"features", "curvature"} <= found.left_out.keys() and "alignment" not in found.left_out
    assert len(numbers(found, "steps")["mean"]["loss"]) == 11  # it could adapt: ten steps were tried


def test_shuffling_costs_a_method_that_reads_its_targets() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.w = nn.Parameter(torch.zeros(1, 1))

        def forward(self, x: Tensor) -> Any:
            return x @ self.w

    def slopes(generator: torch.Generator, split: str) -> Any:
        slope, x = torch.randn(1, generator=generator), torch.linspace(-1, 1, 20)[:, None]
        return (x, slope * x), (x, slope * x)

    run = run_of(mo.losses.mse, Scaled(), rule=mo.rules.SGD(1.0), steps=5)
    found = mo.diagnose(run, mo.tasks.from_function(slopes), episodes=20, closely=2)
    seen = numbers(found, "gain")
    assert seen["after"]["mean"] < 0.01 * seen["before"]["mean"] < seen["cost_of_shuffling"]["mean"]
    assert found["gain"].sentence.startswith("It adapts: its loss goes from")


def test_shuffled_targets_are_the_same_however_episodes_are_cut() -> None:
    family = Changed(images(), gain.shuffled)
    whole, first, rest = (family.sample("val", seed=5, start=s, count=c) for s, c in ((0, 5), (0, 2), (2, 3)))
    plain = images().sample("val", seed=5, start=0, count=5)
    assert torch.equal(whole.support[1], torch.cat([first.support[1], rest.support[1]]))
    assert torch.equal(whole.support[1].sort(1).values, plain.support[1].sort(1).values)
    assert torch.equal(whole.support[0], plain.support[0]) and torch.equal(whole.query[1], plain.query[1])
    assert not torch.equal(whole.support[1], plain.support[1]) and family.splits == images().splits


def test_scores_after_each_step_are_those_of_evaluate_and_go_beyond_training() -> None:
    run = classifier(lr=0.3, steps=2)
    seen = numbers(mo.diagnose(run, images(), **SMALL, seed=3), "steps")
    row = mo.evaluate(run, images(), split="val", episodes=4, steps=10, baselines=(), seed=3, progress=False).rows[0]
    for metric in ("accuracy", "loss"):
        assert (seen["mean"][metric], seen["interval"][metric]) == (row.mean(metric), row.interval(metric))
    gaps = (row.scores["accuracy"] - row.scores["accuracy"][:, 2:3])[:, 3:].double()
    assert seen["last"]["gain"] == pytest.approx(gaps[:, -1].mean().item())
    assert seen["best_beyond"]["gain"] == pytest.approx(gaps.mean(0).max().item())
    assert numbers(mo.diagnose(run, images(), **SMALL, steps=2), "steps")["last"] is None


# Assignments of classes to outputs


class Reads(nn.Module):
    """Knows the class by heart: the input is the class, one-hot, times a weight."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.head = nn.Linear(3, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(3))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Any:
        return self.head(x)


def known_classes(generator: torch.Generator, split: str) -> Any:
    y = torch.arange(3)
    return (torch.eye(3), y), (torch.eye(3), y)


def test_assignments_of_a_method_that_knows_its_classes_by_heart() -> None:
    """It is right on the fixed points of a permutation: of 3 classes, all (once), one (three times) or none (twice)."""
    run = run_of(mo.losses.cross_entropy, Reads(), rule=mo.rules.SGD(1e-6))
    seen = numbers(mo.diagnose(run, mo.tasks.from_function(known_classes), **SMALL), "permutations")
    fixed = np.array([1, 1 / 3, 1 / 3, 1 / 3, 0, 0])
    assert (seen["assignments"], seen["classes"]) == (6, 3)
    for when in ("before", "after"):
        assert sorted(seen[when]["means"], reverse=True) == pytest.approx(fixed)
        assert seen[when]["spread"] == pytest.approx(fixed.std())
        assert (seen[when]["worst"], seen[when]["best"]) == pytest.approx((0, 1))


def test_assignments_do_not_matter_from_a_head_of_zeros() -> None:
    run = classifier(lr=1.0)
    zeros = {n: p * 0 if n.startswith("head.") else p for n, p in run.phi.weights.items()}
    found = mo.diagnose(Run(run.method, run.phi._replace(weights=zeros)), images(), **SMALL)
    assert numbers(found, "permutations")["after"]["spread"] == pytest.approx(0, abs=1e-7)
    assert "hardly matters" in found["permutations"].sentence


def test_assignments_are_distinct_and_keep_what_losses_pass_over() -> None:
    many = permutations.assignments(5)
    assert len(set(many)) == 8 and many[0] == (0, 1, 2, 3, 4) and all(sorted(order) == [0, 1, 2, 3, 4] for order in many)
    batch = Task((torch.zeros(1, 3), torch.tensor([[0, 1, -100]])), (torch.zeros(1, 1), torch.tensor([[2]])))
    changed = permutations.assigned((2, 0, 1))(batch, "val", 0, 0)
    assert changed.support[1].tolist() == [[2, 0, -100]] and changed.query[1].tolist() == [[1]]


# Step sizes


def test_step_sizes_are_read_by_layer_whatever_stands_in_front() -> None:
    psi = {"lr.a.weight": torch.tensor([[0.1, -0.2], [0.3, 0.4]]), "lr.a.bias": torch.tensor([0.5]), "lr.w": torch.tensor(1.0)}
    a = sorted([0.1, -0.2, 0.3, 0.4, 0.5])
    found = step_sizes.by_layer(mo.rules.SGD(1.0), psi)
    assert {layer: pytest.approx(sorted(values)) for layer, values in found.items()} == {"a": a, "w": [1.0]}
    behind = mo.rules.chain(mo.rules.Clip(norm=1.0), mo.rules.chain(mo.rules.SGD(1.0)))
    assert step_sizes.by_layer(behind, {f"1.0.{n}": x for n, x in psi.items()}) == found
    per_step = {"0.lr": torch.tensor([0.1, 0.2]), "lr": torch.tensor(0.3), "0.decay": torch.tensor(1.0)}
    assert step_sizes.by_layer(None, per_step) == {"0": pytest.approx([0.1, 0.2]), "all": pytest.approx([0.3])}


def test_negative_step_sizes_are_flagged() -> None:
    method = mo.meta_sgd(mo.nn.mlp((1, 4, 1)), mo.losses.mse, low=0.1, high=0.1)
    psi = dict(method.phi.rule)
    psi["lr.2.weight"] = torch.tensor([[0.1, -0.2, 0.1, 0.2]])
    found = mo.diagnose(Run(method, method.phi._replace(rule=psi)), mo.tasks.sinusoid(), **SMALL)
    first, last = numbers(found, "step_sizes")["layers"]
    assert (first["layer"], first["count"], first["negative"], first["mean"]) == ("0", 8, 0.0, pytest.approx(0.1))
    assert (last["layer"], last["count"], last["negative"]) == ("2", 5, 0.2)
    assert [last[name] for name in ("least", "most", "mean", "mean_at_start")] == pytest.approx([-0.2, 0.2, 0.06, 0.1])
    assert "`2` most of them (20.0 %)" in found["step_sizes"].sentence


# Sentences


def at(metric: str = "accuracy", **change: Any) -> dict[str, Any]:
    scores = {"mean": {metric: [0.2, 0.8, 0.9]}, "interval": {metric: [0.1, 0.1, 0.1]}}
    return {"metric": metric, "episodes": 9, "training_steps": 1, "adapts": True, **scores, **change}


def change(value: float) -> dict[str, Any]:
    return {"step": 2, "gain": value, "interval": 0.05}


@pytest.mark.parametrize(("read", "given", "says"), [
    (steps.read, at(last=change(0.051), best_beyond=change(0.051)), "80.0 % ± 10.0 % after the 1 step of training; going on h"),
    (steps.read, at(last=change(0.049), best_beyond=change(0.049)), "changes nothing that 9 episodes can tell"),
    (steps.read, at(last=change(-0.051), best_beyond=change(0.06)), "going on makes it worse, 90.0 % after 2"),
    (steps.read, at(last=None, best_beyond=None, adapts=False), "no inner step moves anything"),
    (steps.read, at("loss", last=change(math.nan), best_beyond=change(math.nan), mean={"loss": [1.0, 0.5, math.nan]}),
     "no longer finite from step 2 on"),
    (alignment.read, {"same_task": 0.3, "other_task": 0.19}, "tell tasks apart"),
    (alignment.read, {"same_task": 0.3, "other_task": 0.21}, "pull alike"),
    (alignment.read, {"same_task": 0.0, "other_task": -0.5}, "can't help"),
    (permutations.read, {"assignments": 8, "before": None, "after": {"spread": 0.021, "worst": 0.8, "best": 0.9}},
     "output matters: over 8 assignments the accuracy of an episode goes from 80.0 to 90.0 %"),
    (permutations.read, {"assignments": 8, "before": {"spread": 0.3}, "after": {"spread": 0.019, "worst": 0.8, "best": 0.9}},
     "hardly matters"),
    (step_sizes.read, {"layers": [{"layer": "a", "negative": 0.0, "mean": 0.2}, {"layer": "b", "negative": 0.0, "mean": 0.1}]},
     "go from 0.1 (`b`) to 0.2 (`a`)"),
])  # fmt: skip
def test_sentences_follow_from_thresholds(read: Any, given: dict[str, Any], says: str) -> None:
    assert says in read(given) and read(given).endswith(".")


@pytest.mark.parametrize(("gained", "cost", "known", "says"), [
    (0.2, 0.2, 0.0, "It adapts"), (-0.2, 0.0, 0.0, "Its steps do harm"),
    (0.5, 0.1, 0.0, "It moves, but not by what the targets say"),
    (0.2, 0.1, 0.0, "It moves, and 9 episodes can't tell whether by what the targets say"),
    (0.1, 0.2, 0.0, "Its steps change too little for 9 episodes to tell"),
    (-0.1, 0.1, 0.5, "It does not adapt, it knows by heart"), (-0.1, 0.1, 0.1, "Its steps change too little for 9"),
])  # fmt: skip
def test_the_sentence_on_adaptation(gained: float, cost: float, known: float, says: str) -> None:
    score = {"mean": 0.5, "interval": 0.1}
    given = {
        "metric": "accuracy",
        "episodes": 9,
        "known": {"mean": known, "interval": 0.1},
        **dict.fromkeys(("before", "after", "shuffled"), score),
    }
    told = {"gain": {"mean": gained, "interval": 0.1}, "cost_of_shuffling": {"mean": cost, "interval": 0.1}}
    sentence = gain.read({**given, **told})
    assert sentence.startswith(says) and ": its accuracy goes from 50.0 % to 50.0 %, and to 50.0 %" in sentence
    closed = gain.read({**given, **told, "before": None, "gain": None})
    assert closed.startswith("It reads the support" if cost > 0.1 else "Shuffled targets cost it nothing that 9")


@pytest.mark.parametrize(("gained", "says"), [
    (0.2, "It moves"), (-0.2, "Its steps do harm"), (0.1, "Its steps change too little to tell"), (None, "Its loss is 0.5;"),
])  # fmt: skip
def test_targets_of_one_row_are_not_shuffled(gained: float | None, says: str) -> None:
    score = {"mean": 0.5, "interval": 0.1}
    given = {"metric": "loss", "before": None if gained is None else score, "after": score}
    moved = None if gained is None else {"mean": gained, "interval": 0.1}
    told = gain.read({**given, "shuffled": None, "gain": moved, "cost_of_shuffling": None})
    assert told.startswith(says) and "with one row to a support there is nothing to shuffle" in told


def test_one_shot_regression_does_not_know_by_heart() -> None:
    method = mo.maml(mo.nn.mlp((1, 8, 1), "tanh"), mo.losses.mse, lr=0.01)
    found = mo.diagnose(Run(method, method.phi), mo.tasks.sinusoid(shots=1), episodes=4, closely=2)
    assert numbers(found, "gain")["shuffled"] is numbers(found, "gain")["cost_of_shuffling"] is None
    assert "whether it reads the targets is not measured" in found["gain"].sentence
    assert numbers(found, "gain")["gain"]["mean"] != 0


@pytest.mark.parametrize(("least", "chance", "says"), [
    (0.9, 0.5, "Features are reused: ahead of the head `b` keeps the least, a CKA of 0.90; the head's outputs keep 0.30"),
    (0.89, 0.5, "Features change with the task"), (0.95, 0.9, "7 examples can't tell"), (0.5, 0.95, "Features change"),
])  # fmt: skip
def test_the_sentence_on_features(least: float, chance: float, says: str) -> None:
    rows = [("a", 1.0, False), ("b", least, False), ("dead", math.nan, False), ("head", 0.3, True)]
    layers = [{"layer": name, "cka": value, "by_chance": chance, "head": head} for name, value, head in rows]
    assert says in features.read({"examples": 7, "layers": layers})


@pytest.mark.parametrize(("product", "says"), [
    ([1.0, 2.1], "too long for the sharpest direction: α·λ is 2.1 at step 1"), ([1.9, 0.3], "short enough"), (None, "no α"),
])  # fmt: skip
def test_the_sentence_on_curvature(product: list[float] | None, says: str) -> None:
    given = {"largest_eigenvalue": {"mean": [3.0, 4.0]}, "steps": [0, 1], "product": product and {"mean": product}}
    assert says in curvature.read(given)
    lost = {**given, "largest_eigenvalue": {"mean": [3.0, math.nan]}}
    assert curvature.read(lost) == "The steps diverge: the curvature is no longer finite at step 1."


# Whole diagnoses


def test_a_diagnosis_repeats_leaves_everything_as_it_was_and_is_strict_json(tmp_path: Path) -> None:
    run = classifier(lr=0.3)
    before, state = torch.get_rng_state(), {n: x.clone() for n, x in run.network.net.state_dict().items()}
    found = mo.diagnose(run, images(), **SMALL)
    assert torch.equal(torch.get_rng_state(), before) and run.network.net.training
    assert all(torch.equal(x, state[n]) for n, x in run.network.net.state_dict().items())
    assert found.json() == mo.diagnose(run, images(), **SMALL).json()
    assert [reading.name for reading in found.readings] == [name for name in PARTS if name != "step_sizes"]
    assert DRAWN.keys() == PARTS.keys() and found.left_out.keys() == {"step_sizes"}

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} isn't JSON")

    told = json.loads(found.save(tmp_path / "new").read_text(), parse_constant=refuse)
    assert told["facts"]["split"] == "val" and told["facts"]["closely"] == 3 and told["facts"]["episodes"] == 4
    assert all(told["readings"][r.name]["sentence"] == r.sentence for r in found.readings)
    assert all(f"│ {name} " in str(found) for name in PARTS) and "left out: the update rule" in str(found)
    with pytest.raises(KeyError, match="step_sizes was left out: the update rule has no step sizes"):
        found["step_sizes"]
    with pytest.raises(KeyError, match="no reading `curvatrue`; there are steps, gain"):
        found["curvatrue"]


def test_a_closed_form_is_asked_what_it_can_be_asked() -> None:
    found = mo.diagnose(classifier(mo.protonet), images(), **SMALL)
    assert [reading.name for reading in found.readings] == ["steps", "gain", "permutations"]
    assert numbers(found, "gain")["before"] is None and numbers(found, "gain")["gain"] is None
    assert numbers(found, "permutations")["after"]["spread"] == pytest.approx(0, abs=1e-6)
    for name, why in {"features": "no inner step", "alignment": "no weight adapts", "curvature": "no path"}.items():
        assert why in found.left_out[name]


def test_a_regression_has_no_classes_and_every_other_reading() -> None:
    torch.manual_seed(0)
    method = mo.meta_sgd(mo.nn.mlp((1, 8, 1)), mo.losses.mse)
    found = mo.diagnose(Run(method, method.phi), mo.tasks.sinusoid(), **SMALL)
    assert found.left_out.keys() == {"permutations"} and "no classes" in found.left_out["permutations"]


class Twin(nn.Module):
    """Takes a dict, returns a tuple, and has a weight of its own beside its layers."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.a, self.b, self.scale = nn.Linear(4, 6), nn.Linear(6, 2), nn.Parameter(torch.ones(1))

    def forward(self, x: dict[str, Tensor]) -> Any:
        h = torch.tanh(self.a(x["u"] + x["v"])) * self.scale
        return self.b(h), h


def test_code_of_the_users_own() -> None:
    def sample(generator: torch.Generator, split: str) -> Any:
        def part() -> Any:
            u, v = torch.randn(2, 5, 4, generator=generator)
            return {"u": u, "v": v}, torch.randn(5, 2, generator=generator)

        return part(), part()

    torch.manual_seed(0)
    run = run_of(lambda output, target: nn.functional.mse_loss(output[0], target), Twin(), rule=mo.rules.Adam(0.01))
    found = mo.diagnose(run, mo.tasks.from_function(sample, splits=("mine",)), **SMALL)
    assert found.facts["split"] == "mine"
    layers = numbers(found, "features")["layers"]
    assert [(layer["layer"], layer["head"]) for layer in layers] == [("a", False), ("b", True), ("", True)]
    assert numbers(found, "curvature")["product"] is None and found.left_out.keys() == {"permutations", "step_sizes"}


class Once(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Any:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        return 2 * g


def test_what_cannot_be_differentiated_twice_has_no_curvature_and_all_else() -> None:
    """torch would leave such a function out of a Hessian without a word."""

    class Net(Point):
        def forward(self, x: Tensor) -> Any:
            return Once.apply(Point.forward(self, x))

    run = run_of(net=Net(), estimator=mo.estimators.Unroll(first_order=True), rule=mo.rules.SGD(0.1))
    found = mo.diagnose(run, points(drawn), **SMALL)
    assert "once_differentiable" in found.left_out["curvature"]
    assert [reading.name for reading in found.readings] == ["steps", "gain", "features", "alignment"]


@pytest.mark.parametrize(("options", "words"), [
    ({"episodes": 1}, ("episodes=1", "at least 2")), ({"closely": 1}, ("closely=1", "at least 2")),
    ({"steps": 0}, ("steps=0", "at least 1")), ({"split": "vla"}, ("'vla'", "'train', 'val', 'test'")),
    ({"normalisation": "batch"}, ("'batch'", "transductive")), ({"device": "nowhere"}, ("nowhere", "cpu")),
    ({"seed": -1}, ("seed", "-1")),
])  # fmt: skip
def test_wrong_arguments_are_refused_with_a_sentence(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        mo.diagnose(classifier(), images(), **{**SMALL, **options})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_only_a_run_is_diagnosed() -> None:
    run: Any = [classifier()]
    with pytest.raises(ValueError, match=r"takes one run; found list: mo.Run\(method, phi\)"):
        mo.diagnose(run, images())


TINY = """
[algorithm]
name = "maml"
loss = "cross_entropy"
lr = 0.4
[model]
name = "conv4"
filters = 2
[tasks]
name = "glyphs"
ways = 3
queries = 2
[train]
iterations = 2
tasks_per_step = 2
validate_episodes = 2
[engine]
batching = "loop"
memory = "graph"
runtime = "eager"
"""


@pytest.mark.slow
def test_the_command_on_a_tiny_run_of_glyphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    assert main(["train", "tiny.toml", "--out", "run"]) == 0
    assert main(["diagnose", "run", "--episodes", "4", "--closely", "2", "--normalisation", "inductive"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(Path("run/diagnosis/diagnosis.json").read_text())
    assert told["facts"]["normalisation"] == "inductive" and told["facts"]["episodes"] == 4
    assert list(told["readings"]) == ["steps", "gain", "permutations", "features", "alignment", "curvature"]
    for name, reading in told["readings"].items():
        assert name in out and reading["sentence"].split()[0] in out
        assert Path(f"run/diagnosis/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "left out: the update rule has no step sizes" in " ".join(out.split()) and "\x1b" not in out + err


def test_the_command_and_its_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "draw_diagnosis", lambda found, folder: drawings.append(folder))
    drawings: list[Path] = []
    few = ["--episodes", "2", "--closely", "2", "--steps", "1"]
    small = ("train.iterations=2", "train.tasks_per_step=2", "train.validate_every=0", "engine.runtime=eager")
    assert main(["train", "sinusoid-maml", "--out", "run", *(part for key in small for part in ("--set", key))]) == 0
    assert main(["diagnose", "run", *few, "--checkpoint", "last"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(Path("run/diagnosis/diagnosis.json").read_text())
    assert told["facts"]["split"] == "val" and told["facts"]["runs"][0]["step"] == 2 and drawings == [Path("run/diagnosis")]
    assert told["left_out"].keys() == {"permutations", "step_sizes"}
    assert "The numbers are in run/diagnosis/diagnosis.json" in out and "\x1b" not in out + err
    for args, words in {
        ("nowhere",): "there is no nowhere/recipe.toml",
        ("run", "--split", "vla"): "There is no split 'vla'",
        ("run", "--episodes", "1"): "episodes=1: it must be a whole number, at least 2",
        ("run", "--normalisation", "batch"): "`normalisation` in [evaluate]",
    }.items():
        assert main(["diagnose", *args]) == 2
        err = capsys.readouterr().err
        assert words in err and err.startswith("error: ") and err.count("\n") == 1
    folder = Path("run/diagnosis")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    assert main(["diagnose", "run", *few]) == 1
    out, err = capsys.readouterr()
    assert "steps" in out and "printed above, could not be saved" in err


@pytest.mark.slow
def test_every_reading_is_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = mo.diagnose(classifier(mo.meta_sgd), images(), **SMALL)
    assert [path.name for path in draw_diagnosis(found, tmp_path)] == [f"{name}.png" for name in PARTS]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
