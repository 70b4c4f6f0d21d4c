"""Meta-training of learned optimizers: what is learnt, what goes on after an interruption, what is reported and refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import metaoptim as mo
from metaoptim import lopt
from metaoptim.core import trees
from metaoptim.core.objectives import trajectory_mean
from metaoptim.core.types import MetaParams, Params
from metaoptim.estimators import Guarded, Truncated, Unroll, pes
from metaoptim.lopt.data import Data
from metaoptim.rules import SGD, ScheduleFreeAdamW, chain
from metaoptim.rules.momentum import Momentum
from metaoptim.rules.schedule import Schedule
from metaoptim.runs.store import load_checkpoint

pytestmark = pytest.mark.slow

EAGER = {"runtime": "eager", "batching": "vmap", "memory": "graph"}
RULE = chain(Momentum(1.0, 0.5), Schedule(2e-3))  # ψ is the logarithm of a step size
WINDOW, HORIZONS = 4, (4, 12)


def family(**changes: Any) -> lopt.Problems:
    return lopt.quadratics(3, steps=8).with_(**changes)


def learn(**changes: Any) -> Any:
    options: dict[str, Any] = {
        "rule": RULE, "problems": family(), "iterations": 12, "window": WINDOW, "horizons": HORIZONS, "problems_per_step": 3,
        "validate_every": 5, "validate_episodes": 4, "progress": False, "engine": EAGER,
    }  # fmt: skip
    options |= changes
    return lopt.meta_train(options.pop("rule"), options.pop("problems"), **options)


def log_lr(psi: Params) -> float:
    return psi["1.log_lr.all"].item()


def test_one_graph_serves_all_outer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the states of a matrix lie in memory otherwise after a step than at the start."""
    built: list[int] = []

    def trace(function: Any, inputs: Any) -> Any:
        built.append(len(inputs))
        return traced(function, inputs)

    graphs = import_module("metaoptim.engine.graphs.graphs")
    traced = graphs.trace
    monkeypatch.setattr(graphs, "trace", trace)
    toy = Data("toy", torch.randn(20, 1, 2, 2), torch.arange(20) % 2, 2)
    problems = lopt.mlp(toy, (3,), batch=4, steps=8)
    engine = {"runtime": "trace", "batching": "vmap", "memory": "graph"}
    learn(rule=lopt.SmallFC(), problems=problems, iterations=3, validate_every=0, engine=engine)
    assert len(built) == 1


class Stopped(Exception):
    """What a listener raises."""


@pytest.mark.parametrize("estimator", ["pes", "nres", "truncated"])
def test_a_resumed_run_is_the_uninterrupted_one(estimator: str, tmp_path: Path) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 7:
            raise Stopped

    learn(estimator=estimator, out=tmp_path / "whole")
    with pytest.raises(Stopped):
        learn(estimator=estimator, out=tmp_path / "cut", on_step=stop)
    learn(estimator=estimator, out=tmp_path / "cut", resume=True)
    whole, cut = (load_checkpoint(tmp_path / name, "last") for name in ("whole", "cut"))
    assert whole.step == cut.step == 12 and whole.tensors.keys() == cut.tensors.keys()
    assert any(name.startswith("carry/") for name in whole.tensors)
    assert all(torch.equal(x, cut.tensors[name]) for name, x in whole.tensors.items())


def test_a_run_goes_on_with_the_same_horizons_alone(tmp_path: Path) -> None:
    learn(out=tmp_path / "run", iterations=2)
    with pytest.raises(ValueError, match="horizons"):
        learn(out=tmp_path / "run", resume=True, horizons=(4, 16))


@pytest.mark.parametrize("estimator", ["pes", "truncated"])
def test_a_step_size_that_is_too_small_grows(estimator: str) -> None:
    method = lopt.learned_optimizer(RULE, family(), pes(WINDOW, 0.1))
    run = learn(estimator=estimator, sigma=0.1, pairs=4, iterations=40, lr=0.05, validate_every=0)
    assert log_lr(run.phi.rule) > log_lr(method.phi.rule) + 0.5


def test_several_families_are_trained_side_by_side() -> None:
    run = learn(problems=[family(), lopt.quadratics(2, uniform=True, steps=8)], iterations=2, on_validation=None)
    assert run.method.learner.problems.name == "mixture(quadratics-3, quadratics-2-uniform)"


def last_losses(problems: lopt.Problems, psi: Params, count: int) -> Tensor:
    """The judged loss after the last step of problems of split "val", in a loop by hand."""
    losses = []
    tasks = problems.sample("val", seed=0, start=0, count=count)
    for t in range(count):
        task = trees.index(tasks, t)
        matrix, target = (x[0, 0] for x in task.support["batches"])
        theta, m, lr = task.support["start"]["theta"][0], torch.zeros(3), psi["1.log_lr.all"].exp()
        for _ in range(problems.steps):
            m = 0.5 * m + 2 * matrix.T @ (matrix @ theta - target)
            theta = theta - lr * m
        losses.append((matrix @ theta - target).square().sum() / problems.unit)
    return torch.stack(losses)


def test_validation_trains_problems_of_split_val_for_the_familys_own_steps() -> None:
    told: list[dict[str, float]] = []
    run = learn(iterations=1, validate_every=1, on_validation=lambda step, scores: told.append(scores))
    expected = last_losses(family(), run.phi.rule, 4).clamp(max=3.0).mean().item()
    assert told[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_what_diverges_is_left_out_and_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[dict[str, Any]] = []
    wild = chain(Momentum(1.0), Schedule(1e30))
    run = learn(
        rule=wild, estimator="truncated", iterations=2, validate_every=0, progress=True, on_step=lambda r: seen.append(r)
    )
    assert all(r["diverged"] == 1 and r["discarded"] == 1 and r["loss"] == 3 for r in seen)
    method = lopt.learned_optimizer(wild, family(), Truncated(WINDOW))
    assert log_lr(run.phi.rule) == log_lr(method.phi.rule)
    assert "loss 3.0000 (running mean)  diverged 100.0 %  discarded 100.0 %" in capsys.readouterr().err


def test_an_estimator_without_a_window_goes_through_whole_runs() -> None:
    seen: list[dict[str, Any]] = []
    learn(estimator=Unroll(), window=None, horizons=None, iterations=2, on_step=lambda r: seen.append(r))
    assert seen[1]["loss"] > 0 and seen[1]["discarded"] == 0


def test_a_guard_of_ones_own_keeps_its_clip() -> None:
    seen: list[dict[str, Any]] = []
    learn(estimator=Guarded(Truncated(WINDOW), clip=1e-9), window=None, iterations=1, on_step=lambda r: seen.append(r))
    assert seen[0]["clipped"] == 1 and seen[0]["grad_norm"] <= 1.001e-9


@dataclass(frozen=True)
class Own:
    """A rule that does one thing wrong."""

    fault: str

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {"a": torch.zeros(1)}

    def init(self, psi: Params, weights: Params) -> Any:
        return {n: torch.zeros_like(w) for n, w in weights.items()}

    def update(self, psi: Params, grads: Params, state: Any, weights: Params, step: Any) -> Any:
        wrong = {"sum": {n: g.sum() for n, g in grads.items()}, "forget": {}, "none": None}
        if self.fault == "write":
            return grads, {n: m.mul_(0.9).add_(grads[n]) for n, m in state.items()}
        if self.fault == "shape":
            return {n: g @ g[:1] for n, g in grads.items()}, state
        found = {n: g * psi[f"a.{n}"] for n, g in grads.items()} if self.fault == "key" else wrong[self.fault]
        return None if found is None else (found, state)


class Half:
    """A rule without its beginning."""

    def update(self, psi: Params, grads: Params, state: Any, weights: Params, step: Any) -> Any:
        return grads, state


def test_the_estimator_is_named_and_psi_given_as_in_meta_training() -> None:
    start = learn(iterations=2, validate_every=0).phi.rule
    method = lopt.learned_optimizer(RULE, [family()], "truncated", window=WINDOW, psi=start)
    assert log_lr(method.phi.rule) == log_lr(start) and "Truncated(window=4)" in repr(method)
    assert log_lr(learn(iterations=1, lr=1e-9, psi=start).phi.rule) == pytest.approx(log_lr(start))
    whole = {"window": None, "horizons": None, "iterations": 2, "validate_every": 0}
    found = learn(estimator="unroll", objective="trajectory_mean", **whole).phi.rule
    mean = learn(estimator=Unroll(objective=trajectory_mean), **whole).phi.rule
    assert log_lr(found) == log_lr(mean) != log_lr(learn(estimator="unroll", **whole).phi.rule)


CASES: list[tuple[Callable[[], Any], str]] = [
    (lambda: learn(horizons=(4, 10)), r"horizons=\(4, 10\).*multiples of the window, which is 4"),
    (lambda: learn(horizons=(8, 4)), "the smaller one first"),
    (lambda: learn(horizons=8), r"horizons=\(8,\): they must be two multiples"),
    (lambda: learn(tasks_per_step=3), "tasks_per_step=3: .*give problems_per_step"),
    (lambda: family().with_(step=10), "has no `step`; did you mean `steps`"),
    (lambda: learn(window=3, horizons=(3, 6)), "window=3.*divide the inner steps, which are 8"),
    (lambda: learn(window=0), "window=0"),
    (lambda: learn(estimator="es"), "estimator='es': it must be one of pes, nres, truncated_es, truncated"),
    (lambda: learn(estimator=Truncated(4), window=2), "window=2 was given beside"),
    (lambda: learn(estimator="unroll", window=2), "window=2 was given beside 'unroll', which goes through whole runs"),
    (lambda: learn(objective="last"), "objective=.*EvolutionStrategy says itself which states it judges"),
    (lambda: learn(estimator=Unroll(), window=None), r"horizons=\(4, 12\): Unroll goes through whole runs, of 8 steps"),
    (lambda: learn(problems=[]), "the members are none"),
    (lambda: learn(problems_per_step=0), "problems_per_step=0"),
    (lambda: learn(rule="celo2"), "takes a rule, such as .*; found 'celo2'"),
    (lambda: learn(rule=Half()), "found Half, which has no `start` and no `init`"),
    (lambda: learn(rule=Momentum), "found the class Momentum, which is to be called"),
    (lambda: learn(rule=SGD(0.1)), r"SGD\(lr=0.1\) has no ψ, so nothing"),
    (lambda: learn(problems=mo.tasks.sinusoid()), r"training problems are families such as .*; found Sinusoid\("),
    (lambda: learn(problems=[family(), "quadratics"]), "found 'quadratics'"),
    (lambda: learn(estimator=pes, window=None), "estimator=pes: it must be one of .*, or an estimator, such as"),
    (lambda: learn(estimator=Unroll, window=None), "estimator=Unroll: it must be one of"),
    (lambda: learn(psi={"a": torch.zeros(1)}), "psi: '1.log_lr.all' is missing, where Chain"),
    (lambda: learn(iteration=3), "meta_train has no argument `iteration`; did you mean `iterations`"),
    (lambda: learn(foo=1), "meta_train has no argument `foo`: see those of"),
    (lambda: learn(rule=Own("sum")), r"`update` of the rule Own returns an update of shape \(\) for the weight `theta`"),
    (lambda: learn(rule=Own("forget")), "returns no update for the weight `theta`"),
    (lambda: learn(rule=Own("none")), "returned NoneType; it must return"),
    (lambda: learn(rule=Own("key")), "the rule Own finds no 'a.theta' where it looks for it"),
    (lambda: learn(rule=Own("write")), r"`update` of the rule Own writes into the state that it is given.*return new tensors"),
    (lambda: learn(rule=Own("shape")), r"the rule Own fails in test_lopt_training.py:\d+, in .*: inconsistent tensor size"),
]


@pytest.mark.parametrize(("call", "sentence"), CASES)
def test_what_makes_no_sense_is_refused(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_run_is_judged_where_its_rule_says() -> None:
    rule, phi = ScheduleFreeAdamW(0.1), MetaParams({}, {})
    learner, task = lopt.Optimizee(family(), rule), trees.index(family().sample("val", seed=0, start=0, count=1), 0)
    state = learner.init(phi, task.support)
    for k in range(2):
        grads = trees.map_tensors(torch.ones_like, state.fast)
        state = learner.apply(phi, state, grads, torch.zeros(()), torch.tensor(k))
    mean = rule.read_out({}, state.rule, state.fast)
    assert not torch.equal(mean["theta"], state.fast["theta"])
    assert torch.equal(learner.weights(phi, state)["theta"], mean["theta"])
    matrix, target = (x[0, 0] for x in task.query["batches"])
    expected = (matrix @ mean["theta"] - target).square().sum() / 3
    loss, _ = learner.loss(phi, state, task.support, task.query, torch.tensor(2))
    torch.testing.assert_close(loss, expected.clamp(max=3.0))
