"""The outer loop: it learns, repeats, keeps the best, stops where it should, and leaves the caller's things alone."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metaoptim as mo
from metaoptim.core.types import Batch, MetaOptimizer, MetaParams, Outer, Task
from metaoptim.gradcheck import in_the_data
from metaoptim.runs import progress
from metaoptim.runs.store import load_checkpoint
from metaoptim.training import TrainingError
from metaoptim.training.state import Training

SINUSOID = mo.tasks.sinusoid()
VMAP = {"batching": "vmap", "memory": "graph", "runtime": "eager"}
SMALL: dict[str, Any] = {
    "iterations": 6,
    "tasks_per_step": 3,
    "engine": VMAP,
    "progress": False,
}


def build(algorithm: str = "maml", seed: int = 0, **options: Any) -> MetaOptimizer:
    torch.manual_seed(seed)
    return mo.ALGORITHMS[algorithm](mo.nn.mlp([1, 16, 1]), mo.losses.mse, **options)


def leaves(meta: MetaParams) -> dict[str, Tensor]:
    return {**{f"weights/{n}": p for n, p in meta.weights.items()}, **{f"rule/{n}": p for n, p in meta.rule.items()}}


def same(a: MetaParams, b: MetaParams) -> bool:
    x, y = leaves(a), leaves(b)
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("algorithm", "options", "lr"),
    [
        ("maml", {"lr": 0.02}, 0.01),
        pytest.param("meta_sgd", {"low": 0.02, "high": 0.02}, 0.01, marks=pytest.mark.slow),
        pytest.param("reptile", {"lr": 0.02, "steps": 10, "inner": "sgd"}, None, marks=pytest.mark.slow),
    ],
)
def test_training_reduces_the_loss_after_adaptation(algorithm: str, options: dict[str, Any], lr: float | None) -> None:
    torch.manual_seed(0)
    meta = mo.ALGORITHMS[algorithm](mo.nn.mlp([1, 40, 40, 1]), mo.losses.mse, **options)
    run = mo.train(meta, SINUSOID, **{**SMALL, "iterations": 150, "tasks_per_step": 10}, lr=lr, validate_every=0)
    score = mo.evaluate(run, SINUSOID, episodes=200, progress=False)
    before = score.rows[1].mean("loss")[-1]
    # 3.00 is what the best function reaches that knows no task (see `sinusoid`).
    assert score.mean < 2.2 < 3.5 < before


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    runs = [
        mo.train(build(), SINUSOID, **SMALL, seed=seed, out=out) for seed, out in ((5, None), (5, tmp_path / "kept"), (6, None))
    ]
    assert same(runs[0].phi, runs[1].phi)
    assert not same(runs[0].phi, runs[2].phi)
    assert not same(runs[0].phi, build().phi)


def test_dropout_is_a_function_of_seed_and_step_and_off_in_validation() -> None:
    def once(seed: int) -> MetaParams:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))
        return mo.train(mo.maml(net, mo.losses.mse), SINUSOID, **SMALL, seed=seed, validate_every=3).phi

    assert same(once(0), once(0))

    seen: list[bool] = []
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    net[1].register_forward_hook(lambda module, x, y: seen.append(module.training))
    mo.train(mo.maml(net, mo.losses.mse), SINUSOID, **{**SMALL, "iterations": 1}, validate_every=1)
    assert set(seen) == {True, False} and net[1].training
    assert seen == sorted(seen, reverse=True)  # training first, then validation


def test_the_callers_generator_and_network_are_untouched() -> None:
    torch.manual_seed(3)
    net = mo.nn.conv4(ways=5, filters=2)
    net.requires_grad_(True)
    meta = mo.maml(net, mo.losses.cross_entropy, lr=0.1)
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 28, 28), np.uint8)
    tasks = mo.tasks.ImageTasks("noise", images, list("abcdefghij"), {"train": np.arange(5), "val": np.arange(5, 10)}, 5, 1, 1)
    weights = {n: x.clone() for n, x in net.state_dict().items()}
    before = torch.get_rng_state()
    run = mo.train(meta, tasks, **{**SMALL, "iterations": 2}, validate_every=1, validate_episodes=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, weights[n]) for n, x in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters()) and net.training
    assert not same(run.phi, meta.phi)
    assert same(meta.phi, MetaParams({n: p for n, p in net.named_parameters()}, {}))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda i: 1.0),
        ("linear", lambda i: 1 - i / 8),
        ("cosine", lambda i: 0.5 + 0.5 * math.cos(math.pi * i / 8)),
    ],
)
def test_schedules(tmp_path: Path, schedule: Any, expected: Callable[[int], float]) -> None:
    options = {**SMALL, "iterations": 8, "log_every": 1, "lr": 0.25, "optimizer": "SGD", "validate_every": 0}
    mo.train(build(), SINUSOID, **options, clip=1e-3, schedule=schedule, out=tmp_path / "run")
    rates = [record["lr"] for record in records(tmp_path / "run")]
    assert rates == pytest.approx([0.25 * expected(i) for i in range(8)], rel=1e-12)


def one_step(meta: MetaOptimizer, **options: Any) -> tuple[MetaParams, dict[str, Tensor]]:
    """φ after one step of `train`, and the meta-gradient of its batch."""
    run = mo.train(meta, SINUSOID, **{**SMALL, "iterations": 1, **options}, validate_every=0)
    module = mo.MetaModule(meta, "vmap", "graph", "eager")
    module.backward(SINUSOID.sample("train", seed=0, start=0, count=3))
    return run.phi, {n.replace(".", "/", 1): p.grad for n, p in module.named_parameters() if p.grad is not None}


def test_clip_scales_the_meta_gradient_down_to_its_norm() -> None:
    for clip, shrinks in ((1e-3, True), (1e6, False)):
        meta = build()
        after, grad = one_step(meta, optimizer="SGD", lr=1.0, clip=clip)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grad.values()))
        assert norm > 1e-2
        factor = clip / norm if shrinks else 1.0
        for name, p in leaves(after).items():
            torch.testing.assert_close(p, leaves(meta.phi)[name] - factor * grad[name], rtol=1e-5, atol=1e-7)


def test_optimizers_by_name_and_the_rule_never_decays() -> None:
    """AdamW's decay shrinks θ by lr · 0.01 in a step; on ψ its step must be plain Adam's."""
    meta = build("meta_sgd", low=5.0, high=5.0)
    decayed, grad = one_step(meta, optimizer="AdamW", lr=0.5)
    plain, _ = one_step(build("meta_sgd", low=5.0, high=5.0), optimizer="Adam", lr=0.5)
    assert all(torch.equal(p, plain.rule[n]) for n, p in decayed.rule.items())
    for name, p in meta.phi.weights.items():
        torch.testing.assert_close(decayed.weights[name], plain.weights[name] - 0.5 * 0.01 * p, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(decayed.weights[n], plain.weights[n]) for n in decayed.weights)
    assert grad.keys() == leaves(meta.phi).keys()


def test_an_algorithm_brings_its_own_outer_optimizer() -> None:
    torch.manual_seed(0)
    meta = mo.article_reptile(mo.nn.mlp([1, 4, 1]), mo.losses.mse, beta=0.5)
    assert meta.outer == Outer("SGD", 0.5, "constant")
    after, grad = one_step(meta)
    for name, p in leaves(after).items():
        torch.testing.assert_close(p, leaves(meta.phi)[name] - 0.5 * grad[name])


def test_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    """Steps that are far too large: the validation score is best early, and gets worse."""
    options = {**SMALL, "iterations": 12, "optimizer": "SGD", "lr": 0.3, "validate_every": 2, "validate_episodes": 60}
    run = mo.train(build(), SINUSOID, **options, clip=2.0, out=tmp_path / "run", log_every=1)
    scores = {r["step"]: r["val_loss"] for r in records(tmp_path / "run") if "val_loss" in r}
    assert list(scores) == [2, 4, 6, 8, 10, 12]
    best = min(scores, key=scores.__getitem__)
    assert best < 12
    assert (run.step, run.selection, run.path) == (best, "best", tmp_path / "run")
    last = mo.load(tmp_path / "run", build(), "last")
    assert (last.step, last.selection) == (12, "last") and not same(run.phi, last.phi)

    in_memory = mo.train(build(), SINUSOID, **options, clip=2.0)
    assert same(in_memory.phi, run.phi) and (in_memory.step, in_memory.selection) == (best, "best")

    episodes = SINUSOID.sample("val", seed=0, start=0, count=60)
    judged = mo.MetaModule(MetaOptimizer(run.method.learner, run.method.estimator, run.phi), "loop", "graph", "eager")
    assert judged.estimate(episodes).loss.item() == pytest.approx(scores[best], rel=1e-5)


def test_what_a_run_directory_holds(tmp_path: Path) -> None:
    mo.train(build(), SINUSOID, **{**SMALL, "iterations": 25}, out=tmp_path / "run", checkpoint_every=10, recipe="a = 1\n")
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 10, 20, 25]
    for line in lines:
        assert {"loss", "grad_norm", "lr", "seconds"} <= line.keys() and math.isfinite(line["loss"])
    assert "val_loss" in lines[-1]
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["status"], state["step"]) == ("finished", 25)
    assert (tmp_path / "run" / "recipe.toml").read_text() == "a = 1\n"
    assert {"torch", "python", "metaoptim", "threads"} <= json.loads((tmp_path / "run" / "environment.json").read_text()).keys()
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def poisoned(bad_step: int) -> mo.tasks.TaskFamily:
    """Lines through 0; the second task of one outer step holds a NaN."""
    drawn: list[int] = []
    good = mo.tasks.from_function(lambda g, s: drawn.append(g.initial_seed()) or (((torch.zeros(1, 1),) * 2),) * 2)
    good.sample("train", seed=0, start=2 * bad_step - 1, count=1)

    def sample(generator: torch.Generator, split: str) -> tuple[Batch, Batch]:
        x = torch.randn(6, 1, generator=generator)
        y = x.clone()
        if split == "train" and generator.initial_seed() == drawn[0]:
            y[0] = float("nan")
        return (x[:3], y[:3]), (x[3:], y[3:])

    return mo.tasks.from_function(sample, name="function")


def test_odd_data_are_found_in_whatever_they_are_part_of() -> None:
    def ones() -> Any:
        return {"x": torch.ones(3, 2), "n": torch.ones(3, dtype=torch.int64)}, {"x": torch.ones(3, 2), "none": torch.ones(3, 0)}

    batch = Task(*ones())
    assert in_the_data(batch) is None
    batch.query["x"][2, 0] = float("nan")
    assert in_the_data(batch) == (2, 'NaN, in `["x"]` of its query set')
    batch.support["x"][1, 1] = -float("inf")
    assert in_the_data(batch) == (1, 'infinity, in `["x"]` of its support set')
    pairs = Task((torch.ones(2, 1), torch.ones(2)), (torch.ones(2, 1), torch.tensor([1.0, float("inf")])))
    assert in_the_data(pairs) == (1, "infinity, in the targets of its query set")


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_a_loss_that_is_not_finite_stops_with_step_task_and_checkpoint(tmp_path: Path, how: str) -> None:
    options = {
        **SMALL,
        "tasks_per_step": 2,
        "engine": {"batching": how, "memory": "graph", "runtime": "eager"},
        "validate_every": 0,
        "checkpoint_every": 2,
    }
    with pytest.raises(TrainingError) as error:
        mo.train(build(), poisoned(4), **options, out=tmp_path / "run")
    said = str(error.value)
    assert said == (
        "step 4: the data of task 1 (episode 7 of seed 0) hold NaN, in the targets of its support set; the last good "
        f"checkpoint is step 3 in {tmp_path / 'run'}. Mend the data, and train again."
    )
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "failed"
    checkpoint = load_checkpoint(tmp_path / "run", "last")
    assert checkpoint.step == 3 and all(x.isfinite().all() for x in checkpoint.tensors.values())
    mended = mo.train(build(), poisoned(10**6), **options, out=tmp_path / "run", resume=True)
    whole = mo.train(build(), poisoned(10**6), **options)
    assert mended.step == whole.step == 6
    assert all(torch.equal(x, mended.phi.weights[n]) for n, x in whole.phi.weights.items())

    with pytest.raises(TrainingError, match=r"step 1: .* task 1 .*; no checkpoint was saved"):
        mo.train(build(), poisoned(1), **options)


class Unsafe(mo.rules.SGD):
    """Divides by the root of a running mean of squares, whose slope at 0 is infinite."""

    eps = 1e-8

    def init(self, psi: Any, weights: Any) -> Any:
        return {n: torch.zeros_like(w) for n, w in weights.items()}

    def update(self, psi: Any, grads: Any, state: Any, weights: Any, step: Any) -> Any:
        state = {n: 0.9 * state[n] + 0.1 * g.square() for n, g in grads.items()}
        return {n: -self.lr * g / (state[n].sqrt() + self.eps) for n, g in grads.items()}, state


class Safe(Unsafe):
    """The same, with the constant inside the root."""

    def update(self, psi: Any, grads: Any, state: Any, weights: Any, step: Any) -> Any:
        state = {n: 0.9 * state[n] + 0.1 * g.square() for n, g in grads.items()}
        return {n: -self.lr * g / (state[n] + self.eps).sqrt() for n, g in grads.items()}, state


def with_dead_units(rule: Any) -> MetaOptimizer:
    torch.manual_seed(0)
    net = mo.nn.mlp([1, 16, 1])
    with torch.no_grad():
        net.get_parameter("0.bias").fill_(-99.0)[0] = 1.0
    return mo.compose(net, mo.losses.mse, rule=rule, steps=2, name="mine")


def test_a_rule_with_an_infinite_slope_is_named_and_one_without_is_not() -> None:
    words = r"the rule Unsafe has an infinite slope where a gradient is 0.*\(v \+ eps\)\.sqrt\(\)"
    with (
        pytest.warns(UserWarning, match=f"the meta-gradient of mine is not finite: {words}"),
        pytest.raises(TrainingError, match=f"step 1: the meta-gradient is not finite, though every loss is; .*{words}"),
    ):
        mo.train(with_dead_units(Unsafe(0.001)), SINUSOID, **SMALL)
    mo.train(with_dead_units(Safe(0.001)), SINUSOID, **{**SMALL, "iterations": 1}, validate_every=0)


def test_a_step_that_raises_the_support_loss_is_told_with_one_that_lowers_it() -> None:
    """(w − 1)² from w = 3, or near it: a step goes to 1 + 2 (1 − 2 lr), which is as high at lr = 1."""

    def sample(generator: torch.Generator, split: str) -> tuple[Batch, Batch]:
        x = torch.ones(4, 1)
        return (x, x), (x, x)

    class Uphill(mo.rules.SGD):
        def update(self, psi: Any, grads: Any, state: Any, weights: Any, step: Any) -> Any:
            return {n: self.lr * g for n, g in grads.items()}, state

    def train(lr: float, rule: type[mo.rules.SGD] = mo.rules.SGD) -> None:
        net = nn.Linear(1, 1, bias=False)
        nn.init.constant_(net.weight, 3.0)
        method = mo.compose(net, mo.losses.mse, rule=rule(lr), steps=1)
        mo.train(method, mo.tasks.from_function(sample), **{**SMALL, "iterations": 1}, validate_every=0)

    train(0.9)
    with pytest.warns(UserWarning, match=r"raises the support loss from 4\.\d+ to 19\d \(.* 1/8 as long \(lr=0.5\) lowers it"):
        train(4.0)
    with pytest.warns(UserWarning, match=r"raises the support loss .* one 1/33554432 as long .* lowers it"):
        train(3e7)
    with pytest.warns(UserWarning, match=r"raises the support loss .* no shorter one lowers it either; does the rule return"):
        train(0.1, Uphill)


def test_any_failure_leaves_the_state_failed_and_lets_go_of_the_folder(tmp_path: Path) -> None:
    def sample(generator: torch.Generator, split: str) -> tuple[Batch, Batch]:
        raise LookupError("the user's own error")

    for _ in range(2):  # the second finds the folder free, and no run in it that came to anything
        with pytest.raises(LookupError, match="the user's own error"):
            mo.train(build(), mo.tasks.from_function(sample), **SMALL, out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "failed"
    mo.train(build(), SINUSOID, **SMALL, out=tmp_path / "run")
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 6]
    with pytest.raises(ValueError, match=r"holds a run already \(step 6 reached\)"):
        mo.train(build(), SINUSOID, **SMALL, out=tmp_path / "run")


def test_progress_goes_to_stderr_in_plain_words_or_not_at_all(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    run = mo.train(build(), SINUSOID, **{**SMALL, "progress": True}, validate_every=3)
    mo.evaluate(run, SINUSOID, episodes=3, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "\x1b" not in err and "\r" not in err
    assert "step 3: validation loss" in err and "step 6/6" in err and "(running mean)" in err and "steps/s" in err
    run = mo.train(build(), SINUSOID, **SMALL, validate_every=3)
    mo.evaluate(run, SINUSOID, episodes=3, progress=False)
    assert capfd.readouterr() == ("", "")


def test_worker_threads_end_before_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle ones would slow everything else in the process down."""
    alive: dict[str, list[int]] = {"advance": [], "validate": []}

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(Training, name)

        def watching(*args: Any, **options: Any) -> Any:
            before = count()
            result = original(*args, **options)
            alive[name].append(count() if name == "advance" else before)
            return result

        return watching

    def count() -> int:
        return sum(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())

    for name in alive:
        monkeypatch.setattr(Training, name, watched(name))
    workers = {"batching": "workers:2", "memory": "graph", "runtime": "trace"}
    mo.train(build(), SINUSOID, **{**SMALL, "iterations": 4, "engine": workers}, validate_every=2, validate_episodes=2)
    assert len(alive["advance"]) == 4 and min(alive["advance"]) > 0
    assert alive["validate"] == [0, 0]


@pytest.mark.usefixtures("empty_cache")
def test_what_is_being_measured_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(import_module("metaoptim.training.train"), "WAIT", 1)
    mo.train(build(), SINUSOID, **{**SMALL, "iterations": 2, "engine": {}, "progress": True}, validate_every=0)
    assert "measuring vmap, graph, eager" in capsys.readouterr().err
