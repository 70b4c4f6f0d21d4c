"""What every entry of ALGORITHMS keeps to; a new entry is covered with nothing to touch here."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaoptim.nn
from metaoptim.algorithms import ALGORITHMS
from metaoptim.algorithms.example import example_net
from metaoptim.core import trees
from metaoptim.core.gradients import held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.losses import cross_entropy
from metaoptim.core.types import Batch, Estimate, MetaOptimizer, Normalisation, Task
from metaoptim.engine import Engine, offered
from metaoptim.gradcheck.case import REFERENCE, prepare
from metaoptim.gradcheck.claims import judge

pytestmark = pytest.mark.usefixtures("doubles", "empty_cache")

POLICIES: tuple[Normalisation, ...] = ("transductive", "inductive", "frozen")
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def small_net(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return example_net(name, seed=1).to(dtype)


def tasks(count: int = 5, dtype: torch.dtype = torch.float64, seed: int = 2) -> Task:
    """3-way 2-shot images of 4 × 4, a prototype per class and noise."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(count, 3, 1, 4, 4, generator=g, dtype=torch.float64)

    def draw(per_class: int) -> Batch:
        y = torch.arange(3).repeat(per_class)
        noise = torch.randn(count, len(y), 1, 4, 4, generator=g, dtype=torch.float64)
        return (means[:, y] + 0.3 * noise).to(dtype), y.expand(count, -1).clone()

    return Task(draw(2), draw(3))


def build(name: str, net: nn.Module | None = None, **options: Any) -> MetaOptimizer:
    """The algorithm with the options it comes with; every float of φ is a function of the seed."""
    torch.manual_seed(3)
    return ALGORITHMS[name](small_net(name) if net is None else net, cross_entropy, **options)


def options(name: str) -> dict[str, inspect.Parameter]:
    """The keyword arguments of a builder beside the net and the loss."""
    return dict(list(inspect.signature(ALGORITHMS[name]).parameters.items())[2:])


def estimates(
    optimizer: MetaOptimizer, how: str = "loop", memory: str = "graph", runtime: str = "eager", rounds: int = 2
) -> list[Estimate]:
    """Meta-gradients of several batches in turn, with what is carried from one to the next."""
    torch.manual_seed(4)  # of the tasks' keys
    engine, dtype = Engine(optimizer, how, memory, runtime), next(iter(optimizer.phi.weights.values())).dtype
    carry, found = engine.init(optimizer.phi, tasks(seed=10, dtype=dtype)), []
    for i in range(rounds):
        found.append(engine(optimizer.phi, tasks(seed=10 + i, dtype=dtype), carry, i))
        carry = found[-1].carry
    return found


def leaves(estimate: Estimate) -> list[Tensor]:
    return trees.flatten((estimate.loss, estimate.grad, estimate.carry, dict(sorted(estimate.info.items()))))


KINDS = ("maml", "fomaml", "reptile", "imaml", "protonet")  # one of each: the others take seconds


@pytest.mark.parametrize("name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in ALGORITHMS])
@pytest.mark.parametrize("policy", [POLICIES[0], *(pytest.param(policy, marks=pytest.mark.slow) for policy in POLICIES[1:])])
@pytest.mark.slow
def test_every_way_gives_the_same_numbers(name: str, policy: Normalisation) -> None:
    if "normalisation" not in options(name):
        pytest.skip(f"{name} has no normalisation policy")
    many = "steps" in options(name) and options(name)["steps"].default > 2
    optimizer = build(name, normalisation=policy, **({"steps": 2} if many else {}))  # graphs of a few are built quickly
    expected = estimates(optimizer)
    traced = {("vmap", "graph", "trace"), ("loop", "steps", "trace"), ("workers:2", "mixed", "trace")}
    ways = [way for way in offered(optimizer) if way[2] == "eager" or (policy == "transductive" and way in traced)]
    assert ways[0] == ("loop", "graph", "eager") and len(ways) >= 3
    for way in ways[1:]:
        for loop, other in zip(expected, estimates(optimizer, *way), strict=True):
            assert loop.info["losses"].shape == (5,)
            for a, b in zip(leaves(loop), leaves(other), strict=True):
                assert a.shape == b.shape
                assert (a - b).norm() <= 1e-9 * a.norm(), way


@every_algorithm
@pytest.mark.parametrize("how", ["loop", "vmap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept(name: str, how: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32 if dtype == torch.float64 else torch.float64)  # so that none is made up
    optimizer = build(name, small_net(name, dtype))
    assert {x.dtype for x in trees.flatten(optimizer.phi)} == {dtype}
    for estimate in estimates(optimizer, how):
        assert {x.dtype for x in leaves(estimate)} == {dtype}


@every_algorithm
def test_every_learnt_leaf_gets_a_gradient(name: str) -> None:
    optimizer = build(name)
    gradient = estimates(optimizer, rounds=1)[0].grad
    assert [g.keys() for g in gradient] == [p.keys() for p in optimizer.split(optimizer.phi)[0]]
    for part, learnt in zip(gradient, optimizer.split(optimizer.phi)[0], strict=True):
        for leaf, g in part.items():
            assert g.shape == learnt[leaf].shape
            assert g.isfinite().all(), leaf
            assert g.norm() > 1e-9, leaf


@every_algorithm
def test_the_gradient_is_what_its_estimator_claims(name: str) -> None:
    optimizer = build(name)
    verdict = judge(prepare(optimizer, optimizer.phi, tasks(), 2), REFERENCE)
    assert verdict.error <= verdict.limit


@every_algorithm
def test_adaptation_lowers_the_support_loss(name: str) -> None:
    optimizer = build(name)
    learner, phi = optimizer.learner, optimizer.phi
    assert bool(optimizer.adapting) == (learner.steps > 0), "what has steps adapts, and nothing else does"
    for t in range(5 if learner.steps else 0):
        support: Batch = trees.index(tasks(), t).support
        losses = [learner.loss(phi, s, support, support, k)[0] for k, s in inner_loop(learner, phi, support, held)]
        assert losses[-1] < losses[0]


@every_algorithm
@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_same_seed_same_floats(name: str, how: str) -> None:
    once, again = (estimates(build(name), how) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


@every_algorithm
def test_the_users_module_is_left_alone(name: str) -> None:
    net = small_net(name)
    next(net.children()).requires_grad_(False)
    list(net.children())[-2].eval()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before, modes = copy.deepcopy(net), [m.training for m in net.modules()]
    first, second = build(name, net), build(name, net)
    assert all(torch.equal(a, b) for a, b in zip(trees.flatten(first.phi), trees.flatten(second.phi), strict=True))
    for how in ("loop", "vmap"):
        estimates(first, how)
    for (leaf, p), q in zip(net.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q), leaf
        assert p.grad is not None
        assert torch.equal(p.grad, torch.ones_like(p))
        assert p.requires_grad == q.requires_grad
    assert all(torch.equal(p, q) for p, q in zip(net.buffers(), before.buffers(), strict=True))
    assert modes == [m.training for m in net.modules()]
    own = {p.data_ptr() for p in net.parameters()}
    assert not any(x.data_ptr() in own for x in first.phi.weights.values()), "φ shares memory with the module"
    assert not any(x.requires_grad for x in trees.flatten(first.phi))


@every_algorithm
def test_frozen_parameters_neither_adapt_nor_are_learnt(name: str) -> None:
    net = small_net(name)
    names, usual = [n for n, _ in net.named_parameters()], build(name, net)
    frozen = {names[0], "head.bias"}
    for leaf in frozen:
        net.get_parameter(leaf).requires_grad_(False)
    optimizer = build(name, net)
    assert optimizer.phi.weights.keys() == set(names)
    assert set(optimizer.adapting) == set(usual.adapting) - frozen
    for estimate in estimates(optimizer):
        assert estimate.grad.weights.keys() == {n for n in names if usual.learns(n)} - frozen
        assert not any(leaf in owned for leaf in frozen for owned in estimate.grad.rule)
    support: Batch = trees.index(tasks(), 0).support
    # Two steps: a head whose rows are alike passes nothing back to the body in the first one. Seeded: masks are drawn.
    torch.manual_seed(0)
    *_, (_, state) = inner_loop(optimizer.learner, optimizer.phi, support, held, steps=2)
    after = optimizer.learner.weights(optimizer.phi, state)
    assert after.keys() == optimizer.phi.weights.keys()
    assert {leaf for leaf in after if not torch.equal(after[leaf], optimizer.phi.weights[leaf])} == set(optimizer.adapting)


@every_algorithm
@pytest.mark.parametrize("policy", POLICIES)
def test_running_statistics_are_refused(name: str, policy: Normalisation) -> None:
    net = small_net(name)
    head = net.get_submodule("head")
    net.add_module("head", nn.Sequential(nn.BatchNorm1d(head.in_features), head))
    asked: dict[str, Any] = {"normalisation": policy} if "normalisation" in options(name) else {}
    if name == "proto_maml":  # whose head is a linear layer
        asked["head"] = "head.1"
    if policy == "frozen" and asked:
        build(name, net, **asked)  # stored statistics are what it asks for
    else:
        with pytest.raises(
            ValueError, match=r"layer `head\.0` \(BatchNorm1d\) keeps running.*metaoptim\.nn\.convert\(module\)"
        ):
            build(name, net, **asked)
    build(name, metaoptim.nn.convert(net), **asked)


def module_of(build: Callable[..., MetaOptimizer]) -> ModuleType:
    module = inspect.getmodule(build)
    assert module is not None
    return module


@every_algorithm
def test_the_file_tells_its_paper_and_its_deviations(name: str) -> None:
    module = module_of(ALGORITHMS[name])
    doc = module.__doc__ or ""
    assert re.search(r"https?://\S+", doc)
    assert "\nPaper:" in doc
    assert "\nDeviations:" in doc
    assert len(inspect.getsource(module).splitlines()) < 100
    assert ALGORITHMS[name].__name__ == name


@every_algorithm
def test_every_option_is_a_keyword_with_a_default_and_a_meaning(name: str) -> None:
    meanings = inspect.getdoc(ALGORITHMS[name]) or ""
    assert "Args:" in meanings
    documented = re.findall(r"^ {4}(\w+): \S", meanings.partition("Args:")[2], re.MULTILINE)
    assert documented == list(options(name))
    for option in options(name).values():
        assert option.kind is inspect.Parameter.KEYWORD_ONLY, option.name
        assert option.default is not inspect.Parameter.empty, option.name
        assert option.annotation is not inspect.Parameter.empty, option.name
