"""Recommending: features of tasks, scores that families share, how predictors are judged, and what is proposed."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import metaoptim as mo
from metaoptim.cli.main import main
from metaoptim.core.types import Task
from metaoptim.design import trials as stored
from metaoptim.design.features import alignment, features, separability
from metaoptim.design.history import History, Row, centred, history, known_features, left, shipped_trials, tasks_key
from metaoptim.design.moved import goes, moved, wanted
from metaoptim.design.predictors import MODELS, gaussian_process
from metaoptim.design.selection import CHOSEN, RANDOM, SINGLE, gap, judge, picks, standing, width
from metaoptim.design.strategies import rebuilt, strategy
from metaoptim.design.trials import Trial
from metaoptim.ledger import records, store
from metaoptim.recipes import recipe as config
from metaoptim.runs.checkpoint import strict_json

LEDGER = Path(__file__).parents[1] / "results"
QUICK = {"Gaussian process": gaussian_process}


class Made:
    """Episodes from a function of (number, seed), as a task family."""

    splits = ("train",)

    def __init__(self, make: Callable[[torch.Generator], Task]) -> None:
        self.make = make

    def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
        tasks = [self.make(torch.Generator().manual_seed(seed + 1 + i)) for i in range(start, start + count)]
        parts = [[torch.stack(pair) for pair in zip(*batches, strict=True)] for batches in zip(*tasks, strict=True)]
        return Task((parts[0][0], parts[0][1]), (parts[1][0], parts[1][1]))

    def describe(self, split: str) -> dict[str, Any]:
        return {}


def classes(spread: float, a: float = 1.0, b: float = 0.0) -> Made:
    """3 ways, 2 shots, 4 queries: class means are normal in 6 dimensions, what is around them is `spread` wide; x ↦ a·x + b."""

    def make(generator: torch.Generator) -> Task:
        means = torch.randn(3, 6, generator=generator)

        def batch(each: int) -> tuple[Tensor, Tensor]:
            y = torch.arange(3).repeat(each)
            return a * (means[y] + spread * torch.randn(3 * each, 6, generator=generator)) + b, y

        return Task(batch(2), batch(4))

    return Made(make)


def lines(noise: float = 0.0, unit: float = 1.0) -> Made:
    """One line, the same in every task, in one dimension."""

    def make(generator: torch.Generator) -> Task:
        def batch(n: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(n, 1, generator=generator)
            return x, unit * (2 * x + noise * torch.randn(n, 1, generator=generator))

        return Task(batch(8), batch(8))

    return Made(make)


def test_separable_classes_and_meaningless_ones() -> None:
    clear, vague = features(classes(1e-4)), features(classes(1e4))
    assert [clear[name] for name in ("separability", "centroid", "linear")] == pytest.approx([1, 1, 1])
    assert all(abs(vague[name]) < 0.12 for name in ("separability", "centroid", "linear")), "chance is 0"
    assert (clear["ways"], clear["shots"], clear["queries"], clear["channels"], clear["classification"]) == (3, 2, 4, 1, 1)
    assert clear["inputs"] == pytest.approx(math.log10(6))


def test_separability_by_hand() -> None:
    """Two groups of two points: W = 4 · 0.5² = 1, S = 4 · (1² + 0.5²) = 5, so that 1 − (1/2) / (5/3) = 0.7."""
    x = torch.tensor([[[-1.0, 0.5], [-1.0, -0.5], [1.0, 0.5], [1.0, -0.5]]], dtype=torch.float64)
    groups = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]], dtype=torch.float64)
    assert separability(x, groups) == pytest.approx(0.7)


def test_alignment_of_the_same_of_opposite_and_of_orthogonal_tasks() -> None:
    same = torch.tensor([[1.0, 2], [2, 4], [3, 6]], dtype=torch.float64)
    assert alignment(same) == pytest.approx(1)
    assert alignment(torch.tensor([[1.0, 0], [-2, 0]], dtype=torch.float64)) == pytest.approx(-1)
    assert alignment(torch.eye(4, dtype=torch.float64)) == pytest.approx(0)

    def make(generator: torch.Generator) -> Task:
        x = torch.linspace(-1, 1, 5)[:, None]
        return Task((x, x**2), (x, x**2))

    assert features(Made(make))["alignment"] == pytest.approx(1)


def test_features_know_neither_the_place_nor_the_unit_of_x_nor_that_of_y() -> None:
    plain = features(classes(0.5))
    assert features(classes(0.5, a=7.0, b=-3.0)) == pytest.approx(plain, rel=1e-4, abs=1e-5)
    assert features(lines(0.1, unit=100.0)) == pytest.approx(features(lines(0.1)), rel=1e-4, abs=1e-5)
    assert features(classes(0.5)) == plain, "the same call gives the same numbers"


def test_what_a_line_tells() -> None:
    """Ridge regression on 8 points shrinks the slope by 1 / (1 + 0.1/8), so that R² is nearly 1; the mean tells nothing."""
    found = features(lines())
    assert 0.99 < found["linear"] < 1 and found["centroid"] < 0.1 and found["step"] < -0.2
    assert found["classification"] == 0 and found["ways"] == 1 and found["shots"] == 8


def test_tasks_without_pairs_or_without_anything_to_learn_are_refused() -> None:
    class Dicts(Made):
        def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
            return Task({"x": torch.zeros(2, 2)}, {"x": torch.zeros(2, 2)})

    with pytest.raises(ValueError, match="an episode holds dict"):
        features(Dicts(lambda generator: Task((), ())))
    with pytest.raises(ValueError, match="all values of these tasks are the same"):
        features(lines(0.0, unit=0.0))


def test_strategies_are_read_from_recipes() -> None:
    maml, meta_sgd = strategy(config.load("sinusoid-maml")), strategy(config.load("fertility-meta-sgd"))
    assert (maml["algorithm"], maml["learner"], maml["rule"], maml["estimator"]) == ("maml", "GradientLearner", "SGD", "exact")
    assert maml["adapts"] == 1 and maml["steps"] == math.log1p(1) and maml["inner_lr"] == -2 and maml["outer_lr"] == -3
    assert maml["weights"] == pytest.approx(math.log10(1 + 1761)) and maml["rule_size"] == 0
    assert meta_sgd["rule_size"] == pytest.approx(math.log10(1 + 1761))
    assert meta_sgd["inner_lr"] == pytest.approx(math.log10(math.sqrt(0.005 * 0.1)))
    anil, r2d2 = strategy(config.load("sinusoid-anil")), strategy(config.load("fertility-r2d2"))
    assert anil["adapts"] == pytest.approx(41 / 1761)
    assert r2d2["learner"] == "ClosedForm" and r2d2["adapts"] == 0 and math.isnan(float(r2d2["inner_lr"]))


def test_scores_are_centred_scaled_and_cut() -> None:
    """Of 0, 1, 2, 3, 100 the median is 2, and that of the deviations 2, 1, 0, 1, 98 is 1."""
    one = 1 / 1.4826
    assert centred([0, 1, 2, 3, 100, -math.inf][:5]) == pytest.approx([-2 * one, -one, 0, one, 3])
    assert centred([0, 1, 2, 3, 100, -math.inf]) == pytest.approx([-2 * one, -one, 0, one, 3, -3])
    assert centred([5, 5, 5]) is None and centred([-math.inf]) is None
    assert centred([1, 1, 1, 2]) == pytest.approx([0, 0, 0, 3]), "most are equal, and so the mean deviation, 1/4, counts: cut"
    assert left("accuracy", 1.0, 100) == 0.005 and left("accuracy", 0.9, 100) == pytest.approx(0.1)
    assert left("loss", 0.02, 100) == 0.02 and left("loss", None, 100) == math.inf


def row(data: str, algorithm: str, score: float, steps: float = 1.0, aligned: float = 0.0, family: str = "") -> Row:
    trial: Any = None  # which judging never reads
    return Row(trial, family or data, data, score, {"alignment": aligned}, {"algorithm": algorithm, "steps": steps})


def test_the_gap_by_hand() -> None:
    """Of two families the best cost −3 and −1, the single best −1 and 0, the model −2 and −1: (−1.5 + 2) / (−0.5 + 2)."""
    best, single, model = {"a": -3.0, "b": -1.0}, {"a": -1.0, "b": 0.0}, {"a": -2.0, "b": -1.0}
    assert gap(model, single, best) == pytest.approx(1 / 3)
    assert gap(single, single, best) == 1 and gap(best, single, best) == 0 and gap(best, best, best) is None


def test_picks_and_standing_by_hand() -> None:
    rows = [row("a", "x", 1.0), row("a", "y", -1.0), row("b", "x", 0.5), row("b", "x", 1.5), row("b", "z", 2.0)]
    assert picks(rows, np.array([0.0, 1.0, 0.0, 3.0, 2.0])) == {"a": 1.0, "b": -1.5}
    assert standing(rows) == {"x": 1.0, "z": 1.0, "y": -0.5}, "the mean over families, 0 where it was not tried"


def test_the_width_by_hand() -> None:
    """Three data sets and the new one: each miss weighs 1/4 over how many there are, and 3/4 takes all of them."""
    assert width({"a": [1.0], "b": [2.0], "c": [3.0]}, level=0.75) == 3.0
    assert width({"a": [1.0], "b": [2.0], "c": [3.0]}, level=0.5) == 2.0
    assert width({"a": [1.0, 9.0], "b": [2.0], "c": [3.0]}, level=0.5) == 3.0
    assert width({"a": [1.0], "b": [2.0]}, level=0.75) == 6.0, "two data sets say nothing of a third at that level"


def ruled(noise: bool, seed: int = 0, sets: int = 6) -> History:
    """Data sets whose tasks are more and less aligned: where they are, few steps are best, elsewhere many; or all is noise."""
    generator, rows = np.random.default_rng(seed), []
    for number in range(sets):
        aligned = -1.0 if number % 2 else 1.0
        for place, steps in enumerate(np.linspace(-1, 1, 7)):
            score = generator.normal() if noise else -2 * aligned * steps + 0.1 * generator.normal()
            rows.append(row(f"set {number}", f"algorithm {place}", float(score), float(steps), aligned + 0.05 * number))
    return History(rows, {})


@pytest.mark.slow
def test_a_rule_is_found_and_noise_is_not() -> None:
    found = judge(ruled(noise=False), QUICK)
    assert found.trusted and found.model == "Gaussian process"
    gaps = {name: held.gap for name, held in found.held.items()}
    assert gaps[CHOSEN] is not None and gaps[CHOSEN] < 0.2 and gaps[SINGLE] == 1 and (gaps[RANDOM] or 0) > 0.4
    assert found.width < 1.5
    noise = judge(ruled(noise=True), QUICK)
    assert not noise.trusted and any(told in noise.doubt for told in ("no better than", "by no more than chance"))
    assert noise.width > found.width


def test_families_of_one_data_set_are_held_out_together() -> None:
    seen: list[tuple[set[str], set[str]]] = []

    def watching(rows: Any) -> Any:
        told = {r.data for r in rows}

        def predict(asked: Any) -> Any:
            seen.append((told, {r.data for r in asked}))
            return np.zeros(len(asked))

        return predict

    rows = [
        row(data, name, score, family=f"{data}{i}")
        for data in "abc" for i in range(2) for name, score in (("x", 1.0), ("y", 0.0))
    ]  # fmt: skip
    judge(History(rows, {}), {"watching": watching})
    assert seen and all(not told & asked for told, asked in seen)
    with pytest.raises(ValueError, match="of 1 data sets, and 3 is the least"):
        judge(History(rows[:2], {}), QUICK)


@pytest.mark.slow
def test_all_models_find_the_rule_and_noise_is_seldom_believed() -> None:
    for fit in MODELS.values():
        assert judge(ruled(noise=False), {"it": fit}).trusted
    believed = sum(judge(ruled(noise=True, seed=seed), QUICK).trusted for seed in range(20))
    assert believed <= 4, "a test at 5 %"


def test_the_shipped_trials_are_those_of_the_ledger() -> None:
    entries = store.read(LEDGER)
    assert entries, "the repository has its ledger"
    measured = {(e.recipe, e.content, e.seed, e.date): e for e in entries}
    for trial in shipped_trials():
        content = hashlib.sha256(strict_json(trial.tables, sort_keys=True).encode()).hexdigest()[:12]
        entry = measured[trial.recipe, content, trial.seed, trial.date]
        assert (trial.metric, trial.value, trial.interval, trial.episodes) == (
            entry.metric, entry.value, entry.interval, entry.episodes,
        )  # fmt: skip
        assert trial.iterations == entry.iterations and trial.source == "reproduce"
    again = records.trials(entries, {name: config.load(name) for name in config.names()})
    dates = {(t.recipe, t.seed): t for t in shipped_trials()}
    same = [t for t in again if (old := dates.get((t.recipe, t.seed))) is not None and old.date == t.date]
    assert len(same) > 50 and all(t == dates[t.recipe, t.seed] for t in same)


def test_the_shipped_features_are_measured_ones(past: History, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAOPTIM_DATA", str(data_dir))
    known = known_features()
    assert (
        len(past.rows) > 70 and len(past.data) == 4 and {tasks_key(r.trial.tables["tasks"]) for r in past.rows} == known.keys()
    )
    for name in ("sinusoid-maml", "fertility-maml"):
        recipe = config.load(name)
        assert features(recipe.experiment().tasks) == pytest.approx(
            known[tasks_key(recipe.tables["tasks"])], rel=1e-3, abs=1e-3
        )
    for each in past.families:
        scores = [r.score for r in past.rows if r.family == each]
        assert np.median(scores) == pytest.approx(0, abs=1e-9) and max(map(abs, scores)) <= 3


def made(name: str, value: float | None, seed: int = 0, *settings: str) -> Trial:
    recipe = config.load(name, settings)
    return Trial(
        recipe=recipe.name, tables=recipe.content, metric="loss", value=value, interval=0.01, seed=seed, split="test", steps=1,
        episodes=100, iterations=10, tasks_per_step=4, seconds=None, protocol="", source="compare",
    )  # fmt: skip


def test_trials_become_rows() -> None:
    tried = [made("sinusoid-maml", v, 0, f"algorithm.steps={k}") for k, v in ((1, 1.0), (2, 0.5), (3, 0.25), (4, None))]
    tried += [made("sinusoid-maml", 0.5, 1, "algorithm.steps=1"), made("fertility-maml", 0.1)]
    past = history([*tried, made_lopt()], dict(known_features()))
    steps = {round(math.expm1(float(r.strategy["steps"]))): r for r in past.rows}
    assert len(past.rows) == 4 and steps[1].trial.value == 0.75, "the mean over seeds"
    assert steps[4].score == -3 and steps[3].score > steps[2].score > steps[1].score
    assert past.left_out == {"families with fewer than 4 strategies": 1, "learned optimizers": 1}
    held = history([*tried, replace(tried[0], split="val")], dict(known_features())).left_out
    assert "strategies judged on split val, whose scores don't compare with those on split test" in " ".join(held)


def test_trials_on_data_that_are_not_here_are_left_out(tmp_path: Path) -> None:
    plain = made("omniglot-maml", 0.9)
    tables = {**plain.tables, "tasks": {"name": "from_folder", "ways": 5}}
    tried = [
        Trial(**{**vars(plain), "metric": "accuracy", "value": 0.9 + k / 100, "tables": {
            **tables, "algorithm": {**plain.tables["algorithm"], "steps": k}}})
        for k in range(1, 6)
    ]  # fmt: skip
    assert history(tried, {}).left_out == {"tasks whose data are not here": 5}
    known = {tasks_key(tables["tasks"]): {"classification": 1.0}}
    assert len(history(tried, known).rows) == 5, "unless they are known, as those that are asked for"


def made_lopt() -> Trial:
    return Trial(**{**vars(made("sinusoid-maml", 1.0)), "tables": config.load("lopt-mlp-pes").content})


@pytest.fixture(scope="module")
def past() -> History:
    """What the shipped trials are to a meta-model."""
    return history(shipped_trials(), dict(known_features()))


def test_a_strategy_is_moved_with_what_its_model_needs(past: History) -> None:
    rows = {r.trial.recipe: r for r in past.rows}
    target = wanted("glyphs-maml", ["tasks.ways=3"])
    recipe = moved(rows["omniglot-warpgrad"], past.rows, target)
    assert recipe.tables["model"]["warp"] and recipe.tables["model"]["ways"] == 3
    assert recipe.tables["tasks"] == target.tables["tasks"] and recipe.tables["algorithm"]["name"] == "warpgrad"
    assert recipe.tables["evaluate"]["steps"] == rows["omniglot-warpgrad"].trial.tables["evaluate"]["steps"]
    assert (
        moved(rows["omniglot-reptile"], past.rows, target).tables["tasks"]["train_shots"]
        == 10 * target.tables["tasks"]["shots"]
    )
    small = moved(rows["fertility-maml"], past.rows, wanted("sinusoid"))
    assert small.tables["model"]["sizes"] == [1, 40, 40, 1] and goes(small) == ""
    kept = rebuilt("omniglot-maml", rows["omniglot-maml"].trial.tables)
    assert kept.content == config.load("omniglot-maml").content


@pytest.mark.slow
def test_what_is_true_of_other_data_alone_is_found_out_before_it_is_proposed(past: History) -> None:
    pretrain = next(r for r in past.rows if r.trial.recipe == "omniglot-pretrain")
    assert "classes" in goes(moved(pretrain, past.rows, wanted("glyphs-maml")))


def by_algorithm(rows: Sequence[Row]) -> Callable[[Sequence[Row]], Any]:
    """A model that takes no time: the mean score of the algorithm elsewhere."""
    means = standing(rows)
    return lambda asked: np.array([means.get(str(r.strategy["algorithm"]), 0.0) for r in asked])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model, that takes no time, in place of those that there are."""
    module, models = sys.modules["metaoptim.design.recommend"], {"means": by_algorithm}
    monkeypatch.setattr(module, "judge", partial(judge, models=models))
    monkeypatch.setattr(module, "MODELS", models)


@pytest.mark.slow
def test_the_models_that_there_are_say_the_same_twice() -> None:
    one, two = (mo.recommend("sinusoid-maml").document() for _ in range(2))
    assert one == two and one["judgement"]["model"] in MODELS
    assert set(one["judgement"]["held_out"]) == {*MODELS, CHOSEN, SINGLE, RANDOM}


def test_the_command_proposes_a_recipe_that_trains(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stored.append(tmp_path / "tried", made("sinusoid-maml", 0.001, 0, "algorithm.steps=7"))
    assert main(["recommend", "sinusoid-maml", "--trials", "tried", "--set", "tasks.shots=5", "--out", "new"]) == 0
    told = capsys.readouterr().out
    assert "Not enough trials" in told and "single best" in told and "metaoptim train new/recipe.toml" in told
    recipe = config.load("new/recipe.toml")
    assert recipe.tables["tasks"]["shots"] == 5 and goes(recipe) == ""
    start = tomllib.loads(Path("new/start.toml").read_text())
    points = start["start"]
    assert start["recipe"] == recipe.name
    assert points[0]["train.lr"] > 0 and points == [dict(p) for p in points if p.keys() == points[0].keys()]
    document = json.loads(Path("new/recommendation.json").read_text())
    assert document["judgement"]["trusted"] is False and document["features"]["shots"] == 5
    assert known_features(tmp_path / "new").keys() == {tasks_key(recipe.tables["tasks"])}


def test_what_was_tried_on_these_very_tasks_comes_first(quick: None) -> None:
    found = mo.recommend("sinusoid-maml", [made("sinusoid-maml", 0.0001, 0, "algorithm.steps=7")])
    assert found.tried and found.proposals[0].measured == 0.0001 and found.recipe.tables["algorithm"]["steps"] == 7
    assert found.starts[0]["algorithm.steps"] == 7
    assert "tried on these very tasks" in " ".join(found.sentences)


def test_a_search_on_these_very_tasks_hands_over_what_it_has_varied(quick: None) -> None:
    def tried(width: int, value: float, folds: int = 3) -> Trial:
        trial = made("sinusoid-maml", value, 0, "tasks.shots=7", f"model.sizes=[1, {width}, 1]", f"algorithm.steps={width % 5}")
        return replace(trial, split="val", protocol=f"{folds}-fold cross-validation", source="tune")

    search = [tried(width, width / 100) for width in (8, 16, 24, 31)]
    other = [tried(width, width / 1000, folds=2) for width in (32, 33, 34, 36)]
    found = mo.recommend(config.load("sinusoid-maml", ["tasks.shots=7"]), [*search, *other[:3]])
    assert found.tried == "held-out folds of split train" and found.proposals[0].measured == 0.08
    assert found.recipe.tables["model"]["sizes"] == [1, 8, 1]
    assert "another model than yours, and keeps that: sizes = [1, 8, 1] for [1, 40, 40, 1]." in repr(found)
    judged = [made(name, 0.5, 0, "tasks.shots=7") for name in ("sinusoid-maml", "sinusoid-anil", "sinusoid-meta-sgd")]
    judged.append(made("sinusoid-fomaml", 0.4, 0, "tasks.shots=7"))
    found = mo.recommend(config.load("sinusoid-maml", ["tasks.shots=7"]), [*search, *other, *judged])
    assert found.tried == "split test" and found.proposals[0].algorithm == "fomaml" and found.proposals[0].measured == 0.4
    assert "8 more were judged otherwise, on held-out folds of split train: such scores don't compare" in repr(found)
    assert {p.measured for p in found.proposals} <= {0.4, 0.5, None}


def test_what_can_not_be_recommended_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "lopt-mlp-pes", "--out", str(tmp_path / "a")]) == 2
    assert main(["recommend", "sinusoid-maml", "--trials", str(tmp_path), "--out", str(tmp_path / "a")]) == 2
    assert main(["recommend", "sinusoidal", "--out", str(tmp_path / "a")]) == 2
    assert main(["recommend", "omniglott", "--out", str(tmp_path / "a")]) == 2
    assert main(["recommend", "lopt-celo2-smalls", "--out", str(tmp_path / "a")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "learned optimizer" in told[0] and "there are no trials in" in told[1] and "did you mean `sinusoid`?" in told[2]
    assert told[3] == "error: unknown task family or recipe `omniglott`; did you mean `omniglot`?"
    assert "lopt" not in told[4].partition(";")[2]
    (tmp_path / "families.json").write_text("{[")
    with pytest.raises(ValueError, match="remove it, and they are measured again"):
        known_features(tmp_path)


def test_the_benchmark_of_warm_starts_counts_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of losses: the best of all is 0.2 ± 0.1, so 0.3 is near enough; of accuracies: 0.9 ± 0.05, so 0.85 is."""
    monkeypatch.syspath_prepend(LEDGER.parent / "benchmarks")
    bench = __import__("warm_start")
    runs = [[(0.5, 0.1), None, (0.29, 0.1)], [(0.4, 0.1), (0.2, 0.1)]]
    assert bench.target(runs, higher=False) == pytest.approx(0.3)
    assert [bench.needed([x and x[0] for x in run], 0.3, higher=False) for run in runs] == [3, 2]
    assert bench.target([[(0.9, 0.05), (0.8, 0.01)]], higher=True) == pytest.approx(0.85)
    assert bench.needed([0.5, None], 0.85, higher=True) is None
    cold = bench.cold_recipe("fertility-maml").tables
    assert cold["algorithm"]["steps"] == 1 and cold["train"]["lr"] == 0.001, "and not what was found for these tasks"
