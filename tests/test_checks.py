"""Arguments of the wrong kind, or out of all bounds, are one sentence from Python."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch

import metaoptim as mo
from metaoptim.core import checks
from metaoptim.estimators import Implicit, Unroll

SINUSOID = mo.tasks.sinusoid()
LOSS, RULES = mo.losses.mse, cast(Any, mo.rules)


def net() -> torch.nn.Module:
    return mo.nn.mlp((1, 4, 1))


def build(name: str, **options: Any) -> Any:
    return mo.ALGORITHMS[name](net(), LOSS, **options)


def train(method: Any = None, **options: Any) -> mo.Run:
    short: dict[str, Any] = {"iterations": 1, "tasks_per_step": 2, "validate_every": 0, "progress": False}
    return mo.train(method or build("maml"), SINUSOID, **short | options)


def evaluate(**options: Any) -> Any:
    method = build("maml")
    return mo.evaluate(mo.Run(method, method.phi), SINUSOID, **{"episodes": 2, "progress": False} | options)


def compose(**options: Any) -> Any:
    return mo.compose(net(), LOSS, **{"rule": mo.rules.SGD(0.1)} | options)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    # rules
    "a text for a step size": (lambda: RULES.SGD("0.1"), "lr='0.1': it must be a positive number"),
    "a truth for a step size": (lambda: RULES.SGD(True), "lr=True: it must be a positive number"),
    "a negative step size": (lambda: RULES.SGD(-0.1), "lr=-0.1: it must be a positive number"),
    "no step": (lambda: RULES.Momentum(0.0), "lr=0.0: it must be a positive number"),
    "a step that is no number": (lambda: RULES.Adam(float("nan")), "lr=nan: it must be a positive number"),
    "an endless step": (lambda: RULES.Adam(float("inf")), "lr=inf: it must be a positive number"),
    "beyond float32": (lambda: RULES.SGD(1e39), "lr=1e+39: it must be a positive number that float32 can hold"),
    "a whole number beyond all floats": (lambda: RULES.SGD(10**400), "it must be a positive number that float32 can hold"),
    "decay of a text": (lambda: RULES.Momentum(0.1, "0.9"), "decay='0.9': it must be a number from 0 to below 1"),
    "a mean that never forgets": (lambda: RULES.Adam(0.1, b2=1.0), "b2=1.0: it must be a number from 0 to below 1"),
    "nothing that keeps a root from zero": (lambda: RULES.Adam(0.1, eps=0.0), "eps=0.0: it must be a positive number"),
    "a text for a bound": (lambda: RULES.Clip(norm="1"), "norm='1': it must be a number that is finite."),
    # builders
    **{
        f"{name}: no inner step": (lambda name=name: build(name, steps=0), "steps=0: it must be a whole number, at least 1")
        for name in ("reptile", "article_reptile", "meta_sgd", "imaml")  # where nothing, or not all, would be learnt
    },
    "half a step": (lambda: build("maml", steps=1.5), "steps=1.5: it must be a whole number"),
    "true steps": (lambda: build("maml", steps=True), "steps=True: it must be a whole number"),
    "text steps": (lambda: compose(steps="2"), "steps='2': it must be a whole number, at least 0"),
    "half a batch": (lambda: compose(batch_size=2.5), "batch_size=2.5: it must be a whole number, at least 1"),
    "a text that pulls": (lambda: build("imaml", prox="1"), "prox='1': it must be a number that is finite and at least 0"),
    "fewer than no iterations": (
        lambda: compose(estimator=Implicit(iterations=-1)), "iterations=-1, damping=0.0: neither may be negative"
    ),
    "nothing is judged": (
        lambda: compose(estimator=Unroll(objective=lambda steps, outer_step: [0.0] * (steps + 1))),
        "the objective gave nothing but zeros for 1 inner steps: give at least one weight that counts",
    ),
    "half an iteration of a solver": (lambda: build("imaml", iterations=0.5), "iterations=0.5: it must be a whole number"),
    "bounds that are crossed": (lambda: build("meta_sgd", low=0.2, high=0.1), "low=0.2 is above high=0.1"),
    "a text for a truth": (lambda: build("meta_sgd", first_order="no"), "first_order='no': it must be True or False"),
    "an unknown inner optimizer": (lambda: build("reptile", inner="adma"), "inner='adma' is unknown: choose adam or sgd"),
    "unknown moments": (lambda: build("reptile", moments="rest"), "moments='rest' is unknown: choose carried or reset"),
    "no way to the mean": (lambda: build("article_reptile", beta=0), "beta=0: it must be a positive number"),
    "half a class": (lambda: build("protonet", ways=2.5), "ways=2.5: it must be a whole number"),
    "half a shot": (lambda: mo.tasks.sinusoid(shots=cast(int, 1.5)), "shots=1.5: it must be a whole number"),
    # train and evaluate
    "half an iteration": (lambda: train(iterations=2.5), "iterations=2.5: it must be a whole number"),
    "true tasks": (lambda: train(tasks_per_step=True), "tasks_per_step=True: it must be a whole number"),
    "validation before now": (lambda: train(validate_every=-1), "validate_every=-1: it must be a whole number, at least 0"),
    "half a seed": (lambda: train(seed=0.5), "The seed is 0.5; it must be a whole number"),
    "a text for a truth to train": (lambda: train(resume="no"), "resume='no': it must be True or False"),
    "a text for a bound to train": (lambda: train(clip="1"), "clip='1': it must be a positive number"),
    "a text for the outer step": (lambda: train(lr="0.1"), "outer lr='0.1': it must be a positive number"),
    "an outer step beyond float32": (lambda: train(lr=1e39), "outer lr=1e+39: it must be a positive number"),
    "a number for an optimizer": (lambda: train(optimizer=3), "optimizer is int; give a name, a class, or a function"),
    "an optimizer that asks again": (lambda: train(optimizer="LBFGS"), "LBFGS can't take outer steps"),
    "an optimizer of sparse gradients": (lambda: train(optimizer="SparseAdam"), "SparseAdam can't take outer steps"),
    "an optimizer that asks again, by its class": (lambda: train(optimizer=torch.optim.LBFGS), "LBFGS can't take outer steps"),
    "an optimizer of matrices": (
        lambda: train(optimizer="Muon"), "Muon can't take outer steps, for it takes matrices alone, and `weights.0.bias` has"
    ),
    "a text for the rule's outer step": (
        lambda: train(build("meta_sgd"), rule_lr="0.1"), "rule_lr='0.1': it must be a positive number"
    ),
    "half of patience": (lambda: train(early_stopping=1.5), "early_stopping=1.5: it must be a whole number, at least 1"),
    "half an episode": (lambda: evaluate(episodes=2.5), "episodes=2.5: it must be a whole number"),
    "half a step at test": (lambda: evaluate(steps=0.5), "steps=0.5: it must be a whole number, at least 0"),
    "a text for a seed": (lambda: evaluate(seed="0"), "The seed is '0'"),
    "a folder without a name": (lambda: train(out=""), "the name of the run's folder is empty"),
    "a folder that is no text": (lambda: train(out="a\udcff"), r"the name of the folder 'a\udcff' isn't UTF-8 text"),
    # beyond any machine
    "tasks beyond memory": (lambda: train(tasks_per_step=10**9), "tasks_per_step=1000000000: a batch of so many tasks"),
    "points beyond memory": (lambda: mo.tasks.sinusoid(shots=10**10), "one task of so many points would take"),
    "steps beyond patience": (lambda: build("reptile", steps=10**9), "would go through 1,000,000,000 inner steps"),
    "episodes beyond patience": (lambda: train(validate_episodes=10**10), "a validation would go through"),
    "scores beyond memory": (lambda: evaluate(episodes=10**10), "the scores would take"),
    "counts beyond 64 bits": (lambda: train(iterations=10**30), "and at most 9.22e+18"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "memory", lambda: 2**35)
    do, words = WRONG[name]
    with pytest.raises(ValueError) as error:
        do()
    said = str(error.value)
    assert words in said and "\n" not in said and said.endswith((".", "path", "folder"))


def test_states_beyond_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build("maml", steps=1000)
    monkeypatch.setattr(checks, "memory", lambda: 2**20)
    with pytest.raises(ValueError, match=r"steps=1000: the states of one inner run would take"):
        train(method)
    train(build("reptile", steps=100, lr=1e-6), check=False)  # it keeps none of them


def test_what_a_machine_can_just_do_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "memory", lambda: 2**30)
    checks.check_memory(2**30, "it")
    with pytest.raises(ValueError, match=r"^it would take 1,024\.0 GiB or more, and this machine has 1\.0 GiB of memory; ask"):
        checks.check_memory(2**40, "it")
    most = round(checks.PATIENCE / checks.INNER_STEP)
    checks.check_time(most, "it")
    with pytest.raises(ValueError, match=r"^it would go through 72,000,000 inner steps .*, which takes 2\.0 hours even"):
        checks.check_time(2 * most, "it")


def test_numpys_numbers_are_numbers(tmp_path: Any) -> None:
    method = mo.maml(net(), LOSS, lr=np.float64(0.1), steps=cast(int, np.int64(1)))
    run = train(method, iterations=np.int64(2), seed=np.int64(3), clip=np.float64(1.0), out=tmp_path / "run")
    assert mo.load(tmp_path / "run", method).seed == run.seed == 3


def test_numpys_single_floats_are_numbers_too(tmp_path: Any) -> None:
    """The run is the same as with Python's, and resumed with either; the recipe says them."""
    method, same = (mo.maml(net(), LOSS, lr=cast(float, lr)) for lr in (np.float32(0.25), 0.25))
    same = replace(same, phi=method.phi)
    settings: dict[str, Any] = {"lr": 0.5, "clip": 2.0, "engine": {"runtime": "trace", "batching": "vmap"}}
    numpys = settings | {"lr": np.float32(0.5), "clip": np.float32(2.0)}
    run = train(method, iterations=np.int64(2), out=tmp_path / "run", **numpys)
    again = train(same, iterations=2, **settings)
    assert all(torch.equal(x, run.phi.weights[n]) for n, x in again.phi.weights.items())
    recorded = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["train"]
    assert (recorded["iterations"], recorded["lr"], recorded["clip"]) == (2, 0.5, 2.0)
    assert mo.load(tmp_path / "run", same).step == 2
    assert train(same, iterations=3, resume=True, out=tmp_path / "run", **settings).step == 3
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    train(method, lr=np.float32(0.5), scheduler=scheduler, out=tmp_path / "scheduled")


def test_what_is_allowed() -> None:
    assert build("meta_sgd", low=0.1, high=0.1).phi.rule["lr.0.weight"].unique().tolist() == pytest.approx([0.1])
    train(compose(steps=0))
    compose(estimator=Implicit(iterations=0))  # ∂L/∂φ alone
    checks.check_counts(0, none=0, most=checks.MOST)
    checks.check_numbers(low=-checks.LARGEST, high=checks.LARGEST)
    checks.check_positive(low=checks.SMALLEST, high=checks.LARGEST)
    checks.check_fractions(none=0)
    train(build("maml", steps=0))  # joint training
    assert evaluate(steps=0).facts["steps"] == 0
