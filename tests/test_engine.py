"""The engine: how tasks are mapped, which way is chosen, what is refused, what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from metaoptim import rules
from metaoptim.algorithms import article_maml, maml, meta_sgd, reptile
from metaoptim.core import trees
from metaoptim.core.losses import mse
from metaoptim.core.types import MetaOptimizer, MetaParams, Task
from metaoptim.engine import Engine, adapt, rollout
from metaoptim.engine import heritage as heritage_of
from metaoptim.estimators import Displacement
from metaoptim.learners import GradientLearner, Network
from metaoptim.nn import mlp

pytestmark = pytest.mark.usefixtures("doubles", "empty_cache")


def net() -> nn.Module:
    return mlp((3, 4, 2), "tanh")


def tasks(count: int = 5) -> Task:
    def draw(rows: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, rows, 3), torch.randn(count, rows, 2)

    return Task(draw(6), draw(7))


def plain(batch: Task, change: Callable[[Task], Task]) -> str:
    """What the engine says of an altered batch."""
    with pytest.raises(ValueError) as raised:
        Engine(maml(net(), mse), "vmap", "graph", "eager")(maml(net(), mse).phi, change(batch))
    return str(raised.value)


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_every_task_has_its_own_dropout(how: str) -> None:
    optimizer = maml(nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.5), nn.Linear(9, 2)), mse)
    batch = trees.map_tensors(lambda x: x[:1].expand(4, *x.shape[1:]), tasks())
    assert len(set(Engine(optimizer, how, "graph", "eager")(optimizer.phi, batch).info["losses"].tolist())) == 4


# --- What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    ["", "vmap:", "vmap:0", "vmap:-1", "vmap:x", "vmap:²", "loop:2", "VMAP", "fast", "workers", "workers:0", "workers:2:0"],
)
def test_unknown_ways_are_refused(how: str) -> None:
    with pytest.raises(ValueError, match=rf"^engine\.batching = '{how}' is not offered; choose auto, loop, vmap, vmap:C"):
        Engine(maml(net(), mse), how, "graph", "eager")


def test_unknown_memory_and_runtime_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^engine\.memory = 'none' is not offered; choose one of auto, graph, steps, mixed\.$"
    ):
        Engine(maml(net(), mse), memory="none")
    with pytest.raises(
        ValueError, match=r"^engine\.runtime = 'jit' is not offered; choose one of auto, eager, trace, compile\.$"
    ):
        Engine(maml(net(), mse), runtime="jit")
    with pytest.raises(ValueError, match=r"^engine\.precision = 'half' is not offered; choose one of full, bf16\.$"):
        Engine(maml(net(), mse), precision="half")
    with pytest.raises(ValueError, match=r"^engine\.budget=0: it must be a positive number"):
        Engine(maml(net(), mse), budget=0)


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^engine\.batching = 'workers:2' needs runtime = \"trace\" or \"compile\""):
        Engine(maml(net(), mse), "workers:2", runtime="eager")
    optimizer = reptile(net(), mse)
    with pytest.raises(
        ValueError, match=r"^engine\.memory = 'steps' is not offered by Displacement; choose one of auto, graph"
    ):
        Engine(optimizer, "loop", "steps")(optimizer.phi, tasks())


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
    assert said.startswith(
        "a batch of tasks needs a support with tensors (T, S, …) and a query with tensors (T, Q, …), such as"
    )
    assert "found leading axes support.x (" in said
    assert "\n" not in said


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_a_carry_for_another_number_of_tasks_is_refused(how: str) -> None:
    optimizer = reptile(net(), mse)
    engine = Engine(optimizer, how, "graph", "eager")
    carry = engine(optimizer.phi, tasks(5), engine.init(optimizer.phi, tasks(5))).carry
    with pytest.raises(ValueError, match="the batch has 3 tasks and this algorithm carries its state for 5 task slots"):
        engine(optimizer.phi, tasks(3), carry)


def test_displacement_refuses_what_it_says_nothing_about() -> None:
    network = Network(net(), mse)
    with pytest.raises(ValueError, match=r"says nothing about the rule's own parameters \(lr\.0\.bias, …\); use Unroll"):
        replace(meta_sgd(net(), mse), estimator=Displacement())
    head = GradientLearner(network, rules.SGD(0.1), 1, adapts=lambda n: n.startswith("2."))
    with pytest.raises(ValueError, match=r"zero for weights that do not adapt, such as 0\.weight; .* or use Unroll"):
        MetaOptimizer(head, Displacement(), MetaParams(network.weights(), {}))
    MetaOptimizer(head, Displacement(), MetaParams(network.weights(), {}), learns=lambda n: n.startswith("2."))


# --- What comes back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["loop", "vmap", "vmap:2", "vmap:5", "vmap:9"])
def test_losses_come_one_per_task_in_order_and_as_their_mean(how: str) -> None:
    optimizer, batch = maml(net(), mse), tasks()
    estimate = Engine(optimizer, how, "graph", "eager")(optimizer.phi, batch)
    singles = [trees.map_tensors(lambda x: x[None], trees.index(batch, t)) for t in range(5)]
    alone = [Engine(optimizer, "loop", "graph", "eager")(optimizer.phi, single) for single in singles]
    losses = torch.stack([a.loss for a in alone])
    torch.testing.assert_close(estimate.info["losses"], losses)
    torch.testing.assert_close(estimate.loss, losses.mean())
    for name, g in estimate.grad.weights.items():
        torch.testing.assert_close(g, torch.stack([a.grad.weights[name] for a in alone]).mean(0))
    total = Engine(article_maml(net(), mse), how, "graph", "eager")
    found = total(optimizer.phi, batch)
    torch.testing.assert_close(found.loss, found.info["losses"].sum())


@pytest.mark.parametrize("how", ["loop", "vmap", "vmap:2"])
def test_the_carry_keeps_its_slots(how: str) -> None:
    optimizer = reptile(net(), mse, steps=3)
    engine = Engine(optimizer, how, "graph", "eager")
    carry = engine.init(optimizer.phi, tasks())
    for i in range(1, 3):
        carry = engine(optimizer.phi, tasks(), carry).carry
        assert {x.shape[0] for x in trees.flatten(carry)} == {5}
        assert carry["t"].tolist() == [3 * i] * 5
    assert not torch.equal(carry["v"]["0.weight"][0], carry["v"]["0.weight"][1])
    torch.testing.assert_close(heritage_of(optimizer, carry)['["v", "0.bias"]'], carry["v"]["0.bias"].mean(0))
    assert trees.flatten(Engine(maml(net(), mse), how, "graph", "eager")(maml(net(), mse).phi, tasks()).carry) == []


@pytest.mark.parametrize("how", ["loop", "vmap", "vmap:2"])
def test_rollout_judges_every_step_and_agrees_with_adapt(how: str) -> None:
    optimizer, batch = maml(net(), mse, lr=0.2), tasks()
    scores = rollout(optimizer, optimizer.phi, batch, {}, 4, how)
    assert scores["loss"].shape == (5, 5)
    network = Network(net(), mse)
    for t in range(5):
        task: Task = trees.index(batch, t)
        for k in range(5):
            count, state = adapt(optimizer, optimizer.phi, task.support, {}, k)
            assert count == k
            weights = optimizer.learner.weights(optimizer.phi, state)
            torch.testing.assert_close(scores["loss"][t, k], network(weights, task.query, task.support, count)[0])
    assert not scores["loss"].requires_grad
