"""Tuning: folds share no class, the test split is never sampled, what was interrupted goes on, and who is picked."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import metaoptim as mo
from metaoptim.cli.main import main
from metaoptim.core import trees
from metaoptim.design import Row, Tuning, storage, study_picture, trials, tune, workers
from metaoptim.design.cross_validation import CrossValidation, Setup
from metaoptim.design.folds import Stream, folded
from metaoptim.design.space import Choice, Span, grid, space_of
from metaoptim.design.study import pick
from metaoptim.design.workers import Job, Worker
from metaoptim.lopt.problem import Problems
from metaoptim.recipes import recipe as config
from metaoptim.recipes.places import contents
from metaoptim.runs.store import load_checkpoint
from metaoptim.tasks import ImageTasks
from metaoptim.tasks.images import ImageTasks as Images
from metaoptim.tasks.sinusoid import Sinusoid
from metaoptim.training import Interrupted
from metaoptim.training.state import Training

ENGINE = """
[engine]
batching = "loop"
memory = "graph"
runtime = "eager"
"""
SINUSOID = f"""
description = "a tiny one"
[algorithm]
name = "maml"
loss = "mse"
lr = 0.01
[model]
name = "mlp"
sizes = [1, 4, 1]
[tasks]
name = "sinusoid"
[train]
iterations = 3
tasks_per_step = 2
validate_episodes = 4
checkpoint_every = 1
[evaluate]
steps = 2
[expected]
metric = "loss"
value = 1.0
{ENGINE}"""
IMAGES = SINUSOID.replace("mse", "cross_entropy").replace('"mlp"\nsizes = [1, 4, 1]', '"conv4"\nfilters = 2\nsize = 16')
IMAGES = IMAGES.replace('"sinusoid"', '"from_folder"\nways = 2\nqueries = 1\nsize = 16\ncolour = "grey"\nroot = "images"')
LOPT = f"""
[algorithm]
name = "learned_optimizer"
rule = "small_fc"
estimator = {{name = "pes", window = 2, sigma = 0.01}}
[tasks]
name = "quadratics"
dim = 2
steps = 4
[train]
iterations = 3
problems_per_step = 2
validate_episodes = 3
[evaluate]
steps = 6
{ENGINE}"""
SEARCH = {"algorithm.lr": "log:0.001..0.1", "algorithm.steps": "1..3"}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn in a test of their own, for drawing takes longer than these searches."""
    monkeypatch.setattr(study_picture, "draw", lambda tuning, path: None)


def tiny(text: str = SINUSOID, *overrides: str) -> config.Recipe:
    return config.parse(text, "tiny", overrides)


def quick(out: Path, recipe: config.Recipe | None = None, **options: Any) -> Tuning:
    """A search of two trials in two folds."""
    given = {"search": SEARCH, "trials": 2, "folds": 2, "progress": False, "out": out, **options}
    return tune(recipe or tiny(), given.pop("search"), **given)


def told(found: Tuning) -> list[dict[str, Any]]:
    """Everything of the trials but the time that they took."""
    return [{name: value for name, value in vars(row).items() if name != "seconds"} for row in found.rows]


# Folds.


@pytest.fixture(scope="module")
def letters() -> ImageTasks:
    images = np.random.default_rng(0).integers(0, 255, (18, 4, 8, 8), np.uint8)
    members = {"train": np.arange(14), "val": np.arange(14, 16), "test": np.arange(16, 18)}
    return ImageTasks("letters", images, [f"c{i}" for i in range(18)], members, ways=2, shots=1, queries=1)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_folds_of_classes_share_none_and_make_up_the_training_classes(letters: ImageTasks, count: int) -> None:
    folds = [folded(letters, i, count) for i in range(count)]
    held = [set(fold.class_names("val")) for fold in folds]
    assert set.union(*held) == set(letters.class_names("train")) and sum(map(len, held)) == letters.classes("train")
    assert max(map(len, held)) - min(map(len, held)) <= 1
    for fold, classes in zip(folds, held, strict=True):
        assert set(fold.class_names("train")) == set(letters.class_names("train")) - classes
        assert fold.splits == ("train", "val")
        with pytest.raises(ValueError, match="There is no split 'test'"):
            fold.sample("test", seed=0, start=0, count=1)


def test_folds_of_a_table_are_folds_of_its_entities(tmp_path: Path) -> None:
    rows = [f"{name},{x},{x * len(name)}" for name in ("a", "bb", "ccc", "dddd", "eeeee", "ffffff") for x in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["who,x,y", *rows]))
    table = mo.tasks.from_table(str(tmp_path / "t.csv"), "who", "y", shots=1, queries=2)
    held = [set(folded(table, i, 2).members["val"].tolist()) for i in range(2)]
    assert not held[0] & held[1] and held[0] | held[1] == set(table.members["train"].tolist())
    with pytest.raises(ValueError, match=r"folds=40: the 4 tasks of split train can't be divided into 40 parts"):
        folded(table, 0, 40)


@pytest.mark.parametrize("family", [mo.tasks.sinusoid(), mo.lopt.quadratics(2, steps=3)], ids=["sinusoid", "quadratics"])
def test_folds_of_a_stream_are_parts_of_it(family: Any) -> None:
    def drawn(tasks: Any, split: str, count: int) -> list[float]:
        batch = tasks.sample(split, seed=3, start=0, count=count)
        return [float(x.flatten()[0]) for x in zip(*trees.flatten(batch.support), strict=True) for x in x[:1]]

    folds = [folded(family, i, 3) for i in range(3)]
    held = [drawn(fold, "val", 4) for fold in folds]
    assert sorted(x for part in held for x in part) == sorted(drawn(family, "train", 12))
    for i, fold in enumerate(folds):
        assert sorted(drawn(fold, "train", 8)) == sorted(x for j, part in enumerate(held) if j != i for x in part)
        alone = fold.sample("train", seed=3, start=5, count=1)
        assert torch.equal(trees.flatten(alone)[0][0], trees.flatten(fold.sample("train", seed=3, start=0, count=8))[0][5])
        assert fold.describe("train") != folds[i - 1].describe("train")


def test_too_few_classes_are_told(letters: ImageTasks) -> None:
    with pytest.raises(ValueError, match=r"folds=8: 2 ways were asked for, but split `val` of `letters` has 1 class"):
        folded(letters, 7, 8)
    with pytest.raises(ValueError, match=r"folds=20: the 14 classes of split train can't be divided into 20 parts"):
        folded(letters, 0, 20)
    with pytest.raises(ValueError, match=r"folds=1: it must be a whole number, at least 2"):
        folded(letters, 0, 1)


# Spaces.


def test_the_default_space_is_made_of_what_a_recipe_has() -> None:
    assert {k: str(d) for k, d in space_of(config.load("omniglot-maml"), None).items()} == {
        "algorithm.steps": "1..10", "algorithm.lr": "log:0.04..4", "train.lr": "log:0.0004..0.04",
    }  # fmt: skip
    assert "algorithm.first_order" in space_of(config.load("sinusoid-meta-sgd"), None)
    assert {*space_of(tiny(LOPT), None)} == {"train.lr"}
    composed = tiny(SINUSOID.replace('"maml"', '"compose"').replace("lr = 0.01", 'rule = {name = "momentum", lr = 0.02}'))
    assert str(space_of(composed, None)["algorithm.rule.lr"]) == "log:0.002..0.2"


def test_specs_are_ranges_and_choices() -> None:
    found = space_of(
        tiny(), ["algorithm.steps=2..5", "algorithm.lr=1..2", "train.lr=log:1e-4..0.1", "model.activation=relu|tanh"]
    )
    assert found["algorithm.steps"] == Span(2, 5, whole=True)
    assert found["algorithm.lr"] == Span(1.0, 2.0), "a key that takes any number is given any number"
    assert found["train.lr"] == Span(1e-4, 0.1, log=True)
    assert found["model.activation"] == Choice(("relu", "tanh"))
    assert space_of(tiny(), {"model.sizes": [[1, 2, 1], [1, 4, 1]]})["model.sizes"].drawn([1, 4, 1]) == "[1, 4, 1]"
    assert space_of(tiny(), ["algorithm.name=maml|fomaml"])["algorithm.name"] == Choice(("maml", "fomaml"))
    assert space_of(tiny(LOPT), ["algorithm.estimator.sigma=0.001..0.1"])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("algorithm.stepz=1..3", "unknown key `stepz` in [algorithm]; did you mean `steps`?"),
        ("algorthm.steps=1..3", "unknown table `algorthm`; did you mean `algorithm`?"),
        ("algorithm.steps", "can't search `algorithm.steps`; expected TABLE.KEY=SPEC"),
        ("algorithm.steps=3..1", "its first number must be less than its second one"),
        ("algorithm.steps=3", "One value is given by --set algorithm.steps=3"),
        ("algorithm.steps=1..x", "expected a range, as in 1..10"),
        ("algorithm.steps=0.5..2.5", "`steps` in [algorithm]: found 0.5, expected a whole number"),
        ("algorithm.lr=log:0..1", "a logarithmic range begins above 0"),
        ("algorithm.lr=0.1|0.1", "its choices must be different"),
        ("tasks.shots=1..5", "scores of different tasks can't be compared"),
        ("train.iterations=1..5", "how long trials train is --iterations"),
        ("train.seed=1..5", "`train.seed` can't be searched, for a seed that did best did so by chance."),
        ("evaluate.seed=1..5", "of [evaluate], evaluate.steps alone can"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(spec: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        space_of(tiny(), [spec])
    assert words in str(error.value) and "\n" not in str(error.value)


# Who is picked.


def row(number: int, train: int, means: list[float], error: float = 0.02, state: Any = "complete") -> Row:
    return Row(number, {}, state, train, (0, 1, 2), tuple(means), (error,) * 3)


DRAW = study_picture.draw
ROWS = [
    row(0, 1, [0.2, 0.70, 0.75]),
    row(1, 2, [0.2, 0.885, 0.89]),  # within one standard error of the best, after one step too
    row(2, 2, [0.2, 0.888, 0.86]),  # as cheap as that, and better
    row(3, 5, [0.2, 0.85, 0.90]),
    row(4, 1, [0.99, 0.99, 0.99], state="pruned"),
]


def test_one_standard_error_takes_the_fewest_steps_and_of_these_the_best() -> None:
    found = pick(ROWS, "accuracy", "one-se", (1, 2))
    assert (found.trial, found.test_steps) == (2, 1) and found.best[:2] == (3, 2)
    assert "By the rule of one standard error: the best is trial 3" in found.why and "trial 2 (2 inner steps" in found.why
    assert (pick(ROWS, "accuracy", "best", (1, 2)).trial, pick(ROWS, "accuracy", "best", (1,)).trial) == (3, 2)
    tight = [Row(**{**vars(r), "error": (0.001,) * 3}) for r in ROWS]
    assert pick(tight, "accuracy", "one-se", (1, 2)).trial == 3, "nothing else is within a small standard error"


def test_the_table_shows_the_best_and_what_is_picked() -> None:
    one = row(0, 1, [0.2, 0.885, 0.89])
    facts = {"protocol": "2-fold cross-validation", "test_steps": [1, 2], "folds": 2, "iterations": 3}
    for metric, trial, best, taken in (
        ("accuracy", one, "89.00", "88.50"),
        ("loss", Row(**{**vars(one), "mean": (0.8, 0.115, 0.11)}), "0.1100", "0.1150"),
    ):
        found = str(Tuning(tiny(), metric, {}, (trial,), pick([trial], metric, "one-se", (1, 2)), {}, facts))
        assert re.search(rf" 0 .* 2 .*{best}.*\n.*\*0 .* 1 .*{taken}", found), found


def test_of_a_loss_less_is_better() -> None:
    losses = [Row(**{**vars(r), "mean": tuple(1 - m for m in r.mean)}) for r in ROWS]
    assert pick(losses, "loss", "one-se", (1, 2)).trial == 2 and pick(losses, "loss", "best", (1, 2)).trial == 3


def test_without_a_completed_trial_none_is_picked() -> None:
    with pytest.raises(ValueError, match="no trial was completed, so that none can be picked; trial 0: too large"):
        pick([Row(0, {}, "refused", reason="too large")], "loss", "one-se", (1,))


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_picture(metric: str, tmp_path: Path) -> None:
    facts = {"protocol": "2-fold cross-validation", "test_steps": [1, 2], "folds": 2, "iterations": 3}
    shares = {"algorithm.lr": 0.7, "algorithm.steps": 0.3}
    picked = pick(ROWS, metric, "one-se", (1, 2))
    DRAW(Tuning(tiny(), metric, {}, tuple(ROWS), picked, shares, facts), tmp_path / "whole.png")
    alone = [Row(**{**vars(r), "steps": (5,), "mean": r.mean[2:], "error": r.error[2:]}) for r in ROWS]
    picked = pick(alone, metric, "best", (5,))
    DRAW(Tuning(tiny(), metric, {}, tuple(alone), picked, {}, facts | {"test_steps": [5]}), tmp_path / "alone.png")
    with Image.open(tmp_path / "whole.png") as whole, Image.open(tmp_path / "alone.png") as one:
        assert whole.width > 2 * one.width, "three panels, and one"


# Searches.


def test_a_search_ends_with_a_recipe_to_train(tmp_path: Path) -> None:
    found = quick(tmp_path / "s", warm_start=[{"algorithm.lr": 0.05}])
    assert [r.state for r in found.rows] == ["complete", "complete"]
    assert found.rows[0].params["algorithm.lr"] == 0.05, "what was given is tried first"
    assert found.rows[1].params == {"algorithm.lr": 0.01, "algorithm.steps": 1}, "and then the recipe's own values"
    assert found.rows[0].steps == (0, 1, 2, 3) and len(found.rows[0].folds) == 2
    assert found.rows[0].mean == pytest.approx(np.mean(found.rows[0].folds, 0)), "folds have as many episodes"
    known = json.loads((tmp_path / "s" / "study.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert known["picked"]["trial"] == found.picked.trial and len(known["trials"]) == 2 and known["environment"]["torch"]
    chosen = config.load(tmp_path / "s" / "recipe.toml")
    assert chosen.tables["algorithm"]["lr"] == found.rows[found.picked.trial].params["algorithm.lr"]
    assert chosen.tables["evaluate"]["steps"] == found.picked.test_steps
    assert chosen.tables["train"]["iterations"] == 3 and not chosen.tables["expected"] and chosen.name == "tiny-tuned"
    assert (tmp_path / "s" / "recipe.toml").read_text().startswith("# Chosen by metaoptim tune: algorithm.lr = ")
    lines = trials.read(tmp_path / "s")
    assert [t.source for t in lines] == ["tune", "tune"] and lines[0].tables["algorithm"]["lr"] == 0.05
    assert not list((tmp_path / "s" / "trials").glob("0*")), "the runs of trials that ended are gone"
    assert "trial" in str(found) and "Too few trials" in str(found)
    assert "held-out folds of split train" in known["protocol"] and "split val" not in f"{known} {found}"
    assert "after 0 to 3 inner steps" in lines[0].protocol and "after test steps" in str(found)


@pytest.mark.parametrize("text", [IMAGES, SINUSOID, LOPT], ids=["images", "sinusoid", "learned optimizer"])
def test_val_and_test_are_never_sampled(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    for place in (Path("images", f"c{i}", f"{k}.png") for i in range(12) for k in range(2)):
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (16, 16), np.uint8)).save(place)
    recipe = tiny(text)
    tasks = recipe.experiment().tasks
    if isinstance(tasks, Images):
        before = Images._batch
        names = {name: split for split in tasks.splits for name in tasks.class_names(split)}

        def batch(self: Images, split: str, classes: Any, drawings: Any, labels: Any) -> Any:
            seen.update(names[self.class_names(split)[int(c)]] for c in np.unique(classes))
            return before(self, split, classes, drawings, labels)

        monkeypatch.setattr(Images, "_batch", batch)
    elif isinstance(tasks, Problems):
        from metaoptim.lopt import problem

        plain = problem.raw

        def raw(seed: int, stream: str, *rest: Any) -> Any:
            seen.add(stream.rpartition("/")[2])
            return plain(seed, stream, *rest)

        monkeypatch.setattr(problem, "raw", raw)
    else:
        sample = Sinusoid.sample

        def sampled(self: Sinusoid, split: str, **rest: Any) -> Any:
            seen.add(split)
            return sample(self, split, **rest)

        monkeypatch.setattr(Sinusoid, "sample", sampled)
    search = {"train.lr": "log:0.001..0.1"} if text == LOPT else SEARCH
    found = quick(tmp_path / "s", recipe, search=search, trials=1)
    assert seen == {"train"} and found.rows[0].state == "complete"
    assert found.metric == ("accuracy" if text == IMAGES else "loss")
    assert found.rows[0].steps == ((6,) if text == LOPT else (0, 1, 2, 3))


def test_a_fold_has_the_same_episodes_in_every_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = CrossValidation(Setup(tiny().text(), "tiny", space_of(tiny(), SEARCH), 2, 2, 0, (1,), "loss"))
    plain, drawn = Stream.sample, list[tuple[int, float]]()

    def sample(self: Stream, split: str, **rest: Any) -> Any:
        batch = plain(self, split, **rest)
        drawn.extend((self.number, float(x.sum())) for x in batch.query[0] if split == "val")
        return batch

    monkeypatch.setattr(Stream, "sample", sample)
    seen = []
    for lr in (0.001, 0.1):
        drawn.clear()
        judge.scores(judge.recipe({"algorithm.lr": lr}), tmp_path / str(lr), lambda step, score: None, None)
        seen.append(set(drawn))
    assert seen[0] == seen[1] and len(seen[0]) == 2 * 4, "four episodes a fold, whatever is tried"
    assert not {x for fold, x in seen[0] if fold == 0} & {x for fold, x in seen[0] if fold == 1}


def test_what_diverges_is_the_worst_and_no_crash(tmp_path: Path) -> None:
    found = quick(tmp_path / "s", tiny(SINUSOID, "algorithm.steps=3"), search={"algorithm.lr": [1e30, 0.01]}, warm_start=[
        {"algorithm.lr": 1e30}], trials=2)  # fmt: skip
    assert [r.state for r in found.rows] == ["diverged", "complete"]
    assert "not finite" in found.rows[0].reason and found.picked.trial == 1
    assert "diverged" in str(found)
    assert json.loads((tmp_path / "s" / "study.json").read_text())["trials"][0]["state"] == "diverged"


def test_a_recipe_that_cannot_be_trained_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    search = {"train.optimizer": ["LBFGS", "SGD"], "train.lr": [0.01, 0.02]}
    found = quick(tmp_path / "s", search=search, warm_start=[{"train.optimizer": "LBFGS"}, {"train.optimizer": "SGD"}])
    assert [r.state for r in found.rows] == ["refused", "complete"] and "LBFGS" in found.rows[0].reason
    with pytest.raises(ValueError, match=r"no trial was completed, .* trial 0: .*LBFGS"):
        quick(tmp_path / "t", search=search, warm_start=[{"train.optimizer": "LBFGS"}], trials=1)


@pytest.mark.slow
def test_an_interrupted_search_goes_on_to_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quick(tmp_path / "whole", trials=3)
    step, taken = Training.advance, [0]

    def advance(self: Training, directory: Any) -> Any:
        taken[0] += 1
        if taken[0] == 10:
            raise Interrupted("stopped")
        return step(self, directory)

    monkeypatch.setattr(Training, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "s", trials=3)
    assert list((tmp_path / "s" / "trials").glob("0*/fold*/checkpoint.safetensors")), "the trial's runs are kept"
    with pytest.raises(ValueError, match="holds a study already"):
        quick(tmp_path / "s", trials=3)
    with pytest.raises(ValueError, match=r"was started with other values of train.seed, --folds"):
        quick(tmp_path / "s", tiny(SINUSOID, "train.seed=1"), trials=3, folds=3, resume=True)
    before = taken[0]
    assert told(quick(tmp_path / "s", trials=3, resume=True)) == told(whole)
    assert taken[0] - before == 3 * 2 * 3 - 9, "no outer step is taken twice"


def test_a_search_does_not_go_on_with_other_contents_of_the_recipes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "def loss(prediction, y):\n    return ((prediction - y) ** 2).mean()\n"
    (tmp_path / "own.py").write_text(code)
    recipe = tiny(SINUSOID.replace('"mse"', '"own.py:loss"'))
    quick(tmp_path / "s", recipe, trials=1)
    (tmp_path / "own.py").write_text(f"{code}# Altered.\n")
    with pytest.raises(ValueError, match="with other values of what the files hold that the recipe names; go on with"):
        quick(tmp_path / "s", recipe, resume=True)
    (tmp_path / "own.py").write_text(code)
    assert len(quick(tmp_path / "s", recipe, resume=True).rows) == 2


def test_contents_of_files_are_told_apart(tmp_path: Path) -> None:
    def found(**tasks: str) -> str:
        return contents({"tasks": {"name": "from_table", **tasks}})

    table, folder = tmp_path / "t.csv", tmp_path / "images"
    table.write_text("a")
    (folder / "x").mkdir(parents=True)
    first = found(), found(table=str(table)), found(root=str(folder))
    assert first[0] == "" and len(set(first)) == 3
    table.write_text("b")
    (folder / "x" / "1.png").touch()
    assert found() == "" and found(table=str(table)) != first[1] and found(root=str(folder)) != first[2]


def test_a_small_space_is_tried_whole_and_each_point_once(tmp_path: Path) -> None:
    search = {"algorithm.steps": [1, 2, 3], "algorithm.lr": "0.01|0.02"}
    assert len(grid(space_of(tiny(), search), 6)) == 6 and grid(space_of(tiny(), search), 5) == []
    assert grid(space_of(tiny(), {"algorithm.lr": "0.01..0.02"}), 100) == []
    said: list[str] = []
    found = tune(tiny(), search, trials=9, folds=2, iterations=2, out=tmp_path / "s", progress=False, say=said.append)
    assert said[0] == "There are 6 points to try, and each is tried once."
    tried = sorted((row.params["algorithm.steps"], row.params["algorithm.lr"]) for row in found.rows)
    assert tried == [(n, lr) for n in (1, 2, 3) for lr in (0.01, 0.02)]
    first = tune(recipe := tiny(), search, trials=2, folds=2, iterations=2, out=tmp_path / "r", progress=False)
    assert len({tuple(row.params.values()) for row in first.rows}) == 2
    more = tune(recipe, search, trials=9, folds=2, iterations=2, out=tmp_path / "r", progress=False, resume=True)
    assert sorted((row.params["algorithm.steps"], row.params["algorithm.lr"]) for row in more.rows) == tried


def test_a_value_of_the_recipe_that_is_not_searched_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    search = {"algorithm.lr": "log:0.001..0.1", "algorithm.steps": [2, 3]}
    found = quick(tmp_path / "s", search=search, trials=1, settings=["algorithm.lr=0.02"], say=said.append)
    assert found.rows[0].params["algorithm.lr"] == 0.02 and found.base.tables["algorithm"]["lr"] == 0.02
    assert said[0] == "the recipe's algorithm.steps = 1 is not in 2|3: the trial of its values draws another."
    quick(tmp_path / "grid", search={"algorithm.steps": [2, 3]}, say=said.append)
    assert "the recipe's algorithm.steps = 1 is not in 2|3: no trial has its values." in said
    other = config.Recipe("another", "", tiny().tables)
    with pytest.raises(ValueError, match=r"the study in .* is of tiny, not another; choose another folder\."):
        quick(tmp_path / "s", other, resume=True)


def test_more_trials_can_be_asked_for(tmp_path: Path) -> None:
    first = told(quick(tmp_path / "s", trials=1))
    more = told(quick(tmp_path / "s", trials=2, resume=True))
    assert more[:1] == first and len(more) == 2
    with pytest.raises(ValueError, match=r"there is no study in .* to go on with"):
        quick(tmp_path / "none", resume=True)


def test_a_trial_whose_worker_was_killed_is_tried_again(tmp_path: Path) -> None:
    quick(tmp_path / "s", trials=1)
    url, folder = f"sqlite:///{tmp_path}/s/study.db", tmp_path / "s"
    with storage.quiet():
        name = storage.names(url)[0]
        worker = Worker(Job(url, name, str(folder), 2), Setup.of(storage.setup_in(url, name)))
        lost = worker.study.ask()  # as a kill leaves it
        lost.set_user_attr("place", storage.place(folder))
        drawn = lost.suggest_float("algorithm.lr", 0.001, 0.1, log=True)
        with storage.lock_of(folder, 1):
            assert not worker.once(), "while its worker lives, it is left alone"
        assert worker.once() and not worker.once()
        found = storage.rows(worker.study)
    assert [r.number for r in found] == [0, 1] and found[1].params["algorithm.lr"] == drawn


def test_a_trial_that_another_machine_drew_at_the_same_moment_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(tmp_path / "s", trials=1)
    url, folder, counted = f"sqlite:///{tmp_path}/s/study.db", tmp_path / "s", storage.begun
    with storage.quiet():
        name = storage.names(url)[0]
        worker = Worker(Job(url, name, str(folder), 1), Setup.of(storage.setup_in(url, name)))
        monkeypatch.setattr(storage, "begun", lambda study, *before: counted(study, *before) if before else 0)
        assert not worker.once(), "there was a place when it looked, and none when it had drawn"
        monkeypatch.undo()
        assert not worker.once() and [r.number for r in storage.rows(worker.study)] == [0]
        worker = Worker(Job(url, name, str(folder), 2), Setup.of(storage.setup_in(url, name)))
        assert worker.once() and [r.number for r in storage.rows(worker.study)] == [0, 1]


@pytest.mark.slow
def test_a_trial_that_is_worse_than_most_is_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "AT_RANDOM", 2)
    poor = [{"algorithm.lr": 0.99}]
    good = [{"algorithm.lr": 0.001 * i} for i in range(1, storage.AT_RANDOM + 1)]
    search = {"algorithm.lr": "0.0001..1.0"}
    found = quick(tmp_path / "s", tiny(SINUSOID, "train.iterations=6"), search=search, trials=3, warm_start=[*good, *poor])
    assert [r.state for r in found.rows] == ["complete", "complete", "pruned"]
    assert found.rows[2].mean == () and "2 complete, 1 pruned" in str(found)


@pytest.mark.slow
def test_time_that_is_up_ends_the_search_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no trial came to its end within 1e-06 seconds"):
        quick(tmp_path / "s", trials=None, seconds=1e-6)
    plain, taken, late = Training.advance, [0], time.time() + 1000

    def advance(self: Training, directory: Any) -> Any:
        taken[0] += 1
        if taken[0] > 7:
            monkeypatch.setattr(workers.time, "time", lambda: late)
        return plain(self, directory)

    monkeypatch.setattr(Training, "advance", advance)
    first = quick(tmp_path / "s", trials=None, seconds=500.0, resume=True)
    assert len(first.rows) == 1 and taken[0] == 8, "two folds of three steps, and two of the next trial, which then was stopped"
    monkeypatch.undo()
    second = Path(tmp_path / "s" / "trials" / "0001" / "fold0")
    assert load_checkpoint(second, "last").step == 2, "and goes on from there"


def test_bad_options_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="pick='two'"):
        quick(tmp_path / "s", pick="two")
    with pytest.raises(ValueError, match=r"warm start: `algorithm.l` isn't searched; did you mean `algorithm.lr`"):
        quick(tmp_path / "s", warm_start=[{"algorithm.l": 1}])
    with pytest.raises(ValueError, match=r"warm start: algorithm.lr = 9 is not in log:0.001..0.1"):
        quick(tmp_path / "s", warm_start=[{"algorithm.lr": 9}])
    (tmp_path / "start.toml").write_text('recipe = "other"\n[[start]]\n"algorithm.lr" = 9\n')
    with pytest.raises(ValueError, match=r"start.toml holds points for the recipe other, and they don't fit tiny: .*lr = 9"):
        quick(tmp_path / "s", warm_start=tmp_path / "start.toml")
    with pytest.raises(ValueError, match=r"the storage nonsense can't be opened"):
        quick(tmp_path / "s", storage="nonsense")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "study.db").write_text("cut" * 999)
    with pytest.raises(ValueError, match=r"the storage sqlite.*cut/study.db can't be opened: file is not a database"):
        quick(tmp_path / "cut", resume=True)
    with pytest.raises(ValueError, match=r"`evaluate.steps` can't be searched here"):
        quick(tmp_path / "s", tiny(LOPT), search={"evaluate.steps": "1..5"})
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"tune needs Optuna, which isn't installed: pip install 'metaoptim\[design\]'"):
        quick(tmp_path / "s")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(SINUSOID.replace('"mlp"\nsizes = [1, 4, 1]', '"tuned_net.py:net"'))
    Path("tuned_net.py").write_text("import metaoptim as mo\n\n\ndef net():\n    return mo.nn.mlp((1, 4, 1))\n")
    Path("start.toml").write_text('[[start]]\n"algorithm.lr" = 0.05\n')
    given = ["tune", "tiny.toml", "--search", "algorithm.lr=0.01..0.1", "--search", "evaluate.steps=1..2", "--folds", "2"]
    assert main([*given, "--trials", "1", "--warm-start", "start.toml"]) == 0
    out, err = capsys.readouterr()
    assert "trial 0: algorithm.lr 0.05" in err and "metaoptim train tuning/tiny/recipe.toml" in out
    with Path("tuning/tiny/recipe.toml").open("rb") as file:
        assert tomllib.load(file)["algorithm"]["lr"] == 0.05
    assert main([*given, "--trials", "1"]) == 2
    assert "holds a study already" in capsys.readouterr().err
    assert main(["tune", "tiny.toml", "--search", "algorithm.stepz=1..2", "--out", "x"]) == 2
    assert "did you mean `steps`?" in capsys.readouterr().err
    monkeypatch.chdir("/")
    assert config.load(tmp_path / "tuning/tiny/recipe.toml").build(), "its code is found from any folder"


# Several processes.


def start(folder: Path, *more: str, workers: int = 2, trials: int = 4) -> subprocess.Popen[str]:
    recipe = folder / "tiny.toml"
    recipe.write_text(SINUSOID.replace("iterations = 3", "iterations = 150"))
    command = [
        sys.executable, "-m", "metaoptim.cli.main", "tune", str(recipe), "--folds", "2", "--workers", str(workers),
        "--trials", str(trials), "--search", "algorithm.lr=0.001..0.02", "--out", str(folder / "s"), *more,
    ]  # fmt: skip
    source = str(Path(mo.__file__).parents[1])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": source}
    )


def wait_for_trial(folder: Path, number: int = 0) -> None:
    deadline = time.time() + 120
    while not list((folder / "s" / "trials").glob(f"{number:04d}/fold*/checkpoint.safetensors")):
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_worker_loses_its_trial_alone(tmp_path: Path) -> None:
    search = start(tmp_path)
    wait_for_trial(tmp_path)
    children = Path(f"/proc/{search.pid}/task/{search.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    out, _ = search.communicate(timeout=300)
    assert search.returncode == 0, out
    assert "ended with exit code -9; what it was trying is tried again" in out
    known = json.loads((tmp_path / "s" / "study.json").read_text())
    assert [t["number"] for t in known["trials"]] == [0, 1, 2, 3] and {t["state"] for t in known["trials"]} == {"complete"}


@pytest.mark.slow
def test_ctrl_c_reaches_all_workers_and_the_command_goes_on(tmp_path: Path) -> None:
    search = start(tmp_path)
    wait_for_trial(tmp_path)
    search.send_signal(signal.SIGINT)
    out, _ = search.communicate(timeout=120)
    assert search.returncode == 130 and "Nothing is lost. To go on: metaoptim tune" in out and "Traceback" not in out
    again = start(tmp_path, "--resume")
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert len(json.loads((tmp_path / "s" / "study.json").read_text())["trials"]) == 4


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a database of its own, on this machine alone."""
    tools = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not tools:
        pytest.skip("there is no PostgreSQL here: apt-get install postgresql, and this is tested")
    pytest.importorskip("psycopg2", reason="pip install psycopg2-binary, and PostgreSQL is tested")
    tools_at = tools[-1].parent
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are root's alone
        if as_user:
            shutil.chown(folder, "postgres")

        def run(tool: str, *given: str) -> None:
            subprocess.run([*as_user, str(tools_at / tool), *given], check=True, capture_output=True, cwd=folder, timeout=60)

        run("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "tuner", "--no-sync")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        run("pg_ctl", "-D", f"{folder}/data", "-l", f"{folder}/log", "-w", "-o", options, "start")
        try:
            yield f"postgresql+psycopg2://tuner:secret@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")


@pytest.mark.slow
def test_several_machines_work_on_one_study(postgres: str, tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        folder.mkdir()
    both = [start(folder, "--storage", postgres, workers=1, trials=6) for folder in (first, second)]
    outs = [search.communicate(timeout=300)[0] for search in both]
    assert [search.returncode for search in both] == [0, 0], outs
    studies = [json.loads((folder / "s" / "study.json").read_text()) for folder in (first, second)]
    most = max(len(study["trials"]) for study in studies)
    assert most == 6
    assert all(trials.read(folder / "s") for folder in (first, second)), "each has tried some"
    assert all("secret" not in (folder / "s" / "study.json").read_text() for folder in (first, second))
    assert studies[0]["study"] == studies[1]["study"] and studies[0]["trials"][0] == studies[1]["trials"][0]


@pytest.mark.slow
def test_a_trial_of_another_machine_that_shows_no_life_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(tmp_path / "s", trials=1)
    url, folder = f"sqlite:///{tmp_path}/s/study.db", tmp_path / "s"
    monkeypatch.setattr(storage, "HEARTBEAT", 1)
    monkeypatch.setattr(storage, "GRACE", 1)
    with storage.quiet():
        name = storage.names(url)[0]
        worker = Worker(Job(url, name, str(folder), 2, shared=True), Setup.of(storage.setup_in(url, name)))
        lost = worker.study.ask()
        lost.set_user_attr("place", "elsewhere:/s")
        worker.study._storage.record_heartbeat(lost._trial_id)
        assert not worker.once(), "as long as it may be alive, it is left alone"
        time.sleep(2.5)
        assert worker.once() and not worker.once()
        assert [r.number for r in storage.rows(worker.study)] == [0, 1]
