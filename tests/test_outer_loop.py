"""What the user may bring to the outer loop: optimizers, schedulers, functions that are told, and an early end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import metaoptim as mo
from metaoptim.core.types import MetaOptimizer, MetaParams
from metaoptim.runs.progress import Reporter, tracked
from metaoptim.runs.store import load_checkpoint
from metaoptim.training.outer_step import alike

SINUSOID = mo.tasks.sinusoid()
SHORT: dict[str, Any] = {
    "iterations": 8, "tasks_per_step": 2, "validate_every": 2, "validate_episodes": 3, "log_every": 1, "checkpoint_every": 1,
    "progress": False, "check": False, "engine": {"batching": "vmap", "memory": "graph", "runtime": "eager"},
}  # fmt: skip


def build() -> MetaOptimizer:
    torch.manual_seed(0)
    return mo.meta_sgd(mo.nn.mlp([1, 8, 1]), mo.losses.mse, low=0.01, high=0.02)


def train(**options: Any) -> mo.Run:
    return mo.train(build(), SINUSOID, **SHORT | options)


def same(a: MetaParams, b: MetaParams) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p.values(), q.values(), strict=True))


def rates(folder: Path) -> list[float]:
    return [json.loads(line)["lr"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- optimizers


def test_a_name_a_class_and_a_function_give_the_same_floats() -> None:
    options: dict[str, Any] = {"weight_decay": 0.3, "betas": (0.8, 0.9)}
    named = train(optimizer="AdamW", optimizer_options=options, lr=0.02).phi
    assert same(named, train(optimizer=torch.optim.AdamW, optimizer_options=options, lr=0.02).phi)
    made = train(optimizer=lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.3, betas=(0.8, 0.9))).phi
    assert same(named, made)
    assert not same(named, train(optimizer="AdamW", lr=0.02).phi)


def test_the_rule_has_a_step_size_of_its_own() -> None:
    step = {"optimizer": "SGD", "lr": 1e-3, "iterations": 1, "validate_every": 0}
    start, plain, other = build().phi, train(**step).phi, train(**step, rule_lr=1e-2).phi
    for name, p in start.rule.items():
        torch.testing.assert_close(other.rule[name] - p, 10 * (plain.rule[name] - p), rtol=1e-3, atol=1e-7)
    assert all(torch.equal(p, plain.weights[n]) for n, p in other.weights.items())


class NoLr(torch.optim.Adam):
    def __init__(self, params: Any) -> None:
        torch.optim.Adam.__init__(self, params)


class Lambda:
    """A scheduler's function that no checkpoint can keep."""

    def __init__(self) -> None:
        self.memory = torch.zeros(3)

    def __call__(self, epoch: int) -> float:
        return 1.0


OTHER = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an optimizer": ({"optimizer": OTHER}, "optimizer is SGD; give a name, a class, or a function"),
    "a function of nothing": ({"optimizer": lambda params: None}, "returned NoneType; it must return a torch optimizer"),
    "other parameters": ({"optimizer": lambda params: OTHER}, "does not hold `weights.0.weight`"),
    "options of a function": (
        {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1), "optimizer_options": {"momentum": 0.9}},
        "sets them itself",
    ),
    "lr beside a function": ({"optimizer": lambda params: torch.optim.SGD(params, lr=0.1), "lr": 0.2}, "in one place"),
    "an unknown option": ({"optimizer_options": {"momentun": 0.9}}, "can't be made: .*momentun"),
    "a class without lr": ({"optimizer": NoLr}, "can't be made: "),
    "a closure": ({"optimizer": lambda params: torch.optim.LBFGS(params[0]["params"] + params[1]["params"])}, "outer_step="),
    "no rule": ({"rule_lr": -0.1}, "rule_lr=-0.1: it must be a positive number"),
    "a schedule and a scheduler": ({"schedule": "linear", "scheduler": lambda o: None}, "give one of them"),
    "no scheduler": ({"scheduler": lambda o: None}, "scheduler gave NoneType"),
    "a plateau": ({"scheduler": lr_scheduler.ReduceLROnPlateau}, "steps without a metric"),
    "another optimizer's": ({"scheduler": lambda o: lr_scheduler.StepLR(OTHER, 1)}, "StepLR of another optimizer"),
    "a state with tensors": ({"scheduler": lambda o: lr_scheduler.LambdaLR(o, Lambda())}, "a checkpoint can't keep it"),
    "no patience": ({"early_stopping": 0}, "early_stopping=0: it must be a whole number, at least 1"),
    "nothing to stop by": ({"early_stopping": 3, "validate_every": 0}, "needs validations"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_can_not_be_is_a_sentence(name: str, tmp_path: Path) -> None:
    options, words = BAD[name]
    with pytest.raises(ValueError, match=words) as raised:
        train(**options, out=tmp_path / "run")
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_a_step_size_for_a_rule_that_has_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rule_lr=0\.1: this method's rule has no parameters"):
        mo.train(mo.maml(mo.nn.mlp([1, 8, 1]), mo.losses.mse), SINUSOID, **SHORT, rule_lr=0.1)


# ---- schedulers

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 6], gamma=0.1),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_after_a_kill_to_the_same_floats(name: str, tmp_path: Path) -> None:
    reference = SCHEDULERS[name](torch.optim.Adam(nn.Linear(1, 1).parameters(), lr=0.01))
    wanted = []
    for _ in range(8):
        wanted.append(reference.optimizer.param_groups[0]["lr"])
        reference.optimizer.step()
        reference.step()
    options: dict[str, Any] = {"scheduler": SCHEDULERS[name], "lr": 0.01}
    whole = train(**options, out=tmp_path / "whole")
    assert rates(tmp_path / "whole") == pytest.approx(wanted) and len(set(wanted)) > 1

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == 4:
            raise LookupError

    with pytest.raises(LookupError):
        train(**options, out=tmp_path / "killed", on_step=kill)
    resumed = train(**options, out=tmp_path / "killed", resume=True)
    assert rates(tmp_path / "killed") == rates(tmp_path / "whole")
    assert same(whole.phi, resumed.phi)
    a, b = (load_checkpoint(tmp_path / folder, "last") for folder in ("whole", "killed"))
    assert a.state == b.state and all(torch.equal(x, b.tensors[n]) for n, x in a.tensors.items())
    with pytest.raises(ValueError, match=r"train\.schedule is .* in the run and constant here"):
        train(lr=0.01, out=tmp_path / "killed", resume=True)


def test_what_json_makes_of_a_state_is_undone() -> None:
    state = {"milestones": {3: 1, 6: 1}, "betas": (0.9, 0.99), "list": [1, {"a": (1,)}], "none": None}
    assert alike(json.loads(json.dumps(state)), state) == state


def test_functions_with_other_settings_are_told_apart_on_resume(tmp_path: Path) -> None:
    train(optimizer=lambda params: torch.optim.AdamW(params, lr=0.02), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"groups\.weights\.lr is 0\.02 in the run and 0\.03 here"):
        train(optimizer=lambda params: torch.optim.AdamW(params, lr=0.03), out=tmp_path / "run", resume=True)


# ---- those who are told


def test_listeners_are_told_of_every_step_and_validation(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    scores: list[tuple[int, dict[str, float]]] = []
    train(on_step=records.append, on_validation=lambda step, found: scores.append((step, found)), out=tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, 9)) and all(math.isfinite(r["loss"]) for r in records)
    assert [step for step, _ in scores] == [2, 4, 6, 8]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["val_loss"] for r in logged if "val_loss" in r] == [found["loss"] for _, found in scores]


class Pruned(Exception):
    """As a tuner raises it."""


def test_what_a_listener_raises_reaches_the_caller_with_the_state_saved(tmp_path: Path) -> None:
    def prune(step: int, scores: dict[str, float]) -> None:
        if step == 4:
            raise Pruned

    with pytest.raises(Pruned):
        train(on_validation=prune, out=tmp_path / "run", checkpoint_every=100)
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "interrupted"
    assert load_checkpoint(tmp_path / "run", "last").step == 4
    resumed = train(out=tmp_path / "run", resume=True)
    assert same(resumed.phi, train().phi)


def test_a_listener_that_returns_true_ends_training(tmp_path: Path) -> None:
    train(on_step=lambda record: record["step"] == 3, out=tmp_path / "run", checkpoint_every=100)
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "finished"
    assert load_checkpoint(tmp_path / "run", "last").step == 3
    assert train(on_validation=lambda step, scores: True).step == 2


def test_training_ends_after_vain_validations_and_stays_ended(tmp_path: Path) -> None:
    """Steps that are far too large: the first validation is the best one."""
    options: dict[str, Any] = {"optimizer": "SGD", "lr": 0.5, "clip": 2.0, "iterations": 40, "validate_episodes": 30}
    steps: list[int] = []
    run = train(**options, early_stopping=2, out=tmp_path / "run", on_validation=lambda step, scores: steps.append(step))
    last = load_checkpoint(tmp_path / "run", "last")
    assert last.step == steps[-1] < 40 and steps[-1] == run.step + 4
    before = (tmp_path / "run" / "checkpoint.safetensors").stat().st_mtime_ns
    again = train(**options, early_stopping=2, out=tmp_path / "run", resume=True)
    assert (again.step, (tmp_path / "run" / "checkpoint.safetensors").stat().st_mtime_ns) == (run.step, before)

    with pytest.raises(LookupError):
        train(**options, early_stopping=2, out=tmp_path / "killed", on_validation=lambda step, scores: {}[step])
    resumed = train(**options, early_stopping=2, out=tmp_path / "killed", resume=True)
    assert same(run.phi, resumed.phi) and load_checkpoint(tmp_path / "killed", "last").state == last.state


# ---- what is left


class Clock:
    """A clock that stands still until it is told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("every", [0, 10, 25, 50])
@pytest.mark.parametrize("validation", [0.5, 30.0])
@pytest.mark.parametrize("done", [0, 500])
def test_time_left_is_true_after_a_tenth_of_the_work(every: int, validation: float, done: int) -> None:
    """Steps of 1 s, a first one of 60 s that plans, and validations."""
    total, clock, foretold = 1000, Clock(), {}
    report = Reporter(total, done, False, every, 1.0, clock)
    for step in range(done + 1, total + 1):
        clock.now += 60.0 if step == done + 1 else 1.0
        if every and (step % every == 0 or step == total):
            with report.validating(10):
                clock.now += validation
        report.advanced({"step": step, "loss": 1.0, "seconds": 1.0})
        foretold[step] = (clock.now, report.left)
    for step in range(done + (total - done) // 10, total - 20):
        now, left = foretold[step]
        assert left == pytest.approx(clock.now - now, rel=0.2), step


def test_validations_to_come_count_before_the_first_one() -> None:
    clock = Clock()
    report = Reporter(1000, 0, False, 500, 100.0, clock)  # 100 times as many episodes as a step has tasks
    for step in range(1, 101):
        clock.now += 1.0
        report.advanced({"step": step, "loss": 1.0, "seconds": 1.0})
    assert report.left == pytest.approx(900 + 2 * 50)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_log_has_a_line_now_and_then(enabled: bool, capsys: pytest.CaptureFixture[str]) -> None:
    clock, seen = Clock(), []
    for item in tracked(range(5, 10), "judging", enabled, clock):
        seen.append(item)
        clock.now += 15.0
    assert seen == [5, 6, 7, 8, 9]
    lines = ["judging: 2 of 5 done  0:00:45 left", "judging: 4 of 5 done  0:00:15 left"]
    assert capsys.readouterr().err.splitlines() == (lines if enabled else [])


def test_planning_and_validation_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaoptim.runs.progress.QUIET_SECONDS", -1.0)
    train(progress=True)
    shown = capsys.readouterr().err
    assert "validating on 3 episodes" in shown and "step 2: validation loss" in shown and "0:00:0" in shown and " left" in shown
