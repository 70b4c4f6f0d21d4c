"""Rules as optimizers of torch's, against torch's own and against the rules run by hand; and the files of rules."""

from __future__ import annotations

import copy
import io
import json
import random
import re
import sys
import time
import tomllib
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metaoptim as mo
from metaoptim.core import trees
from metaoptim.core.types import Params, Rule, Step
from metaoptim.engine.graphs.graphs import Graphs
from metaoptim.lopt import LSTM, Celo2, SmallFC, fused, pieces
from metaoptim.optim import LearnedOptimizer, Named, files, from_pretrained, from_rule, load, optimizer, save, ways
from metaoptim.rules import (
    SGD,
    SOAP,
    Adam,
    AdamW,
    Average,
    Clip,
    LayerStepSizes,
    Momentum,
    Muon,
    Nesterov,
    RMSprop,
    Schedule,
    ScheduleFreeAdamW,
    adam_hd,
    chain,
    sgd_hd,
)  # fmt: skip

LEARNED: dict[str, Rule] = {
    "celo2": Celo2(0.02, decay=0.1), "celo2 base": Celo2(0.02, orthogonal=False, by_adam=Named()), "small_fc": SmallFC(),
    "lstm": LSTM(),
}  # fmt: skip
RULES: dict[str, Rule] = LEARNED | {
    "sgd": SGD(0.1), "momentum": Momentum(0.1), "nesterov": Nesterov(0.1), "rmsprop": RMSprop(0.01), "adam": Adam(0.01),
    "adamw": AdamW(0.01), "muon": Muon(0.02), "soap": SOAP(0.01), "schedule-free": ScheduleFreeAdamW(0.01),
    "chain": chain(Clip(value=0.1), Momentum(1.0), Schedule(0.1)), "clipped": chain(Clip(norm=0.5), Adam(0.01)),
    "hypergradient": sgd_hd(0.1, 1e-3), "per layer": LayerStepSizes(0.1, 3),
}  # fmt: skip
TOGETHER = ["clipped", "hypergradient", "per layer"]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Weights of one, two and four dimensions, several of one shape, and a scalar."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    model = nn.Sequential(body, nn.Linear(4, 4))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    return model.to(dtype)


def loss_of(model: nn.Module, k: int) -> Tensor:
    g = torch.Generator().manual_seed(k)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(8, 1, 4, 4, generator=g).to(dtype), torch.randint(0, 4, (8,), generator=g)
    return F.cross_entropy(model(x) * model.scale, y)


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range = range(5)) -> None:
    for k in steps:
        opt.zero_grad()
        loss_of(model, k).backward()
        opt.step()


def values(model: nn.Module) -> Params:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def by_hand(rule: Rule, psi: Params, model: nn.Module, steps: int) -> Params:
    """The functional rule, on all weights at once."""
    weights = values(model)
    state = rule.init(psi, weights)
    for k in range(steps):
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
        probe = copy.deepcopy(model)
        for n, p in probe.named_parameters():
            p.data = leaves[n].data
        loss = loss_of(probe, k)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(probe.parameters())), strict=True))
        updates, state = rule.update(psi, grads, state, weights, Step(torch.tensor(k), loss.detach()))
        weights = trees.add(weights, updates)
    return weights


def same(a: Params, b: Params, **tolerance: float) -> None:
    for n, x in a.items():
        torch.testing.assert_close(x, b[n], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, n=n: f"{n}: {m}")


# --- The same numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_it_moves_as_the_rule_run_by_hand(name: str) -> None:
    """In float64, whatever was moved together."""
    model = net(torch.float64)
    start = values(model)
    opt = from_rule(RULES[name])(model.named_parameters())
    expected = by_hand(RULES[name], opt.psi, copy.deepcopy(model), 5)
    train(model, opt)
    same(values(model), expected, rtol=1e-9, atol=1e-11)
    assert any(not torch.equal(x, start[n]) for n, x in expected.items())


TORCH: dict[str, tuple[Rule, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (Momentum(0.1), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "nesterov": (Nesterov(0.1), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True)),
    "rmsprop": (RMSprop(0.01), lambda p: torch.optim.RMSprop(p, 0.01)),
    "adam": (Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    "adamw": (AdamW(0.01), lambda p: torch.optim.AdamW(p, 0.01)),
}


@pytest.mark.parametrize("name", TORCH)
def test_rules_made_by_hand_are_the_optimizers_of_torch(name: str) -> None:
    rule, build = TORCH[name]
    ours, theirs = net(torch.float64), net(torch.float64)
    train(ours, from_rule(rule)(ours.parameters()), range(50))
    train(theirs, build(theirs.parameters()), range(50))
    same(values(ours), values(theirs), rtol=1e-9, atol=1e-11)


def test_muon_is_the_one_of_torch() -> None:
    """Which computes in bfloat16, so that the same few digits are all there is to compare."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
    theirs.load_state_dict(ours.state_dict())
    opts = (
        from_rule(Muon(0.02, decay=0.1))(ours.named_parameters()),
        torch.optim.Muon(theirs.parameters(), 0.02, weight_decay=0.1),
    )
    start = ours.weight.detach().clone()
    for k in range(50):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(k))
        for model, opt in zip((ours, theirs), opts, strict=True):
            opt.zero_grad()
            (model(x) - x[:, :4].sin()).square().mean().backward()
            opt.step()
    far = (ours.weight - start).norm()
    assert (ours.weight - theirs.weight).norm() < 0.1 * far and far > 0.3


@pytest.mark.parametrize("name", LEARNED)
def test_sixteen_bits_are_moved_in_thirty_two(name: str) -> None:
    model = net(torch.bfloat16)
    opt = from_rule(LEARNED[name])(model.named_parameters())
    train(model, opt, range(1))
    assert all(x.dtype == torch.float32 for s in opt.state.values() for x in s.values() if isinstance(x, Tensor))
    start = net(torch.bfloat16)
    loss_of(start, 0).backward()
    weights = {n: p.detach().float() for n, p in start.named_parameters()}
    grads = {n: p.grad.float() for n, p in start.named_parameters() if p.grad is not None}
    rule, step = LEARNED[name], Step(torch.tensor(0), torch.tensor(0.0))
    updates, _ = rule.update(opt.psi, grads, rule.init(opt.psi, weights), weights, step)
    same(values(model), {n: (w + updates[n]).bfloat16() for n, w in weights.items()}, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["celo2", "celo2 base"])
@pytest.mark.parametrize("shape", [(70, 90), (90, 70), (40, 40), (33, 40, 3, 3), (2, 2, 9, 11), (1, 5000), (5000, 1)])
def test_large_weights_are_moved_by_quicker_ways_to_the_same_numbers(
    name: str, shape: tuple[int, ...], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piece by piece, and as the sums that a compiler is given; the last piece is a smaller one."""
    monkeypatch.setattr(pieces, "PIECE", 512)
    monkeypatch.setattr(pieces, "LEAST", 1)
    monkeypatch.setattr(fused, "LEAST", 1)
    rule: Any = LEARNED[name]
    torch.manual_seed(0)
    w = {"w": torch.randn(shape, dtype=torch.float64)}
    psi = {n: x + 0.1 * torch.randn_like(x) for n, x in rule.start(w, torch.Generator().manual_seed(1)).items()}
    plain, other = [rule.init(psi, w)] * 2
    for k in range(3):
        g, step = {"w": torch.randn(shape, dtype=torch.float64)}, Step(torch.tensor(k), torch.tensor(0.0))
        expected, plain = rule.update(psi, g, plain, w, step)
        found, other = rule.quick(psi, g, other, w, step, compiled)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        for one, two in zip(trees.flatten(plain), trees.flatten(other), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)
        w = trees.add(w, expected)


# --- What torch expects of an optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("through", ["state_dict", "torch.save", "deepcopy"])
def test_a_run_goes_on_to_the_same_floats(name: str, through: str) -> None:
    whole = net()
    train(whole, from_rule(RULES[name])(whole.named_parameters()), range(6))
    model = net()
    opt = from_rule(RULES[name])(model.named_parameters())
    train(model, opt, range(3))
    if through == "deepcopy":
        model, opt = copy.deepcopy((model, opt))
    else:
        kept = opt.state_dict()
        assert all(isinstance(x, Tensor | int | float) for s in kept["state"].values() for x in s.values())
        if through == "torch.save":
            file = io.BytesIO()
            torch.save(kept, file)
            file.seek(0)
            kept = torch.load(file)  # weights only
        model = copy.deepcopy(model)
        opt = from_rule(RULES[name])(model.named_parameters())
        opt.load_state_dict(kept)
    train(model, opt, range(3, 6))
    same(values(model), values(whole))
    assert {s["step"] for s in opt.state.values()} == {6}


def test_the_state_goes_through_safetensors_and_keeps_its_floats() -> None:
    """Which takes no tensors that share memory."""
    model = net(torch.bfloat16)
    opt = from_rule(Celo2())(model.parameters())
    train(model, opt)
    kept = opt.state_dict()
    flat = {f"{i}/{n}": x for i, s in kept["state"].items() for n, x in s.items() if isinstance(x, Tensor)}
    back = safetensors.torch.load(safetensors.torch.save({n: x.contiguous() for n, x in flat.items()}))
    state = {i: {n: back.get(f"{i}/{n}", x) for n, x in reversed(s.items())} for i, s in kept["state"].items()}
    other = copy.deepcopy(model)
    again = from_rule(Celo2())(other.parameters())
    again.load_state_dict({**kept, "state": state})
    for mine, theirs in zip(opt.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(x, theirs[n]) and x.dtype == theirs[n].dtype for n, x in mine.items() if isinstance(x, Tensor))
    for m, o in ((model, opt), (other, again)):
        train(m, o, range(5, 7))
    same(values(other), values(model))


def test_groups_have_their_own_step_sizes_and_decay() -> None:
    """A step size scales all of an update; weights of groups that differ in it alone still move together."""
    models = [net(torch.float64) for _ in range(3)]
    parts = [list(model.parameters()) for model in models]
    opt = from_rule(AdamW(0.01))([{"params": parts[0][:3], "lr": 0.002}], weight_decay=0.3)
    opt.add_param_group({"params": parts[0][3:], "weight_decay": 0.0})
    theirs = torch.optim.AdamW([{"params": parts[1][:3], "lr": 0.002}], 0.01, weight_decay=0.3)
    theirs.add_param_group({"params": parts[1][3:], "weight_decay": 0.0})
    train(models[0], opt)
    train(models[1], theirs)
    same(values(models[0]), values(models[1]), rtol=1e-9, atol=1e-12)
    frozen = from_rule(Celo2())(parts[2], lr=0.0)
    before = values(models[2])
    train(models[2], frozen)
    same(values(models[2]), before)


def test_schedulers_scale_the_updates_of_a_rule_without_step_size() -> None:
    model, start = net(), values(net())
    opt = from_rule(SmallFC())(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 4.0 if k == 0 else 0.0)
    train(model, opt, range(1))
    scheduler.step()
    first = values(model)
    plain = net()
    train(plain, from_rule(SmallFC())(plain.parameters()), range(1))
    same(trees.subtract(first, start), {n: 2 * (x - start[n]) for n, x in values(plain).items()}, rtol=1e-4, atol=1e-7)
    train(model, opt, range(1, 3))
    same(values(model), first)


@pytest.mark.parametrize("name", [n for n in RULES if n not in TOGETHER])
def test_without_gradient_a_parameter_and_its_state_stay(name: str) -> None:
    model = net()
    opt = from_rule(RULES[name])(model.named_parameters())
    train(model, opt, range(2))
    left, state = model[1].weight, copy.deepcopy(opt.state_dict()["state"])
    place = [n for n, _ in model.named_parameters()].index("1.weight")
    before = left.detach().clone()
    loss_of(model, 2).backward()
    left.grad = None
    opt.step()
    assert torch.equal(left, before)
    after = opt.state_dict()["state"]
    assert after[place]["step"] == 2 and after[0]["step"] == 3
    assert all(torch.equal(x, after[place][n]) for n, x in state[place].items() if isinstance(x, Tensor))
    train(model, opt, range(3, 5))
    assert not torch.equal(left, before) and opt.state_dict()["state"][place]["step"] == 4


@pytest.mark.parametrize("name", TOGETHER)
def test_rules_of_all_weights_together_want_the_same_ones(name: str) -> None:
    model = net()
    opt = from_rule(RULES[name])(model.named_parameters())
    model[1].weight.requires_grad_(False)
    train(model, opt, range(2))
    model[1].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1\.weight had no gradient before: .* reads all weights together"):
        train(model, opt, range(1))


def test_small_weights_of_one_shape_are_moved_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    own = Celo2.update

    def counted(rule: Celo2, psi: Params, grads: Params, *rest: Any) -> Any:
        calls.append(tuple(next(iter(grads.values())).shape))
        return own(rule, psi, grads, *rest[:3])

    monkeypatch.setattr(Celo2, "update", counted)
    monkeypatch.setattr(Celo2, "quick", counted)
    model = net()
    train(model, from_rule(Celo2())(model.parameters()), range(1))
    assert sorted(calls) == [(), (4,), (4, 1, 3, 3), (4, 4), (4, 16)]
    calls.clear()
    monkeypatch.setattr(optimizer, "SMALL", 4)
    train(model, from_rule(Celo2())(model.parameters()), range(1))
    assert sorted(calls) == [(), (4,), (4, 1, 3, 3), (4, 4), (4, 4), (4, 16)]


def test_names_say_what_goes_by_adam() -> None:
    rule = Celo2(0.01, by_adam=Named("1.*"))
    model = net()
    opt = from_rule(rule)(model.named_parameters())
    train(model, opt, range(1))
    adams = {n: len(opt.state[p]) == 4 for n, p in model.named_parameters()}  # m, v, t and the step
    assert {n for n, adam in adams.items() if adam} == {"1.weight", "1.bias"}


def test_closures_and_hooks() -> None:
    model, seen = net(), list[str]()
    opt = from_rule(Celo2())(model.parameters())
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    other = net()
    train(other, from_rule(Celo2())(other.parameters()), range(1))
    assert opt.step(closure).item() == pytest.approx(loss_of(net(), 0).item())
    same(values(model), values(other))
    assert seen == ["before", "after"]
    assert "LearnedOptimizer" in repr(opt) and "lr: 0.001" in repr(opt)


def test_a_rule_is_told_the_loss_of_the_closure() -> None:
    class ByLoss(SGD):
        def update(self, psi: Params, grads: Params, state: Any, weights: Params, step: Step) -> tuple[Params, Any]:
            return {n: step.loss * g for n, g in grads.items()}, state

    w = nn.Parameter(torch.tensor(3.0))
    opt = LearnedOptimizer([w], ByLoss(1.0))

    def closure() -> float:
        w.grad = torch.tensor(1.0)
        return 0.5

    opt.step(closure)
    assert w.item() == 3.5


def test_gradients_are_scaled_as_torch_does() -> None:
    model, plain = net(), net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = from_rule(Celo2())(model.parameters())
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(opt)
    scaler.update()
    train(plain, from_rule(Celo2())(plain.parameters()), range(1))
    same(values(model), values(plain), rtol=1e-4, atol=1e-6)
    before = values(model)
    opt.zero_grad()
    scaler.scale(loss_of(model, 1) * float("inf")).backward()
    scaler.step(opt)
    same(values(model), before)


def test_the_weights_that_a_run_is_judged_at() -> None:
    rule, model = ScheduleFreeAdamW(0.05), net(torch.float64)
    opt = from_rule(rule)(model.named_parameters())
    same(opt.read_out(), values(model))
    train(model, opt)
    found = opt.read_out()
    state = {n: opt.state[p] for n, p in model.named_parameters()}
    same(found, {n: w - 0.1 * state[n]["0"] for n, w in values(model).items()}, rtol=1e-9, atol=1e-12)
    assert not torch.equal(found["1.weight"], model[1].weight)
    with pytest.raises(ValueError, match="averages weights, which scaled updates would break"):
        train(model, from_rule(chain(Clip(value=1.0), rule))(model.parameters(), lr=0.5), range(1))
    plain = net()
    clipped = from_rule(RULES["clipped"])(plain.named_parameters())
    train(plain, clipped, range(1))
    same(clipped.read_out(), values(plain))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_as_a_graph_are_the_same(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new step size, a new count and new states make no new graph."""
    monkeypatch.setattr(ways, "Graphs", Graphs if compiled else lambda guards, compiled, as_made: Graphs(guards))
    ours, graph = net(torch.float64), net(torch.float64)
    train(ours, from_rule(Celo2(0.02))(ours.parameters()), range(5))
    opt = from_rule(Celo2(0.02))(graph.parameters(), compile=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1.0 + 1e-12 * k)
    for k in range(5):
        train(graph, opt, range(k, k + 1))
        scheduler.step()
    same(values(graph), values(ours), rtol=1e-7, atol=1e-9)
    assert opt._ways.graphs is not None and len(opt._ways.graphs.graphs) == 1


@pytest.mark.slow
def test_compiled_steps_of_large_weights_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LEAST", 1)
    torch.manual_seed(0)
    start = torch.randn(6, 5, 3, 2, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    plain, compiled = (from_rule(LEARNED["celo2 base"])([("w", p)], compile=p is theirs) for p in (ours, theirs))
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn_like(start)
        plain.step()
        compiled.step()
    assert compiled._ways.graphs is not None and len(compiled._ways.graphs.graphs) == 1
    same({"w": theirs}, {"w": ours}, rtol=1e-7, atol=1e-9)
    same({k: compiled.state[theirs][k] for k in "0123"}, {k: plain.state[ours][k] for k in "0123"}, rtol=1e-9, atol=1e-12)


class Twice:
    """The last two gradients, of which it keeps the last as it was given."""

    separable = takes_step = True

    def start(self, weights: Params, generator: torch.Generator) -> Params:
        return {}

    def init(self, psi: Params, weights: Params) -> Any:
        return {n: torch.zeros_like(w) for n, w in weights.items()}

    def update(self, psi: Params, grads: Params, state: Any, weights: Params, step: Any) -> tuple[Params, Any]:
        return {n: -0.1 * (g + state[n]) for n, g in grads.items()}, dict(grads)


def test_a_rule_may_keep_a_gradient_that_is_written_over_afterwards() -> None:
    found = []
    for afresh in (True, False):
        model = net(torch.float64)
        opt = from_rule(Twice())(model.parameters())
        for k in range(3):
            opt.zero_grad(set_to_none=afresh)
            sum((p.square() * (k + 1)).sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
            opt.step()
        found.append(values(model))
    same(*found, rtol=0, atol=0)


@pytest.mark.parametrize("state", [None, {"count": 0}, {"scale": (torch.zeros(2), 0.5)}])
def test_a_state_that_is_not_made_of_tensors_is_told_of(state: Any) -> None:
    rule: Any = type("Own", (Twice,), {"init": lambda self, psi, weights: state})()
    with pytest.raises(ValueError, match=r"`init` of .*Own.* returned a state with (None|0|0\.5) in it; it must"):
        from_rule(rule)(net().named_parameters())


SIZE = {"of": 1.0}


class Odd(Twice):
    """A rule that neither vmap nor a graph, or a graph alone, can take as it is."""

    def __init__(self, by: Callable[[Any, Tensor], Any], own: Any = None) -> None:
        self.by, self.own = by, own

    def update(self, psi: Params, grads: Params, state: Any, weights: Params, step: Any) -> tuple[Params, Any]:
        return {n: -0.1 * g * self.by(step, g) for n, g in grads.items()}, state


@pytest.mark.parametrize(
    ("by", "compiled", "words"),
    [
        (lambda step, g: 2.0 if step.k < 2 else 1.0, True, r"Odd branches on a value .* on, steps are not compiled\."),
        (lambda step, g: g.norm().item(), False, "Odd branches on a value .* on, weights of one shape are moved one by one"),
        (lambda step, g: g.norm().item(), True, "branches on a value .* on, steps are not compiled and weights of one shape"),
        (lambda step, g: 1.0 + 0.0 * random.random(), True, "draws .*`random`.* on, steps are not compiled"),
        (lambda step, g: 1.0 + 0.0 * np.random.rand(), True, r"draws .*`numpy\.random`.* on, steps are not compiled"),
        (lambda step, g: 1.0 + 0.0 * time.time(), True, r"the time \(`time`\) is read .* on, steps are not compiled"),
    ],
)  # fmt: skip
def test_a_rule_that_is_no_graph_moves_weights_all_the_same(by: Any, compiled: bool, words: str) -> None:
    found = []
    for rule in (Odd(by), type("Whole", (Odd,), {"separable": False})(by)):  # neither stacked nor compiled
        model, stacks = net(), not found
        opt = from_rule(rule)(model.named_parameters(), compile=compiled and stacks)
        with pytest.warns(UserWarning, match=words) if stacks else nullcontext():
            train(model, opt, range(1))
        train(model, opt, range(1, 4))  # without another warning
        found.append(values(model))
    same(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("draw", [random.random, lambda: np.random.rand(), lambda: torch.rand(())])
def test_a_step_that_could_not_be_compiled_has_drawn_nothing(draw: Callable[[], Any]) -> None:
    found = []
    for compiled in (False, True):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        model = net()
        rule = type("Whole", (Odd,), {"separable": False})(lambda step, g: draw() * float(step.k >= 0))
        with pytest.warns(UserWarning, match="steps are not compiled") if compiled else nullcontext():
            opt = from_rule(rule)(model.named_parameters(), compile=compiled)
            torch.manual_seed(0)
            train(model, opt, range(3))
        found.append(values(model))
    same(*found)


def written(part: str) -> Callable[..., Any]:
    def update(rule: Any, psi: Any, grads: Params, state: Params, weights: Params, step: Any) -> Any:
        for x in {"the gradients": grads, "the state": state, "the weights": weights}[part].values():
            x.mul_(0.9)
        return {n: -g for n, g in grads.items()}, state

    return update


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("part", ["the gradients", "the state", "the weights"])
def test_a_rule_that_writes_into_what_it_is_given_is_refused(part: str, separable: bool, compiled: bool) -> None:
    rule = type("Own", (Twice,), {"update": written(part), "separable": separable})()
    with pytest.raises(ValueError, match=f"`update` of the rule Own writes into {part} that it is given: return new tensors"):
        train(model := net(), from_rule(rule)(model.named_parameters(), compile=compiled), range(1))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize(
    ("after", "words"),
    [
        (lambda grads: None, "returns None for the state, where it was given"),
        (lambda grads: {n: 1.0 for n in grads}, r"returns 1\.0 for the state\['.*'\], where it was given float32"),
        (lambda grads: {**grads, "more": torch.zeros(1)}, "returns .* for the state, where it was given"),
        (lambda grads: {n: (g, g) for n, g in grads.items()}, r"returns \(float32 .* for the state\['.*'\], where it"),
        (lambda grads: {n: g.sum().expand(2, 3) for n, g in grads.items()}, r"returns float32 \(2, 3\) for the state"),
    ],
)
def test_a_state_of_another_form_is_refused(after: Any, words: str, separable: bool, compiled: bool) -> None:
    def update(rule: Any, psi: Params, grads: Params, *rest: Any) -> Any:
        return grads, after(grads)

    rule: Any = type("Own", (Twice,), {"update": update, "separable": separable})()
    with pytest.raises(ValueError, match=rf"`update` of the rule Own {words}.*the same names and shapes in all steps"):
        train(model := net(), from_rule(rule)(model.named_parameters(), compile=compiled), range(1))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_state_may_come_back_in_another_order(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "Graphs", lambda guards, compiled, as_made: Graphs(guards))

    class Turned(Twice):
        def init(self, psi: Params, weights: Params) -> Any:
            return {"m": Twice.init(self, psi, weights), "v": Twice.init(self, psi, weights)}

        def update(self, psi: Params, grads: Params, state: Any, weights: Params, step: Any) -> tuple[Params, Any]:
            m = {n: 0.9 * state["m"][n] + g for n, g in grads.items()}
            return {n: -0.1 * x for n, x in m.items()}, {"v": state["v"], "m": m}

    ours, theirs = net(torch.float64), net(torch.float64)
    train(ours, from_rule(Turned())(ours.named_parameters(), compile=compiled))
    train(theirs, from_rule(Momentum(0.1))(theirs.named_parameters()))
    same(values(ours), values(theirs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("own", [[1.0, 2.0], torch.tensor([1.0, 2.0]), {"a": [1]}])
def test_a_graph_sees_what_its_rule_reads(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments that have no hash, an attribute, and a variable of its module that change."""
    monkeypatch.setattr(ways, "Graphs", lambda guards, compiled, as_made: Graphs(guards))
    found = []
    for compiled in (True, False):
        monkeypatch.setitem(SIZE, "of", 1.0)
        rule, model = Odd(lambda step, g: SIZE["of"] * step.k, own), net()
        opt = from_rule(rule)(model.named_parameters(), compile=compiled)
        train(model, opt, range(2))
        SIZE["of"] = 0.5
        train(model, opt, range(2, 4))
        rule.by = lambda step, g: 0.25 * step.k
        train(model, opt, range(4, 6))
        found.append(values(model))
        assert opt._ways.graphs is None or len(opt._ways.graphs.graphs) == 3
    same(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_wrong_with_a_rule_is_raised_as_it_is(compiled: bool) -> None:
    def by(step: Any, g: Tensor) -> Tensor:
        raise KeyError("mine")

    model = net()
    opt = from_rule(Odd(by))(model.named_parameters(), compile=compiled)
    for _ in range(2):
        with pytest.raises(KeyError, match="mine") as raised:
            train(model, opt, range(1))
        assert raised.value.__context__ is None


OWN: Any = type("Own", (AdamW,), {"takes_step": None})  # a rule that says nothing of its steps


@pytest.mark.parametrize(
    ("go", "words"),
    [
        (lambda: from_rule(SGD(0.1))([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), "is torch.complex64: rules move"),
        (lambda: made(SGD(0.1), lr=-1.0), "lr=-1.0: it must be a number that is finite"),
        (lambda: made(SGD(0.1), weight_decay=0.1), "weight_decay=0.1: .* decays no"),
        (lambda: made(SGD(0.1), compile="yes"), "compile='yes': it must be True or False"),
        (lambda: made(SGD(0.1), lr=torch.tensor(0.1)), r"lr=tensor.*\(value.item\(\) gives it\)"),
        (lambda: in_group(SGD(0.1), lr=torch.tensor(0.1)), r"lr=tensor.*\(value.item\(\) gives it\)"),
        (lambda: in_group(SGD(0.1), lr="0.1"), "lr='0.1': it must be a number"),
        (lambda: in_group(SGD(0.1), weight_decay=0.1), "weight_decay=0.1: SGD.* decays no weights; leave it out"),
        (lambda: in_group(AdamW(0.1), weight_decay="x"), "weight_decay='x': it must be a number"),
        (lambda: made(chain(SGD(0.5), Schedule(0.1)), lr=0.1), "lr=0.1: several rules of .* have a step size; give it to"),
        (lambda: made(chain(OWN(1.0), AdamW(0.1)), weight_decay=0.1), "weight_decay=0.1: several rules of .* decay weights"),
        (lambda: in_group(chain(Clip(norm=1.0), AdamW(0.1)), weight_decay=0.1), "Groups differ in weight_decay: .* all"),
        (lambda: made(ScheduleFreeAdamW(0.01), lr=0.02), "averages .* build the rule with the lr that .* take no scheduler"),
        (lambda: made(chain(SmallFC(), Average(0.9)), lr=0.5), "it has no step size, so leave lr out, and take no scheduler"),
        (lambda: made(LayerStepSizes(0.1, 3)).add_param_group({"params": [("more.w", nn.Parameter(torch.zeros(2)))]}),
         "psi: 'more.lr' is missing, where LayerStepSizes has it of shape"),
        (lambda: from_rule(SGD(0.1))([*net().named_parameters(), *net().named_parameters()]),
         "Two parameters are called 'scale': names must differ.* or parameters without names"),
        (lambda: from_rule(SGD(0.1))([{"params": net().named_parameters()}, {"params": net().named_parameters()}]),
         "Two parameters are called 'scale'"),
        (lambda: from_rule(Celo2(), SmallFC().start({"w": torch.zeros(2, 2)}, torch.Generator())),
         "psi: .* is .*, where Celo2 has it .*; give the ψ of this rule"),
        (lambda: from_rule(Celo2(), {}), r"psi is missing: Celo2\(\) has one of 347 numbers"),
        (lambda: from_rule(SmallFC(), torch.zeros(190)), "psi must be a dictionary of tensors by name, .*; found Tensor"),
        (lambda: from_rule(SmallFC(), "psi.pt"), "psi must be a dictionary of tensors by name, .*; found 'psi.pt'"),
        (lambda: made(LayerStepSizes(0.1, 3), psi={"body.lr": torch.zeros(3)}),
         "psi: '0.0.lr' is missing, where LayerStepSizes has it of shape .* for these weights"),
        (lambda: from_rule("muon"), "from_rule takes a rule, such as .*; found 'muon'"),
        (lambda: from_rule(Muon), "from_rule takes a rule, such as .*; found the class Muon"),
        (lambda: LearnedOptimizer([nn.Parameter(torch.zeros(2))], Muon), "an optimizer takes a rule, .*; found the class Muon"),
        (lambda: Celo2(by_adam="*embed*"), r"by_adam='\*embed\*': it must be a function of a weight's name, such as mo"),
        (lambda: Muon(0.1, hidden="body"), "hidden='body': it must be a function of a weight's name"),
        (lambda: Named(["*embed*"]), r"Named takes patterns one by one, .*; found \['\*embed\*'\]"),
    ],
)  # fmt: skip
def test_what_optimizers_take(go: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as found:
        go()
    assert "\n" not in str(found.value)


def made(rule: Any, psi: Any = None, **options: Any) -> LearnedOptimizer:
    return from_rule(rule, psi)(net().named_parameters(), **options)


def in_group(rule: Any, **options: Any) -> LearnedOptimizer:
    """The second of two groups."""
    first, *rest = net().named_parameters()
    return from_rule(rule)([{"params": [first]}, {"params": rest, **options}])


def test_a_group_that_is_refused_is_not_added() -> None:
    opt = made(chain(Clip(norm=1.0), SGD(0.1)))
    late = {"params": [("late", nn.Parameter(torch.zeros(2)))]}
    for group, words in ((dict(late, lr=-1.0), "lr=-1.0"), ({"params": [("scale", nn.Parameter(torch.zeros(2)))]}, "'scale'")):
        with pytest.raises(ValueError, match=words):
            opt.add_param_group(group)
        assert len(opt.param_groups) == 1
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    with pytest.raises(ValueError, match=r"A group was added after the first step: .* give all parameters before"):
        opt.add_param_group(late)
    opt.step()


CHAINED: dict[str, tuple[Rule, Rule]] = {
    "sgd": (chain(Clip(norm=1e3), SGD(0.1)), SGD(0.05)),
    "adamw": (chain(Clip(norm=1e3), AdamW(0.01)), AdamW(0.05, decay=0.3)),
    "small": (chain(Clip(value=1e3), AdamW(0.01)), AdamW(0.05, decay=0.3)),
    "nested": (chain(Clip(norm=1e3), chain(Clip(value=1e3), AdamW(0.01))), AdamW(0.05, decay=0.3)),
    "scheduled": (chain(Momentum(1.0), Schedule(0.1)), Momentum(0.05)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINED)
def test_step_size_and_decay_of_a_chain_are_those_of_the_rule_that_has_them(name: str) -> None:
    """Given at the start, in a group, or by a scheduler."""
    rule, plain = CHAINED[name]
    decay: dict[str, Any] = {"weight_decay": 0.3} if "adamw" in str(plain).lower() else {}
    expected = net(torch.float64)
    train(expected, from_rule(plain)(expected.parameters()))
    for way in ("argument", "group", "scheduler"):
        model = net(torch.float64)
        given = [{"params": list(model.parameters()), "lr": 0.05, **decay}] if way == "group" else model.parameters()
        options = {} if way == "group" else decay | ({"lr": 0.05} if way == "argument" else {})
        opt = from_rule(rule)(given, **options)
        if way == "scheduler":
            torch.optim.lr_scheduler.LambdaLR(opt, lambda k, own=opt.own_lr: 0.05 / own)
        train(model, opt)
        same(values(model), values(expected), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("rule", "named", "words"),
    [
        (Muon(0.02), False, r"Muon\(lr=0.02\) tells weights apart by their names, and these have none: give model.named_param"),
        (chain(Clip(value=1.0), Celo2(by_adam=Named("*bias"))), False, "Celo2.* tells weights apart by their names"),
        (LayerStepSizes(0.1, 3), False, "LayerStepSizes.* tells weights apart"),
        (Celo2(by_adam=Named("*embed*", "*norm*")), True, r"has a name like \*embed\* or \*norm\*; .* such as 'scale'"),
        (Celo2(by_adam=Named("*embed*", "*bias")), True, None), (Celo2(by_adam=Named()), False, None), (Celo2(), False, None),
    ],
)  # fmt: skip
def test_rules_that_go_by_names_want_some(rule: Rule, named: bool, words: str | None) -> None:
    model = net()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        from_rule(rule)(model.named_parameters() if named else model.parameters())
    assert [str(w.message) for w in found if w.filename == __file__] == [str(w.message) for w in found]
    assert len(found) == (0 if words is None else 1) and (words is None or re.search(words, str(found[0].message)))


@dataclass(frozen=True)
class Own(SGD):
    """A rule whose update is made by a function of gradients and step."""

    lr: float = 1.0
    make: Callable[[Params, Step], Any] = lambda grads, step: (grads, {})
    separable: bool = True

    def update(self, psi: Params, grads: Params, state: Any, weights: Params, step: Step) -> Any:
        return self.make(grads, step)


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda grads, step: ({n: -g.sum() for n, g in grads.items()}, {}), r"an update of shape \(\) for the weight"),
        (lambda grads, step: ({}, {}), "`update` of the rule Own returns no update for the weight"),
        (lambda grads, step: ({**grads, "more": torch.zeros(1)}, {}), "returns an update for 'more', which is no weight"),
        (lambda grads, step: None, r"returned NoneType; it must return \(updates by name, state\)"),
        (lambda grads, step: ({n: step.loss * g for n, g in grads.items()}, {}), "reads the loss, which a closure alone tells"),
    ],
)  # fmt: skip
def test_what_rules_return(make: Callable[..., Any], words: str, separable: bool) -> None:
    model = nn.Sequential(net()[0])  # without a scalar
    start, opt = values(model), from_rule(Own(make=make, separable=separable))(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=words):
        opt.step()
    same(values(model), start)


@pytest.mark.parametrize("name", RULES)
def test_a_parameter_without_elements_is_left_alone(name: str) -> None:
    ours, theirs = net(), net()
    ours.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
    for model in (ours, theirs):
        opt = from_rule(RULES[name])(model.named_parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    same(values(theirs), values(ours))
    opt = from_rule(RULES[name])([("empty", empty := nn.Parameter(torch.zeros(0, 3)))])
    empty.grad = torch.zeros(0, 3)
    opt.step()


def test_sparse_gradients_are_refused() -> None:
    layer = nn.Embedding(5, 2, sparse=True)
    opt = from_rule(Adam(0.1))(layer.named_parameters())
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="The gradient of weight is sparse"):
        opt.step()


@pytest.mark.parametrize(
    ("saved", "rule", "words"),
    [
        (Adam(0.1), SmallFC(), "one of Adam, where this optimizer moves by SmallFC"), (Adam(0.1), AdamW(0.1), "one of Adam,"),
        (ScheduleFreeAdamW(0.1), AdamW(0.1), "one of ScheduleFreeAdamW,"), (AdamW(0.1), Momentum(0.1), "one of AdamW,"),
        (SGD(0.1), chain(Clip(norm=1.0), SGD(0.1)), r"one of SGD, where this optimizer moves by Chain\(Clip, SGD\)"),
        (sgd_hd(0.1, 1e-3), adam_hd(0.1, 1e-3), r"HypergradientDescent\(SGD\), where .* by HypergradientDescent\(AdamW\)"),
        (Celo2(), Celo2(by_adam=Named("*")), r"The state of scale is not one of Celo2|The state of 0\.0\.weight is not one"),
        (None, AdamW(0.1), "The state of scale is not one of AdamW"), (None, SGD(0.1), "The state of scale is not one of SGD"),
        (AdamW(0.1), AdamW(0.2, decay=0.0), None), (chain(Clip(norm=1.0), Adam(0.1)), chain(Clip(norm=9.0), Adam(0.2)), None),
    ],
)  # fmt: skip
def test_a_state_belongs_to_a_rule_of_any_numbers(saved: Rule | None, rule: Rule, words: str | None) -> None:
    """None: to AdamW of torch. What is refused leaves the optimizer as it was."""
    model = net()
    theirs = torch.optim.AdamW(model.named_parameters()) if saved is None else from_rule(saved)(model.named_parameters())
    train(model, theirs, range(1))
    opt = from_rule(rule)(model.named_parameters())
    train(model, opt, range(2))
    before = copy.deepcopy(opt.state_dict())
    if words is None:
        opt.load_state_dict(theirs.state_dict())
        assert {s["step"] for s in opt.state.values()} == {1}
        return
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(theirs.state_dict())
    assert str(opt.state_dict()) == str(before)
    train(model, opt, range(1))


# --- Files ----------------------------------------------------------------------------------------------------------------

KEPT: dict[str, Rule] = {
    "celo2": Celo2(0.3, decay=0.1, by_adam=Named("*embed*", "*bias")), "lstm": LSTM(p=None, scale=1.0), "small_fc": SmallFC(),
    "adam": Adam(0.1), "muon": Muon(0.1), "chain": chain(Clip(value=1.0), Celo2(1.0), Schedule(0.1, 5)),
    "hypergradient": sgd_hd(0.1, 1e-3),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_a_rule_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    rule = KEPT[name]
    psi = rule.start({"w": torch.zeros(2, 2)}, torch.Generator().manual_seed(3))
    save(tmp_path / "rule.safetensors", rule, psi, {"recipe": "none", "scores": {"mlp": 0.5}})
    found = load(tmp_path / "rule.safetensors")
    assert found.rule == rule and found.psi is not None
    same(found.psi, psi)
    assert found.header["scores"] == {"mlp": 0.5} and found.header["sha256"] == files.digest(psi, found.header)
    a, b = net(), net()
    train(a, found(a.named_parameters()))
    train(b, from_rule(rule, psi)(b.named_parameters()))
    same(values(a), values(b))
    assert repr(found).startswith("Factory(") and f"{sum(x.numel() for x in psi.values()):,} numbers" in repr(found)


def changed(data: bytes, honest: bool = True, **changes: Any) -> bytes:
    """The file with other entries of its header; honest: and the sum of these."""
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    told = json.loads(head["__metadata__"]["metaoptim"]) | changes
    told |= {"sha256": files.digest(safetensors.torch.load(data), told)} if honest else {}
    text = json.dumps({**head, "__metadata__": {"metaoptim": json.dumps(told)}}).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def without(data: bytes) -> bytes:
    return safetensors.torch.save({"x": torch.zeros(3)})


FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda d: d[:-8], "is cut, or no file of a rule"),
    "text": (lambda d: b"hello, this is no such file", "is cut, or no file of a rule"),
    "empty": (lambda d: b"", "is cut, or no file of a rule"),
    "others": (without, "holds tensors, and no rule"),
    "format": (lambda d: changed(d, format=7), "has format 7 and inputs 1, where this version reads 1 and 1"),
    "bits": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "is altered: its ψ and its header have another sha256"),
    "arguments changed": (
        lambda d: changed(d, honest=False, rule={"name": "Celo2", "arguments": {"lr": 0.02}}),
        "is altered: its ψ and its header have another sha256",
    ),
    "scores": (lambda d: changed(d, honest=False, scores={"mlp": 0.1}), "is altered: its ψ and its header"),
    "unknown": (
        lambda d: changed(d, rule={"name": "Velo", "arguments": {}}),
        "is of the rule Velo, which this version doesn't",
    ),
    "arguments": (lambda d: changed(d, rule={"name": "Celo2", "arguments": {"x": 1}}), "has arguments that Celo2 doesn't take"),
    "shapes": (
        lambda d: changed(d, rule={"name": "SmallFC", "arguments": {}}),
        r"'b0' is of shape \(8,\), where SmallFC has it of shape \(4,\)",
    ),
    "header": (lambda d: changed(d, rule="Celo2"), "has a header that can't be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_files_are_refused_with_one_sentence(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "rule.safetensors"
    save(path, Celo2(), Celo2().start({"w": torch.zeros(2, 2)}, torch.Generator()))
    data = path.read_bytes()
    assert load(path).rule == Celo2()
    path.write_bytes(FAULTS[fault][0](data))
    with pytest.raises(ValueError, match=FAULTS[fault][1]) as found:
        load(path)
    assert "\n" not in str(found.value) and "rule.safetensors" in str(found.value)


def test_what_can_be_kept(tmp_path: Path) -> None:
    path, psi = tmp_path / "x.safetensors", Celo2().start({"w": torch.zeros(2, 2)}, torch.Generator())
    with pytest.raises(ValueError, match=r"'<lambda>' can't be kept in a file; give Named"):
        save(path, Celo2(by_adam=lambda name: True), psi)
    for go in (lambda: save(path, Celo2()), lambda: from_rule(Celo2()).save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"ψ is missing: Celo2\(\) has one of 347 numbers; give it"):
            go()
    with pytest.raises(
        ValueError, match=r"ψ must be a dictionary of tensors by name, .*; found a φ, of which it is the \.rule"
    ):
        save(path, Celo2(), mo.MetaParams({}, psi))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"save takes a rule, .*; found the class Celo2"):
        save(path, Celo2, psi)  # type: ignore[arg-type]
    for take in (from_rule, partial(save, path)):
        with pytest.raises(ValueError, match=r"takes a rule; of a run, mo\.optim\.from_run\(run\) makes optimizers"):
            take(object.__new__(mo.Run))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"header must be a dictionary, such as .*; found \['a'\]"):
        save(path, Celo2(), psi, ["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="header has the entry `rule`"):
        save(path, Celo2(), psi, {"rule": "mine"})
    with pytest.raises(ValueError, match="header can't be written as JSON"):
        save(path, Celo2(), psi, {"scores": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"LayerStepSizes|'w?\.?lr'"):
        save(path, LayerStepSizes(0.1, 3), {"a.lr": torch.zeros(3)})
    assert not path.exists()
    with pytest.raises(ValueError, match="There is no file 'no-such-rule'"):
        load("no-such-rule")
    with pytest.raises(ValueError, match=r"is a folder, and load takes a file; mo\.optim\.from_pretrained takes folders"):
        load(tmp_path)


def test_a_rule_of_ones_own_is_told_how_it_can_be_kept(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Mine(SGD):
        pass

    advice = r"can't be kept in a file.*mo\.optim\.from_rule\(rule, psi=run\.phi\.rule\)"
    for rule in (Mine(0.1), Twice()):
        with pytest.raises(ValueError, match=f"{type(rule).__name__} {advice}"):
            from_rule(rule).save(tmp_path / "x.safetensors")


def test_folders_are_made_and_files_are_not_taken_for_them(tmp_path: Path) -> None:
    factory = from_rule(SGD(0.1))
    factory.save(tmp_path / "new" / "rule.safetensors")
    assert load(tmp_path / "new" / "rule.safetensors").rule == SGD(0.1)
    with pytest.raises(ValueError, match="is a file, and save_pretrained takes a folder"):
        factory.save_pretrained(tmp_path / "new" / "rule.safetensors")


def test_rules_that_come_with_the_library_load_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mo.optim.available() == sorted(mo.optim.available())
    for name in mo.optim.available():
        assert load(name).psi is not None
    from metaoptim.optim import factory

    monkeypatch.setattr(factory, "SHIPPED", tmp_path)
    save(tmp_path / "tiny.safetensors", SGD(0.1))
    assert mo.optim.available() == ["tiny"] and load("tiny").rule == SGD(0.1)


@pytest.mark.parametrize("name", ["celo2", "small_fc"])
def test_a_shipped_rule_says_where_it_comes_from_and_trains_what_it_has_not_seen(name: str) -> None:
    assert name in mo.optim.available()
    factory = load(name)
    told = factory.header
    assert told["command"].startswith("metaoptim train lopt-") and told["steps"] > 0
    assert tomllib.loads(told["recipe"])["algorithm"]["name"] == "learned_optimizer"
    families = {"MNIST", "CIFAR", "convolutions", "transformer", "5 times the steps", "10 times the width"}
    assert families < told["scores"].keys(), "held out"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    x = torch.randn(200, 6)
    y = (x[:, :3] + 0.5 * x[:, 3:]).argmax(1)
    optimizer = factory(model.named_parameters())
    before = F.cross_entropy(model(x), y).item()
    for _ in range(100):
        rows = torch.randint(0, 200, (32,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    judged = torch.func.functional_call(model, optimizer.read_out(), (x,))
    assert F.cross_entropy(judged, y).item() < 0.5 * before


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for it."""
    psi = SmallFC().start({"w": torch.zeros(2, 2)}, torch.Generator())
    made = from_rule(SmallFC(), psi)
    made.save_pretrained(tmp_path / "mine")
    assert from_pretrained(tmp_path / "mine").rule == SmallFC()

    class Api:
        def __init__(self, token: str) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, exist_ok: bool) -> None:
            (tmp_path / repo_id).mkdir(parents=True)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            for file in Path(folder_path).iterdir():
                (tmp_path / repo_id / file.name).write_bytes(file.read_bytes())
            return f"hub/{repo_id}"

    def download(repo_id: str, name: str, revision: str | None) -> str:
        if not (tmp_path / repo_id).is_dir():
            raise OSError("404\nmore")
        return str(tmp_path / repo_id / name)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Api, hf_hub_download=download))
    assert load(tmp_path / "mine" / "rule.safetensors").push_to_hub("me/rule", token="secret") == "hub/me/rule"
    found = from_pretrained("me/rule")
    assert found.psi is not None
    same(found.psi, psi)
    with pytest.raises(ValueError, match=r"'me/other' is no folder, and the hub has no rule\.safetensors of it to give: 404$"):
        from_pretrained("me/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"'me/rule' is no folder, and the hub needs .*: pip install 'metaoptim\[hub\]'"):
        from_pretrained("me/rule")
    with pytest.raises(ValueError, match=r"There is no folder '\./mine', nor can a repository of the hub be called so"):
        from_pretrained("./mine")
    with pytest.raises(ValueError, match=r"is a file, and from_pretrained takes a folder; mo\.optim\.load takes files"):
        from_pretrained(tmp_path / "mine" / "rule.safetensors")


# --- Training loops of others ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_with_it(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            lightning.LightningModule.__init__(self)
            self.net, self.losses = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), list[float]()

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            opt = from_rule(Muon(0.02, adam_lr=0.02))(self.named_parameters())
            return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)]

    torch.manual_seed(0)
    x = torch.randn(64, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    torch.manual_seed(1)
    whole = Module()
    parts = copy.deepcopy(whole), copy.deepcopy(whole)
    lightning.Trainer(max_epochs=4, default_root_dir=tmp_path, **options).fit(whole, loader)
    assert sum(whole.losses[-4:]) < 0.9 * sum(whole.losses[:4])
    trainer = lightning.Trainer(max_epochs=3, default_root_dir=tmp_path, **options)
    trainer.fit(parts[0], loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer = lightning.Trainer(max_epochs=4, default_root_dir=tmp_path, **options)
    trainer.fit(parts[1], loader, ckpt_path=tmp_path / "last.ckpt")
    assert len(parts[1].losses) == 4
    same(values(parts[1]), values(whole))


@pytest.mark.filterwarnings("ignore")
def test_transformers_trains_with_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    rows = [{"input_ids": (i + torch.arange(8)) % 11, "labels": (i + torch.arange(8)) % 11} for i in range(32)]
    rule = Muon(0.02, adam_lr=0.02)

    def trainer(steps: int) -> Any:
        opt = from_rule(rule)(model.named_parameters())
        given = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=8, logging_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1.0)
        return transformers.Trainer(model, given, train_dataset=rows, optimizers=(opt, schedule))

    first = trainer(8)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    second = trainer(10)
    second.train(resume_from_checkpoint=True)
    found = second.optimizer
    assert {s["step"] for s in getattr(found, "optimizer", found).state.values()} == {10}


def test_states_are_where_the_parameters_are() -> None:
    """On the meta device as on any other: nothing is made elsewhere."""
    for name in ("celo2", "small_fc", "lstm", "adam", "muon"):
        w = [nn.Parameter(torch.zeros(4, 3, device="meta")) for _ in range(2)]
        opt = from_rule(RULES[name])([(f"w{i}", p) for i, p in enumerate(w)])
        for p in w:
            p.grad = torch.zeros_like(p)
        opt.step()
        assert {x.device.type for s in opt.state.values() for x in s.values() if isinstance(x, Tensor)} == {"meta"}


def test_an_accelerator_computes_all_but_the_largest_weights_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """There each call costs more than a million weights do; the meta device stands for one."""
    called = []
    monkeypatch.setattr(pieces, "perceptron_of", lambda psi, x, *rest: called.append(x.device.type) or x)
    for device in ("cpu", "meta"):
        w = nn.Parameter(torch.zeros(40, 30, device=device))
        opt, w.grad = from_rule(Celo2(orthogonal=False))([w]), torch.zeros_like(w)
        opt.step()
    assert called == ["cpu"] and not pieces.few(torch.empty(1, 2048, 2048, device="meta"))
