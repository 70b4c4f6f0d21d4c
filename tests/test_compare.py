"""`metaoptim compare`: the same episodes, equal budgets, interruptions, and what is refused or left out."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import warnings
from dataclasses import replace
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

import metaoptim as mo
from metaoptim.cli.main import main
from metaoptim.design import budget, compare, statistics, trials
from metaoptim.design.comparison import FILE, Comparison
from metaoptim.design.contenders import gather
from metaoptim.design.folder import RunFolder
from metaoptim.design.report import chapter
from metaoptim.engine import timed
from metaoptim.estimators import FiniteDifferences, Joint, LastSteps, Unroll, WarpObjective, pes
from metaoptim.recipes import recipe as config
from metaoptim.recipes.few_shot import FewShot
from metaoptim.report.html import few_shot
from metaoptim.runs import metrics
from metaoptim.training import TrainingError
from metaoptim.training.state import Training

TEXT = """
[algorithm]
name = "{algorithm}"
loss = "mse"
lr = {lr}
steps = {steps}
[model]
name = "mlp"
sizes = [1, 8, 1]
[tasks]
name = "sinusoid"
[train]
iterations = {iterations}
tasks_per_step = 2
validate_every = 2
validate_episodes = 2
checkpoint_every = 1
check = false
log_every = 1
[evaluate]
episodes = 40
baselines = []
[engine]
runtime = "eager"
batching = "loop"
"""
OPTIMIZER = """
[algorithm]
name = "learned_optimizer"
rule = {{name = "lstm"}}
estimator = {{name = "truncated", window = 2}}
[tasks]
name = "quadratics"
dim = 2
steps = 4
[train]
iterations = 2
problems_per_step = 2
lr = {lr}
validate_every = 0
check = false
[evaluate]
families = "own"
problems = 2
seeds = 1
step_sizes = 1
baselines = ["Adam"]
[engine]
runtime = "eager"
"""
TIMES = ("seconds", "elapsed", "seconds_per_step", "bytes", "training_seconds", "date", "command", "runs")


def tiny(name: str, algorithm: str = "maml", lr: float = 0.01, steps: int = 1, iterations: int = 4) -> str:
    """A recipe in the current folder."""
    Path(f"{name}.toml").write_text(TEXT.format(algorithm=algorithm, lr=lr, steps=steps, iterations=iterations))
    return f"{name}.toml"


def timeless(found: Any) -> Any:
    """Without what differs from one time to the next."""
    if isinstance(found, dict):
        return {key: timeless(x) for key, x in found.items() if key not in TIMES}
    return [timeless(x) for x in found] if isinstance(found, list) else found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A folder of its own; and pictures, which take long, in one test alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(statistics, "RESAMPLES", 299)
    monkeypatch.setattr(timed, "ENOUGH", 0.0)
    if "better" not in request.node.name:
        monkeypatch.setattr(Comparison, "draw", lambda self, path: None)


def test_a_better_method_is_found_and_one_against_itself_is_the_same() -> None:
    what = [tiny("still", lr=1e-6), tiny("moves", lr=0.05), tiny("again", lr=0.05)]
    Path("again.toml").write_text(Path("again.toml").read_text().replace("log_every = 1", "log_every = 2"))
    found = compare(what, seeds=[0, 1], out="out", progress=False)
    assert [row.name for row in found.rows][2] == "still" and {row.name for row in found.rows[:2]} == {"moves", "again"}
    same = next(p for p in found.pairs if "still" not in (p.first, p.second))
    assert same.difference == 0 and same.p == same.corrected == 1
    assert same.over_episodes == (0, 0) and same.over_seeds == (0, 0)
    better = found.against_best(found.rows[2])
    assert better is not None and better.difference > 0 and better.over_episodes and better.over_episodes.low > 0
    assert better.corrected < 0.05 and [row.rank for row in found.rows] == pytest.approx([1.7, 1.7, 2.6], abs=0.15)

    rows = {row.name: row for row in found.rows}
    data = json.loads(Path("out", FILE).read_text())
    stored = safetensors.torch.load_file("out/scores.safetensors")
    for method, row in zip(data["methods"], found.rows, strict=True):
        assert stored[row.name].shape == (2, 40) and method["by_seed"] == pytest.approx(stored[row.name].mean(1).tolist())
        assert method["mean"] == pytest.approx(stored[row.name].mean().item()) and config.parse(method["recipe"], "x")
        assert [len(curve) for curve in method["curves"]] == [2, 2] and method["curves"][0][-1]["step"] == 4
        assert method["cost"]["seconds_per_step"] > 0 and all(s > 0 for s in method["cost"]["training_seconds"])
    page = chapter(RunFolder(Path("out/runs/moves-s1")))
    assert "was not evaluated" not in str(page) and "that of the comparison which has trained this run" in str(page)
    result = json.loads(Path("out/judged/moves/result.json").read_text())
    assert few_shot.written("loss", result["mean"], result["interval"])[0] in str(page.sections[0])
    assert result["mean"] == pytest.approx(rows["moves"].mean)
    run = config.load("out/runs/moves-s1/recipe.toml").experiment()
    judged = run.evaluate([run.load("out/runs/moves-s1")], progress=False)
    assert judged.scores.tolist() == pytest.approx(stored["moves"][1].tolist())
    assert judged.facts["episodes_sha256"] == data["episodes_sha256"]
    assert Path("out/comparison.png").read_bytes().startswith(b"\x89PNG")
    told = str(found)
    assert "difference to" in told and "intervals over 2 seeds are too short" in told and "sign-flip" in told

    known = trials.read("out")
    assert sorted((t.recipe, t.seed) for t in known) == sorted((n, s) for n in ("again", "moves", "still") for s in (0, 1))
    assert {t.value for t in known if t.recipe == "moves"} == {x.mean().item() for x in stored["moves"]}
    assert known[0].tables == config.load("out/runs/still-s0/recipe.toml").content and known[0].source == "compare"


def stopping(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C while an outer step is taken, the one of that number over all trainings."""
    real, count = Training.advance, [0]

    def advance(self: Training, directory: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, directory)

    monkeypatch.setattr(Training, "advance", advance)


def test_what_was_interrupted_goes_on_with_the_same_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipes = [tiny("a", lr=0.01), tiny("b", lr=0.02)]
    assert main(["compare", *recipes, "--seeds", "0,1", "--out", "whole"]) == 0
    capfd.readouterr()
    command = ["compare", *recipes, "--seeds", "0,1", "--out", "stopped"]
    with monkeypatch.context() as patched:
        stopping(patched, at=6)
        assert main(command) == 130
    told = capfd.readouterr().err
    assert "stopped after step 2, saved in stopped/runs/b-s0" in told
    assert "To go on: metaoptim compare a.toml b.toml --seeds 0,1 --out stopped" in told
    with monkeypatch.context() as patched:
        patched.setattr(import_module("metaoptim.design.compare"), "side_by_side", interrupted)
        assert main(command) == 130
    with monkeypatch.context() as patched:
        patched.setattr(Training, "advance", interrupted)  # nothing is trained
        patched.setattr(FewShot, "evaluate", interrupted)  # nor judged again
        assert main(command) == 0
    whole, stopped = (json.loads(Path(folder, FILE).read_text()) for folder in ("whole", "stopped"))
    assert timeless(whole) == timeless(stopped) and stopped["command"].startswith("metaoptim compare a.toml")
    assert len(trials.read("stopped")) == 4, "no trial is told twice"


def interrupted(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_runs_and_recipes_are_compared_and_seeds_are_put_together(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        assert main(["train", tiny("ready", lr=0.03), "--set", f"train.seed={seed}", "--out", f"runs/ready-{seed}"]) == 0
    found = compare(["runs/ready-0", tiny("new"), "runs/ready-1"], out="out", progress=False)
    rows = {row.name: row for row in found.rows}
    assert rows["ready"].seeds == (0, 1) and rows["ready"].runs == ("runs/ready-0", "runs/ready-1")
    assert rows["ready"].over_seeds is not None and rows["new"].over_seeds is None and rows["new"].scores.shape == (1, 40)
    assert sorted(p.name for p in Path("out/runs").iterdir()) == ["new-s0"], "runs that are given stay where they are"
    Path("runs/ready-1/state.json").write_text('{"status": "interrupted"}')
    with pytest.warns(UserWarning, match="runs/ready-1 has not come to its end"):
        assert compare(["runs/ready-1", "new.toml"], out="out", progress=False)
    with pytest.raises(
        ValueError, match=r"ready is trained already, for 4 outer steps, and 2 steps would be 2; give an --amount of 4"
    ):
        compare(["runs/ready-0", "new.toml"], budget="steps", amount=2, progress=False)
    with pytest.raises(ValueError, match="ready is trained already, for as long as it took"):
        compare(["runs/ready-0", "new.toml"], budget="seconds", progress=False)


def test_a_run_stays_as_it_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, lr in (("ready", 0.01), ("new", 0.03)):
        config.load(tiny(name, lr=lr)).experiment().train(f"runs/{name}", progress=False)
    shutil.copytree("runs/ready", "copies/ready")
    for other, seeds, advice in (
        ("ready.toml", None, "by seeds."), ("ready.toml", [1], "(seeds 0, 1 join as one method where all of them are runs)."),
        ("copies/ready", None, "by seeds."),
    ):  # fmt: skip
        for what in (["runs/ready", other], [other, "runs/ready"]):
            with pytest.raises(ValueError, match="are the same but for name and seed, .*" + re.escape(advice)):
                gather(what, seeds, ())
    what, shorter = ["runs/ready", "new.toml"], ["train.iterations=2", "train.seed=3", "evaluate.episodes=20"]
    ready, new = gather(what, None, shorter)
    assert (ready.iterations, ready.seeds, new.iterations, new.seeds) == (4, (0,), 2, (3,))
    assert ready.recipe.tables["evaluate"]["episodes"] == 20
    monkeypatch.setattr(Training, "advance", interrupted)  # nothing is trained
    with pytest.raises(ValueError, match="ready is trained already, for 4 outer steps, and 2 steps would be 2"):
        compare(what, budget="steps", amount=2, settings=shorter, progress=False)
    with pytest.raises(ValueError, match=r"^--set algorithm.lr=0.2 can't alter runs/ready, .*rule.lr is 0.01 in the run"):
        compare(what, settings=["evaluate.episodes=20", "algorithm.lr=0.2"], progress=False)
    with pytest.raises(ValueError, match=r"--set train\.iterations=2 says how to train, but all that is given is trained"):
        gather(["runs/ready", "runs/new"], None, shorter)


def test_methods_of_one_name_are_told_apart() -> None:
    tiny("a"), tiny("b", lr=0.02)
    for name in ("a", "b"):
        Path(f"{name}.toml").write_text('name = "maml"\n' + Path(f"{name}.toml").read_text())
    assert [one.name for one in gather(["a.toml", "b.toml"], None, ())] == ["maml (lr=0.01)", "maml (lr=0.02)"]
    Path("sub").mkdir()
    others = {"lr = 0.01": "lr = 0.02", "steps = 1": "steps = 2", "log_every = 1": "log_every = 2"}
    Path("sub/a.toml").write_text(reduce(lambda text, pair: text.replace(*pair), others.items(), Path("a.toml").read_text()))
    assert [one.name for one in gather(["a.toml", "sub/a.toml"], None, ())] == ["maml (a)", "maml (a) #2"]


def iterations(found: Comparison) -> dict[str, int]:
    for row in found.rows:
        assert f"iterations = {row.iterations}\n" in (Path(row.runs[0]) / "recipe.toml").read_text()
    return {row.name: row.iterations for row in found.rows}


def test_budgets_are_made_equal_in_steps_in_gradients_and_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    what = [tiny("one", steps=1, iterations=6), tiny("three", steps=3, iterations=4)]
    assert iterations(compare(what, out="own", progress=False)) == {"one": 6, "three": 4}
    assert iterations(compare(what, budget="steps", out="least", progress=False)) == {"one": 4, "three": 4}
    found = compare(what, budget="gradients", out="gradients", progress=False)
    assert iterations(found) == {"one": 6, "three": 3} and {row.cost.gradients for row in found.rows} == {24}
    assert found.facts["budget"] == {"kind": "gradients", "amount": 24} and "the same gradients, 24" in str(found)

    paces = iter([budget.Pace(0.25, None), budget.Pace(0.5, None)])
    monkeypatch.setattr(budget, "pace", lambda recipe: next(paces))
    for _ in range(2):  # the second time, the paces are those that were kept
        found = compare(what, budget="seconds", amount=1, out="seconds", progress=False)
        assert iterations(found) == {"one": 4, "three": 2}
    took = zip(found.rows, [(1.1,), (0.5, 1.0)], strict=True)
    rows = tuple(replace(row, cost=replace(row.cost, training_seconds=seconds)) for row, seconds in took)
    told = replace(found, rows=rows, facts={**found.facts, "tasks": 8})
    assert told.caveats["cost"] == f"seconds were estimated, and missed by more than a fifth: {rows[1].name} took 0.8 s"
    assert all(sentence in " ".join(str(told).split()) for sentence in told.caveats.values())
    assert str(told).count("not over tasks") == 2 and "not over tasks" not in str(found) and found.facts["tasks"] is None
    assert told.json()["caveats"]["episodes"].startswith("intervals are over episodes of 8 tasks, not over tasks: they")
    with pytest.raises(ValueError, match=r"paces\.json is damaged; remove it"):
        Path("cut").mkdir()
        Path("cut/paces.json").write_text("{")
        compare(what, budget="seconds", amount=1, out="cut", progress=False)
    with pytest.raises(ValueError, match=r"the run in .*one-s0 was started for 4 outer steps, and would have 8 now; give the"):
        compare(what, budget="seconds", amount=2, out="seconds", progress=False)


def test_a_pace_is_measured_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    found = budget.pace(config.load(tiny("one")))
    assert 0 < found.seconds < 60 and found.choice is None
    stopping(monkeypatch, at=2)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped while measuring how long an outer step of one takes$"):
        budget.pace(config.load("one.toml"))
    assert budget.by_name("vmap graph trace") == {"choice": None, "batching": "vmap", "memory": "graph", "runtime": "trace"}


def composed(estimator: Any, steps: int = 4, **options: Any) -> mo.MetaOptimizer:
    return mo.compose(mo.nn.mlp((1, 2, 1)), mo.losses.mse, rule=mo.rules.SGD(0.1), steps=steps, estimator=estimator, **options)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (lambda: mo.maml(mo.nn.mlp((1, 2, 1)), mo.losses.mse, steps=4), 5),
        (lambda: mo.reptile(mo.nn.mlp((1, 2, 1)), mo.losses.mse, steps=4), 4),
        (lambda: mo.r2d2(mo.nn.mlp((1, 2, 1)), mo.losses.mse), 1),
        (lambda: composed(Unroll(objective=mo.objectives.trajectory_mean)), 8),
        (lambda: composed(LastSteps(2), learns="head", adapts="body"), 5),
        (lambda: composed(WarpObjective()), 8),
        (lambda: composed(Joint()), 1),
        (lambda: composed(pes(window=2, sigma=0.1, pairs=3)), 2 * 3 * (2 + 2)),
        (lambda: composed(FiniteDifferences()), 2 * 7 * 5),
    ],
)
def test_gradients_are_counted(method: Any, expected: int) -> None:
    assert budget.gradients(method()) == expected


def test_gradients_are_as_many_as_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    method, counted = mo.maml(mo.nn.mlp((1, 2, 1)), mo.losses.mse, steps=3), []
    real = type(method.learner).loss
    monkeypatch.setattr(type(method.learner), "loss", lambda *args: counted.append("judged") or real(*args))
    inner = type(method.learner).inner
    monkeypatch.setattr(type(method.learner), "inner", lambda *args: counted.append("inner") or inner(*args))
    batch = mo.tasks.sinusoid().sample("train", seed=0, start=0, count=1)
    mo.Engine(method, "loop", "graph", "eager")(method.phi, batch)
    assert len(counted) >= budget.gradients(method) == 4
    assert len(set(counted)) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"amount": 3}, "amount=3 of what"),
        ({"budget": "epochs"}, "budget='epochs' is unknown: choose steps, gradients or seconds"),
        ({"budget": "steps", "amount": 2.5}, "a budget of steps is a whole number"),
        ({"budget": "steps", "amount": -1}, "amount=-1"),
        ({"seeds": [-1]}, "The seed is -1"),
        ({"seeds": [3, 3]}, "seeds=3, 3: each counts once"),
    ],
)
def test_budgets_that_cannot_be_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        compare([tiny("a"), tiny("b", lr=0.1)], progress=False, **options)


def test_what_cannot_be_compared_is_refused_before_anything_is_trained() -> None:
    Path("learned.toml").write_text(OPTIMIZER.format(lr=0.01))
    Path("more.toml").write_text(Path(tiny("a")).read_text().replace('"sinusoid"', '"sinusoid"\nshots = 3'))
    Path("own.py").write_text("def l1(output, target):\n    return (output - target).abs().mean()\n")
    Path("robust.toml").write_text(Path("a.toml").read_text().replace('"mse"', '"own.py:l1"'))
    Path("same.toml").write_text('name = "another"\n' + Path("a.toml").read_text())
    Path("empty").mkdir()
    for others, sentence in {
        ("a.toml", "more.toml"): r"a and more are judged on different episodes .* \(they differ in tasks.shots\)",
        ("a.toml", "robust.toml"): r"or by different losses \(they differ in algorithm.loss\)",
        ("a.toml", "learned.toml"): "one adapts a model to a few examples, the other is a learned optimizer",
        ("a.toml",): "nothing to compare a with; give two methods or more",
        ("a.toml", "a.toml"): "a.toml is given twice, so that there is nothing to compare",
        ("a.toml", "same.toml"): "a.toml and same.toml are the same but for name and seed",
        ("a.toml", "empty"): "there is no empty/recipe.toml",
        ("a.toml", "glyphs-mmal"): "unknown recipe `glyphs-mmal`; did you mean `glyphs-maml`",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            compare(others, progress=False)
    assert not Path("comparisons").exists()
    with pytest.raises(ValueError, match=r"compare takes several methods; found 'a\.toml'"):
        compare("a.toml")


def test_a_method_that_fails_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    what = [tiny("a"), tiny("b", lr=0.02), tiny("wild", lr=1e30, steps=3)]
    with pytest.warns(UserWarning, match=r"wild is left out .* seed 0 failed: step 1: the loss of task 0 .* is not finite"):
        found = compare(what, out="out", progress=False)
    assert {row.name for row in found.rows} == {"a", "b"} and "not finite" in found.facts["left_out"]["wild"]
    assert all(np.isfinite(row.scores).all() for row in found.rows)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["compare", "a.toml", "wild.toml", "--out", "two"]) == 1
    assert "fewer than two methods came through" in capfd.readouterr().err


def test_scores_that_are_not_finite_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = FewShot.evaluate

    def spoilt(self: FewShot, runs: Any, *, progress: bool = True) -> Any:
        found = real(self, runs, progress=progress)
        if self.recipe.name == "far":
            found.rows[0].runs[0]["loss"][:3] = float("nan")
        return found

    monkeypatch.setattr(FewShot, "evaluate", spoilt)
    with (
        pytest.warns(UserWarning, match="far is left out of the comparison: of 40 episodes, 3 have scores that are not finite"),
        pytest.raises(TrainingError, match="fewer than two methods"),
    ):
        compare([tiny("far"), tiny("still", lr=1e-6)], out="out", progress=False)
    assert [t.value is None for t in trials.read("out")] == [True, False]
    assert all(t.interval is not None for t in trials.read("out") if t.finite)


def test_learned_optimizers_are_compared_on_the_same_problems() -> None:
    for name, lr in (("slow", 1e-4), ("fast", 1e-2)):
        Path(f"{name}.toml").write_text(OPTIMIZER.format(lr=lr))
    found = compare(["slow.toml", "fast.toml"], seeds=[0, 1], budget="gradients", out="out", progress=False)
    assert found.metric == "loss" and {row.scores.shape for row in found.rows} == {(2, 2)}
    assert {row.cost.gradients for row in found.rows} == {2 * 2 * (2 + 2)}
    assert list(found.baselines) == ["Adam"], "the same problems, tuned in the same way, give the same number once"
    assert [t.split for t in trials.read("out")] == ["test"] * 4


def test_what_training_took_is_known_through_its_resumptions(tmp_path: Path) -> None:
    lines = [{"step": 1, "seconds": 2.0}, {"step": 5, "seconds": 4.0, "val_loss": 0.5}, {"step": 10, "seconds": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"cut')
    assert metrics.pace(tmp_path) == 3 and metrics.elapsed(tmp_path) == 30
    assert metrics.validations(tmp_path) == [{"step": 5, "seconds": 15.0, "loss": 0.5}]
    assert metrics.read(tmp_path / "nowhere") == [] and metrics.elapsed(tmp_path / "nowhere") == 0
    run = config.load(tiny("one")).experiment()
    run.train("run", progress=False)
    before = metrics.elapsed(Path("run"))
    longer = config.load("one.toml", ["train.iterations=6"]).experiment()
    longer.train("run", resume=True, progress=False)
    after = [line["elapsed"] for line in metrics.read(Path("run"))]
    assert after == sorted(after) and after[3] == before < after[4]
