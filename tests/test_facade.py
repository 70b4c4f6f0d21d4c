"""The façade: φ in loops that people already have, the articles' loop, and what comes out: an ordinary module."""

from __future__ import annotations

import copy
import inspect
import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metaoptim as mo
from metaoptim.algorithms.example import example_net
from metaoptim.core.brief import brief
from metaoptim.core.random import forked
from metaoptim.core.types import Estimate, MetaOptimizer, MetaParams, Task
from metaoptim.estimators import Unroll
from metaoptim.runs import Run
from metaoptim.tasks import ImageTasks
from metaoptim.training.outer_step import factor
from metaoptim.training.source import Episodes

LOOP = {"batching": "loop", "memory": "graph", "runtime": "eager"}
VMAP = {"batching": "vmap", "memory": "graph", "runtime": "eager"}

SINUSOID = mo.tasks.sinusoid()
OPTIONS: dict[str, dict[str, Any]] = {"reptile": {"lr": 0.01}, "meta_sgd": {"low": 0.01, "high": 0.02}}


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return mo.nn.mlp([1, 8, 1])


def build(algorithm: str = "maml", **options: Any) -> MetaOptimizer:
    return mo.ALGORITHMS[algorithm](mlp(), mo.losses.mse, **OPTIONS.get(algorithm, {}) | options)


def batch(start: int = 0, count: int = 3) -> Task:
    return SINUSOID.sample("train", seed=0, start=start * count, count=count)


def named(meta: MetaParams) -> dict[str, Tensor]:
    return {f"weights.{n}": p for n, p in meta.weights.items()} | {f"rule.{n}": p for n, p in meta.rule.items()}


def letters(generator: torch.Generator, split: str) -> tuple[Any, Any]:
    """3-way 2-shot images of 4 × 4, a prototype per class and noise: for the network that suits every algorithm."""
    means = torch.randn(3, 1, 4, 4, generator=generator)

    def draw(per_class: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(3).repeat(per_class)
        return means[y] + 0.3 * torch.randn(len(y), 1, 4, 4, generator=generator), y

    return draw(2), draw(2)


LETTERS = mo.tasks.from_function(letters)


def few_letters(start: int = 0, count: int = 3) -> Task:
    return LETTERS.sample("train", seed=0, start=start * count, count=count)


def drawn(step: int) -> AbstractContextManager[None]:
    """Inside, the tasks' keys are drawn as `train` draws them in that outer step."""
    return forked(torch.device("cpu"), int(np.random.SeedSequence((0, step)).generate_state(1)[0]))


# ---- MetaModule


@pytest.mark.parametrize("algorithm", mo.ALGORITHMS)
def test_a_plain_loop_is_train_step_by_step(algorithm: str) -> None:
    torch.manual_seed(0)
    build = mo.ALGORITHMS[algorithm]
    all_classes = {"classes": 3} if "classes" in inspect.signature(build).parameters else {}
    meta = build(example_net(algorithm), mo.losses.cross_entropy, **all_classes)
    module = mo.MetaModule(meta, "vmap", "graph", "eager")
    kind = getattr(torch.optim, meta.outer.optimizer)
    optimizer = kind(module.parameters(), lr=meta.outer.lr)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        with drawn(step):
            losses.append(module.backward(few_letters(step)).item())
        for group in optimizer.param_groups:
            group["lr"] = meta.outer.lr * factor(meta.outer.schedule, step / 4)
        optimizer.step()
    own = None if getattr(meta.learner, "pooled", None) is None else Episodes(LETTERS, 0, 3)  # of no image family
    run = mo.train(meta, LETTERS, iterations=4, tasks_per_step=3, validate_every=0, progress=False, engine=VMAP, source=own)
    trained, state = named(run.phi), named(module.phi())
    assert trained.keys() == state.keys()
    for name, p in state.items():
        assert torch.equal(p, trained[name])
    again = mo.MetaModule(meta, "vmap", "graph", "eager")
    with drawn(0):
        assert losses[0] == again.backward(few_letters()).item()
    assert len(set(losses)) == 4


def test_gradients_accumulate_as_backward_does() -> None:
    module = mo.MetaModule(build("meta_sgd"), "loop", "graph", "eager")
    module.backward(batch(0))
    first = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    assert all(p.grad is None for p in module.parameters())
    module.backward(batch(1))
    second = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.backward(batch(0))
    for name, p in module.named_parameters():
        assert p.grad is not None and first[name].abs().sum() > 0
        torch.testing.assert_close(p.grad, first[name] + second[name])


def test_the_state_dict_goes_round_and_the_network_is_not_touched() -> None:
    net = mlp()
    module = mo.MetaModule(mo.meta_sgd(net, mo.losses.mse), "vmap", "graph", "eager")
    torch.optim.SGD(module.parameters(), lr=0.1).zero_grad()
    module.backward(batch())
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(net.parameters(), mlp().parameters(), strict=True))
    other = mo.MetaModule(mo.meta_sgd(mlp(1), mo.losses.mse), "vmap", "graph", "eager")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.estimate(batch()).loss, module.estimate(batch()).loss)
    assert {n.partition(".")[0] for n in module.state_dict()} == {"weights", "rule", "outer_step"}
    assert torch.equal(copy.deepcopy(module).estimate(batch()).loss, module.estimate(batch()).loss)


def test_another_dtype_and_weights_that_are_not_learnt() -> None:
    net = mlp()
    frozen = net.get_submodule("0")
    frozen.requires_grad_(False)
    module = mo.MetaModule(mo.maml(net, mo.losses.mse), "vmap", "graph", "eager").to(torch.float64)
    assert sorted(n for n, _ in module.named_parameters()) == ["weights.2.bias", "weights.2.weight"]
    assert sorted(n for n, _ in module.named_buffers()) == ["weights.0.bias", "weights.0.weight"]
    support, query = ((x.double(), y.double()) for x, y in batch())
    loss = module.backward(Task(support, query))
    assert loss.dtype == torch.float64
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in module.parameters())


def test_carried_state_needs_the_same_number_of_tasks() -> None:
    module = mo.MetaModule(build("reptile"), "vmap", "graph", "eager")
    module.backward(batch())
    with pytest.raises(ValueError, match=r"2 tasks .* 3 task slots; keep the number of tasks per step the same"):
        module.backward(batch(count=2))
    with pytest.raises(ValueError, match=r"2 tasks .* 3 task slots"):
        mo.meta_train(net := mlp(), torch.optim.SGD(net.parameters(), 0.1), [batch(), batch(count=2)], 2, 0.01, "reptile")


# ---- meta_train


@pytest.mark.parametrize("algorithm", mo.ALGORITHMS)
def test_meta_train_is_the_same_loop_on_the_models_own_parameters(algorithm: str) -> None:
    net, build = example_net(algorithm), mo.ALGORITHMS[algorithm]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    if algorithm == "maml_plus_plus":
        with pytest.raises(ValueError, match=r"learns `norm\.weight` for each inner step.*use train, or MetaModule"):
            mo.meta_train(net, optimizer, [few_letters()], 2, 0.02, algorithm, engine=LOOP)
        return
    if "classes" in inspect.signature(build).parameters:
        with pytest.raises(ValueError, match=r"the targets of each task are 0 to 2: .* set classes=3; where each task numbers"):
            mo.meta_train(net, optimizer, [few_letters()], 2, 0.02, algorithm, engine=LOOP)
        return
    batches = [few_letters(i) for i in range(4)]
    torch.manual_seed(0)  # of ψ where it is drawn, and of the tasks' keys
    losses = mo.meta_train(net, optimizer, batches, 2, 0.02, algorithm, engine=LOOP)
    given = {"steps": 2, "lr": 0.02, "low": 0.02, "high": 0.02}
    options = {name: given[name] for name in inspect.signature(build).parameters if name in given}
    torch.manual_seed(0)
    module = mo.MetaModule(build(example_net(algorithm), mo.losses.cross_entropy, **options), "loop", "graph", "eager")
    reference = torch.optim.Adam(module.parameters(), lr=0.01)
    for i in range(4):
        reference.zero_grad()
        assert losses[i] == module.backward(batches[i]).item()
        reference.step()
    for name, p in net.named_parameters():
        assert torch.equal(p, module.state_dict()[f"weights.{name}"]) and p.requires_grad
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert len(held) == len(list(net.parameters())) + len(module.method.phi.rule)
    assert {id(p) for p in net.parameters()} <= held


def test_meta_sgd_goes_on_with_its_step_sizes_in_the_next_epoch() -> None:
    net, other = mlp(), mlp()
    two, one = (torch.optim.AdamW(n.parameters(), lr=0.01) for n in (net, other))
    for epoch in range(2):
        mo.meta_train(net, two, [batch(2 * epoch), batch(2 * epoch + 1)], 1, 0.02, "meta_sgd", engine=LOOP)
    mo.meta_train(other, one, [batch(i) for i in range(4)], 1, 0.02, "meta_sgd", engine=LOOP)
    assert len(two.param_groups) == len(one.param_groups) == 2
    assert two.param_groups[1]["weight_decay"] == 0 and two.param_groups[0]["weight_decay"] > 0
    for a, b in zip(two.param_groups, one.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            assert torch.equal(p, q)
    assert any(not torch.equal(p, torch.full_like(p, 0.02)) for p in two.param_groups[1]["params"])


def test_a_plain_batch_is_one_task_cut_into_halves() -> None:
    x = torch.randn(20, 4)
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=5)
    seen: list[tuple[int, ...]] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(tuple(output.shape))
        return mo.losses.cross_entropy(output, target)

    net = nn.Linear(4, 2)
    mo.meta_train(net, torch.optim.SGD(net.parameters(), 0.1), loader, 1, 0.1, loss=loss, engine=LOOP)
    assert seen == [(2, 2), (3, 2)] * 5  # adapted on 2 of 5, judged on the other 3; the first of 4 batches is looked at too
    assert len(mo.meta_train(net, torch.optim.SGD(net.parameters(), 0.1), loader, 1, 0.1)) == 4  # cross-entropy by itself


def test_a_last_batch_of_one_example_is_left_out_with_a_word() -> None:
    x = torch.randn(9, 4)
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4)
    with pytest.warns(UserWarning, match="a batch of 1 example can't be divided into a support and a query set, and was left"):
        assert len(mo.meta_train(net, optimizer, loader, 1, 0.1)) == 2
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="at least 2 examples"):
        mo.meta_train(net, optimizer, DataLoader(TensorDataset(x, x[:, :2]), batch_size=1), 1, 0.1)
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optimizer": "adam"}, "optimizer is 'adam'; give one made on the model's parameters, such as torch.optim.Adam"),
        ({"optimizer": torch.optim.Adam}, "give one made on the model's parameters"),
        ({"optimizer": "LBFGS"}, "LBFGS evaluates the loss again within a step: choose another optimizer, such as Adam"),
        ({"engine": "eager"}, "engine='eager': it must be settings by name"),
        ({"engine": {"horizon": 3}}, "engine has no setting 'horizon'; choose among batching"),
    ],
)
def test_what_meta_train_can_not_take_is_a_sentence(given: dict[str, Any], words: str) -> None:
    net = mlp()
    made = torch.optim.LBFGS(net.parameters()) if given.get("optimizer") == "LBFGS" else torch.optim.SGD(net.parameters(), 0.1)
    options: dict[str, Any] = {"optimizer": made} | {n: x for n, x in given.items() if x != "LBFGS"}
    with pytest.raises(ValueError, match=words):
        mo.meta_train(net, data_loader=[batch()], num_inner_steps=1, inner_lr=0.1, **options)


def test_what_a_module_and_a_run_can_not_take_is_a_sentence() -> None:
    method, net = build(), mlp()
    module: Any = mo.MetaModule(method)
    with pytest.raises(
        ValueError, match=r"no network to be called: module\.backward\(batch of tasks\) takes the meta-gradient"
    ):
        module(batch().support[0])
    words = "a batch of tasks is one Task, whose tensors have a leading axis T; found 2 tasks in a list: stack their tensors"
    with pytest.raises(ValueError, match=words):
        module.backward([batch(), batch()])
    with pytest.raises(ValueError, match=words):
        mo.meta_train(net, torch.optim.SGD(net.parameters(), 0.1), [[batch(), batch()]], 1, 0.1)
    text: Any = "eager"
    with pytest.raises(ValueError, match=r"engine='eager': it must be settings by name, such as \{'runtime': 'eager'\}"):
        mo.train(method, SINUSOID, iterations=1, engine=text)
    run = mo.train(method, SINUSOID, iterations=1, tasks_per_step=2, progress=False, engine=LOOP)
    x, y = batch().support
    with pytest.raises(
        ValueError, match=r"an axis more than in training, in shapes \(3, 10, 1\) and \(3, 10, 1\): take one task"
    ):
        run.adapt((x, y))
    with pytest.raises(ValueError, match=r"adapt takes one pair, as in run\.adapt\(\(x, y\)\); found a tensor"):
        run.adapt(x[0], y[0])
    assert run.adapt((x[0], y[0]))(x[0]).shape == (10, 1)


def test_batches_that_are_hardly_meant_are_told_at_the_first_step() -> None:
    x = torch.randn(10, 1)
    with pytest.warns(UserWarning, match=r"have the shape \(10, 1\), which is 10 tasks of one example, each a single number"):
        mo.MetaModule(build()).backward(mo.Task((x, x), (x, x)))
    images, ones = torch.randn(4, 10, 1), torch.ones(4, 10, dtype=torch.int64)
    one_class = mo.Task((images, ones), (images, ones))
    with pytest.warns(UserWarning, match="every target is 1: with one class there is nothing to tell apart"):
        mo.MetaModule(mo.maml(mo.nn.mlp((1, 8, 2)), mo.losses.cross_entropy)).backward(one_class)
    with pytest.raises(ValueError, match=r"the loss is called with \(output, target\): missing a required argument: 'var'"):
        mo.maml(mlp(), torch.nn.functional.gaussian_nll_loss)  # type: ignore[arg-type]


def test_a_data_loader_of_tasks() -> None:
    """What torch's default collation makes of single tasks, named or as plain pairs of pairs."""
    single = [Task((x[0], y[0]), (xq[0], yq[0])) for (x, y), (xq, yq) in (batch(i, 1) for i in range(6))]
    results = []
    items: Any
    for items in (single, [tuple(task) for task in single]):
        net = mlp()
        loader = DataLoader(items, batch_size=3)
        results.append(mo.meta_train(net, torch.optim.SGD(net.parameters(), 0.1), loader, 1, 0.01))
    net = mlp()
    results.append(mo.meta_train(net, torch.optim.SGD(net.parameters(), 0.1), [batch(0), batch(1)], 1, 0.01))
    assert results[0] == results[1] == pytest.approx(results[2]) and len(results[0]) == 2


def test_meta_train_learns() -> None:
    torch.manual_seed(0)
    net = mo.nn.mlp([1, 40, 40, 1])
    tasks = (SINUSOID.sample("train", seed=0, start=10 * i, count=10) for i in range(120))
    test = SINUSOID.sample("test", seed=0, start=0, count=200)
    before = mo.MetaModule(mo.maml(net, mo.losses.mse, lr=0.02), "vmap", "graph", "eager").estimate(test).loss
    mo.meta_train(net, torch.optim.Adam(net.parameters(), lr=0.01), tasks, 1, 0.02, engine=VMAP)
    assert mo.MetaModule(mo.maml(net, mo.losses.mse, lr=0.02), "vmap", "graph", "eager").estimate(test).loss < 0.7 * before


# ---- Run.adapt and load


def images() -> ImageTasks:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 6, 12, 12)).astype(np.uint8)
    return ImageTasks("noise", pictures, list("abcdef"), {"train": np.arange(3), "test": np.arange(3, 6)}, 3, 2, 3)


def conv_run(normalisation: Any, dropout: bool = False) -> Run:
    torch.manual_seed(0)
    net = mo.nn.conv4(ways=3, size=12, filters=4)
    if dropout:
        net = nn.Sequential(nn.Dropout(0.5), net)
    meta = mo.maml(net, mo.losses.cross_entropy, lr=0.3, steps=2, normalisation=normalisation)
    return mo.train(meta, images(), iterations=2, tasks_per_step=2, progress=False, engine=LOOP)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("policy", ["transductive", "inductive", "frozen"])
def test_an_adapted_module_predicts_what_the_learner_does(policy: Any, dropout: bool) -> None:
    run = conv_run(policy, dropout)
    before = {n: p.clone() for n, p in named(run.phi).items()}
    (xs, ys), (xq, yq) = images().sample("test", seed=0, start=0, count=1)
    judged = mo.evaluate(run, images(), episodes=1, baselines=(), progress=False).rows[0].scores["loss"][0]
    for steps in (0, 1, 2):
        fast = run.adapt((xs[0], ys[0]), steps).eval()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(fast(xq[0]), yq[0])
        torch.testing.assert_close(loss, judged[steps], rtol=1e-4, atol=1e-5)
    fast = run.adapt((xs[0], ys[0]))
    assert not fast.training and run.network.net.training  # the user's network stays as it was
    with torch.no_grad():
        together, alone = fast(xq[0]), torch.cat([fast(x[None]) for x in xq[0]])
    assert torch.allclose(together, alone, atol=1e-5) == (policy != "transductive")
    with torch.no_grad():
        for p in fast.parameters():
            p.zero_()
    assert all(torch.equal(p, before[n]) for n, p in named(run.phi).items())
    fresh = dict(conv_run(policy, dropout).network.net.named_parameters())
    assert all(torch.equal(p, fresh[n]) for n, p in run.network.net.named_parameters())


@pytest.mark.parametrize("policy", ["transductive", "inductive"])
def test_an_adapted_module_is_ordinary(policy: Any, tmp_path: Path) -> None:
    run = conv_run(policy)
    (xs, ys), (xq, _) = images().sample("test", seed=0, start=0, count=1)
    fast = run.adapt((xs[0], ys[0]))
    expected = fast(xq[0])
    assert expected.requires_grad and torch.equal(copy.deepcopy(fast)(xq[0]), expected)
    expected.sum().backward()
    assert all(p.grad is not None for p in fast.parameters())

    safetensors.torch.save_file(fast.state_dict(), tmp_path / "fast.safetensors")
    other = run.adapt((xs[0].flip(0), ys[0]), steps=0)
    assert not torch.equal(other(xq[0]), expected)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "fast.safetensors"))
    assert torch.equal(other(xq[0]), expected)
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == fast.state_dict().keys()


def test_reptile_adapts_with_the_moments_it_has_carried() -> None:
    """Fresh second moments make Adam's first steps the size of lr, whatever the gradient; carried ones don't."""
    meta = build("reptile", lr=0.01, steps=1 + 1, batch_size=None)
    run = mo.train(meta, SINUSOID, iterations=3, tasks_per_step=2, progress=False, validate_every=0)
    support: Any = tuple(x[0] for x in batch(9).support)
    fast = dict(run.adapt(support, steps=1).named_parameters())
    net = copy.deepcopy(run.network.net)
    net.load_state_dict(run.phi.weights)
    grads = torch.autograd.grad(mo.losses.mse(net(support[0]), support[1]), list(net.parameters()))
    t = run.inherited['["t"]'] + 1
    for (name, p), g in zip(net.named_parameters(), grads, strict=True):
        v = 0.999 * run.inherited[f'["v", "{name}"]'] + 0.001 * g.square()
        torch.testing.assert_close(fast[name], p - 0.01 * g / ((v / (1 - 0.999**t)).sqrt() + 1e-8))


def test_a_run_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    run = mo.train(build("reptile"), SINUSOID, iterations=3, tasks_per_step=2, progress=False, out=tmp_path / "run", seed=4)
    again = mo.load(tmp_path / "run", build("reptile"))
    assert (again.step, again.seed, again.selection, again.path) == (3, 4, "best", tmp_path / "run")
    support: Any = tuple(x[0] for x in batch(9).support)
    a, b = run.adapt(support), again.adapt(support)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert mo.load(str(tmp_path / "moved"), build("reptile"), "last").step == 3


def test_torchs_own_mse_and_an_attribute_that_changes_are_right_by_default() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.net, self.temp = mlp(), 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) / self.temp

    net = Scaled()
    module, losses = mo.MetaModule(mo.maml(net, nn.functional.mse_loss)), []
    for net.temp in (1.0, 2.0):
        losses.append(module.backward(batch()).item())
        assert losses[-1] == mo.Engine(module.method, "loop", "graph", "eager")(module.phi(), batch()).loss.item()
    assert losses[0] != losses[1]


# ---- Closed forms


def proto_run(policy: Any = "transductive", ways: int = 3) -> Run:
    torch.manual_seed(0)
    method = mo.protonet(mo.nn.conv4(ways, size=8, filters=6), mo.losses.cross_entropy, normalisation=policy)
    return mo.train(method, images(), iterations=2, tasks_per_step=2, progress=False, engine=LOOP)


@pytest.mark.parametrize("policy", ["transductive", "inductive", "frozen"])
def test_a_closed_form_is_evaluated_and_adapted_as_anything_else(policy: Any, tmp_path: Path) -> None:
    run = proto_run(policy)
    (xs, ys), (xq, yq) = images().sample("test", seed=0, start=0, count=1)
    result = mo.evaluate(run, images(), episodes=3, progress=False, baselines=("untrained", "prototypes"))
    assert [row.scores["accuracy"].shape for row in result.rows] == [(3, 1)] * 3
    torch.testing.assert_close(result.rows[0].scores["accuracy"], result.rows[2].scores["accuracy"])
    more = mo.evaluate(run, images(), episodes=3, progress=False, steps=2, baselines=())
    assert torch.equal(more.rows[0].scores["loss"], result.rows[0].scores["loss"].expand(3, 3)), "no step changes it"
    classify = run.adapt((xs[0], ys[0])).eval()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(classify(xq[0]), yq[0])
    torch.testing.assert_close(loss, result.rows[0].scores["loss"][0, 0], rtol=1e-4, atol=1e-5)
    safetensors.torch.save_file(classify.state_dict(), tmp_path / "fitted.safetensors")
    other = run.adapt((xs[0].flip(-1), ys[0])).eval()
    assert not torch.equal(other(xq[0]), classify(xq[0]))
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "fitted.safetensors"))
    assert torch.equal(other(xq[0]), classify(xq[0])) and torch.equal(copy.deepcopy(classify)(xq[0]), classify(xq[0]))


def test_prototypes_are_class_means_and_absent_classes_are_never_predicted() -> None:
    run = proto_run(ways=5)
    (xs, ys), (xq, _) = images().sample("test", seed=0, start=0, count=1)
    logits = run.adapt((xs[0], ys[0]))(xq[0])
    assert logits.shape == (len(xq[0]), 5) and logits[:, 3:].isneginf().all()
    body = copy.deepcopy(run.network.net)
    body.load_state_dict(run.phi.weights, strict=False)
    body.add_module("head", nn.Identity())
    z, q = body(xs[0]), body(xq[0])
    for c in range(3):
        torch.testing.assert_close(logits[:, c], -(q - z[ys[0] == c].mean(0)).square().sum(1), rtol=1e-4, atol=1e-5)


def test_a_network_that_is_an_embedding_keeps_its_last_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 4))
    method = mo.protonet(net, nn.functional.cross_entropy, ways=3)
    assert method.learns("3.weight")
    run = mo.train(method, images(), iterations=1, tasks_per_step=2, progress=False, engine=LOOP)
    (xs, ys), (xq, _) = images().sample("test", seed=0, start=0, count=1)
    z, q = (torch.func.functional_call(net, run.phi.weights, (x[0],)) for x in (xs, xq))
    expected = -torch.cdist(q, torch.stack([z[ys[0] == c].mean(0) for c in range(3)])).square()
    torch.testing.assert_close(run.adapt((xs[0], ys[0]))(xq[0]), expected, rtol=1e-4, atol=1e-5)


def test_what_is_printed_is_short_and_has_no_tensors() -> None:
    run = proto_run()
    result = mo.evaluate(run, images(), episodes=2, progress=False, baselines=())
    assert "protonet" in str(result) and "accuracy" in str(result) and "tensor(" not in str(result)
    big = mo.maml(mo.nn.conv4(5), mo.losses.cross_entropy, lr=0.3, steps=3, normalisation="frozen")
    shown = [repr(x) for x in (run, run.method, result, images(), SINUSOID, LETTERS, big, mo.Run(big, big.phi))]
    shown += [repr(mo.anil(mo.nn.conv4(5), mo.losses.cross_entropy)), repr(build("meta_sgd")), repr(build("reptile"))]
    for line in shown:
        assert "\n" not in line and len(line) < 160 and "tensor(" not in line and " at 0x" not in line, line
    assert repr(big) == "MetaOptimizer(maml, SGD(lr=0.3), steps=3, Unroll(), normalisation='frozen', 112,005 weights)"
    assert shown[-3].endswith("weights, 325 of them adapt)") and shown[-2].endswith("25 weights, 25 in the rule)")
    batch = SINUSOID.sample("train", seed=0, start=0, count=2)
    assert (
        repr(batch) == "Task(support=(float32 (2, 10, 1), float32 (2, 10, 1)), query=(float32 (2, 10, 1), float32 (2, 10, 1)))"
    )
    assert repr(Estimate(torch.tensor(0.5), big.phi, (), {"losses": torch.ones(4)})) == (
        "Estimate(loss=tensor(0.5000), grad=MetaParams(112,005 numbers in weights), info=['losses'])"
    )
    assert repr(Unroll()) == "Unroll()" and repr(mo.estimators.Joint()) == "Joint()"
    assert repr(SINUSOID) == "sinusoid()" and repr(mo.tasks.sinusoid(grid=50)) == "sinusoid(grid=50)"
    assert repr(LETTERS) == "from_function(letters, name='function')"
    assert "step=2" in shown[0] and "protonet" in shown[0] and "classes: train 3, test 3" in shown[3]


def test_what_is_printed_says_what_differs() -> None:
    assert brief(mo.rules.Adam(0.1, b1=0.5)) == "Adam(lr=0.1, b1=0.5)" and brief(mo.rules.SGD(0.1), "step") == "step(lr=0.1)"
    mean = Unroll(first_order=True, objective=mo.objectives.trajectory_mean)
    assert brief(mean) == "Unroll(first_order=True, objective=trajectory_mean)"
    assert brief(mean, leave=("objective",)) == "Unroll(first_order=True)"
    assert repr(mo.rules.SGD(np.float32(0.1))) == brief(mo.rules.SGD(np.float32(0.1))) == "SGD(lr=0.1)"
    assert repr(mo.rules.chain(mo.rules.Clip(np.float64(2.0)), mo.rules.Adam(0.1, b1=0.5))) == (
        "Chain(rules=(Clip(norm=2.0), Adam(lr=0.1, b1=0.5)))"
    )
    assert [brief(x) for x in (Unroll, "a", 0.5, None, torch.zeros(2))] == ["Unroll", "'a'", "0.5", "None", "Tensor"]
