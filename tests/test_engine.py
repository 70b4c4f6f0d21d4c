"""The engine: how tasks are mapped, which way is chosen, what is refused, what comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metaoptim import objectives, rules, trees
from metaoptim.algorithms import article_maml, maml, meta_sgd, reptile
from metaoptim.engine import Choice, Engine, adapt, rest, rollout
from metaoptim.engine.choose import choose, key
from metaoptim.estimators import Displacement, Unroll
from metaoptim.learners import GradientLearner, Network
from metaoptim.losses import mse
from metaoptim.nn import mlp
from metaoptim.types import Meta, MetaOptimizer, Task


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("METAOPTIM_CACHE", str(tmp_path))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def net() -> nn.Module:
    return mlp((3, 4, 2), "tanh")


def tasks(count: int = 5) -> Task:
    def draw(rows: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, rows, 3), torch.randn(count, rows, 2)

    return Task(draw(6), draw(7))


def plain(batch: Task, change: Callable[[Task], Task]) -> str:
    """What the engine says of an altered batch."""
    with pytest.raises(ValueError) as raised:
        Engine(maml(net(), mse), "vmap")(maml(net(), mse).meta, change(batch))
    return str(raised.value)


# --- Choosing -----------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when a way is run."""

    def __init__(self) -> None:
        self.now, self.ran = 0.0, list[str]()

    def way(self, name: str, *seconds: float) -> Callable[[], None]:
        left = iter(seconds)

        def run() -> None:
            self.ran.append(name)
            self.now += next(left)

        return run

    def __call__(self) -> float:
        return self.now


def test_the_fastest_way_by_its_best_run_is_chosen() -> None:
    clock = Clock()
    ways = {"loop": clock.way("loop", 2.0, 2.0, 2.0), "vmap": clock.way("vmap", 5.0, 1.0, 3.0)}
    assert choose("k", ways, clock) == Choice("vmap", {"loop": 2.0, "vmap": 1.0})
    assert clock.ran == ["loop", "vmap"] * 3


def test_a_hopeless_way_is_run_once() -> None:
    clock = Clock()
    ways = {"loop": clock.way("loop", 10.0), "vmap": clock.way("vmap", 1.0, 1.0, 1.0)}
    assert choose("k", ways, clock).tasks == "vmap"
    assert clock.ran == ["loop", "vmap", "vmap", "vmap"]


def test_a_choice_is_read_again_for_the_same_key_alone(tmp_path: Path) -> None:
    clock = Clock()
    first = choose("k", {"loop": clock.way("loop", 1, 1, 1), "vmap": clock.way("vmap", 2, 2, 2)}, clock)
    clock.ran.clear()
    assert choose("k", {"loop": clock.way("loop"), "vmap": clock.way("vmap")}, clock) == first
    assert clock.ran == []
    assert [p.name for p in (tmp_path / "plans").iterdir()] == ["k.json"], "nothing temporary stays behind"
    choose("other", {"loop": clock.way("loop", 1, 1, 1)}, clock)
    assert clock.ran == ["loop"] * 3


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"tasks": "vmap"}', b'{"tasks": "gone", "seconds": {}}',
                b'{"tasks": "loop", "seconds": 3}', b'{"tasks": "loop", "seconds": null}']
)  # fmt: skip
def test_a_damaged_cache_is_measured_anew(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plans" / "k.json"
    path.parent.mkdir()
    path.write_bytes(content)
    clock = Clock()
    choice = choose("k", {"loop": clock.way("loop", 1, 1, 1)}, clock)
    assert choice == Choice("loop", {"loop": 1})
    assert json.loads(path.read_text()) == {"tasks": "loop", "seconds": {"loop": 1}}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "plans").write_text("a file where the folder should be")
    clock = Clock()
    assert choose("k", {"loop": clock.way("loop", 1, 1, 1)}, clock).tasks == "loop"


def test_the_key_tells_work_apart_and_is_the_same_for_the_same_work() -> None:
    batch, base = tasks(), maml(net(), mse)
    keys = {
        key(base, base.meta, batch),
        key(base, base.meta, tasks(4)),
        key(base, base.meta, trees.map_tensors(lambda x: x.float(), batch)),
        key(maml(net(), mse, steps=2), base.meta, batch),
        key(replace(base, estimator=Unroll(first_order=True)), base.meta, batch),
        key(base, maml(mlp((3, 5, 2)), mse).meta, batch),
    }
    assert len(keys) == 6
    again = [replace(base, estimator=Unroll(objective=objectives.multi_step([1.0]))) for _ in range(2)]  # two addresses
    assert len({key(m, m.meta, batch) for m in again}) == 1


def test_the_key_is_the_same_in_every_process() -> None:
    code = (
        "import torch\nfrom metaoptim import maml, nn, losses, Task\nfrom metaoptim.engine.choose import key\n"
        "m, x = maml(nn.mlp((1, 1)), losses.mse), torch.ones(2, 3, 1)\nprint(key(m, m.meta, Task((x, x), (x, x))))"
    )
    seen = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": s}
        )
        for s in ("1", "2")
    ]
    assert seen[0].stdout == seen[1].stdout != ""


def test_auto_decides_once_and_keeps_the_choice(tmp_path: Path) -> None:
    optimizer, batch = maml(net(), mse), tasks()
    engine = Engine(optimizer)
    estimate = engine(optimizer.meta, batch)
    assert engine.choice is not None
    assert engine.choice.seconds.keys() == {"loop", "vmap"}
    assert len(list((tmp_path / "plans").iterdir())) == 1
    named = Engine(optimizer, engine.choice.tasks)(optimizer.meta, batch)
    assert all(torch.equal(a, b) for a, b in zip(trees.flatten(estimate.grad), trees.flatten(named.grad), strict=True))


def test_a_restored_choice_is_taken_over_by_auto_alone() -> None:
    optimizer = maml(net(), mse)
    auto, given = Engine(optimizer), Engine(optimizer, "loop")
    for engine in (auto, given):
        engine.restore(Choice("vmap", {}))
    assert auto.choice == Choice("vmap", {})
    assert given.choice == Choice("loop", {})


def test_measuring_leaves_the_random_numbers_alone() -> None:
    # With dropout a first run, which measures, and a second, which reads the cache, must draw the same masks.
    optimizer = maml(nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.5), nn.Linear(9, 2)), mse)
    batch, losses = tasks(), []
    for _ in range(2):
        torch.manual_seed(7)
        losses.append(Engine(optimizer)(optimizer.meta, batch).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_every_task_has_its_own_dropout(how: str) -> None:
    optimizer = maml(nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.5), nn.Linear(9, 2)), mse)
    batch = trees.map_tensors(lambda x: x[:1].expand(4, *x.shape[1:]), tasks())
    assert len(set(Engine(optimizer, how)(optimizer.meta, batch).info["losses"].tolist())) == 4


# --- What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["", "vmap:", "vmap:0", "vmap:-1", "vmap:x", "vmap:²", "loop:2", "VMAP", "fast"])
def test_unknown_ways_are_refused(how: str) -> None:
    with pytest.raises(ValueError, match=rf"^engine\.tasks = '{how}' is not offered; choose auto, loop, vmap, or vmap:C"):
        Engine(maml(net(), mse), how)


def test_unknown_memory_and_runtime_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^engine\.memory = 'steps' is not offered; choose one of auto, graph\.$"):
        Engine(maml(net(), mse), memory="steps")
    with pytest.raises(ValueError, match=r"^engine\.runtime = 'compile' is not offered; choose one of auto, eager\.$"):
        Engine(maml(net(), mse), runtime="compile")


MALFORMED: dict[str, Callable[[Task], Task]] = {
    "unequal T": lambda b: Task(b.support, (b.query[0][:3], b.query[1][:3])),
    "unequal T within a pair": lambda b: Task((b.support[0], b.support[1][:4]), b.query),
    "no task": lambda b: trees.map_tensors(lambda x: x[:0], b),
    "no support": lambda b: Task((b.support[0][:, :0], b.support[1][:, :0]), b.query),
    "no query": lambda b: Task(b.support, (b.query[0][:, :0], b.query[1][:, :0])),
    "unequal S": lambda b: Task((b.support[0], b.support[1][:, :2]), b.query),
    "unequal Q": lambda b: Task(b.support, (b.query[0][:, :2], b.query[1])),
    "no axis of examples": lambda b: Task((b.support[0], torch.zeros(5)), b.query),
    "scalars": lambda b: trees.map_tensors(lambda x: x.sum(), b),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_batches_are_refused_with_one_sentence(fault: str) -> None:
    said = plain(tasks(), MALFORMED[fault])
    assert said.startswith("a batch of tasks needs support x (T, S, …) and y (T, S, …) and query x (T, Q, …)")
    assert "found leading axes support.x (" in said
    assert "\n" not in said


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_a_carry_for_another_number_of_tasks_is_refused(how: str) -> None:
    optimizer = reptile(net(), mse)
    engine = Engine(optimizer, how)
    carry = engine(optimizer.meta, tasks(5), engine.init(optimizer.meta, 5)).carry
    with pytest.raises(ValueError, match="the batch has 3 tasks and this algorithm carries its state for 5 task slots"):
        engine(optimizer.meta, tasks(3), carry)


def test_displacement_refuses_what_it_says_nothing_about() -> None:
    network = Network(net(), mse)
    with pytest.raises(ValueError, match=r"says nothing about the rule's own parameters \(lr\.0\.bias, …\); use Unroll"):
        replace(meta_sgd(net(), mse), estimator=Displacement())
    head = GradientLearner(network, rules.sgd(0.1), 1, adapts=lambda n: n.startswith("2."))
    with pytest.raises(ValueError, match=r"zero for weights that do not adapt, such as 0\.weight; .* or use Unroll"):
        MetaOptimizer(head, Displacement(), Meta(network.weights(), {}))
    MetaOptimizer(head, Displacement(), Meta(network.weights(), {}), learns=lambda n: n.startswith("2."))


# --- What comes back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["loop", "vmap", "vmap:2", "vmap:5", "vmap:9"])
def test_losses_come_one_per_task_in_order_and_as_their_mean(how: str) -> None:
    optimizer, batch = maml(net(), mse), tasks()
    estimate = Engine(optimizer, how)(optimizer.meta, batch)
    singles = [trees.map_tensors(lambda x: x[None], trees.index(batch, t)) for t in range(5)]
    alone = [Engine(optimizer, "loop")(optimizer.meta, single) for single in singles]
    losses = torch.stack([a.loss for a in alone])
    torch.testing.assert_close(estimate.info["losses"], losses)
    torch.testing.assert_close(estimate.loss, losses.mean())
    for name, g in estimate.grad.weights.items():
        torch.testing.assert_close(g, torch.stack([a.grad.weights[name] for a in alone]).mean(0))
    total = Engine(article_maml(net(), mse), how)
    found = total(optimizer.meta, batch)
    torch.testing.assert_close(found.loss, found.info["losses"].sum())


@pytest.mark.parametrize("how", ["loop", "vmap", "vmap:2"])
def test_the_carry_keeps_its_slots(how: str) -> None:
    optimizer = reptile(net(), mse, steps=3)
    engine, carry = Engine(optimizer, how), Engine(optimizer, how).init(optimizer.meta, 5)
    for i in range(1, 3):
        carry = engine(optimizer.meta, tasks(), carry).carry
        assert {x.shape[0] for x in trees.flatten(carry)} == {5}
        assert carry["t"].tolist() == [3 * i] * 5
    assert not torch.equal(carry["v"]["0.weight"][0], carry["v"]["0.weight"][1])
    torch.testing.assert_close(rest(carry)["v"]["0.bias"], carry["v"]["0.bias"].mean(0))
    assert trees.flatten(Engine(maml(net(), mse), how)(maml(net(), mse).meta, tasks()).carry) == []


@pytest.mark.parametrize("how", ["loop", "vmap", "vmap:2"])
def test_rollout_judges_every_step_and_agrees_with_adapt(how: str) -> None:
    optimizer, batch = maml(net(), mse, lr=0.2), tasks()
    scores = rollout(optimizer, optimizer.meta, batch, (), 4, how)
    assert scores["loss"].shape == (5, 5)
    network = Network(net(), mse)
    for t in range(5):
        task: Task = trees.index(batch, t)
        for k in range(5):
            weights = adapt(optimizer, optimizer.meta, task.support, (), k)
            torch.testing.assert_close(scores["loss"][t, k], network(weights, task.query)[0])
    assert not scores["loss"].requires_grad
