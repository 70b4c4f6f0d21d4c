"""Whatever a user gets wrong is told in ONE sentence that says what was found and what to do.

The command line's own mistakes are in test_cli.py, recipes' in test_config.py; here are some of each, all in one table.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metaoptim as mo
from metaoptim.cli.main import main
from metaoptim.core.types import Task
from metaoptim.recipes import recipe as config
from metaoptim.runs.checkpoint import LAST, PREVIOUS

SINUSOID = mo.tasks.sinusoid()


def mlp(*sizes: int) -> nn.Module:
    return mo.nn.mlp(sizes or (1, 4, 1))


def maml(net: nn.Module | None = None, loss: Any = mo.losses.mse, **options: Any) -> mo.MetaOptimizer:
    return mo.maml(net or mlp(), loss, **options)


def train(meta: Any = None, tasks: Any = SINUSOID, **options: Any) -> mo.Run:
    short: dict[str, Any] = {"iterations": 1, "tasks_per_step": 2, "validate_every": 0, "progress": False}
    return mo.train(meta or maml(), tasks, **short | options)


def evaluate(run: Any = None, **options: Any) -> Any:
    return mo.evaluate(run or mo.Run(m := maml(), m.phi), SINUSOID, **{"episodes": 2, "progress": False} | options)


def adapt(x: Tensor, y: Tensor, meta: Any = None, **options: Any) -> nn.Module:
    meta = meta or maml()
    return mo.Run(meta, meta.phi).adapt((x, y), **options)


def compose(**options: Any) -> Any:
    return mo.compose(mlp(), mo.losses.mse, **{"rule": mo.rules.SGD(0.1)} | options)


def meta_train(loader: Any, net: nn.Module | None = None, optimizer: Any = None, **options: Any) -> list[float]:
    net = net or mlp()
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.1)
    return mo.meta_train(net, optimizer, loader, 1, 0.1, **options)


def classes(x: tuple[int, ...], y: Tensor) -> Task:
    """Two tasks with inputs of that shape and these targets."""
    batch = (torch.rand(2, len(y), *x), y.expand(2, -1))
    return Task(batch, batch)


def backward(task: Task, ways: int = 3, how: str = "loop", loss: Any = mo.losses.cross_entropy) -> Tensor:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, ways))
    return mo.MetaModule(maml(net, loss), batching=how).backward(task)


def regression(sx: tuple[int, ...], sy: tuple[int, ...], qx: tuple[int, ...], qy: tuple[int, ...]) -> Tensor:
    return mo.MetaModule(maml()).backward(Task((torch.rand(sx), torch.rand(sy)), (torch.rand(qx), torch.rand(qy))))


def frozen_net() -> nn.Module:
    return mlp().requires_grad_(False)


class Plain(nn.Module):
    """A weight whose size nothing tells but itself."""

    def __init__(self, size: int) -> None:
        nn.Module.__init__(self)
        self.w = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w.mean()


def small_run(folder: Path, net: nn.Module | None = None) -> Path:
    train(maml(net), out=folder / "run", iterations=2, checkpoint_every=1)
    return folder / "run"


def damaged(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    run = small_run(folder)
    for file in run.glob("*.safetensors"):
        file.write_bytes(change(file.read_bytes()))
    return run


def images(**options: Any) -> mo.tasks.ImageTasks:
    pictures = np.zeros((4, 3, 5, 5), np.uint8)
    plain: dict[str, Any] = {
        "images": pictures,
        "names": list("abcd"),
        "members": {"train": np.arange(4)},
        "queries": 1,
        "ways": 2,
    }
    return mo.tasks.ImageTasks("mine", **plain | options)


def function(sample: Any) -> Any:
    return mo.tasks.from_function(sample, name="mine").sample("train", seed=0, start=0, count=2)


LABELS = torch.tensor([0, 1, 2])
ONE = (torch.rand(3, 1), torch.rand(3, 1))


class Bad(NamedTuple):
    """What is done (with a folder to do it in) and the essential words of what is said."""

    do: Callable[[Path], Any]
    words: tuple[str, ...]


TABLE: dict[str, Bad] = {
    # algorithms and models
    "negative steps": Bad(lambda p: maml(steps=-1), ("steps=-1", "at least 0")),
    "unknown normalisation": Bad(lambda p: maml(normalisation="batch"), ("'batch'", "transductive, inductive, frozen")),
    "running statistics": Bad(
        lambda p: maml(nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))), ("layer `1` (BatchNorm1d)", "metaoptim.nn.convert")
    ),
    "batch norm under inductive": Bad(
        lambda p: maml(nn.BatchNorm1d(2, track_running_stats=False), normalisation="inductive"), ("`inductive`", "convert")
    ),
    "nothing is learnt": Bad(lambda p: maml(frozen_net()), ("nothing is learnt", "requires_grad=False")),
    "a list of layers": Bad(lambda p: maml(nn.Linear(1, 1).weight), ("net=Parameter: it must be a torch.nn.Module",)),
    "a class for a network": Bad(lambda p: maml(nn.Linear), ("must be a torch.nn.Module", "not its class")),
    "a word for a loss": Bad(lambda p: mo.maml(mlp(), "mse"), ("loss='mse'", "a function of (output, target)")),
    "a class for a rule": Bad(lambda p: compose(rule=mo.rules.SGD), ("rule=", "mo.rules.SGD(0.1)")),
    "an optimizer for a rule": Bad(
        lambda p: compose(rule=torch.optim.SGD(mlp().parameters(), 0.1)), ("rule=SGD", "mo.rules.SGD")
    ),
    "a word for an estimator": Bad(lambda p: compose(estimator="pes"), ("estimator='pes'", "mo.estimators.Unroll()")),
    "unknown reduction": Bad(lambda p: compose(reduction="avg"), ("'avg'", "mean or sum")),
    "unknown mask": Bad(lambda p: compose(adapts="top"), ("'top'", "all, head, body")),
    "unknown solver": Bad(lambda p: mo.imaml(mlp(), mo.losses.mse, solver="gmres"), ("'gmres'", "cg or neumann")),
    "unknown judged set": Bad(
        lambda p: compose(estimator=mo.estimators.Unroll(judged_on="val")),
        ("'val'", "query or support"),
    ),
    "an objective of another length": Bad(
        lambda p: compose(estimator=mo.estimators.Unroll(objective=lambda steps, outer_step: [1.0] * steps)),
        ("gave 1 weights for 1 inner steps", "s_0 … s_1"),
    ),
    "no parameters": Bad(lambda p: maml(nn.ReLU()), ("nothing is learnt", "there is none")),
    "one width": Bad(lambda p: mlp(3), ("sizes=[3]", "input and an output")),
    "one way": Bad(lambda p: mo.nn.conv4(ways=1), ("ways=1", "ways >= 2")),
    "images too small to pool": Bad(lambda p: mo.nn.conv4(ways=2, size=8, pool=True), ("size=8", "16 pixels")),
    # losses, shapes, targets
    "loss is not a scalar": Bad(lambda p: train(maml(loss=nn.MSELoss(reduction="none"))), ("shape (10, 1)", "a scalar")),
    "float targets": Bad(lambda p: backward(classes((4,), LABELS.float())), ("float32", "class numbers", "int64")),
    "float targets, vmap": Bad(lambda p: backward(classes((4,), LABELS.float()), how="vmap"), ("float32", "class numbers")),
    "labels beyond the ways": Bad(lambda p: backward(classes((4,), LABELS + 1)), ("int64 from 1 to 3", "below its outputs")),
    "labels beyond, vmap": Bad(lambda p: backward(classes((4,), LABELS + 1), how="vmap"), ("int64 from 1 to 3", "below")),
    "negative labels": Bad(lambda p: backward(classes((4,), LABELS - 1)), ("int64 from -1 to 1", "below its outputs")),
    "inputs the model can't read": Bad(
        lambda p: backward(classes((5,), LABELS)), ("mat1 and mat2", "(2, 3, 5) float32", "what the model reads")
    ),
    "the same, vmap": Bad(lambda p: backward(classes((5,), LABELS), how="vmap"), ("(2, 3, 5) float32", "what the model reads")),
    "the same, auto": Bad(lambda p: backward(classes((5,), LABELS), how="auto"), ("(2, 3, 5) float32", "what the model reads")),
    "channels that don't fit": Bad(
        lambda p: mo.MetaModule(maml(mo.nn.conv4(3, size=8), mo.losses.cross_entropy)).backward(classes((3, 8, 8), LABELS)),
        ("(2, 3, 3, 8, 8) float32", "channels"),
    ),
    "targets of another shape": Bad(lambda p: train(maml(mlp(1, 4, 2))), ("mse", "(10, 2)", "(10, 1)")),
    "evaluated on what doesn't fit": Bad(
        lambda p: evaluate(mo.Run(m := maml(mlp(2, 1)), m.phi), baselines=()), ("(2, 10, 1) float32", "what the model reads")
    ),
    # batches of tasks
    "different T": Bad(lambda p: regression((2, 3, 1), (2, 3, 1), (3, 3, 1), (3, 3, 1)), ("same T", "query.x (3, 3)")),
    "different S": Bad(lambda p: regression((2, 3, 1), (2, 4, 1), (2, 3, 1), (2, 3, 1)), ("support.y (2, 4)", "(T, S, …)")),
    "no task": Bad(lambda p: regression((0, 3, 1), (0, 3, 1), (0, 3, 1), (0, 3, 1)), ("T >= 1", "support.x (0, 3)")),
    "empty support": Bad(lambda p: regression((2, 0, 1), (2, 0, 1), (2, 3, 1), (2, 3, 1)), ("S >= 1", "support.x (2, 0)")),
    "no axis of tasks": Bad(lambda p: regression((3,), (3,), (3,), (3,)), ("(T, S, …)", "support.x (3,)")),
    # training
    "an optimizer beside an outer step": Bad(
        lambda p: train(lr=0.1, outer_step=object()), ("lr was given beside an outer_step", "leave one of them out")
    ),
    "no iterations": Bad(lambda p: train(iterations=0), ("iterations=0", "at least 1")),
    "no tasks per step": Bad(lambda p: train(tasks_per_step=0), ("tasks_per_step=0", "at least 1")),
    "unknown optimizer": Bad(lambda p: train(optimizer="Adma"), ("'Adma'", "such as Adam")),
    "not an optimizer": Bad(lambda p: train(optimizer="Optimizer"), ("'Optimizer'", "such as Adam")),
    "step size is zero": Bad(lambda p: train(lr=0.0), ("lr=0.0", "positive")),
    "step size is nan": Bad(lambda p: train(lr=float("nan")), ("lr=nan", "positive")),
    "unknown schedule": Bad(lambda p: train(schedule="step", out=p / "r"), ("'step'", "constant, linear or cosine")),
    "negative clip": Bad(lambda p: train(clip=-1.0), ("clip=-1.0", "positive")),
    "negative validation steps": Bad(lambda p: train(validate_steps=-1), ("validate_steps=-1", "at least 0")),
    "no tasks": Bad(
        lambda p: mo.train(maml(), lambda g, s: None, iterations=1), ("task family", "found MetaOptimizer and function")
    ),
    "the wrong way round": Bad(lambda p: mo.train(SINUSOID, maml(), iterations=1), ("a meta-optimizer, such as mo.maml",)),
    "a method to evaluate": Bad(lambda p: evaluate(run=maml()), ("found MetaOptimizer", "mo.Run(method, phi)")),
    "a word for baselines": Bad(lambda p: evaluate(baselines="untrained"), ("baselines='untrained'", "a list of names")),
    "a batch that is a dict": Bad(
        lambda p: mo.MetaModule(maml()).backward(Task({"x": torch.rand(2, 3, 1)}, {"x": torch.rand(2, 3, 1)})),
        ("batches (x, y)", "found a dict of 1"),
    ),
    "another checkpoint": Bad(lambda p: mo.load(small_run(p), maml(), "bst"), ("'bst'", "best or last")),
    "negative seed": Bad(lambda p: train(seed=-1), ("seed is -1", "2**64")),
    "resume without a folder": Bad(lambda p: train(resume=True), ("out=",)),
    "resume nothing": Bad(lambda p: train(out=p / "none", resume=True), ("no run in", "check the path")),
    "a run is there already": Bad(lambda p: train(out=small_run(p)), ("holds a run already (step 2", "another folder")),
    "the folder is a file": Bad(lambda p: train(out=Path(__file__)), ("is a file", "another path")),
    "no split to train on": Bad(
        lambda p: train(tasks=mo.tasks.from_function(lambda g, s: (ONE, ONE), splits=["test"])), ("no split 'train'", "'test'")
    ),
    "unknown engine": Bad(lambda p: train(engine={"batching": "vmpa"}), ("'vmpa'", "auto, loop, vmap")),
    "unknown memory": Bad(lambda p: train(engine={"memory": "disk"}), ("'disk'", "auto, graph")),
    "unknown engine key": Bad(lambda p: train(engine={"task": "loop"}), ("'task'", "batching, memory, runtime")),
    "no chunk": Bad(lambda p: mo.MetaModule(maml(), batching="vmap:0"), ("'vmap:0'", "C >= 1")),
    # evaluation and adaptation
    "unknown split": Bad(lambda p: evaluate(split="tset"), ("'tset'", "'train', 'val', 'test'")),
    "unknown baseline": Bad(lambda p: evaluate(baselines=["protonet"]), ("'protonet'", "untrained, prototypes, pretrained")),
    "no episodes": Bad(lambda p: evaluate(episodes=0), ("episodes=0", "at least 1")),
    "negative test steps": Bad(lambda p: evaluate(steps=-1), ("steps=-1", "at least 0")),
    "no runs": Bad(lambda p: mo.evaluate([], SINUSOID), ("needs a run", "empty")),
    "unknown policy at test": Bad(lambda p: evaluate(normalisation="none"), ("'none'", "transductive, inductive, frozen")),
    "no head for prototypes": Bad(
        lambda p: mo.evaluate(
            mo.Run(m := maml(mo.nn.BatchNorm(1), mo.losses.cross_entropy), m.phi),
            mo.tasks.from_function(lambda g, s: ((ONE[0], LABELS * 0), (ONE[0], LABELS * 0))),
            episodes=1,
            baselines=["prototypes"],
            progress=False,
        ),
        ("no linear layer", "baselines"),
    ),
    "adapt to nothing": Bad(lambda p: adapt(torch.rand(0, 1), torch.rand(0, 1)), ("S >= 1", "(0, 1)")),
    "adapt to a ragged pair": Bad(lambda p: adapt(torch.rand(3, 1), torch.rand(2, 1)), ("(3, 1)", "(2, 1)")),
    "adapt to what doesn't fit": Bad(
        lambda p: adapt(torch.rand(3, 2), torch.rand(3, 1)), ("(3, 2) float32", "the model reads")
    ),
    "adapt backwards": Bad(lambda p: adapt(*ONE, steps=-1), ("steps=-1", "at least 0")),
    # the articles' loop
    "unknown method": Bad(lambda p: meta_train([ONE], method="mamal"), ("'mamal'", "maml, fomaml")),
    "an empty loader": Bad(lambda p: meta_train([]), ("empty", "(data, targets)")),
    "a loader of inputs alone": Bad(lambda p: meta_train([torch.rand(3, 1)]), ("found Tensor", "(data, targets)")),
    "a loader of other pairs": Bad(lambda p: meta_train([("a", "b")]), ("a pair of str and str",)),
    "a batch of one": Bad(lambda p: meta_train([(torch.rand(1, 1), torch.rand(1, 1))]), ("at least 2", "(1, 1)")),
    "an optimizer of other weights": Bad(
        lambda p: meta_train([ONE], optimizer=torch.optim.SGD(mlp().parameters(), 0.1)), ("`0.weight`", "model.parameters()")
    ),
    # files
    "load nothing": Bad(lambda p: mo.load(p / "none", maml()), ("no run in", "check the path")),
    "load a folder of something else": Bad(lambda p: mo.load(p, maml()), ("no run in", "recipe.toml")),
    "load another model": Bad(lambda p: mo.load(small_run(p), maml(mlp(1, 5, 1))), ("learner.model.net.0", "out_features=5")),
    "load another algorithm": Bad(
        lambda p: mo.load(small_run(p), mo.meta_sgd(mlp(), mo.losses.mse)), ("algorithm is maml in the run", "meta_sgd here")
    ),
    "load another step size": Bad(
        lambda p: mo.load(small_run(p), maml(lr=0.4)), ("learner.rule.lr is 0.1 in the run and 0.4 here", "same model")
    ),
    "load weights of another shape": Bad(
        lambda p: mo.load(small_run(p, Plain(2)), maml(Plain(3))), ("does not fit", "`w`", "(3,)")
    ),
    "evaluate two methods as one": Bad(
        lambda p: mo.evaluate([mo.Run(m, m.phi) for m in (maml(), maml(lr=0.4))], SINUSOID),
        ("learner.rule.lr is 0.1 in the first run and 0.4 in run 2", "one by one"),
    ),
    "evaluate two algorithms as one": Bad(
        lambda p: mo.evaluate([mo.Run(m, m.phi) for m in (maml(), mo.fomaml(mlp(), mo.losses.mse))], SINUSOID),
        ("algorithm is maml in the first run and fomaml in run 2",),
    ),
    "load what is cut": Bad(lambda p: mo.load(damaged(p, lambda d: d[:-9]), maml()), ("intact", LAST, PREVIOUS)),
    "load what is altered": Bad(
        lambda p: mo.load(damaged(p, lambda d: d.replace(b"seed", b"sead")), maml()), ("intact", "cut or altered")
    ),
    "load what is empty": Bad(lambda p: mo.load(damaged(p, lambda d: b""), maml(), "last"), ("intact", "start again")),
    "resume what is cut": Bad(lambda p: train(out=damaged(p, lambda d: d[:99]), resume=True, iterations=2), ("intact", "copy")),
    # data
    "no such data": Bad(lambda p: mo.tasks.omniglot(root=str(p)), ("images_background and images_evaluation", "holds no")),
    "too many shots": Bad(lambda p: images(shots=3), ("3 shots and 1 query", "has 3")),
    "too many ways": Bad(lambda p: images(ways=5), ("5 ways", "split `train`")),
    "images of floats": Bad(lambda p: images(images=np.zeros((4, 3, 5, 5))), ("float64", "uint8")),
    "a class in two splits": Bad(lambda p: images(members={"train": np.arange(3), "test": np.arange(2, 4)}), ("train", "test")),
    "a sampler of one tensor": Bad(lambda p: function(lambda g, s: torch.rand(3)), ("returned Tensor", "((x, y), (x, y))")),
    "a sampler of ragged tasks": Bad(
        lambda p: function(lambda g, s: ((n := int(torch.randint(1, 99, (), generator=g))), (torch.rand(n, 1),) * 2, ONE)[1:]),
        ("same shapes", "episode"),
    ),
    "a sampler with torch's generator": Bad(
        lambda p: function(lambda g, s: ((torch.rand(3, 1), ONE[1]), ONE)), ("`mine` gave two different tasks", "generator=")
    ),
    "a sampler with numpy's generator": Bad(
        lambda p: function(lambda g, s: (ONE, (ONE[0], torch.tensor(np.random.rand(3, 1))))),
        ("episode 0 of split 'train'", "initial_seed()"),
    ),
    "a sampler with a generator of its own": Bad(
        lambda p: function(lambda g, s: ((torch.tensor(np.random.default_rng().random((3, 1))), ONE[1]), ONE)),
        ("two different",),
    ),
    "a sampler with python's generator": Bad(
        lambda p: function(lambda g, s: ((ONE[0] + random.random(), ONE[1]), ONE)), ("two different",)
    ),
    "a sampler of nothing": Bad(lambda p: function(lambda g, s: ((torch.rand(0, 1),) * 2, ONE)), ("(0, 1)", "one or more")),
    # recipes
    "an unknown key": Bad(lambda p: config.load("sinusoid-maml", ["algorithm.stesp=1"]), ("`stesp`", "mean `steps`?")),
    "a recipe that isn't": Bad(lambda p: config.load("sinusoid-mamal"), ("`sinusoid-mamal`", "did you mean `sinusoid-maml`?")),
}


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 40


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        TABLE[name].do(tmp_path)
    said = str(error.value)
    for word in TABLE[name].words:
        assert word in said
    assert "\n" not in said.strip() and len(said) < 450
    assert not (tmp_path / "r").exists()  # what is wrong from the start leaves no run behind


CLI = [
    (["train", "sinusoid-maml", "--set", "model.sizes=[2, 1]"], ("what the model reads",)),
    (["train", "sinusoid-maml", "--set", "train.clip=-1"], ("clip=-1",)),
    (["train", "sinusoid-maml", "--set", "algorithm.loss=cross_entropy"], ("float32", "class numbers")),
    (["evaluate", "run", "--split", "tset"], ("'tset'",)),
    (["evaluate", "run", "--episodes", "0"], ("episodes=0",)),
    (["evaluate", "run", "--steps", "-2"], ("steps=-2",)),
    (["evaluate", "damaged"], ("intact",)),
    (["train", "sinusoid-maml", "--out", "damaged", "--resume"], ("started with other values",)),
]


@pytest.mark.parametrize(("args", "words"), CLI, ids=[" ".join(args) for args, _ in CLI])
def test_on_the_command_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["train.iterations=1", "train.validate_every=0", "engine.batching=loop"]
    recipe = config.load("sinusoid-maml", settings)
    for name in ("run", "damaged"):
        meta, tasks = recipe.build()
        train(meta, tasks, out=name, recipe=recipe.text())
    for file in Path("damaged").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert json.loads(Path("run/state.json").read_text())["status"] == "finished"
