"""Judging learned optimizers: the same starts and minibatches for all, baselines tuned elsewhere, honest ratios and times."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import metaoptim as mo
from metaoptim import lopt
from metaoptim.core import trees
from metaoptim.core.checks import many_at_once
from metaoptim.core.types import Params, Rule
from metaoptim.estimators import Truncated
from metaoptim.lopt import trained
from metaoptim.lopt.baselines import Baseline, tune
from metaoptim.lopt.data import Data
from metaoptim.lopt.judgement import Judgement, Row
from metaoptim.lopt.trained import curves, final, final_losses, merged
from metaoptim.report import optimizers
from metaoptim.rules import SGD, Adam, Average, Chain, Clip, LayerStepSizes, Momentum, Muon, ScheduleFreeAdamW

pytestmark = pytest.mark.slow

STEPS, PROBLEMS = 12, 3


@cache
def toy() -> Data:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    return Data("toy", torch.randn(60, 1, 3, 3, generator=draw) + 0.5 * y[:, None, None, None], y, 3)


def family(**changes: Any) -> lopt.Problems:
    return lopt.logistic(toy(), batch=32, steps=STEPS).with_(**changes)


GRADIENT_DESCENT = {"SGD": Baseline(lambda lr, warmup: SGD(lr), 0.01, 0.3)}


def judged(rule: Rule, psi: Params | None = None, **changes: Any) -> Judgement:
    options: dict[str, Any] = {
        "families": {"toy": family()}, "baselines": GRADIENT_DESCENT, "problems": PROBLEMS, "seeds": 2, "step_sizes": 3,
        "progress": False,
    }  # fmt: skip
    return lopt.evaluate(rule, {} if psi is None else psi, **options | changes)


@cache
def example() -> Judgement:
    return judged(SGD(0.3), baselines={**lopt.BASELINES}, step_sizes=2)


def by_hand(problems: lopt.Problems, number: int, lr: float, decay: float) -> Tensor:
    """Judged losses of SGD with momentum on one problem of split "test"."""
    task = trees.index(problems.sample("test", seed=1, start=number, count=1), 0)
    w, one = trees.index(task.support["start"], 0), torch.tensor(1.0)
    m, losses = trees.map_tensors(torch.zeros_like, w), []
    for k in range(STEPS + 1):
        x, y = (part[0, k] for part in task.query["batches"])
        losses.append(problems.training(w, one, (x, y))[0] / math.log(3))
        if k < STEPS:
            x, y = (part[0, k] for part in task.support["batches"])
            g = torch.func.grad(lambda w, x=x, y=y: problems.training(w, one, (x, y))[0])(w)
            m = {n: decay * m[n] + g[n] for n in m}
            w = {n: w[n] - lr * m[n] for n in w}
    return torch.stack(losses)


def test_a_chain_is_called_by_its_parts() -> None:
    rule = mo.rules.chain(SGD(0.3), mo.rules.Average(0.5))
    assert judged(rule, rule.start({"w": torch.zeros(1)}, torch.Generator())).name == "learned SGD, Average"


def test_curves_are_those_of_a_loop_by_hand() -> None:
    row = judged(Momentum(0.3, 0.5)).rows[0]
    assert row.losses.shape == (2 * PROBLEMS, STEPS + 1)
    for number in range(2):
        torch.testing.assert_close(row.losses[number], by_hand(family(), number, 0.3, 0.5), rtol=1e-5, atol=1e-6)


def test_all_rules_have_the_same_starts_and_every_run_another_one() -> None:
    rows = example().rows
    assert [row.name for row in rows] == ["SGD(lr=0.3)", *lopt.BASELINES]
    assert all(torch.allclose(row.losses[:, 0], rows[0].losses[:, 0], atol=1e-6) for row in rows)
    assert len(set(rows[0].losses[:, 0].tolist())) == 2 * PROBLEMS


def test_a_rule_that_is_the_baseline_is_as_good_as_it() -> None:
    found = judged(SGD(1e-3))
    learned, baseline = found.rows
    assert baseline.lr == pytest.approx(0.3) and baseline.edge
    same = judged(SGD(0.3))
    ours, theirs = (same.measured(row) for row in same.rows)
    assert ours["final_ratio"] == pytest.approx(1.0) and ours["area_ratio"] == pytest.approx(1.0)
    assert 0 < theirs["steps"] <= STEPS and ours["steps"] == theirs["steps"]
    worse = found.measured(learned)
    assert worse["final_ratio"] == pytest.approx(learned.final / baseline.final) and worse["final_ratio"] > 1.05
    assert worse["steps"] is None and worse["seconds"] is None


def test_step_sizes_are_tuned_on_other_problems_by_the_loss_at_the_end() -> None:
    three = Baseline(lambda lr, warmup: Adam(lr), 1e-4, 1.0)
    assert three.step_sizes(3) == pytest.approx([1e-4, 1e-2, 1.0]) and three.step_sizes(1) == [1e-2]
    tasks = family().sample("val", seed=1, start=0, count=PROBLEMS)
    losses = [final(curves(family(), Adam(lr), {}, tasks)[0]).mean().item() for lr in three.step_sizes(5)]
    found = tune(three, family(), tasks, step_sizes=5)
    assert found.loss == min(losses) and found.lr == three.step_sizes(5)[losses.index(min(losses))] and not found.edge
    chosen = judged(SGD(0.1), baselines={"Adam": three}, step_sizes=5).rows[1]
    assert chosen.lr == found.lr and chosen.rule == repr(found.rule)


class Branching(SGD):
    """Goes by its step size in Python, which has to be one number."""

    def update(self, *args: Any) -> Any:
        return (SGD(0.1) if self.lr > 0.05 else SGD(0.01)).update(*args)


SWEPT = {
    **{n: [b.build(lr, 3) for lr in b.step_sizes(4)] for n, b in lopt.BASELINES.items()},
    "Celo2": [lopt.Celo2(lr) for lr in (1e-3, 1e-2, 0.1)],
    "Chain": [Chain((lopt.Celo2(lr), Average(decay))) for lr, decay in ((1e-3, 0.9), (1e-2, 0.9), (1e-2, 0.5))],
    "a rule that clamps": [Chain((Clip(norm=norm), SGD(0.1))) for norm in (0.1, 1.0)],
    "a rule that branches": [Branching(lr) for lr in (0.01, 0.1)],
    "rules of several kinds": [SGD(0.1), Momentum(0.1)],
    "rules that differ in a whole number": [Muon(0.1, iterations=i) for i in (1, 2)],
    "the same rule twice": [SGD(0.1), SGD(0.1)],
}


@pytest.mark.parametrize("name", SWEPT)
def test_rules_of_a_sweep_are_run_together_with_the_losses_that_each_has_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules, tasks = SWEPT[name], family().sample("val", seed=1, start=0, count=PROBLEMS)
    psi = rules[0].start(trees.map_tensors(lambda x: x[0, 0], tasks.support["start"]), torch.Generator().manual_seed(0))
    apart = torch.stack([final(curves(family(), rule, psi, tasks)[0]) for rule in rules])
    torch.testing.assert_close(final_losses(family(), rules, psi, tasks), apart, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(trained, "TOGETHER", 2 * PROBLEMS)
    torch.testing.assert_close(final_losses(family(), rules, psi, tasks), apart, rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class AsksForAFloat:
    lr: Any = 0.1

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> Any:
        return {}

    def update(self, psi: Params, grads: Params, state: Any, weights: Params, step: Any) -> tuple[Params, Any]:
        return {n: -(self.lr if isinstance(self.lr, float) else 0.01) * g for n, g in grads.items()}, state


def test_rules_of_ones_own_are_run_one_by_one() -> None:
    tasks = family().sample("val", seed=1, start=0, count=2)
    losses = final_losses(family(), [AsksForAFloat(lr) for lr in (1e-3, 0.1)], {}, tasks)
    assert not torch.allclose(losses[0], losses[1], rtol=1e-3)


def test_a_baseline_has_nothing_to_learn() -> None:
    learns = Baseline(lambda lr, warmup: Chain((SGD(lr), Average(0.9))), 0.01, 0.1)
    with pytest.raises(
        ValueError, match=r"baselines: 'mean' builds .*, which has something to learn \(1\.logit\); take a rule"
    ):
        judged(SGD(0.1), baselines={"mean": learns})


MISUSED: Any = Baseline
BUILDS_NOTHING = MISUSED(lambda lr, warmup: None, 0.1, 1.0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MISUSED(SGD(0.1), 0.01, 0.1), r"build=SGD\(lr=0\.1\): it must be a function of a step size and"),
        (lambda: MISUSED(lambda lr: SGD(lr), 0.01, 0.1), r"build is called with \(lr, warmup\): .*; it must be a function of"),
        (lambda: MISUSED(lambda lr, warmup: SGD(lr), 1.0, 0.1), r"low=1\.0 is above high=0\.1"),
        (lambda: MISUSED(lambda lr, warmup: SGD(lr), 0.1, 1.0, 0.1), r"warmups=0\.1: it must be shares of the run"),
        (lambda: MISUSED(lambda lr, warmup: SGD(lr), 0.1, 1.0, (2.0,)), r"warmups=2\.0: it must be"),
        (lambda: judged(SGD(0.1), baselines={"x": BUILDS_NOTHING}), "judging the baseline 'x' takes a rule, .* found None"),
        (lambda: judged(SGD(0.1), baselines={"SGD(lr=0.1)": GRADIENT_DESCENT["SGD"]}), "is what the rule that is judged"),
    ],
)  # fmt: skip
def test_what_baselines_take(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("name", [*lopt.BASELINES, "Celo2", "Chain"])
def test_the_library_s_own_rules_are_really_run_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules, tasks = SWEPT[name], family().sample("val", seed=1, start=0, count=2)
    psi = rules[0].start(trees.map_tensors(lambda x: x[0, 0], tasks.support["start"]), torch.Generator().manual_seed(0))
    calls: list[Any] = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return curves(*args)

    monkeypatch.setattr(trained, "curves", counted)
    assert final_losses(family(), rules, psi, tasks).shape == (len(rules), 2) and len(calls) == 1


def test_what_differs_in_more_than_numbers_is_not_merged() -> None:
    for values in ([SGD(0.1), Momentum(0.1)], [(1.0,), (1.0, 2.0)], [1, 2], [None, 1.0], [family, final], ["a", "b"]):
        with pytest.raises((TypeError, ValueError)):
            merged(values, lambda found: 0.0)
    assert merged([SGD(0.1), SGD(0.2)], lambda found: sum(found)) == SGD(0.1 + 0.2)


def test_a_tensor_is_no_number_but_where_it_stands_for_many() -> None:
    with many_at_once():
        assert isinstance(SGD(torch.tensor(0.1)).lr, torch.Tensor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Python number"):
        SGD(torch.tensor(0.1))  # type: ignore[arg-type]


def test_warm_up_is_tuned_where_there_is_one() -> None:
    tried: list[tuple[float, int]] = []

    def build(lr: float, warmup: int) -> Rule:
        tried.append((lr, warmup))
        return ScheduleFreeAdamW(lr, warmup=warmup)

    tasks = family().sample("val", seed=1, start=0, count=2)
    found = tune(Baseline(build, 0.01, 0.1, (0.0, 0.5)), family(), tasks, step_sizes=2)
    alone = {(lr, w): final(curves(family(), ScheduleFreeAdamW(lr, warmup=w), {}, tasks)[0]).mean().item() for lr, w in tried}
    assert (found.lr, found.warmup) == min(alone, key=lambda setting: alone[setting])
    assert found.loss == pytest.approx(min(alone.values()), rel=1e-5)
    assert tried == [(pytest.approx(lr), warmup) for lr in (0.01, 0.1) for warmup in (0, 6)]


def test_baselines_are_chosen_for_what_they_reach_and_diverged_runs_are_counted() -> None:
    found = judged(SGD(1e30))
    learned, baseline = found.rows
    assert learned.diverged == 1 and learned.final == 3 and baseline.diverged == 0
    assert found.best("toy") is baseline


def test_where_all_runs_diverge_it_is_told() -> None:
    x = toy().x.clone()
    x[7] = float("nan")
    with pytest.warns(UserWarning, match="1 of 60 examples"):
        broken = lopt.logistic(replace(toy(), x=x), batch=8, steps=200)
    with pytest.warns(UserWarning, match="All runs on toy diverged, of every rule and baseline"):
        judged(SGD(0.3), families={"toy": broken})


def test_losses_are_told_as_they_are_whatever_was_learnt() -> None:
    plain, learnt = (judged(SGD(0.3), families={"toy": family(logarithm=on)}) for on in (False, True))
    assert all(torch.equal(a.losses, b.losses) for a, b in zip(plain.rows, learnt.rows, strict=True))


def test_a_result_names_the_runs_whose_psi_was_judged() -> None:
    run = lopt.meta_train(lopt.SmallFC(), family(), iterations=1, estimator="truncated", window=4, problems_per_step=2,
                          validate_every=0, progress=False)  # fmt: skip
    options: dict[str, Any] = {"baselines": GRADIENT_DESCENT, "problems": 2, "seeds": 1, "step_sizes": 1, "progress": False}
    own, other = (lopt.evaluate(run, psi, families="own", **options) for psi in (None, run.method.phi.rule))
    assert [one["step"] for one in own.facts["runs"]] == [1] and other.facts["runs"] == []


def test_runs_may_be_longer_than_those_of_meta_training() -> None:
    run = lopt.meta_train(lopt.SmallFC(), family(), iterations=1, estimator="truncated", window=4, problems_per_step=2,
                          validate_every=0, progress=False, engine={"runtime": "eager"})  # fmt: skip
    found = lopt.evaluate(
        run, families=[family()], baselines=GRADIENT_DESCENT, problems=2, seeds=1, step_sizes=2, steps=20, progress=False
    )
    assert found.name == "learned SmallFC" and found.facts["trained_steps"] == STEPS
    assert found.rows[0].losses.shape == (2, 21) and found.rows[0].family == family().name
    assert torch.isfinite(found.rows[0].losses).all()


def test_a_rule_with_a_step_size_is_tuned_if_asked() -> None:
    celo = lopt.Celo2(lr=1e-4)
    psi = lopt.learned_optimizer(celo, family(), Truncated(4)).phi.rule
    found = judged(celo, psi, tuned=True)
    assert found.rows[0].lr in (1e-4, pytest.approx(1e-2), pytest.approx(1.0)) and len(found.rows) == 2
    assert f"lr={found.rows[0].lr}" in found.rows[0].rule


def test_numbers_of_a_row() -> None:
    losses = torch.stack([torch.linspace(2, 0, 21), torch.linspace(2, 1, 21)])
    row = Row("f", "n", "r", 0.1, 0, False, losses, 0.0, 0.5)
    assert row.final == pytest.approx((0.05 + 1.025) / 2) and row.area == pytest.approx(losses[:, 1:].mean().item())
    assert row.steps_to(1.25) == 10 and row.steps_to(0.4) is None
    torch.testing.assert_close(row.quantiles[1], losses.double().mean(0))
    other = Row("f", "b", "r", 0.1, 0, False, losses + 1, 0.0, 0.25)
    told = Judgement((row, other), "n", {"step_sizes": 1})
    assert told.measured(row)["steps"] == 7 and told.measured(other)["seconds"] == 0.25 * told.measured(other)["steps"]


def test_a_judgement_is_a_table_a_dictionary_and_a_picture(tmp_path: Path) -> None:
    found = example()
    text, kept = str(found), json.loads(json.dumps(found.json()))
    assert all(word in text for word in ("SGD(lr=0.3)", "Muon", "ScheduleFreeAdamW", "toy", "6 runs on fresh problems"))
    assert [row["name"] for row in kept["rows"]] == [row.name for row in found.rows]
    assert len(kept["rows"][0]["curve"]["0.5"]) == STEPS + 1 and kept["facts"]["families"]["toy"]["split"] == "test"
    assert kept["rows"][0]["lr"] is None and kept["rows"][2]["seconds_per_step"] > 0
    found.draw(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"baselines": {}}, "baselines is empty"),
        ({"problems": 0}, "problems=0"),
        ({"seeds": 0}, "seeds=0"),
        ({"step_sizes": 0}, "step_sizes=0"),
        ({"steps": 0}, "steps=0"),
        ({"families": []}, "families is empty"),
        ({"families": [family(), family(steps=4)]}, "2 are called `logistic-toy`; name them"),
        ({"families": [mo.tasks.sinusoid()]}, r"training problems are families such as .*; found Sinusoid\("),
        ({"families": {"a": "quadratics"}}, "training problems are families such as .*; found 'quadratics'"),
        ({"baselines": {"x": SGD(0.1)}}, r"baselines: 'x' is SGD\(lr=0.1\).*in mo.lopt.Baseline"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        judged(SGD(0.1), **changes)
    with pytest.raises(ValueError, match="no step size `lr` of its own"):
        judged(lopt.LSTM(), tuned=True)


FEW: dict[str, Any] = {
    "families": family(),
    "baselines": ["Adam"],
    "problems": 2,
    "seeds": 1,
    "step_sizes": 1,
    "progress": False,
}
RULE = lopt.SmallFC()
PSI = RULE.start({"w": torch.zeros(2, 2)}, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("learned", "psi", "sentence"),
    [
        (lopt.Celo2(), PSI, r"psi: 'b0' is of shape \(4,\), where Celo2 has it of shape \(8,\)"),
        (RULE, {n: x for n, x in PSI.items() if n != "b0"}, "psi: 'b0' is missing"),
        (RULE, torch.zeros(190), "psi must be a dictionary of tensors by name, such as run.phi.rule; found Tensor"),
        (RULE, "psi.pt", "found 'psi.pt'"),
        (RULE, mo.MetaParams({}, PSI), "found a φ, of which it is the .rule"),
        (RULE, None, r"psi is missing: SmallFC\(\) has one of 197 numbers"),
        (mo.optim.from_rule(RULE), None, "psi is missing"),
        (
            LayerStepSizes(0.1, STEPS),
            {"w": torch.zeros(STEPS)},
            "psi: .* is missing, where LayerStepSizes .* for these weights",
        ),
        ("runs/pes", None, r"takes a run of lopt.meta_train \(mo.load gives that of a folder\).*found 'runs/pes'"),
        (SGD, None, "found SGD"),
    ],
)
def test_what_is_not_a_rule_with_its_psi_is_refused(learned: Any, psi: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        lopt.evaluate(learned, psi, **FEW)


def test_what_makes_optimizers_is_judged_and_a_rule_without_psi() -> None:
    found = lopt.evaluate(mo.optim.from_rule(RULE, PSI), **FEW)
    assert torch.equal(found.rows[0].losses, lopt.evaluate(RULE, PSI, **FEW).rows[0].losses)
    by_hand = lopt.evaluate(SGD(0.1), **FEW)
    assert by_hand.rows[0].final < 3 and by_hand.name == by_hand.rows[0].name == "SGD(lr=0.1)"


def test_a_judgement_is_printed_as_its_table_and_drawn_at_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lopt.evaluate(SGD(0.1), **FEW)
    assert repr(found) == str(found) and "over 1 step size on other" in " ".join(repr(found).split())
    figures: list[Any] = []
    monkeypatch.setattr(optimizers, "save", lambda figure, path: figures.append(figure))
    found.draw("nowhere.png")
    axes = figures[0].axes[0]
    assert all(x == round(x) for x in axes.get_xticks())
    assert [line.get_linestyle() for line in axes.get_lines()] == ["-", "--"]


def test_step_sizes_are_round_where_they_can_be() -> None:
    assert Baseline(lambda lr, warmup: SGD(lr), 1e-3, 10.0).step_sizes(5) == [1e-3, 1e-2, 0.1, 1.0, 10.0]


def test_few_shot_evaluation_names_the_one_of_learned_optimizers() -> None:
    run = lopt.meta_train(RULE, family(), iterations=1, estimator="truncated", window=4, validate_every=0, progress=False,
                          engine={"runtime": "eager"})  # fmt: skip
    for tasks in (family(), mo.tasks.sinusoid()):
        with pytest.raises(ValueError, match=r"judged by mo.lopt.evaluate\(run\)"):
            mo.evaluate(run, tasks)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"or mo\.lopt\.learned_optimizer"):
        mo.load("runs/x")
