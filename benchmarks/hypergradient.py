"""Seconds of one hypergradient: a plain autograd loop, higher, TorchOpt and `mo.hypergradient`, in the same rounds.

    python benchmarks/hypergradient.py [--steps 10 50] [--rounds 9]

A classifier of 100 rows is trained for K full steps of SGD; the loss on 100 others is differentiated by a weight for each row
and by a temperature. Errors are relative to the loop's gradient in float64: exact ways have rounding errors, and the others
what they are not meant to see. A ratio is the loop's seconds ÷ the way's in the same round.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import missing
from rich.table import Table
from rounds import Contender, measure, quartiles, ratios, timed
from shared import CACHES, CONSOLE, RESULTS, doing, save, summary
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metaoptim as mo
from metaoptim.core import trees
from metaoptim.core.types import Params

LR = 0.5
Way = Callable[[Params], tuple[Tensor, Params]]
"""Hyper-parameters -> (validation loss, its gradient)."""

OURS: dict[str, dict[str, Any]] = {
    "exact": {}, 'exact, memory="steps"': {"memory": "steps"}, "truncated, 5 steps": {"method": "truncated", "window": 5},
    "sama": {"method": "sama"}, "implicit, 5 iterations": {"method": "implicit", "damping": 1.0},
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """K steps of training a multi-layer perceptron on some rows of random classes."""

    steps: int
    rows: int = 100
    width: int = 32
    dtype: torch.dtype = torch.float32

    def draw(self, seed: int) -> tuple[Tensor, Tensor]:
        """Rows x (S, 20) and their classes (S,)."""
        g = torch.Generator().manual_seed(seed)
        y = torch.randint(0, 5, (self.rows,), generator=g)
        x = F.one_hot(y, 20) + 0.7 * torch.randn(self.rows, 20, generator=g, dtype=torch.float64)
        return x.to(self.dtype), y

    def net(self) -> nn.Module:
        """The same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(20, self.width), nn.Tanh(), nn.Linear(self.width, 5)).to(self.dtype)

    def hyper(self, seed: int) -> Params:
        """A weight for each row, and a temperature."""
        g = torch.Generator().manual_seed(seed)
        weights = torch.randn(self.rows, generator=g, dtype=torch.float64).to(self.dtype)
        return {"weights": weights, "temperature": torch.zeros((), dtype=self.dtype)}


def train_loss(net: Any, hyper: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The weighted mean of the rows' losses."""
    each = F.cross_entropy(net(batch[0]) * hyper["temperature"].exp(), batch[1], reduction="none")
    return (hyper["weights"].sigmoid() * each).mean()


def val_loss(net: Any, hyper: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean of the rows' losses."""
    return F.cross_entropy(net(batch[0]), batch[1])


def loop(problem: Problem) -> Way:
    """The base line: plain autograd through `functional_call`."""
    net, data, val = problem.net(), problem.draw(1), problem.draw(2)

    def way(hyper: Params) -> tuple[Tensor, Params]:
        leaves = {n: x.detach().requires_grad_() for n, x in hyper.items()}
        weights = {n: p.detach().requires_grad_() for n, p in net.named_parameters()}
        for _ in range(problem.steps):
            loss = train_loss(partial(_run, net, weights), leaves, data)
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {n: w - LR * g for (n, w), g in zip(weights.items(), slopes, strict=True)}
        loss = val_loss(partial(_run, net, weights), leaves, val)
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return loss.detach(), dict(zip(leaves, found, strict=True))

    return way


def with_higher(problem: Problem) -> Way:
    """`higher`: a patched copy of the module and a differentiable optimizer."""
    import higher

    net, data, val = problem.net(), problem.draw(1), problem.draw(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)

    def way(hyper: Params) -> tuple[Tensor, Params]:
        leaves = {n: x.detach().requires_grad_() for n, x in hyper.items()}
        with higher.innerloop_ctx(net, optimizer) as (fast, inner):
            for _ in range(problem.steps):
                inner.step(train_loss(fast, leaves, data))
            loss = val_loss(fast, leaves, val)
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return loss.detach(), dict(zip(leaves, found, strict=True))

    return way


def with_torchopt(problem: Problem) -> Way:
    """TorchOpt: a meta-optimizer that moves the module in place, and its state put back."""
    import torchopt

    net, data, val = problem.net(), problem.draw(1), problem.draw(2)
    inner = torchopt.MetaSGD(net, lr=LR)
    start, fresh = torchopt.extract_state_dict(net, by="reference"), torchopt.extract_state_dict(inner)

    def way(hyper: Params) -> tuple[Tensor, Params]:
        leaves = {n: x.detach().requires_grad_() for n, x in hyper.items()}
        for _ in range(problem.steps):
            inner.step(train_loss(net, leaves, data))
        loss = val_loss(net, leaves, val)
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        torchopt.recover_state_dict(net, start)
        torchopt.recover_state_dict(inner, fresh)
        return loss.detach(), dict(zip(leaves, found, strict=True))

    return way


def ours(problem: Problem, **options: Any) -> Way:
    """`mo.hypergradient` with one of its methods."""
    net, data, val = problem.net(), problem.draw(1), problem.draw(2)
    given: dict[str, Any] = {"rule": mo.rules.SGD(LR), "steps": problem.steps, **options}

    def way(hyper: Params) -> tuple[Tensor, Params]:
        found = mo.hypergradient(train_loss, val_loss, net, hyper, data, val, **given)
        return found.loss, found.hyper

    return way


def compiled(problem: Problem, runtime: str = "compile") -> Way:
    """The same problem as `mo.bilevel`, as a graph of the engine that is built once."""
    net, data, val = problem.net(), problem.draw(1), problem.draw(2)
    method = mo.bilevel(train_loss, val_loss, net, problem.hyper(0), rule=mo.rules.SGD(LR), steps=problem.steps)
    engine = mo.Engine(method, "loop", "steps", runtime)
    task = mo.Task(*trees.map_tensors(lambda x: x[None], (data, val)))

    def way(hyper: Params) -> tuple[Tensor, Params]:
        phi = mo.MetaParams(method.phi.weights | {f"hyper.{n}": x for n, x in hyper.items()}, {})
        found = engine(phi, task)
        return found.loss, {n.removeprefix("hyper."): g for n, g in found.grad.weights.items()}

    return way


def _run(net: nn.Module, weights: Params, x: Tensor) -> Tensor:
    found: Tensor = functional_call(net, weights, (x,))
    return found


def prepare(problem: Problem) -> list[Contender]:
    """Every way that can be had, with its first call made and its gradient compared; the loop comes first."""
    hypers = [problem.hyper(seed) for seed in range(4)]
    double = Problem(problem.steps, problem.rows, problem.width, torch.float64)
    truth = loop(double)(trees.map_tensors(Tensor.double, hypers[0]))[1]
    ways = {"loop": loop(problem)}
    for name, package, build in (("higher", "higher", with_higher), ("TorchOpt", "torchopt", with_torchopt)):
        if why := missing(package):
            CONSOLE.print(f"  {name} is left out: {why}")
        else:
            ways[name] = build(problem)
    ways |= {f"metaoptim, {name}": ours(problem, **options) for name, options in OURS.items()}
    ways["metaoptim, exact, compiled"] = compiled(problem)
    contenders = []
    for name, way in ways.items():
        doing(name)
        start = time.perf_counter()
        _, grad = way(hypers[0])
        one = Contender(name, timed(lambda i, way=way: way(hypers[i])), first=time.perf_counter() - start)
        gap = trees.norm(trees.subtract({n: g.double() for n, g in grad.items()}, truth)) / trees.norm(truth)
        one.error = gap.item()
        contenders.append(one)
    return contenders


def table(title: str, contenders: list[Contender]) -> Table:
    """A row per way."""
    found = Table(title=title)
    for heading in ("way", "ms", "× loop", "quartiles", "first call, s", "away from exact"):
        found.add_column(heading, justify="left" if heading == "way" else "right")
    for one in contenders:
        low, middle, high = quartiles(ratios(contenders[0], one))
        cells = [one.name, f"{1e3 * one.median:.2f}", f"{middle:.2f}", f"{low:.2f} – {high:.2f}", f"{one.first:.2f}"]
        found.add_row(*cells, f"{one.error:.0e}")
    return found


def main() -> None:
    """Measures, prints, and writes a record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50], help="training steps K")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=RESULTS / "hypergradient.json")
    options = parser.parse_args()
    record: dict[str, Any] = {"benchmark": "hypergradient", "rounds": options.rounds, "works": {}}
    CONSOLE.print(summary())
    with tempfile.TemporaryDirectory(prefix="metaoptim-bench-") as fresh:
        os.environ |= dict.fromkeys(CACHES, fresh)
        for steps in options.steps:
            contenders = prepare(Problem(steps))
            measure(contenders, options.rounds, 4, f"{steps} steps")
            CONSOLE.print(table(f"one hypergradient through {steps} steps", contenders))
            record["works"][str(steps)] = {
                one.name: {"ms": 1e3 * one.median, "times_loop": ratios(contenders[0], one), "error": one.error,
                           "first_call_s": one.first, "seconds": one.seconds} for one in contenders
            }  # fmt: skip
    save(options.json, record)
    CONSOLE.print(f"written: {options.json}")


if __name__ == "__main__":
    main()
