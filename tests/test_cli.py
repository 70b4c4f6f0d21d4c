"""The command line: what it prints, its exit codes, and one sentence instead of a traceback."""

from __future__ import annotations

import errno
import functools
import importlib
import inspect
import json
import logging
import os
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import metaoptim as mo
from metaoptim import training
from metaoptim.algorithms import ALGORITHMS
from metaoptim.cli.main import main
from metaoptim.core import callers
from metaoptim.nn import MODELS
from metaoptim.recipes import recipe as config
from metaoptim.runs.checkpoint import BEST, LAST, PREVIOUS
from metaoptim.runs.store import load_checkpoint
from metaoptim.tasks import TASKS

TINY = """
description = "a tiny one"
[algorithm]
name = "maml"
loss = "mse"
lr = 0.01
[model]
name = "mlp"
sizes = [1, 8, 1]
[tasks]
name = "sinusoid"
[train]
iterations = 3
tasks_per_step = 2
validate_episodes = 4
[evaluate]
episodes = 8
[engine]
batching = "loop"
memory = "graph"
runtime = "eager"
"""

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command line in an empty folder with tiny.toml; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAOPTIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("METAOPTIM_DEBUG", raising=False)
    monkeypatch.setenv("METAOPTIM_DATA", "")  # set first, so that what a command sets is undone as well
    monkeypatch.delenv("METAOPTIM_DATA")
    (tmp_path / "tiny.toml").write_text(TINY)

    def run(*args: str) -> tuple[int, str, str]:
        code = main(args)
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err
        return code, out, err

    return run


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_help_imports_nothing_heavy_and_is_plain_without_a_terminal() -> None:
    code = """
import sys
from metaoptim.cli.main import main
heavy = {"pydantic", "rich.console"} & set(sys.modules)
codes = [main(a) for a in ([], ["--help"], ["--version"], ["train", "--help"], ["evaluate", "--help"], ["trian"])]
heavy |= {"torch", "numpy", "matplotlib", "tensorboard", "rich.console"} & set(sys.modules)
print("codes", codes, "heavy", heavy)
"""
    said = python(code, GITHUB_ACTIONS="1", FORCE_COLOR="1", TERM="xterm-256color")
    assert "codes [0, 0, 0, 0, 0, 2] heavy set()" in said
    assert "\x1b" not in said
    for word in ("Exit codes:", "130 interrupted", "--set", "--resume", "--normalisation"):
        assert word in said


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "metaoptim", "trian"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: No such command 'trian'. Did you mean 'train'?")


def test_list_names_everything(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, _ = cli("list")
    assert code == 0
    for name in (*ALGORITHMS, *TASKS, *MODELS, *config.names()):
        assert f"  {name} " in out


def test_list_of_one_kind_is_one_line_each(cli: Cli) -> None:
    code, out, _ = cli("list", "algorithms")
    assert code == 0 and "omniglot-maml" not in out
    rows = [line for line in out.splitlines() if line.startswith("  ") and line.strip()]
    assert [row.split()[0] for row in rows] == [*ALGORITHMS, "compose", "learned_optimizer"] and all(
        len(row) <= 120 for row in rows
    )


def test_list_shows_what_a_recipe_was_measured_to_reach() -> None:
    from metaoptim.cli.show import measured

    assert measured({"metric": "accuracy", "value": 0.95, "interval": 0.01}) == "accuracy 0.95 ± 0.01"
    assert measured({"metric": "mse", "value": 0.4, "interval": [0.3, 0.5]}) == "mse 0.4 [0.3, 0.5]"
    assert measured({"value": 0.4}) == "0.4"
    assert measured({"note": "not measured yet"}) == ""


@pytest.mark.parametrize("name", ALGORITHMS)
def test_show_explains_every_algorithm(cli: Cli, name: str) -> None:
    code, out, _ = cli("show", name)
    assert code == 0
    build = ALGORITHMS[name]
    head = inspect.getmodule(build).__doc__ or ""
    equations = [line for line in head.splitlines() if line.startswith("    ")]
    assert equations and all(line.rstrip() in out for line in equations)
    assert "https://" in out and "Deviations:" in out
    for option in inspect.signature(build).parameters.values():
        if option.kind is option.KEYWORD_ONLY:
            line = next(line for line in out.splitlines() if line.startswith(f"  {option.name} "))
            assert ('"none"' if option.default is None else json.dumps(option.default)) in line
    assert ("inner steps K in" in out) == ("steps" in inspect.signature(build).parameters)


def test_show_explains_tasks_models_and_recipes(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, words in {
        "sinusoid": ("(tasks)", "4.25", "phase", '"pi" or "2pi"'),
        "omniglot": ("(tasks)", "vinyals", "rotations"),
        "conv4": ("(model)", "(required)", "filters", "64"),
        "mlp": ("(model)", "[1, 40, 40, 1]"),
    }.items():
        code, out, _ = cli("show", name)
        assert code == 0
        for word in words:
            assert word in out
    monkeypatch.setattr(config, "_shipped", lambda: {"tiny": tmp_path / "tiny.toml"})
    for command in (("list",), ("show", "tiny")):
        code, out, _ = cli(*command)
        assert code == 0 and "a tiny one" in out
    assert "sizes = [" in out and "metaoptim train tiny" in out


def test_train_then_evaluate_then_resume(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("train", "tiny.toml", "--set", "algorithm.steps=2")
    assert code == 0, err
    run = tmp_path / "runs" / "tiny"
    assert "runs/tiny" in out and "metaoptim evaluate runs/tiny" in out
    stored = config.load(run / "recipe.toml")
    assert stored == config.load("tiny.toml", ["algorithm.steps=2"])

    code, out, err = cli("evaluate", "runs/tiny", "--steps", "3", "--checkpoint", "last")
    assert code == 0, err
    assert out.strip()
    result = json.loads((run / "result.json").read_text())
    assert result

    code, _, err = cli("train", "tiny.toml", "--set", "algorithm.steps=2")
    assert code == 2 and "resume" in err
    code, _, err = cli("train", "tiny.toml", "--resume")
    assert code == 2 and "algorithm.steps" in err and "--out" in err
    code, _, err = cli("train", "tiny.toml", "--set", "algorithm.steps=2", "--resume")
    assert code == 0, err


OWN = """
from dataclasses import dataclass

import torch
from torch import nn

import metaoptim as mo

class Net(nn.Module):
    def __init__(self, width=4, depth: int = 1):
        nn.Module.__init__(self)
        self.width = width
        self.layers = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x):
        return self.layers(x)

def lines(shots: int = 5):
    def sample(generator, split):
        slope, x = torch.randn(1, generator=generator), torch.rand(2 * shots, 1, generator=generator)
        return (x[:shots], slope * x[:shots]), (x[shots:], slope * x[shots:])
    return mo.tasks.from_function(sample, name="lines")

class NotOne:
    pass

@dataclass(frozen=True)
class HeavyBall:
    lr: float
    keep: float = 0.5

    def start(self, weights, generator):
        return {f"lr.{n}": w.new_tensor(self.lr) for n, w in weights.items()}

    def init(self, psi, weights):
        return {n: w.new_zeros(w.shape) for n, w in weights.items()}

    def update(self, psi, grads, state, weights, step):
        speed = {n: self.keep * state[n] + g for n, g in grads.items()}
        return {n: -psi[f"lr.{n}"] * v for n, v in speed.items()}, speed
"""


@pytest.fixture
def own(cli: Cli, tmp_path: Path) -> str:
    """The name of a file of the user's own, in the current folder, without .py."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    return name


def test_a_recipe_names_code_of_ones_own(cli: Cli, own: str, tmp_path: Path) -> None:
    for name, value in (("mlp", f"{own}.py:Net"), ("sinusoid", f"{own}.py:lines")):
        text = (tmp_path / "tiny.toml").read_text().replace(f'"{name}"', f'"{value}"')
        (tmp_path / "tiny.toml").write_text(text.replace("sizes = [1, 8, 1]", "width = 7"))
    code, _, err = cli("train", "tiny.toml", "--out", "run", "--set", "tasks.shots=3")
    assert code == 0, err
    code, out, err = cli("evaluate", "run")
    assert code == 0 and "lines, split test" in out, err
    identity = load_checkpoint("run").state["identity"]
    assert "Linear(in_features=1, out_features=7, bias=True)" in identity["method"]["learner"]["model"]["net"].values()
    for setting, words in {
        "model.widht=3": "unknown key `widht` in [model]; did you mean `width`?",
        "model.depth=x": 'found the text "x", expected a whole number',
        f"model.name={own}.py:Nett": f"there is no `Nett` in {own}; did you mean `Net`?",
        f"tasks.name={own}.py:NotOne": "it gave NotOne; expected a task family",
        "model.name=nowhere.py:Net": "there is no module nowhere in this folder",
    }.items():
        code, _, err = cli("train", "tiny.toml", "--set", setting)
        assert code == 2 and words in err and err.count("\n") == 1, err


def test_a_recipe_names_a_rule_of_ones_own(cli: Cli, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("project").mkdir()
    Path(f"{own}.py").rename(f"project/{own}.py")
    rule = f'rule = [{{name = "clip", norm = 1.0}}, {{name = "{own}.py:HeavyBall", lr = 0.02}}]\nsteps = 2'
    recipe = TINY.replace('name = "maml"', f'name = "compose"\n{rule}').replace("lr = 0.01\n", "")
    Path("project/own.toml").write_text(recipe)
    code, _, err = cli("train", "project/own.toml", "--out", "run")
    assert code == 0, err
    made, _ = config.load("run/recipe.toml").build()
    assert [float(size) for size in made.phi.rule.values()] == pytest.approx(4 * [0.02])
    assert tomllib.loads(Path("run/recipe.toml").read_text())["algorithm"]["rule"][1]["keep"] == 0.5
    monkeypatch.chdir("project")
    assert cli("train", "own.toml", "--out", "../run", "--resume")[0] == 0
    assert cli("evaluate", "../run", "--episodes", "4")[0] == 0
    for wrong, words in {
        'name = "X.py:HeavyBal", lr = 1.0': "there is no `HeavyBal` in X; did you mean `HeavyBall`?",
        'name = "X.py:HeavyBall", lr = 1.0, kep = 0.1': "unknown key `kep` in [algorithm.rule]; did you mean `keep`?",
        'name = "X.py:HeavyBall"': "missing key `lr` in [algorithm.rule]",
        'name = "X.py:NotOne"': "it gave NotOne; expected a rule, with start, init and update",
    }.items():
        code, _, err = cli("train", "own.toml", "--set", f"algorithm.rule={{{wrong.replace('X.py', f'{own}.py')}}}")
        assert code == 2 and words.replace(" X;", f" {own};") in err and err.count("\n") == 1, err
    code, _, err = cli("train", "own.toml", "--set", f"algorithm.estimator={own}.py:NotOne")
    assert code == 2 and "it gave NotOne; expected an estimator" in err, err


def test_code_takes_the_place_of_a_model_and_of_its_options(cli: Cli, own: str) -> None:
    for recipe in ("tiny.toml", "sinusoid-maml"):
        with pytest.warns(
            UserWarning, match=rf"^\[model\]: {own}\.py:Net takes the place of mlp, so that .*sizes.* left out\.$"
        ):
            loaded = config.load(recipe, [f"model.name={own}.py:Net", "model.width=7"])
        assert loaded.tables["model"] == {"name": f"{own}.py:Net", "width": 7, "depth": 1}
    code, _, err = cli("train", "tiny.toml", "--set", f"model.name={own}.py:Net", "--set", "model.sizes=[1, 1]", "--out", "run")
    assert code == 2 and "unknown key `sizes` in [model]" in err  # one that was asked for beside it
    for kind in ("model", "tasks"):
        code, _, err = cli("train", "tiny.toml", "--set", f"{kind}.name={own}.py")
        assert code == 2 and f"`name` in [{kind}]: {own}.py is a file alone; expected FILE.py:NAME" in err, err


def test_a_loss_of_ones_own(cli: Cli, own: str) -> None:
    Path(f"{own}_losses.py").write_text(
        "def near(output, target):\n    return (output - target).abs().mean()\n\n\nnumber = 3\n"
    )
    text = Path("tiny.toml").read_text()
    Path("own.toml").write_text(text.replace('loss = "mse"', f'loss = "{own}_losses.py:near"'))
    status, _, err = cli("train", "own.toml", "--out", "run")
    assert status == 0, err
    assert cli("evaluate", "run")[0] == 0
    told = json.loads(Path("run/result.json").read_text())
    assert cli("train", "tiny.toml", "--out", "squared")[0] == 0 and cli("evaluate", "squared")[0] == 0
    assert told["mean"] != json.loads(Path("squared/result.json").read_text())["mean"]
    loss = importlib.import_module(f"{own}_losses").near
    method = mo.maml(mo.nn.mlp([1, 8, 1]), loss, lr=0.01)
    mo.train(method, mo.tasks.sinusoid(), iterations=2, tasks_per_step=2, validate_every=0, progress=False, out="started")
    assert tomllib.loads(Path("started/recipe.toml").read_text())["algorithm"]["loss"] == f"{own}_losses.py:near"
    assert cli("evaluate", "started", "--episodes", "4")[0] == 0
    for value, words in {
        f"{own}_losses.py:nea": "did you mean `near`?",
        f"{own}_losses.py:number": "it is int; expected a function of (output, target)",
        "mes": 'expected "cross_entropy" or "mse" or FILE.py:NAME; did you mean `mse`?',
    }.items():
        status, _, err = cli("train", "tiny.toml", "--set", f"algorithm.loss={value}")
        assert status == 2 and words in err and err.count("\n") == 1, err


def test_code_is_found_beside_the_recipe_and_where_a_run_was_started(
    cli: Cli, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("project", "elsewhere"):
        Path(name).mkdir()
    Path(f"{own}.py").rename(f"project/{own}.py")
    text = TINY.replace('"mlp"', f'"{own}.py:Net"').replace("sizes = [1, 8, 1]", "width = 7")
    Path("project/own.toml").write_text(text.replace('"sinusoid"', f'"{own}.py:lines"'))
    code, _, err = cli("train", "project/own.toml", "--out", "run")
    assert code == 0, err
    names = [tomllib.loads(Path("run/recipe.toml").read_text())[kind]["name"] for kind in ("model", "tasks")]
    assert names == [f"{(tmp_path / 'project' / own).as_posix()}.py:{name}" for name in ("Net", "lines")]
    place = tmp_path / "tuned" / "own"
    place.mkdir(parents=True)
    (place / "recipe.toml").write_text(config.load("project/own.toml").lying_in(place).text())
    monkeypatch.chdir("project")  # where the same files have another name
    assert cli("train", "own.toml", "--out", "../run", "--resume")[0] == 0
    assert cli("train", "own.toml", "--out", "../started")[0] == 0
    assert tomllib.loads(Path("../started/recipe.toml").read_text())["model"]["name"] == f"{own}.py:Net"
    monkeypatch.chdir("../elsewhere")
    assert cli("evaluate", "../started", "--episodes", "4")[0] == 0
    tables = tomllib.loads((place / "recipe.toml").read_text())
    assert [tables[kind]["name"] for kind in ("model", "tasks")] == [
        f"../../project/{own}.py:{name}" for name in ("Net", "lines")
    ]
    assert config.load(place / "recipe.toml").build()
    Path(f"../started/planted_{own}.py").write_text(OWN)  # a run's own folder may be somebody else's
    code, _, err = cli("evaluate", "../started", "--set", f"model.name=planted_{own}.py:Net")
    assert code == 2 and f"there is no module planted_{own} in this folder or the recipe's" in err


def test_the_untrained_row_of_a_run_from_python_is_its_own_start(cli: Cli) -> None:
    torch.manual_seed(123)  # which no recipe knows
    method = mo.maml(mo.nn.mlp([1, 8, 1]), mo.losses.mse, lr=0.01)
    options: dict[str, Any] = {"iterations": 2, "tasks_per_step": 2, "validate_every": 0, "progress": False}
    run = mo.train(method, mo.tasks.sinusoid(), **options, out="run", engine={"runtime": "eager"})
    assert all(torch.equal(p, method.phi.weights[n]) for n, p in run.method.phi.weights.items())
    assert cli("evaluate", "run", "--episodes", "6")[0] == 0
    told = {row["name"]: row["loss"]["mean"] for row in json.loads(Path("run/result.json").read_text())["rows"]}
    start = mo.evaluate(mo.Run(method, method.phi), mo.tasks.sinusoid(), episodes=6, progress=False, baselines=())
    assert told["untrained"] == pytest.approx(start.rows[0].mean("loss"), rel=1e-4)
    torch.manual_seed(5)
    other = mo.maml(mo.nn.mlp([1, 8, 1]), mo.losses.mse, lr=0.01)
    assert all(torch.equal(p, method.phi.weights[n]) for n, p in mo.load("run", other).method.phi.weights.items())
    Path("run/start.safetensors").write_bytes(b"cut")
    with pytest.warns(UserWarning, match=r"start\.safetensors is cut or altered: φ before training is taken from the method"):
        assert mo.load("run", other).method is other


def test_a_run_from_python_is_judged_where_its_code_can_be_named(
    cli: Cli, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(own)
    options: dict[str, Any] = {"iterations": 2, "tasks_per_step": 2, "validate_every": 0, "progress": False, "check": False}
    options["engine"] = {"batching": "loop", "memory": "graph", "runtime": "eager"}
    method = mo.meta_sgd(module.Net(6), mo.losses.mse, low=0.01, high=0.02, steps=2)
    mo.train(method, module.lines(), **options, out="named", recipe={"tasks": {"name": f"{own}.py:lines"}}, lr=0.1)
    recipe = tomllib.loads(Path("named/recipe.toml").read_text())
    assert recipe["algorithm"] | {"low": 0.01, "high": 0.02, "steps": 2, "loss": "mse"} == recipe["algorithm"]
    assert recipe["model"] == {"name": f"{own}.py:Net", "width": 6} and recipe["train"]["lr"] == 0.1
    assert recipe["described"]["method"]["learner"]["rule"]["high"] == 0.02
    code, out, err = cli("evaluate", "named", "--episodes", "5")
    assert code == 0 and "meta_sgd" in out, err

    mo.train(mo.maml(mo.nn.mlp([1, 8, 1]), mo.losses.mse), mo.tasks.sinusoid(), **options, out="ours")
    code, out, err = cli("evaluate", "ours", "--episodes", "5")
    assert code == 0 and "maml" in out, err

    net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    plain = mo.reptile(net, mo.losses.mse, inner="sgd", steps=3)
    mo.train(plain, mo.tasks.sinusoid(shots=4), **options, out="unnamed")
    recipe = tomllib.loads(Path("unnamed/recipe.toml").read_text())
    assert recipe["algorithm"]["inner"] == "sgd" and recipe["tasks"]["shots"] == 4 and recipe["model"] == {}
    code, _, err = cli("evaluate", "unnamed")
    assert code == 2 and "missing key `name` in [model]" in err and "FILE.py:NAME" in err
    code, out, err = cli("evaluate", "unnamed", "--set", "model.name=mlp", "--set", "model.sizes=[1, 8, 1]", "--episodes", "5")
    assert code == 0 and "reptile" in out, err
    code, _, err = cli("evaluate", "unnamed", "--set", "model.name=mlp", "--set", "model.sizes=[1, 9, 1]")
    assert code == 2 and "out_features=8" in err and "out_features=9" in err

    rule = mo.compose(mo.nn.mlp([1, 8, 1]), mo.losses.mse, rule=mo.rules.Momentum(0.3), name="mine")
    mo.train(rule, mo.tasks.sinusoid(), **options, out="composed")
    recipe = tomllib.loads(Path("composed/recipe.toml").read_text())
    assert recipe["algorithm"] == {} and recipe["described"]["method"]["learner"]["rule"]["lr"] == 0.3


def test_runs_that_are_judged_together_are_seeds_of_one_recipe(cli: Cli) -> None:
    for name, setting in {"a": "train.seed=0", "b": "train.seed=1", "c": "algorithm.lr=0.02"}.items():
        code, _, err = cli("train", "tiny.toml", "--set", setting, "--out", name)
        assert code == 0, err
    code, _, err = cli("evaluate", "a", "b")
    assert code == 0, err
    code, _, err = cli("evaluate", "a", "c")
    assert code == 2 and "a and c differ in algorithm.lr" in err


BAD = [
    (["trian"], ["No such command 'trian'", "'train'"]),
    (["--versoin"], ["--versoin", "--version"]),
    (["train"], ["Missing argument", "RECIPE"]),
    (["train", "tiny.toml", "more"], ["unexpected extra argument", "more"]),
    (["train", "tiny.toml", "--ste", "algorithm.steps=5"], ["--ste", "--set"]),
    (["train", "tiny.toml", "--set"], ["--set", "requires an argument"]),
    (["train", "tiny.toml", "--set", "algorithm.stpes=5"], ["tiny.toml: unknown key `stpes`", "`steps`"]),
    (["train", "tiny.toml", "--set", "algorithm.steps=x"], ['found the text "x", expected a whole number']),
    (["train", "tiny.toml", "--set", "algorithm.steps"], ["TABLE.KEY=VALUE"]),
    (["train", "tiny.toml", "--set", "agorithm.steps=5"], ["unknown table `agorithm`", "`algorithm`"]),
    (["train", "tiny.toml", "--set", "algorithm.name=mmal"], ["unknown algorithm `mmal`", "`maml`"]),
    (["train", "tiny.toml", "--set", "train.iterations=0"], ["iterations=0", "at least 1"]),
    (["train", "tiny.toml", "--set", "train.optimizer=Adamm"], ["Adamm", "torch.optim"]),
    (["train", "tiny.toml", "--set", "train.lr=-1"], ["-1", "positive"]),
    (["train", "tiny.toml", "--set", "model.sizes=[1]"], ["sizes=[1]"]),
    (["train", "tiny.toml", "--set", "tasks.shots=0"], ["shots"]),
    (["train", "tiny.toml", "--set", "tasks.grid=3"], ["grid of 3"]),
    (["train", "tiny.toml", "--set", "engine.batching=vmpa"], ["vmpa", "vmap"]),
    (["train", "tiny.toml", "--set", "model.sizes=[1, 8, 2]"], ["mse", "(10, 2)", "(10, 1)"]),
    (["train", "tiny.toml", "--data", "nowhere"], ["--data", "nowhere", "does not exist"]),
    (["train", "tiny.toml", "--data", "tiny.toml"], ["--data", "tiny.toml"]),
    (["train", "tiny.toml", "--out", "tiny.toml"], ["tiny.toml"]),
    (["train", "tiny.toml", "--out", "empty", "--resume"], ["empty", "run"]),
    (["train", "none.toml"], ["there is no file none.toml"]),
    (["train", "empty"], ["empty is a folder"]),
    (["train", "tyni"], ["unknown recipe `tyni`; `metaoptim list recipes` lists those that there are."]),
    (["train", ""], ["is a folder"]),
    (["train", "broken.toml"], ["broken.toml: not valid TOML", "line 1"]),
    (["show"], ["Missing argument", "NAME"]),
    (["show", ""], ["unknown name ``", "`metaoptim list` lists those"]),
    (["show", "mamml"], ["unknown name `mamml`", "`maml`"]),
    (["show", "conv"], ["unknown name `conv`", "`conv4`"]),
    (["list", "maml"], ["unknown kind `maml`", "recipes, algorithms, tasks, models"]),
    (["list", "algorithm"], ["did you mean `algorithms`?"]),
    (["evaluate"], ["Missing argument", "RUN"]),
    (["evaluate", "nowhere"], ["nowhere/recipe.toml", "metaoptim train"]),
    (["evaluate", "empty"], ["empty/recipe.toml"]),
    (["evaluate", "python"], ["python/recipe.toml", "started from Python"]),
    (["evaluate", "new"], ["new", "checkpoint"]),
    (["evaluate", "new", "--episodes", "many"], ["--episodes", "valid integer"]),
    (["evaluate", "new", "--checkpoint", "bset"], ["--checkpoint", "bset", "best"]),
    (["evaluate", "new", "--normalisation", "frozn"], ["`frozen`"]),
    (["evaluate", "new", "--step", "3"], ["--step", "--steps"]),
]


@pytest.mark.parametrize(("args", "words"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_wrong_input_is_one_sentence_and_exit_code_2(cli: Cli, tmp_path: Path, args: list[str], words: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "recipe.toml").write_text(config.load(tmp_path / "tiny.toml").text())
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "recipe.toml").write_text("# started from Python\n")
    (tmp_path / "broken.toml").write_text("[algorithm\n")
    code, out, err = cli(*args)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_loss_that_is_not_finite_is_exit_code_1(cli: Cli) -> None:
    code, out, err = cli("train", "tiny.toml", "--set", "algorithm.lr=1e30")
    assert (code, out) == (1, "")
    assert "error: step 1: " in err and "not finite" in err and "Traceback" not in err


def raising(error: BaseException, like: Callable[..., Any]) -> Callable[..., Any]:
    """A function that raises, with the signature of another: recipes are checked by signatures."""

    @functools.wraps(like)
    def raises(*args: Any, **kwargs: Any) -> Any:
        raise error

    return raises


def test_an_interruption_says_how_to_go_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", "tiny.toml", "--set", "algorithm.lr=0.5", "--out", "a b"]
    again = "metaoptim train tiny.toml --set algorithm.lr=0.5 --out 'a b' --resume"

    def interrupted(stop: BaseException | None = None) -> str:
        with monkeypatch.context() as patch:
            stop = stop or KeyboardInterrupt()
            patch.setattr(training, "train", raising(stop, like=training.train))
            code, out, err = cli(*command)
        assert (code, out) == (130, "")
        return err

    assert interrupted() == "Nothing was saved.\ninterrupted\n"
    assert cli(*command)[0] == 0
    assert training.Interrupted("a", "; b").args == ("a; b",)  # the advice for Python; the command's own is printed below
    stop = training.Interrupted("stopped after step 2", "; go on with resume=True")
    assert interrupted(stop) == f"stopped after step 2\nTo go on: {again}\ninterrupted\n"
    for name in (LAST, PREVIOUS, BEST):
        Path("a b", name).unlink(missing_ok=True)
    assert interrupted() == f"No step was saved yet. To start again: {again}\ninterrupted\n"
    assert cli(*command, "--resume")[0] == 0


def test_an_unexpected_error_is_one_line_and_debug_shows_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "_OTHERS", (*callers._OTHERS, str(Path(__file__).parent)))  # as if this were the package
    monkeypatch.setattr(config, "load", raising(RuntimeError("what\nnow"), like=config.load))
    code, out, err = cli("train", "tiny.toml")
    assert (code, out) == (1, "")
    assert err == "internal error: RuntimeError: what now (set METAOPTIM_DEBUG=1 for the traceback)\n"
    monkeypatch.setenv("METAOPTIM_DEBUG", "1")
    assert "Traceback" in cli("train", "tiny.toml")[2]


def test_an_error_in_ones_own_code_names_the_line(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = (
        "from torch import nn",
        "class Bad(nn.Linear):",
        "    def __init__(self): nn.Linear.__init__(self, 1, 1)",
        "    def forward(self, x):",
        "        return nn.Linear.forward(self, x) + self.zz",
    )
    (tmp_path / "broken_net.py").write_text("\n".join(lines))
    told = "broken_net.py:5, in forward: AttributeError: 'Bad' object has no attribute 'zz'"
    (tmp_path / "broken.toml").write_text(TINY.replace('"mlp"\nsizes = [1, 8, 1]', '"broken_net.py:Bad"'))
    train = ("train", "broken.toml")
    for command in (train, ("check", "--model", "broken_net.py:Bad", "--loss", "mse", "--input", "1")):
        code, _, err = cli(*command)
        assert code == 2 and f"error: {told}" in err and "internal" not in err and "Traceback" not in err
    monkeypatch.setenv("METAOPTIM_DEBUG", "1")
    assert "Traceback" in cli(*train)[2]


def test_an_error_of_the_system_names_the_file(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "tiny.toml")
    monkeypatch.setattr(config, "load", raising(full, like=config.load))
    assert cli("train", "tiny.toml") == (1, "", "error: tiny.toml: No space left on device\n")
    denied = PermissionError(errno.EACCES, "Permission denied", "tiny.toml")
    monkeypatch.setattr(config, "load", raising(denied, like=config.load))
    assert cli("train", "tiny.toml") == (2, "", "error: tiny.toml: Permission denied\n")


def test_a_warning_is_one_line(cli: Cli) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        _, _, err = cli("train", "tiny.toml", "--set", "algorithm.name=reptile", "--set", "algorithm.steps=1")
    line = next(line for line in err.splitlines() if line.startswith("warning: "))
    assert "joint training" in line and ".py" not in line


def test_data_sets_the_folder_of_the_data(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert cli("train", "tiny.toml", "--data", "data", "--set", "algorithm.stpes=1")[0] == 2
    assert os.environ["METAOPTIM_DATA"] == "data"


# ---- nothing raw on the terminal


def test_errors_in_a_trace_are_one_sentence(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's tracer logs a traceback of what it could not trace, to a handler of its own, which is one more here."""
    logged: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("torch._subclasses.fake_tensor")
    monkeypatch.setattr(handler, "emit", logged.append)
    logger.addHandler(handler)
    args = ("train", "tiny.toml", "--set", "engine.runtime=trace", "--set", "model.sizes=[2, 8, 1]", "--out")
    code, out, err = cli(*args, "a")
    assert (code, out, logged) == (2, "", [])
    assert err.startswith("error: layer `0`") and err.count("\n") == 1
    logger.removeHandler(handler)


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize("place", ["typer", "torch"])
def test_ctrl_c_during_imports_is_130_and_no_traceback(tmp_path: Path, place: str) -> None:
    """The process interrupts itself where an import would swallow the exception, as NumPy's and torch's can."""
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {place!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000): pass
            except BaseException:
                pass
sys.meta_path.insert(0, Finder())
from metaoptim.cli.main import main
sys.exit(main(["train", "sinusoid-maml", "--set", "train.iterations=1", "--out", sys.argv[1]]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert not (tmp_path / "run").exists()


def test_a_result_that_cannot_be_saved_is_printed_first(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("train", "tiny.toml", "--out", "run")[0] == 0
    assert cli("evaluate", "run")[0] == 0
    before = {name: Path("run", name).read_bytes() for name in ("result.json", "result.png")}
    for fails_at, name in enumerate(("scores.safetensors", "result.json", "result.png"), 1):
        calls = iter(range(1, 9))
        fsync = os.fsync

        def full(handle: int, calls: Any = calls, fails_at: int = fails_at, fsync: Any = fsync) -> None:
            if next(calls) == 2 * fails_at - 1:  # the folder is synced after each file
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            fsync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            code, out, err = cli("evaluate", "run", "--episodes", "4")
        assert code == 1 and "│ maml" in out and "over 4 episodes" in out
        assert err == (
            f"error: the result, printed above, could not be saved: can't write run/{name} (Read-only file system): check the "
            "path and its permissions\n"
        )
        assert not list(Path("run").glob(".*.tmp"))
    assert Path("run/result.png").read_bytes() == before["result.png"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["plan", "tiny.toml", "--set", "model.sizes=[2, 8, 1]"], "layer `0` (Linear) can't take these data"),
        (["plan", "tiny.toml", "--set", "train.tasks_per_step=0"], "tasks_per_step=0: it must be a whole number"),
        (["plan", "tiny.toml", "--set", "train.seed=18446744073709551616"], "The seed is 18446744073709551616"),
        (["train", "tiny.toml", "--set", "train.seed=18446744073709551616"], "The seed is 18446744073709551616"),
        (["train", "tiny.toml", "--out", ""], "--out is empty"),
        (["train", "tiny.toml", "--out", "o\udcff"], r"'o\udcff' isn't UTF-8 text"),
        (["train", "r\udcff.toml"], r"'r\udcff.toml' isn't UTF-8 text"),
        (["train", "tiny.toml", "--set", "algorithm.steps=1000000000"], "1,000,000,000 inner steps"),
        (["train", "tiny.toml", "--set", "train.optimizer=LBFGS"], "LBFGS can't take outer steps"),
    ],
)
def test_what_used_to_be_an_internal_error(cli: Cli, args: list[str], words: str) -> None:
    code, out, err = cli(*args)
    assert (code, out) == (2, "") and words in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not Path("runs").exists()


def test_the_device_is_an_option_of_train_and_evaluate(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("train", "tiny.toml", "--out", "run", "--device", "cpu")[0] == 0
    assert config.load("run/recipe.toml").tables["train"]["device"] == "cpu"
    for name, others in (("same", ()), ("seed", ("--set", "train.seed=1"))):
        assert cli("train", "tiny.toml", "--out", name, *others)[0] == 0
    a, b = (load_checkpoint(name, "last").tensors for name in ("run", "same"))
    assert all(torch.equal(x, b[n]) for n, x in a.items())
    assert cli("evaluate", "run", "seed", "--device", "cpu")[0] == 0  # seeds may be trained on several devices
    assert cli("train", "tiny.toml", "--out", "same", "--device", "cpu", "--resume")[0] == 0  # and one may go on elsewhere
    code, _, err = cli("train", "tiny.toml", "--out", "same", "--device", "cpu", "--set", "algorithm.lr=0.5", "--resume")
    assert code == 2 and "other values of algorithm.lr;" in err

    place = training.train
    monkeypatch.setattr(training, "train", raising(training.Interrupted("stopped"), like=place))
    _, _, err = cli("train", "tiny.toml", "--out", "run", "--device", "cpu")
    assert "To go on: metaoptim train tiny.toml --device cpu --out run --resume" in err


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_unknown_device_is_one_sentence(cli: Cli, command: str) -> None:
    assert cli("train", "tiny.toml", "--out", "run")[0] == 0
    args = ("train", "tiny.toml", "--out", "other") if command == "train" else ("evaluate", "run")
    code, out, err = cli(*args, "--device", "nowhere")
    assert (code, out) == (2, "") and err.startswith("error: device='nowhere' can't be used here") and err.count("\n") == 1
    assert not Path("other").exists()


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 7 TiB"), RuntimeError("can't allocate memory: 7 TiB")])
def test_too_little_memory_is_one_sentence(cli: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(training, "train", raising(error, like=training.train))
    code, _, err = cli("train", "tiny.toml")
    assert code == 1 and err.startswith("error: there is not enough memory (") and "smaller" in err and err.count("\n") == 1


def test_a_finished_run_is_extended_to_the_same_floats(cli: Cli) -> None:
    assert cli("train", "tiny.toml", "--out", "short")[0] == 0
    assert cli("train", "tiny.toml", "--out", "short", "--set", "train.iterations=5", "--resume")[0] == 0
    assert cli("train", "tiny.toml", "--out", "long", "--set", "train.iterations=5")[0] == 0
    short, long = (load_checkpoint(folder, "last") for folder in ("short", "long"))
    assert short.step == long.step == 5
    assert all(torch.equal(x, long.tensors[name]) for name, x in short.tensors.items())
    falling = ("train", "tiny.toml", "--out", "falling", "--set", "train.schedule=linear")
    assert cli(*falling)[0] == 0
    code, _, err = cli(*falling, "--set", "train.iterations=5", "--resume")
    assert code == 2 and "iterations is 3 in the run and 5 here" in err


@pytest.mark.filterwarnings("always")
def test_a_run_that_has_not_come_to_its_end_is_told(cli: Cli, tmp_path: Path) -> None:
    assert cli("train", "tiny.toml")[0] == 0
    assert "has not come to its end" not in cli("evaluate", "runs/tiny")[2]
    state = tmp_path / "runs" / "tiny" / "state.json"
    state.write_text(state.read_text().replace('"finished"', '"running"'))  # as a kill leaves it
    code, _, err = cli("evaluate", "runs/tiny", "--checkpoint", "last")
    total = config.load("tiny.toml").tables["train"]["iterations"]
    assert code == 0 and f"runs/tiny has not come to its end: what is judged is step {total} of {total}; train --resume" in err


def test_a_file_in_place_of_an_algorithm_is_told_which_option_is_meant(cli: Cli) -> None:
    assert "metaoptim check --model my.py:Net --algorithm reptile." in cli("check", "reptile", "--model", "my.py:Net")[2]
    assert "metaoptim check --model my.py:Net" in cli("check", "my.py:Net")[2]
    assert "metaoptim check --recipe tiny.toml" in cli("check", "tiny.toml")[2]


@pytest.mark.parametrize("name", config.names())
def test_a_recipe_is_shown_without_what_is_absent(name: str, tmp_path: Path) -> None:
    recipe = config.load(name)
    text = recipe.text(absent=False)
    assert 'device = "none"' not in text and 'device = "none"' in recipe.text()
    (tmp_path / "shown.toml").write_text(text, encoding="utf-8")
    assert config.load(tmp_path / "shown.toml").tables == recipe.tables
