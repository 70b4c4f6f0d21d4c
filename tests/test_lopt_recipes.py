"""Learned optimizers as recipes: what is filled in and refused, and a run from its recipe to an optimizer of torch's."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import metaoptim as mo
from metaoptim import lopt
from metaoptim.cli.main import main
from metaoptim.lopt.families import FAMILIES
from metaoptim.optim import factory
from metaoptim.recipes import recipe as config
from metaoptim.recipes.again import command
from metaoptim.recipes.schema import ConfigError
from metaoptim.runs.store import load_checkpoint

TINY = """
description = "a tiny one"
[algorithm]
name = "learned_optimizer"
rule = "small_fc"
estimator = {name = "pes", window = 2, sigma = 0.01}
[tasks]
name = "quadratics"
dim = 2
steps = 4
rescaled = [0.5, 2.0]
[train]
iterations = 4
horizons = [2, 4]
problems_per_step = 2
validate_every = 2
validate_episodes = 2
checkpoint_every = 1
check = false
[evaluate]
families = "own"
baselines = ["Adam"]
problems = 2
seeds = 1
step_sizes = 2
[engine]
batching = "vmap"
memory = "graph"
runtime = "eager"
"""
MIXTURE = """
[[tasks.families]]
name = "mlp"
data = "glyphs"
hidden = [4]
[[tasks.families]]
name = "quadratics"
dim = 2
"""
Cli = Callable[..., tuple[int, str, str]]


def tiny(*overrides: str) -> config.Recipe:
    return config.parse(TINY, "tiny", overrides)


def mixed() -> config.Recipe:
    return config.parse(TINY.replace('"quadratics"\ndim = 2\nsteps = 4\nrescaled = [0.5, 2.0]', '"mixture"') + MIXTURE, "mixed")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command line in an empty folder with tiny.toml; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAOPTIM_CACHE", str(tmp_path / "cache"))
    Path("tiny.toml").write_text(TINY)

    def run(*args: str) -> tuple[int, str, str]:
        code = main(args)
        return code, *capsys.readouterr()

    return run


def test_every_option_is_filled_in_from_the_signatures() -> None:
    tables = tiny().tables
    assert tables["algorithm"] == {
        "name": "learned_optimizer",
        "rule": {"name": "small_fc"},
        "estimator": {"name": "pes", "window": 2, "sigma": 0.01, "pairs": 1},
        "objective": None,
    }
    assert tables["tasks"] == {
        "name": "quadratics",
        "dim": 2,
        "uniform": False,
        "steps": 4,
        "rescaled": [0.5, 2.0],
        "logarithm": False,
    }
    assert tables["train"]["clip"] == 1.0 and tables["train"]["optimizer"] is None and tables["train"]["log_every"] == 10
    assert not {"window", "sigma", "estimator", "tasks_per_step", "out", "resume"} & tables["train"].keys()
    assert tables["evaluate"]["tuned"] is False and "progress" not in tables["evaluate"] and "model" not in tables


@pytest.mark.parametrize("name", [*FAMILIES, "mixture"])
def test_a_recipe_on_any_family_reads_back_the_same(name: str) -> None:
    more = {"mlps": 'data = "digits"\ncount = 2', "mixture": 'families = [{name = "quadratics", dim = 3}]'}
    own = more.get(name, 'data = "digits"' if name in ("logistic", "mlp", "convnet") else "")
    recipe = config.parse(TINY.replace('"quadratics"\ndim = 2\nsteps = 4\nrescaled = [0.5, 2.0]', f'"{name}"\n{own}'), "one")
    assert config.parse(recipe.text(), "another name") == recipe
    assert config.parse(recipe.text(absent=False), "").tables == recipe.tables


def test_a_recipe_builds_what_meta_train_trains() -> None:
    method, tasks = tiny().build()
    assert isinstance(tasks, lopt.Problems) and tasks.rescaled == (0.5, 2.0) and tasks.steps == 4
    again = lopt.learned_optimizer(lopt.SmallFC(), tasks, mo.estimators.pes(2, 0.01), seed=0)
    assert method.phi.rule.keys() == again.phi.rule.keys()
    assert all(torch.equal(x, again.phi.rule[n]) for n, x in method.phi.rule.items())
    assert not torch.equal(tiny("train.seed=1").build()[0].phi.rule["w0"], method.phi.rule["w0"])
    celo = tiny("algorithm.rule={name='celo2', lr=0.5}", "algorithm.estimator={name='truncated', window=4}").build()[0]
    assert "Celo2(lr=0.5)" in repr(celo) and "Truncated(window=4)" in repr(celo)
    assert tiny().experiment().batch().support["first"].shape == (2, 1)


def test_several_families_are_a_mixture() -> None:
    tasks = mixed().build()[1]
    assert isinstance(tasks, lopt.Mixture) and tasks.name == "mixture(mlp-4-relu-glyphs-8, quadratics-2)"
    members = mixed().tables["tasks"]["families"]
    assert members[0]["activation"] == "relu" and members[0]["size"] == 8 and members[1]["uniform"] is False


def test_code_of_ones_own_may_be_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_family.py").write_text(
        "import metaoptim as mo\ndef few(dim: int = 3):\n    return mo.lopt.quadratics(dim, steps=4)\n"
        "def none():\n    return 3\n"
    )
    with pytest.warns(UserWarning, match=r"own_family\.py:few takes the place of quadratics"):
        recipe = tiny("tasks.name=own_family.py:few")
    assert recipe.build()[1].name == "quadratics-2" and recipe.tables["tasks"] == {"name": "own_family.py:few", "dim": 2}
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="it gave int; expected a family of training problems"):
        tiny("tasks.name=own_family.py:none").build()


BAD = [
    ("algorithm.rule=smal_fc", "unknown rule `smal_fc` in [algorithm]; did you mean `small_fc`?"),
    ("algorithm.rule={name='lstm', hiden=3}", "unknown key `hiden` in [algorithm.rule]; did you mean `hidden`?"),
    ("algorithm.loss=mse", "unknown key `loss` in [algorithm]; expected one of: rule, estimator, objective."),
    ("algorithm.estimator=pes", "missing key `window` in [algorithm.estimator]"),
    ("tasks.name=quadratic", "unknown tasks `quadratic` in [tasks]; did you mean `quadratics`?"),
    ("tasks.name=sinusoid", "unknown tasks `sinusoid` in [tasks]"),
    ("tasks.dmi=3", "unknown key `dmi` in [tasks]; did you mean `dim`?"),
    ("train.tasks_per_step=3", "unknown key `tasks_per_step` in [train]"),
    ("train.horizon=3", "did you mean `horizons`?"),
    ("evaluate.families=owm", "did you mean `own`?"),
    ("evaluate.baselines=['Adm']", "[evaluate]: baselines: found 'Adm'; expected a list of names"),
    ("evaluate.step_sizes=0", "[evaluate]: step_sizes=0"),
    (
        "algorithm.estimator.window=7",
        "a key inside an option; set all of that, as in algorithm.estimator={name = …, window = 7}",
    ),
    ("algorithm.estimator.name=nres", "a key inside an option; set all of that, as in algorithm.estimator=nres."),
    ("evaluate.split=val", "unknown key `split` in [evaluate]"),
    ("model.name=mlp", "a learned optimizer has no [model], for the networks that it trains are those of [tasks]"),
    (
        "algorithm.name=learned_optimiser",
        "unknown algorithm `learned_optimiser` in [algorithm]; did you mean `learned_optimizer`?",
    ),
    ("algorithm.name=maml", "missing key `name` in [model]"),
]


@pytest.mark.parametrize(("override", "words"), BAD, ids=[override for override, _ in BAD])
def test_what_is_wrong_is_told_in_one_sentence(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(override)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("families", "words"), [
    ("[]", "the members are none"),
    ('[{name = "quadratics"}, {name = "quadratics"}]', "all different"),
    ('[{dim = 3}]', "missing key `name` in [[tasks.families]]"),
    ('[{name = "mpl"}]', "unknown family `mpl` in [[tasks.families]]; did you mean `mlp`?"),
    ('[{name = "mlp", data = "digts"}]', "`data` in [tasks.families]: found"),
    ("3", "`families` in [tasks]: found 3, expected a list, each item a table"),
])  # fmt: skip
def test_wrong_members_of_a_mixture_are_told(families: str, words: str) -> None:
    text = TINY.replace('"quadratics"\ndim = 2\nsteps = 4\nrescaled = [0.5, 2.0]', f'"mixture"\nfamilies = {families}')
    with pytest.raises(ValueError, match=re.escape(words)):
        config.parse(text, "x").build()


@pytest.mark.parametrize(("override", "words"), [
    ("train.horizons=[2]", "horizons=(2,): they must be two multiples of the window"),
    ("tasks.rescaled=[1]", "rescaled=(1.0,): it must be two positive numbers"),
    ("train.problems_per_step=0", "problems_per_step=0"),
    ("train.seed=-1", "The seed is -1"),
    ("evaluate.seed=-1", "The seed is -1"),
])  # fmt: skip
def test_numbers_that_cannot_be_used_are_told(cli: Cli, override: str, words: str) -> None:
    for name in ("train", "plan"):
        code, out, err = cli(name, "tiny.toml", "--set", override)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, err
    assert not Path("runs").exists()


def test_from_a_recipe_to_an_optimizer(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = cli("train", "tiny.toml")
    assert code == 0 and "metaoptim evaluate runs/tiny" in out, err
    run = Path("runs/tiny")
    assert config.load(run / "recipe.toml") == config.load("tiny.toml")
    assert tomllib.loads((run / "recipe.toml").read_text())["algorithm"]["estimator"]["pairs"] == 1

    code, out, err = cli("export", "runs/tiny", "early.safetensors")
    assert code == 0 and "no scores" in out and mo.optim.load("early.safetensors").header["scores"] == {}
    code, out, err = cli("evaluate", "runs/tiny")
    assert code == 0 and "learned SmallFC" in out and "quadratics-2" in out and (run / "result.png").is_file(), err
    result = json.loads((run / "result.json").read_text())
    learned, adam = result["rows"]
    assert adam["name"] == "Adam" and len(learned["finals"]) == 2 and result["metric"] == "loss"
    assert result["mean"] == pytest.approx(sum(learned["finals"]) / 2) and result["facts"]["episodes"] == 2
    assert result["facts"]["families"]["quadratics-2"]["options"]["rescaled"] == [1.0, 1.0]

    code, out, err = cli("export", "runs/tiny", "out/tiny.safetensors", "--checkpoint", "last")
    assert code == 0 and "out/tiny.safetensors" in out, err
    made = mo.optim.load("out/tiny.safetensors")
    last = load_checkpoint(run, "last")
    assert made.rule == lopt.SmallFC() and made.psi is not None
    assert all(torch.equal(x, last.tensors[f"rule/{n}"]) for n, x in made.psi.items())
    assert made.header["steps"] == 4 and made.header["command"] == "metaoptim train tiny.toml"
    assert made.header["scores"]["quadratics-2"]["final"] == learned["final"]
    assert config.parse(made.header["recipe"], "") == config.load(run / "recipe.toml")
    monkeypatch.setattr(factory, "SHIPPED", Path("out").absolute())
    assert mo.optim.available() == ["tiny"]
    net = torch.nn.Linear(3, 2)
    before = net.weight.clone()
    optimizer = mo.optim.load("tiny")(net.named_parameters())
    net(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    assert torch.isfinite(net.weight).all() and not torch.equal(net.weight, before)


def test_a_rule_without_a_step_size_is_not_to_be_tuned(cli: Cli) -> None:
    code, _, err = cli("train", "tiny.toml", "--set", "evaluate.tuned=true")
    assert code == 2 and "tuned=True: SmallFC() has no step size" in err and not Path("runs").exists()


@pytest.mark.slow
def test_the_doctor_looks_at_short_runs(cli: Cli) -> None:
    rule = "algorithm.rule={name = 'layer_step_sizes', lr = 0.1, steps = 10}"
    settings = ("--set", "tasks.steps=40", "--set", "train.horizons=none", "--set", rule)
    code, out, err = cli("check", "--recipe", "tiny.toml", *settings)
    assert "Its runs are cut short for this, to 10 steps." in err and "right: learned LayerStepSizes" in out and code == 0, err


def test_check_says_how_a_learned_optimizer_is_named(cli: Cli) -> None:
    assert tiny("tasks.steps=40").experiment().checked[0].learner.steps == 10
    assert "metaoptim check --recipe RECIPE" in cli("check", "learned_optimizer")[2]
    assert "--set goes with --recipe alone" in cli("check", "maml", "--set", "algorithm.lr=1")[2]


def test_a_run_is_resumed_to_the_same_floats_and_refuses_others(cli: Cli) -> None:
    short = ("train", "tiny.toml", "--set", "train.iterations=2", "--out", "cut")
    assert cli(*short)[0] == 0
    code, _, err = cli("train", "tiny.toml", "--out", "cut", "--resume")
    assert code == 0, err
    assert cli("train", "tiny.toml", "--out", "whole")[0] == 0
    cut, whole = (load_checkpoint(name, "last") for name in ("cut", "whole"))
    assert cut.step == whole.step == 4 and cut.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(x, whole.tensors[name]) for name, x in cut.tensors.items())
    code, _, err = cli("train", "tiny.toml", "--out", "cut", "--set", "tasks.dim=3", "--resume")
    assert code == 2 and "other values of tasks.dim" in err
    for setting, words in {
        "algorithm.rule=lstm": "is learned SmallFC in the run",
        "tasks.dim=3": "quadratics-2",
        "tasks.steps=6": "as in --set evaluate.steps=…",
    }.items():
        code, _, err = cli("evaluate", "cut", "--set", setting)
        assert code == 2 and "differs from what is asked for" in err and words in err, err


def test_scores_are_exported_with_the_weights_that_they_are_of_alone(cli: Cli) -> None:
    assert cli("train", "tiny.toml", "--set", "train.iterations=2")[0] == 0 and cli("evaluate", "runs/tiny")[0] == 0
    (judged,) = json.loads(Path("runs/tiny/result.json").read_text())["facts"]["runs"]
    assert judged["step"] == 2 and len(judged["phi_sha256"]) == 64
    assert cli("train", "tiny.toml", "--resume")[0] == 0
    last = ("export", "runs/tiny", "x.safetensors", "--checkpoint", "last")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, out, err = cli(*last)
    assert code == 0 and "no scores of the ψ of step 4 alone" in err and "no scores, for this ψ wasn't evaluated" in out
    assert mo.optim.load("x.safetensors").header["scores"] == {}
    assert cli("evaluate", "runs/tiny", "--checkpoint", "last")[0] == 0
    assert "the scores of its last" in cli(*last)[1] and mo.optim.load("x.safetensors").header["scores"]

    assert cli("report", "runs/tiny")[0] == 0
    doubt, result = "The result is that of other weights than the run has now", Path("runs/tiny/result.json")
    assert doubt not in Path("runs/tiny/report.html").read_text()
    result.write_text(re.sub(r'"phi_sha256": "\w+"', '"phi_sha256": "0"', result.read_text()))
    assert cli("report", "runs/tiny")[0] == 0 and doubt in Path("runs/tiny/report.html").read_text()


def test_a_run_from_python_says_how_it_is_judged_there(cli: Cli) -> None:
    options: dict[str, Any] = {"estimator": "pes", "window": 2, "problems_per_step": 2, "validate_every": 0, "progress": False}
    run = lopt.meta_train(lopt.SmallFC(), lopt.quadratics(2, steps=4), iterations=1, lr=0.01, out="run", **options)
    text = Path("run/recipe.toml").read_text()
    assert "--set" not in text and "load it in Python" in text
    described = tomllib.loads(text)["described"]
    assert "outer" not in described["method"] and described["train"]["optimizer"]["groups"]["rule"]["lr"] == 0.01
    for words in (("evaluate", "run"), ("export", "run", "x.safetensors")):
        code, _, err = cli(*words)
        assert code == 2 and "this run was started in Python" in err and "mo.lopt.evaluate(run)" in err
    method = lopt.learned_optimizer(lopt.SmallFC(), lopt.quadratics(2, steps=4), "pes", window=2)
    assert torch.equal(mo.load("run", method).phi.rule["w0"], run.phi.rule["w0"])


def test_several_runs_are_judged_together(cli: Cli) -> None:
    for seed in ("0", "1"):
        assert cli("train", "tiny.toml", "--set", f"train.seed={seed}", "--out", f"s{seed}")[0] == 0
    code, out, err = cli("evaluate", "s0", "s1")
    assert code == 0 and "the mean over 2 runs of meta-training" in " ".join(out.replace("│", " ").split()), err
    both = json.loads(Path("s0/result.json").read_text())
    alone = []
    for name in ("s0", "s1"):
        assert cli("evaluate", name)[0] == 0
        alone.append(json.loads(Path(name, "result.json").read_text()))
    assert both["rows"][0]["by_run"] == pytest.approx([one["mean"] for one in alone])
    assert both["mean"] == pytest.approx(sum(one["mean"] for one in alone) / 2)
    assert both["facts"]["episodes_sha256"] == alone[0]["facts"]["episodes_sha256"]
    code, _, err = cli("evaluate", "s0", "s0")
    assert code == 2 and "given twice" in err


def test_commands_for_other_kinds_say_what_to_do(cli: Cli) -> None:
    assert cli("train", "tiny.toml", "--out", "run")[0] == 0
    for args, words in {
        (
            "adapt",
            "run",
            "--support",
            "a",
            "--predict",
            "b",
        ): "adapt takes few-shot runs, and this one is of a learned optimizer",
        ("diagnose", "run"): "diagnose looks into few-shot runs",
        ("evaluate", "run", "--episodes", "3"): "--episodes doesn't apply to a run of learned_optimizer; say what",
        ("evaluate", "run", "--split", "val"): "evaluate.KEY=VALUE, where KEY is one of families, baselines, problems",
        ("evaluate", "run", "--device", "nowhere"): "device='nowhere' can't be used here",
    }.items():
        code, out, err = cli(*args)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, err
    settings = ["train.iterations=1", "train.validate_every=0", "engine.runtime=eager", "train.check=false"]
    assert cli("train", "sinusoid-maml", *(part for s in settings for part in ("--set", s)), "--out", "few")[0] == 0
    code, _, err = cli("export", "few", "x.safetensors")
    assert code == 2 and "export takes runs of learned optimizers" in err and not Path("x.safetensors").exists()
    with pytest.raises(ValueError, match="from_run takes a run of a learned optimizer"):
        mo.optim.from_run(config.load("few/recipe.toml").experiment().load("few"))


def test_plan_and_reproduce_take_them(cli: Cli) -> None:
    code, out, err = cli("plan", "tiny.toml", "--set", "engine.batching=loop")
    assert code == 0 and "one meta-step of 2 tasks" in out, err
    code, out, err = cli("reproduce", "tiny.toml", "--page", "page.md")
    assert code == 0 and "tiny, seed 0: not judged" in out, err
    (line,) = [json.loads(text) for text in Path("results/ledger.jsonl").read_text().splitlines()]
    assert line["metric"] == "loss" and line["rows"].keys() == {"Adam"} and line["steps"] == 4 and line["tasks_per_step"] == 2
    assert (
        line["protocol"]["name"].startswith("training problems quadratics-2 (4 steps), split test") and line["cost"]["seconds"]
    )
    assert cli("reproduce", "tiny.toml", "--page", "page.md")[1].startswith("1 of 1 are in the ledger already.")


def test_list_and_show_know_them(cli: Cli) -> None:
    code, out, _ = cli("list")
    assert code == 0 and all(f"  {name} " in out for name in ("lopt-mlp-pes", "learned_optimizer", "training_families"))
    code, out, _ = cli("show", "learned_optimizer")
    assert code == 0 and all(word in out for word in ("minimise over ψ", "small_fc", "celo2", "lstm", '"sigma": 0.01'))
    code, out, _ = cli("show", "celo2")
    assert code == 0 and "celo2 (rule)" in out and "adam_ratio" in out and "[algorithm.rule]" in out
    code, out, _ = cli("show", "mlp")
    assert code == 0 and "mlp (tasks)" in out and "mlp (model)" in out and '"digits" or "glyphs"' in out


def test_the_command_in_a_file_trains_a_shipped_recipe_again() -> None:
    settings = ["train.iterations=7", "algorithm.rule={name='lstm', p='none'}", "evaluate.seeds=1", "train.clip=none"]
    recipe = config.load("lopt-quadratic-lstm", settings)
    words = command(recipe, "recipe.toml")
    assert words.startswith("metaoptim train lopt-quadratic-lstm --set ") and "evaluate" not in words
    parts = shlex.split(words)[3:]
    assert config.load("lopt-quadratic-lstm", [*parts[1::2], "evaluate.seeds=1"]) == recipe


def test_a_run_knows_its_best_validation(tmp_path: Path) -> None:
    experiment = tiny("train.iterations=2").experiment()
    run = experiment.train(tmp_path / "run", progress=False)
    assert run.best is not None and run.best.metric == "loss" and run.best.step == 2
    assert experiment.load(tmp_path / "run").best == run.best
    assert run.best.beaten(run.best.score - 1) and not run.best.beaten(run.best.score + 1)
    found = experiment.evaluate([run], progress=False)
    assert found.scores.shape == (2,) and found.mean == pytest.approx(found.scores.mean().item())
    assert found.interval == pytest.approx(1.96 * found.scores.double().std().item() / 2**0.5, rel=1e-5)
    assert found.beside["Adam"][0] > 0


@pytest.mark.parametrize(("options", "words"), [
    ({"families": "own"}, "a rule was trained on none that are known here"),
    ({"families": "mine"}, "it must be own, held_out, both"),
    ({"families": {}}, "families is empty"),
    ({"baselines": ["Adma"]}, "found 'Adma'; expected a list of names"),
    ({"baselines": "Adam"}, "found 'Adam'; expected a list of names"),
])  # fmt: skip
def test_what_cannot_be_judged_is_told(options: dict[str, Any], words: str) -> None:
    judge = partial(lopt.evaluate, mo.rules.SGD(0.1), {}, problems=1, seeds=1, step_sizes=1, progress=False)
    with pytest.raises(ValueError, match=words):
        judge(**{"families": [lopt.quadratics(2, steps=2)], **options})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lopt-quadratic-lstm", "lopt-mlp-pes", "lopt-celo2-small"])
def test_shipped_recipes_train(name: str, tmp_path: Path) -> None:
    settings = ["train.iterations=2", "train.validate_episodes=2", "evaluate.families=own", "evaluate.baselines=['Adam']"]
    settings += ["train.problems_per_step=2", "evaluate.problems=2", "evaluate.seeds=1", "evaluate.step_sizes=2"]
    experiment = config.load(name, [*settings, "engine.runtime=eager"]).experiment()
    run = experiment.train(tmp_path / "run", progress=False)
    assert run.step == 2 and all(torch.isfinite(x).all() for x in run.phi.rule.values())
    found = experiment.evaluate([run], progress=False)
    assert torch.isfinite(found.scores).all() and len(found.scores) in (2, 8)
