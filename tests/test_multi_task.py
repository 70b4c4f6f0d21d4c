"""Heads for training tasks, and gradients of tasks that conflict: weights, ways of computing them, training, new tasks."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd import aggregation

import metaoptim as mo
from metaoptim.core import trees
from metaoptim.core.reductions import NAMED, reduction_called
from metaoptim.core.types import Estimate, MetaOptimizer, Task
from metaoptim.engine import Engine
from metaoptim.engine.reducer import Reducer
from metaoptim.learners import Heads
from metaoptim.recipes import recipe as config
from metaoptim.recipes.schema import ConfigError
from metaoptim.runs import identity
from metaoptim.tasks import ImageTasks, from_table
from metaoptim.training.recorded import named_algorithm
from metaoptim.training.source import SharedTasks, source_of

pytestmark = pytest.mark.usefixtures("empty_cache")

CONFLICT = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
REDUCTIONS: Any = list(NAMED)


def weigh(name: str, jacobian: Tensor, key: int = 0) -> Tensor:
    found: Any = reduction_called(name)
    weights: Tensor = found.weigh(jacobian @ jacobian.mT, key)
    return weights


def images(rotations: bool = False) -> ImageTasks:
    """Classes of three alphabets of 2, 3 and 4 letters for training, and of one for each of the others."""
    rng = np.random.default_rng(0)
    drawings = rng.integers(0, 180, (15, 1, 8, 8)) + rng.integers(0, 76, (15, 9, 8, 8))
    names = [f"{group}/{i}" for group, count in zip("abcde", (2, 3, 4, 3, 3), strict=True) for i in range(count)]
    members = {"train": np.arange(9), "val": np.arange(9, 12), "test": np.arange(12, 15)}
    return ImageTasks("letters", drawings.astype(np.uint8), names, members, 3, 2, 4, rotations)


def conv() -> nn.Module:
    torch.manual_seed(0)
    return mo.nn.conv4(ways=3, size=8, filters=8)


def built(reduction: Any = "mean", **options: Any) -> MetaOptimizer:
    return mo.multi_task(conv(), mo.losses.cross_entropy, **{"heads": 3, "outputs": 4, "reduction": reduction, **options})


def train(method: MetaOptimizer, iterations: int = 3, tasks: Any = None, **options: Any) -> mo.Run:
    short: dict[str, Any] = {"tasks_per_step": 3, "validate_every": 0, "progress": False, "engine": {"runtime": "eager"}}
    return mo.train(method, tasks or images(), iterations=iterations, **{**short, "check": False, **options})


# --- Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "update", "within"),
    [("upgrad", (1.0, 0.75), (0.25, 0.75), 1e-3), ("mgda", (0.6, 0.4), (0.2, 0.4), 1e-9),
     ("pcgrad", (1.0, 0.75), (0.25, 0.75), 1e-9)],
)  # fmt: skip
def test_two_gradients_that_conflict(name: str, weights: Any, update: Any, within: float) -> None:
    found = weigh(name, CONFLICT)
    torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float64), atol=within, rtol=0)
    torch.testing.assert_close(found @ CONFLICT, torch.tensor(update, dtype=torch.float64), atol=within, rtol=0)


def test_pcgrad_and_mgda_are_torchjds_and_pcgrad_is_the_mean_of_what_that_sums() -> None:
    jacobian = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(weigh("mgda", jacobian) @ jacobian, aggregation.MGDA()(jacobian))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = aggregation.PCGrad()(jacobian)
    torch.testing.assert_close(6 * weigh("pcgrad", jacobian, 7) @ jacobian, expected)
    assert not torch.allclose(weigh("pcgrad", jacobian, 8) @ jacobian, expected / 6), "the order is drawn"


def test_upgrad_solves_its_quadratic_programs_at_every_scale() -> None:
    jacobian = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = weigh("upgrad", jacobian)
    for scale in (1e-6, 1e6):
        torch.testing.assert_close(weigh("upgrad", scale * jacobian), found)
    normed = (jacobian / jacobian.norm()).numpy()
    g = normed @ normed.T + 1e-4 * np.eye(4)
    solved = [
        minimize(lambda v: v @ g @ v, u, jac=lambda v: 2 * g @ v, bounds=[(low, None) for low in u], tol=1e-14).x
        for u in np.eye(4) / 4
    ]
    np.testing.assert_allclose(found.numpy(), np.sum(solved, 0), rtol=1e-3)
    assert (jacobian @ (found @ jacobian)).min() > -1e-3 * jacobian.norm(), "no task's loss rises"
    assert torch.equal(weigh("upgrad", torch.zeros(3, 2)), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_one_task_and_tasks_that_agree_are_left_alone_and_torchs_generator_too(name: str) -> None:
    before = torch.get_rng_state()
    torch.testing.assert_close(weigh(name, torch.tensor([[2.0, 1.0]])), torch.ones(1))
    if name != "mgda":  # which prefers short ones
        torch.testing.assert_close(weigh(name, torch.eye(3) + 0.1), torch.full((3,), 1 / 3))
    assert weigh(name, torch.tensor([[1.0], [torch.nan]])).isnan().all()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, module in (("torchjd", "torchjd.aggregation"), ("scipy", "scipy.optimize")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(
                ValueError, match=rf"needs {missing}, which isn't installed: pip install 'metaoptim\[multitask\]'"
            ):
                weigh("upgrad", CONFLICT)


@pytest.mark.parametrize("given", ["pcgard", 3, mo.reductions.UPGrad])
def test_an_unknown_reduction_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"is unknown: choose mean or sum, or .*upgrad, pcgrad, mgda"):
        replace(mo.maml(mo.nn.mlp((1, 4, 1)), mo.losses.mse), reduction=given)


@dataclass(frozen=True)
class Own:
    """A reduction whose `weigh` is at fault."""

    how: str

    def weigh(self, gram: Tensor, key: int) -> Any:
        if self.how == "NaN":
            return gram[0] * math.nan
        return gram @ torch.ones(7) if self.how == "fails" else gram if self.how == "a matrix" else [0.5, 0.5]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (
            "fails",
            r"failed \(test_multi_task.py:\d+, in weigh\): .*given the inner products of T gradients, here \(2, 2\)",
        ),
        ("a matrix", r"returned float32 \(2, 2\); expected a tensor of T weights"),
        ("NaN", r"returned weights that are not finite, of the inner products"),
        ("a list", r"returned \(0.5, 0.5\); expected a tensor of T weights"),
    ],
)
@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_a_fault_of_weigh_is_told_of_it(how: str, told: str, batching: str) -> None:
    method = replace(mo.maml(mo.nn.mlp((1, 4, 1)), mo.losses.mse), reduction=Own(how))
    batch = mo.tasks.sinusoid().sample("train", seed=0, start=0, count=2)
    with pytest.raises(ValueError, match=rf"`weigh` of the reduction Own\(how='{how}'\) {told}"):
        Engine(method, batching, "graph", "eager")(method.phi, batch)


# --- The engine ---------------------------------------------------------------------------------------------------------

QUICK = [("loop", "graph", "eager"), ("vmap", "graph", "eager"), ("vmap:2", "steps", "eager")]
TRACED = [
    ("loop", "graph", "trace"),
    ("workers:2", "steps", "trace"),
    ("workers:2:2", "graph", "trace"),
    ("vmap", "mixed", "trace"),
]


def maml(reduction: Any) -> MetaOptimizer:
    torch.manual_seed(1)
    return replace(mo.meta_sgd(mo.nn.mlp((1, 6, 1), "tanh"), mo.losses.mse, steps=2), reduction=reduction)


def waves(count: int = 5) -> Task:
    return trees.map_tensors(Tensor.double, mo.tasks.sinusoid().sample("train", seed=0, start=0, count=count))


def estimate(method: MetaOptimizer, batch: Task, way: tuple[str, str, str] = ("loop", "graph", "eager")) -> Estimate:
    torch.manual_seed(5)
    return Engine(method, *way)(method.phi, batch)


@pytest.mark.usefixtures("doubles", "reused_buffers")
@pytest.mark.parametrize("ways", [QUICK, pytest.param(TRACED, marks=pytest.mark.slow)], ids=["quick", "traced"])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_every_way_gives_the_weighed_sum_of_the_tasks_own_gradients(name: str, ways: list[tuple[str, str, str]]) -> None:
    method, batch = maml(name), waves()
    alone = [trees.flatten(estimate(maml("mean"), trees.index(batch, slice(t, t + 1))).grad) for t in range(5)]
    jacobian = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in alone])
    torch.manual_seed(5)
    key = int(torch.randint(2**31, (5,)).sum())
    expected = weigh(name, jacobian, key) @ jacobian
    mean = jacobian.mean(0)
    assert (expected - mean).norm() > 1e-3 * mean.norm(), "there is something to weigh"
    pairs = jacobian @ jacobian.mT
    for way in ways:
        found = estimate(method, batch, way)
        torch.testing.assert_close(torch.cat([g.flatten() for g in trees.flatten(found.grad)]), expected)
        assert found.info["conflicts"].item() == pytest.approx((pairs < 0).sum().item() / 20)
        torch.testing.assert_close(found.loss, found.info["losses"].mean())
        assert found.grad.rule.keys() == method.phi.rule.keys()


@dataclass(frozen=True)
class First:
    """A reduction of one's own: the first task's gradient alone."""

    def weigh(self, gram: Tensor, key: int) -> Tensor:
        return torch.eye(len(gram), dtype=gram.dtype)[0]


@pytest.mark.usefixtures("doubles")
def test_a_reduction_of_ones_own_and_any_estimator() -> None:
    batch = waves()
    for method in (maml(First()), replace(mo.reptile(mo.nn.mlp((1, 4, 1)), mo.losses.mse), reduction=First())):
        found, alone = estimate(method, batch), estimate(replace(method, reduction="mean"), trees.index(batch, slice(1)))
        for a, b in zip(trees.flatten(found.grad), trees.flatten(alone.grad), strict=True):
            torch.testing.assert_close(a, b)
    assert "reduction=First()" in repr(method)


def test_what_is_kept_is_counted_and_is_nothing_for_a_mean() -> None:
    phi = maml("mean").phi
    numbers = sum(x.nbytes for x in trees.flatten(phi))
    assert [Reducer(maml(r)).bytes(phi, 5) for r in ("mean", "sum", "upgrad")] == [0, 0, 2 * 5 * numbers]
    method = built("upgrad")
    shared = sum(p.nbytes for n, p in method.phi.weights.items() if method.learns(n))
    assert Reducer(method).bytes(method.phi, 3) == 2 * 3 * shared, "heads are added up"


# --- Heads --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", ["mean", *REDUCTIONS])
def test_the_body_is_weighed_and_each_head_has_its_own_gradient(name: str) -> None:
    method = built(name)
    batch = trees.map_tensors(
        lambda x: x.double() if x.is_floating_point() else x, source_of(method, images(), 0, 3)(0, method.phi)
    )
    body = {n: p.clone().requires_grad_() for n, p in method.phi.weights.items() if method.learns(n)}
    weight, bias = (method.phi.rule[f"heads.{n}"].clone().requires_grad_() for n in ("weight", "bias"))
    trunk = nn.Sequential(*list(conv().children())[:-1])
    rows, of_heads = [], []
    for t in range(3):
        (xs, ys, ns), (xq, yq, nq) = trees.index(batch, t)
        number = int(torch.cat([ns, nq]).unique())  # one alone
        z = torch.func.functional_call(trunk, {n.replace("block", ""): p for n, p in body.items()}, (torch.cat([xs, xq]),))
        loss = F.cross_entropy(z @ weight[number].T + bias[number], torch.cat([ys, yq]))
        *shared, w, b = torch.autograd.grad(loss, [*body.values(), weight, bias])
        assert w[[i for i in range(3) if i != number]].eq(0).all()
        rows.append(torch.cat([g.flatten() for g in shared]))
        of_heads.append((w, b))
    torch.manual_seed(5)
    key, jacobian = int(torch.randint(2**31, (3,)).sum()), torch.stack(rows)
    weights = torch.full((3,), 1 / 3) if name == "mean" else weigh(name, jacobian, key)
    for way in (*QUICK[:2], *([("workers:2", "graph", "trace")] if name == "upgrad" else [])):
        found = estimate(method, batch, way).grad
        torch.testing.assert_close(torch.cat([found.weights[n].flatten() for n in body]), weights @ jacobian)
        for head, own in zip(("weight", "bias"), zip(*of_heads, strict=True), strict=True):
            torch.testing.assert_close(found.rule[f"heads.{head}"], torch.stack(own).mean(0))


def test_a_batch_must_say_whose_head_it_is_for() -> None:
    method, episodes = built(), images().sample("train", seed=0, start=0, count=2)
    with pytest.raises(ValueError, match=r"there are 3 heads.*must say whose it is: give \(x, y, number\)"):
        mo.MetaModule(method).backward(episodes)
    mo.MetaModule(built(heads=1, outputs=None)).backward(episodes)


# --- Training tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotations", [False, True])
def test_images_of_an_alphabet_are_a_training_task(rotations: bool) -> None:
    tasks, turns = images(rotations), 4 if rotations else 1
    assert tasks.training_tasks() == (3 * turns, 4)
    heads = Heads(3 * turns, 4)
    batch = SharedTasks(tasks, 0, 3 * turns, heads)(2, built().phi)
    episodes = tasks.sample("train", seed=0, start=0, count=3 * turns)
    assert [p.shape[:2] for part in batch for p in part] == [p.shape[:2] for part in episodes for p in (*part, part[1])]
    x, y, number = (torch.cat(parts, 1) for parts in zip(*batch, strict=True))
    assert sorted(number[:, 0].tolist()) == list(range(3 * turns)), "each of them once"
    first = np.cumsum([0, 2, 3])
    for own_x, own_y, own in zip(x, y, number, strict=True):
        group, turn = divmod(int(own[0]), turns)
        assert (own == own[0]).all() and set(own_y.tolist()) <= set(range((2, 3, 4)[group]))
        for picture, label in zip((255 * own_x[:, 0]).round().int().numpy(), own_y, strict=True):
            known = np.rot90(tasks.images[first[group] + label], turn, axes=(1, 2))
            assert any(np.array_equal(picture, drawing) for drawing in known)
    again = SharedTasks(tasks, 0, 2, heads)(2, built().phi)
    assert not torch.equal(again.query[0][0], batch.query[0][0])


def test_rows_of_a_table_and_waves_that_come_again_are_training_tasks(tmp_path: Path) -> None:
    lines = ["task,x,y", *(f"t{t},{i},{100 * t + i}" for t in range(10) for i in range(6))]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    table = from_table(tmp_path / "table.csv", "task", "y", 2, 2, scale_target=False)
    assert table.training_tasks() == (6, None)
    x, y = table.of_training_tasks(np.array([4, 1]), 50, seed=0, start=0)
    assert x.shape == y.shape == (2, 50, 1)
    for found, task in zip(y // 100, (4, 1), strict=True):
        assert found.unique().tolist() == [float(table.names[table.members["train"][task]][1:])]
    assert len(y[0].unique()) == 6
    for wave in (mo.tasks.sinusoid(), mo.tasks.sinusoid(grid=20)):
        (x, y), (again, z) = (wave.of_training_tasks(np.array([7, 2]), 15, seed=0, start=start) for start in (0, 9))
        assert not torch.equal(x, again) and x.abs().max() <= 5
        both_x, both_y = torch.cat([x, again], 1), torch.cat([y, z], 1)
        basis = torch.cat([both_x.sin(), both_x.cos()], -1)
        residual = both_y - basis @ torch.linalg.lstsq(basis, both_y).solution
        assert residual.abs().max() < 1e-4, "one wave"


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [(images, {"heads": 4}, r"built with heads=4, and the tasks have 3: set heads=3 \(in a recipe: algorithm.heads=3\)"),
     (images, {"outputs": 5}, r"built with outputs=5, and the tasks have 4: set outputs=4"),
     (lambda: mo.tasks.from_function(lambda *a: None), {}, "this family draws new ones"),
     (lambda: replace(images(), names=list("abcdefghijklmno")), {}, "in no groups that could be training tasks")],
)  # fmt: skip
def test_other_training_tasks_are_refused(family: Any, options: dict[str, int], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        train(built(**options), tasks=family(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["omniglot-multi-task", "fertility-multi-task"])
def test_recipes_name_the_training_tasks_of_their_family(name: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAOPTIM_DATA", str(data_dir))
    monkeypatch.delenv("METAOPTIM_CACHE")
    mean = config.load(name).tables
    tasks: Any = config.load(name).experiment().tasks
    assert tasks.training_tasks() == (mean["algorithm"]["heads"], mean["algorithm"]["outputs"])
    for reduction in REDUCTIONS:
        tables = config.load(f"{name}-{reduction}").tables
        assert tables["algorithm"] == mean["algorithm"] | {"reduction": reduction}
        assert all(tables[table] == mean[table] for table in ("model", "tasks", "train", "evaluate", "engine"))


def test_the_benchmark_compares_recipes_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    script: Any = import_module("multi_task")
    for part in script.PARTS:
        words = script.command(part, 0.01, "0", "out")
        settings = [after for before, after in itertools.pairwise(words) if before == "--set"]
        for method in script.METHODS:
            name = f"{part.partition('-')[0]}-{method}"
            assert name in words and config.load(name, settings).tables["tasks"]["shots"] == int(part[-1])
    for module in ("multi_task", "shared"):
        monkeypatch.delitem(sys.modules, module)


# --- Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "pcgrad"])
def test_a_run_that_was_stopped_goes_on_to_the_same_floats(name: str, tmp_path: Path) -> None:
    whole = train(built(name), 4)
    train(built(name), 4, out=tmp_path / "run", on_step=lambda record: bool(record["step"] == 2))
    again = train(built(name), 4, out=tmp_path / "run", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(trees.flatten(whole.phi), trees.flatten(again.phi), strict=True))
    with pytest.raises(ValueError, match=r"reduction is .* in the run and UPGrad\(.*\) here"):
        train(built("upgrad"), 4, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["mean", *REDUCTIONS])
def test_a_run_says_what_it_is_and_the_doctor_looks_at_it(name: str) -> None:
    method = built(name)
    kind = identity.of_method(method)["reduction"]
    assert kind == "mean" if name == "mean" else kind["kind"] == type(method.reduction).__name__
    found = named_algorithm(method)
    assert (found["reduction"], found["heads"], found["outputs"]) == (name, 3, 4)
    report = mo.check(method, images(), modes=[("vmap", "graph", "eager")])
    assert report.ok and any("the mean of the tasks' gradients was checked" in note for note in report.notes) == (
        name != "mean"
    )


def test_a_gradient_that_is_not_finite_ends_training_with_a_sentence() -> None:
    method = maml("upgrad")
    broken = replace(method, phi=trees.map_tensors(lambda x: torch.full_like(x, torch.nan), method.phi))
    with pytest.raises(Exception, match=r"loss of task 0 .*is not finite"):
        train(broken, tasks=mo.tasks.sinusoid())


@pytest.mark.parametrize("name", ["mean", "upgrad"])
def test_new_tasks_get_a_head_of_their_own_on_features_that_help(name: str) -> None:
    losses: list[float] = []
    run = train(built(name), 25, lr=0.02, on_step=lambda record: losses.append(record["loss"]))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    support, _ = trees.index(images().sample("test", seed=0, start=0, count=1), 0)
    fresh = run.adapt(support, 0)
    assert fresh.get_parameter("head.weight").eq(0).all() and fresh.get_parameter("head.weight").shape == (3, 8)
    result = mo.evaluate(run, images(), episodes=12, steps=5, progress=False, baselines=[])
    assert result.mean - 2 * result.interval > 1 / 3
    body = "block0.0.weight"
    for adapts, same in (("head", True), ("all", False)):
        other = mo.Run(built(name, adapts=adapts, lr=0.3, steps=3), run.phi).adapt(support)
        assert torch.equal(other.get_parameter(body), run.phi.weights[body]) == same


WEIGHED = """
[algorithm]
name = "compose"
loss = "mse"
rule = {{name = "sgd", lr = 0.01}}
reduction = "{}"
[model]
name = "mlp"
[tasks]
name = "sinusoid"
[train]
iterations = 1
"""


def test_a_recipe_may_weigh_the_tasks_of_any_method() -> None:
    experiment = config.parse(WEIGHED.format("upgrad"), "mine").experiment()
    assert experiment.method.reduction == mo.reductions.UPGrad()
    assert "metaoptim.reductions" in experiment.modules, "whose code makes its numbers"


def test_a_recipe_may_name_a_reduction_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("class First:\n    def weigh(self, gram, key):\n        return gram[0] * 0 + 1\n")
    recipe = config.parse(WEIGHED.format("mine.py:First"), "mine")
    assert type(recipe.experiment().method.reduction).__name__ == "First"
    assert recipe.lying_in(tmp_path / "there").tables["algorithm"]["reduction"] == "../mine.py:First"
    with pytest.raises(ConfigError) as told:
        config.parse(WEIGHED.format("none_of_these"), "mine")
    assert str(told.value).count("upgrad") == 1 and "FILE.py:NAME" in str(told.value)
    with pytest.raises(ConfigError, match=r"unknown key `reduction` .*`name = \"compose\"` takes it, with a rule"):
        config.parse(WEIGHED.format("upgrad").replace('"compose"', '"maml"').replace("rule =", "# rule ="), "mine")
