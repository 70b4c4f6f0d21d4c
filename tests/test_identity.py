"""What a run says that it is: everything that makes it another run, in JSON, and nothing that differs between processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import metaoptim as mo
from metaoptim.algorithms.example import example_net
from metaoptim.core.types import MetaOptimizer
from metaoptim.runs import identity
from metaoptim.runs.checkpoint import strict_json
from metaoptim.training.recorded import named_algorithm


def net(*sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return mo.nn.mlp(sizes or (1, 4, 1))


def compose(**options: Any) -> MetaOptimizer:
    return mo.compose(options.pop("net", None) or net(), mo.losses.mse, **{"rule": mo.rules.SGD(0.1)} | options)


class Plain:
    """A rule that is no dataclass."""

    def __init__(self, lr: float, scale: float = 1.0) -> None:
        self.lr, self.scale, self.memory = lr, torch.tensor([scale] * 20), [1, 2]

    start = mo.rules.SGD.start
    init = mo.rules.SGD.init
    update = mo.rules.SGD.update


def half_frozen() -> nn.Module:
    made = net()
    made.get_submodule("0").requires_grad_(False)
    return made


def weighted(steps: int, outer_step: Any, scale: float = 1.0) -> list[float]:
    return [0.0, scale]


CHANGES: dict[str, tuple[Callable[[], MetaOptimizer], Callable[[], MetaOptimizer], str]] = {
    "lr": (compose, lambda: compose(rule=mo.rules.SGD(0.4)), "learner.rule.lr"),
    "a rule that is no dataclass": (lambda: compose(rule=Plain(0.1)), lambda: compose(rule=Plain(0.2)), "learner.rule.lr"),
    "its tensors": (lambda: compose(rule=Plain(0.1)), lambda: compose(rule=Plain(0.1, 2.0)), "learner.rule.scale"),
    "steps": (compose, lambda: compose(steps=2), "learner.steps"),
    "a chain": (
        lambda: compose(rule=mo.rules.chain(mo.rules.Clip(norm=1.0), mo.rules.SGD(0.1))),
        lambda: compose(rule=mo.rules.chain(mo.rules.Clip(norm=2.0), mo.rules.SGD(0.1))), "learner.rule.rules",
    ),
    "policy": (compose, lambda: compose(normalisation="frozen"), "learner.model.normalisation"),
    "layers": (compose, lambda: compose(net=net(1, 5, 1)), "learner.model.net.0"),
    "loss": (lambda: mo.maml(net(), mo.losses.mse), lambda: mo.maml(net(), nn.functional.l1_loss), "learner.model.loss"),
    "masks": (compose, lambda: compose(adapts="head"), "learner.adapts"),
    "frozen layers": (compose, lambda: compose(net=half_frozen()), "learner.adapts"),
    "learnt": (compose, lambda: compose(learns="body"), "learns"),
    "estimator": (compose, lambda: compose(estimator=mo.estimators.Unroll(first_order=True)), "estimator.first_order"),
    "objective": (
        lambda: compose(estimator=mo.estimators.Unroll(objective=partial(weighted, scale=0.5))),
        lambda: compose(estimator=mo.estimators.Unroll(objective=partial(weighted, scale=0.7))), "estimator.objective.scale",
    ),
    "reduction": (compose, lambda: compose(reduction="sum"), "reduction"),
    "a closed form": (
        lambda: mo.protonet(net(), mo.losses.cross_entropy, ways=2),
        lambda: mo.protonet(net(), mo.losses.cross_entropy, ways=3), "learner.fit.ways",
    ),
    "name": (compose, lambda: compose(name="other"), "algorithm"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_makes_another_method_is_named_first(name: str) -> None:
    one, other, field = CHANGES[name]
    described = [json.loads(strict_json(identity.of_method(build()))) for build in (one, one, other)]
    assert described[0] == described[1] == identity.of_method(one())
    assert next(identity.differences(described[0], described[2]))[0] == field
    assert not list(identity.differences(described[0], described[1]))


def test_initial_weights_and_modes_make_no_other_method() -> None:
    torch.manual_seed(7)
    other = mo.nn.mlp((1, 4, 1)).eval()
    assert identity.of_method(compose()) == identity.of_method(compose(net=other))


@pytest.mark.parametrize("name", mo.ALGORITHMS)
def test_an_algorithm_is_found_again_from_what_it_is(name: str) -> None:
    method = mo.ALGORITHMS[name](example_net(name), mo.losses.cross_entropy)
    text = strict_json(identity.of_method(method))
    assert " at 0x" not in text and json.loads(text) == identity.of_method(method)
    assert named_algorithm(method)["name"] == name
    assert named_algorithm(replace(method, reduction="sum", name="maml")) == {}, (
        "a changed one is not passed off as the original"
    )


def test_numbers_of_every_kind_are_json() -> None:
    found = identity.described({"a": np.int64(3), "b": float("inf"), "c": torch.arange(3), "d": {2, 1}, 5: (1, None), "f": len})
    assert json.loads(json.dumps(found)) == found
    assert found == {"a": 3, "b": "inf", "c": [0, 1, 2], "d": ["1", "2"], "5": [1, None], "f": "len"}


def test_a_run_without_a_record_of_what_it_is_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did not record what a run is; train it again"):
        identity.saved_in({"method": "a hash"}, tmp_path)


def test_tasks_and_seeds_are_told_apart(tmp_path: Path) -> None:
    short: dict[str, Any] = {"iterations": 1, "tasks_per_step": 2, "validate_every": 0, "progress": False}
    runs = [mo.train(compose(), mo.tasks.sinusoid(), **short, seed=seed, out=tmp_path / str(seed)) for seed in (0, 1)]
    assert mo.evaluate(runs, mo.tasks.sinusoid(), episodes=2, progress=False).facts["seeds"] == [0, 1]
    other = mo.train(compose(), mo.tasks.sinusoid(shots=5), **short, seed=2)
    with pytest.raises(
        ValueError, match=r"tasks\.options\.shots is 10 in the first run and 5 in run 3; evaluate them one by one"
    ):
        mo.evaluate([*runs, other], mo.tasks.sinusoid(), episodes=2, progress=False)
    longer = mo.train(compose(), mo.tasks.sinusoid(), **short | {"iterations": 2}, seed=2)
    with pytest.raises(ValueError, match=r"train\.iterations is 1 in the first run and 2 in run 2"):
        mo.evaluate([mo.load(tmp_path / "1", compose()), longer], mo.tasks.sinusoid(), episodes=2, progress=False)
    with pytest.raises(ValueError, match=r"tasks\.options\.shots is 10 in the run and 5 here"):
        mo.train(compose(), mo.tasks.sinusoid(shots=5), **short, out=tmp_path / "0", resume=True)


def test_the_options_of_torchs_losses_tell_methods_apart_and_what_is_annealed_does_not() -> None:
    net = nn.Linear(1, 1)
    saved, here = (identity.of_method(mo.maml(net, nn.HuberLoss(delta=delta))) for delta in (1.0, 9.0))
    ((field, _, _),) = identity.differences(saved, here)
    assert field.startswith("learner.model.loss")
    before = identity.of_method(mo.maml(net, mo.losses.mse))
    vars(net)["temperature"] = 2.0
    assert identity.of_method(mo.maml(net, mo.losses.mse)) == before


class Warm(nn.Module):
    """Its temperature is an attribute like any other, and so is a constant of its class."""

    scale = 1

    def __init__(self, temperature: float = 1.0) -> None:
        nn.Module.__init__(self)
        self.layer, self.T, self.note = nn.Linear(1, 1), temperature, None

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x) * self.scale / self.T


def warm(temperature: float = 1.0, weight: float = 1.0) -> MetaOptimizer:
    def loss(output: torch.Tensor, target: torch.Tensor) -> Any:
        return weight * mo.losses.mse(output, target)

    torch.manual_seed(0)
    return mo.maml(nn.Sequential(nn.Linear(1, 1), Warm(temperature)), loss)


SHORT: dict[str, Any] = {
    "iterations": 2, "tasks_per_step": 2, "validate_every": 0, "progress": False,
    "engine": {"batching": "loop", "memory": "graph", "runtime": "eager"},
}  # fmt: skip


def test_attributes_that_differ_from_those_at_the_start_are_told(tmp_path: Path) -> None:
    mo.train(warm(), mo.tasks.sinusoid(), **SHORT, out=tmp_path)
    assert identity.attributes(warm()) == {"net.1.scale": 1, "net.1.T": 1.0, "net.1.note": None, "loss.weight": 1.0}
    mo.load(tmp_path, warm())  # without a warning, which would be an error here
    told = r"began with other attributes: net\.1\.T was 1\.0 and is 5\.0 here; loss\.weight was 1\.0 and is 2\.0 here\. Set"
    with pytest.warns(UserWarning, match=told) as caught:
        mo.load(tmp_path, warm(5.0, 2.0))
    assert len(caught) == 1
    for iterations in (2, 3):  # a finished run, and one that goes on
        with pytest.warns(UserWarning, match=r"net\.1\.T was 1\.0 and is 5\.0 here") as caught:
            mo.train(warm(5.0), mo.tasks.sinusoid(), **SHORT | {"iterations": iterations}, out=tmp_path, resume=True)
        assert len(caught) == 1
    mo.load(tmp_path, warm())  # what the run began with stays known


CODE = """
def helper(x):
    return x.square()

SCALE = 1.0

def squared(output, target):
    return SCALE * helper(output - target).mean()

class Scaled(nn.Module):
    def forward(self, x):
        return 2.0 * x

@dataclass(frozen=True)
class Descent:
    lr: float = 0.1

    def start(self, weights, generator):
        return {}

    def init(self, psi, weights):
        return {}

    def update(self, psi, grads, state, weights, step):
        return {n: -self.lr * g for n, g in grads.items()}, state
"""


def by_code(monkeypatch: pytest.MonkeyPatch, edit: tuple[str, str] = ("output", "output")) -> MetaOptimizer:
    """A method of code as it stands in a user's file, in which something may have been replaced."""
    assert edit[0] in CODE
    found: dict[str, Any] = {"nn": nn, "dataclass": dataclass, "__name__": "edited"}
    monkeypatch.setitem(sys.modules, "edited", ModuleType("edited"))
    exec(compile(CODE.replace(*edit), "edited.py", "exec"), found)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 1), found["Scaled"]())
    method = mo.maml(net, found["squared"])
    learner: Any = method.learner
    return replace(method, learner=replace(learner, rule=found["Descent"]()))


def test_edited_code_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mo.train(by_code(monkeypatch), mo.tasks.sinusoid(), **SHORT, out=tmp_path)
    told = ("(output, target):\n", '(output, target):\n    """The mean square."""\n    # of all\n')
    for same in (told, ("helper(output - target)", "helper( ( output-target ) )"), ("def squared(", "\n\n\ndef squared(")):
        mo.load(tmp_path, by_code(monkeypatch, same))  # without a warning, which would be an error here
    edits = {
        "squared": (").mean()", ").sum()"), "helper": ("x.square()", "x.abs()"), "Scaled.forward": ("2.0", "3.0"),
        "Descent.update": ("-self.lr * g", "-self.lr * g.sign()"),
    }  # fmt: skip
    for name, edit in edits.items():
        with pytest.warns(UserWarning, match=rf"the run in .* was trained by other code of {name}; go on only if") as caught:
            mo.load(tmp_path, by_code(monkeypatch, edit))
        assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"began with other attributes: loss\.SCALE was 1\.0 and is 2\.0 here"):
        mo.load(tmp_path, by_code(monkeypatch, ("SCALE = 1.0", "SCALE = 2.0")))
    with pytest.warns(UserWarning, match="was trained by other code of squared; go on"):
        mo.train(by_code(monkeypatch, edits["squared"]), mo.tasks.sinusoid(), **SHORT, out=tmp_path, resume=True)


def test_what_is_annealed_in_training_is_not_told(tmp_path: Path) -> None:
    method = warm()
    net: Any = method.learner

    def anneal(record: dict[str, Any]) -> None:
        net.model.net[1].T = 3.0

    mo.train(method, mo.tasks.sinusoid(), **SHORT, out=tmp_path, on_step=anneal)
    for other in (warm(), method, warm(3.0)):
        mo.load(tmp_path, other)
    mo.train(warm(), mo.tasks.sinusoid(), **SHORT, out=tmp_path, resume=True)
    with pytest.warns(UserWarning, match=r"net\.1\.T was 1\.0 and is 5\.0 here"):
        mo.load(tmp_path, warm(5.0))


@pytest.mark.parametrize(
    "options",
    [{"cosine": False}, {"multi_step_until": 0, "per_step_norms": False}, {"first_order_until": 7, "lr": 0.2}],
    ids=str,
)
def test_parts_that_are_left_out_are_found_again(options: dict[str, Any]) -> None:
    method = mo.maml_plus_plus(example_net("maml_plus_plus"), mo.losses.cross_entropy, steps=2, **options)
    found = named_algorithm(method)
    assert found["name"] == "maml_plus_plus" and found["steps"] == 2
    assert {key: found[key] for key in options} == options
