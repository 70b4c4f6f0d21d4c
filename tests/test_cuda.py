"""What an accelerator computes, against the CPU in float64: meta-gradients, rules as optimizers, meta-training, judging."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metaoptim as mo
from metaoptim import lopt
from metaoptim.core import trees
from metaoptim.core.types import Params, Rule
from metaoptim.engine import Engine
from metaoptim.estimators import Truncated, nres, pes
from metaoptim.lopt.data import Data
from metaoptim.lopt.judgement import Row
from metaoptim.optim import LearnedOptimizer, from_rule
from metaoptim.rules import SGD, SOAP, Adam, Clip, Muon, Schedule, ScheduleFreeAdamW, chain

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"), pytest.mark.usefixtures("doubles")
]  # fmt: skip

WAYS = [("loop", "graph", "eager"), ("vmap", "graph", "eager"), ("vmap:2", "steps", "eager"), ("vmap", "graph", "trace"),
        ("workers:2", "graph", "trace"), ("vmap", "graph", "compile")]  # fmt: skip
RULES: dict[str, Rule] = {
    "adam": Adam(0.01), "muon": Muon(0.02), "soap": SOAP(0.01), "schedule-free": ScheduleFreeAdamW(0.01),
    "celo2": lopt.Celo2(0.02), "small_fc": lopt.SmallFC(), "lstm": lopt.LSTM(),
    "chain": chain(Clip(norm=0.5), SGD(1.0), Schedule(0.1)),
}  # fmt: skip


def same(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Two trees of tensors, of which the first is on the accelerator."""
    for a, b in zip(trees.flatten(found), trees.flatten(expected), strict=True):
        assert a.is_cuda and (a.to(b.device) - b).norm() <= tolerance * b.norm() + 1e-14


# --- Meta-gradients -------------------------------------------------------------------------------------------------------


class Drawing(nn.Module):
    """Layers whose functions are written out, and one that draws."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.a, self.drop, self.norm = nn.Linear(4, 8), nn.Dropout(0.2), mo.nn.BatchNorm(8)
        self.groups, self.b = nn.GroupNorm(2, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.groups(self.norm(self.drop(torch.tanh(self.a(x))))))


def gradient(where: str, estimator: Any, *way: str) -> Any:
    torch.manual_seed(0)
    net, draw = Drawing().to(where), torch.Generator().manual_seed(0)
    parts = [tuple(torch.randn(3, rows, n, generator=draw).to(where) for n in (4, 2)) for rows in (6, 4)]
    method = mo.compose(net, F.mse_loss, rule=Adam(0.05), steps=2, estimator=estimator)
    engine, batch = Engine(method, *way), mo.Task(*parts)
    found = engine(method.phi, batch, engine.init(method.phi, batch))
    return found.loss, found.grad


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_every_way_computes_the_gradient_of_the_cpu(way: tuple[str, str, str]) -> None:
    unroll = mo.estimators.Unroll()
    same(gradient("cuda", unroll, *way), gradient("cpu", unroll, "loop", "graph", "eager"))


@pytest.mark.parametrize("estimator", [Truncated(1), pes(1, 0.1), nres(1, 0.1, pairs=2)], ids=["truncated", "pes", "nres"])
@pytest.mark.parametrize("runtime", ["eager", "trace"])
def test_estimators_draw_the_same_noise_everywhere(estimator: Any, runtime: str) -> None:
    same(gradient("cuda", estimator, "vmap", "graph", runtime), gradient("cpu", estimator, "vmap", "graph", "eager"))


# --- Rules as optimizers --------------------------------------------------------------------------------------------------


def net(where: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Weights of none, one, two and four dimensions, and one that is large enough for the quick ways."""
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh()]
    model = nn.Sequential(*body, nn.Linear(40, 4))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    return model.to(where, dtype)


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range = range(5)) -> Params:
    for k in steps:
        opt.zero_grad()
        loss_of(model, k).backward()
        opt.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def loss_of(model: Any, k: int) -> Tensor:
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(k)).to(model.scale.device, model.scale.dtype)
    return F.cross_entropy(model(x) * model.scale, torch.arange(8, device=x.device) % 4)


def made(name: str, model: nn.Module, **options: Any) -> LearnedOptimizer:
    return from_rule(RULES[name])(model.named_parameters(), **options)


# SOAP's first basis is arbitrary where a gradient has not full rank, so that 1e-15 at the start becomes a tenth.
@pytest.mark.parametrize("name", [name for name in RULES if name != "soap"])
def test_a_rule_moves_as_on_the_cpu(name: str) -> None:
    ours, theirs = net("cuda"), net("cpu")
    same(train(ours, made(name, ours)), train(theirs, made(name, theirs)), 1e-7)


@pytest.mark.parametrize("name", ["celo2", "small_fc", "adam"])
def test_a_compiled_step_moves_as_on_the_cpu(name: str) -> None:
    ours, theirs = net("cuda"), net("cpu")
    same(train(ours, made(name, ours, compile=True)), train(theirs, made(name, theirs)), 1e-7)


@pytest.mark.parametrize("name", ["celo2", "small_fc", "lstm", "soap"])
def test_a_run_goes_on_after_its_state_went_through_a_file(name: str, tmp_path: Path) -> None:
    whole = net("cuda")
    opt = made(name, whole)
    train(whole, opt, range(2))
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    others = {where: copy.deepcopy(whole).to(where) for where in ("cuda", "cpu")}
    expected = train(whole, opt, range(2, 5))
    for where, model in others.items():
        again = made(name, model)
        again.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu"))
        assert {x.device.type for s in again.state.values() for x in s.values() if isinstance(x, Tensor)} == {where}
        same(expected, train(model, again, range(2, 5)), 1e-12 if where == "cuda" else 1e-7)


@pytest.mark.parametrize("name", ["celo2", "small_fc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shipped_rules_train_in_fewer_bits_with_scaled_gradients(name: str, dtype: torch.dtype) -> None:
    model, full = net("cuda", dtype), dtype == torch.float32
    opt, scaler = mo.optim.load(name)(model.parameters()), torch.amp.GradScaler("cuda", enabled=full)
    losses = []
    for _ in range(60):
        opt.zero_grad()
        with torch.autocast("cuda", torch.float16 if full else torch.bfloat16):
            loss = loss_of(model, 0)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# --- Meta-training and judging --------------------------------------------------------------------------------------------


def family() -> lopt.Problems:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 1, 3, 3, generator=draw) + 0.5 * y[:, None, None, None]
    return lopt.mlp(Data("toy", x, y, 3), (6,), batch=8, steps=8)


HOW = [("pes", "trace"), ("nres", "eager"), ("nres", "compile"), ("truncated", "eager"), ("unroll", "eager")]


@pytest.mark.parametrize(("estimator", "runtime"), HOW)
def test_a_rule_is_meta_trained_as_on_the_cpu(estimator: str, runtime: str) -> None:
    def psi(where: str, runtime: str) -> Params:
        options = {} if estimator == "unroll" else {"window": 4}
        return lopt.meta_train(
            lopt.SmallFC(), family(), iterations=3, estimator=estimator, problems_per_step=3, validate_every=0, progress=False,
            device=where, engine={"batching": "vmap", "memory": "graph", "runtime": runtime}, **options,
        ).phi.rule  # fmt: skip

    same(psi("cuda", runtime), psi("cpu", "eager"), 1e-6)


def test_a_rule_is_judged_as_on_the_cpu() -> None:
    def judged(where: str) -> list[Row]:
        options = {"problems": 3, "seeds": 1, "step_sizes": 3, "progress": False, "device": where}
        return lopt.evaluate(Adam(0.01), {}, families={"toy": family()}, **options).rows

    for a, b in zip(judged("cuda"), judged("cpu"), strict=True):
        assert (a.name, a.lr, a.warmup) == (b.name, b.lr, b.warmup)
        torch.testing.assert_close(a.losses.cpu(), b.losses, rtol=1e-5, atol=1e-7)
