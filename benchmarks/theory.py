"""Theory on small problems: what starts are, what first order drops, why α·K counts, estimators' bias, error against classes.

    python benchmarks/theory.py starts | first-order | alpha-k | estimators | classes

Each prints its numbers and draws docs/images/theory-NAME.png (--figure takes another path). docs/theory.md says what they mean.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table
from shared import CONSOLE, summary
from torch import Tensor, nn
from torch.func import vmap

import metaoptim as mo
from metaoptim.core import trees
from metaoptim.core.types import Clock, Estimator, MetaOptimizer, MetaParams, Task
from metaoptim.report.style import COLOURS, save, sheet

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PLAIN = {"batching": "vmap", "memory": "graph", "runtime": "eager"}
BLUE, RED, GREEN, PINK = COLOURS


def main() -> None:
    """Runs one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=COMMANDS)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    figure = COMMANDS[options.name]()
    save(figure, options.figure or IMAGES / f"theory-{options.name}.png")
    CONSOLE.print(f"{time.perf_counter() - began:.0f} s on {summary()}")


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    shown = Table(*heads, title=title)
    for row in rows:
        shown.add_row(*(x if isinstance(x, str) else f"{x:.4g}" for x in row))
    CONSOLE.print(shown)


# What starts are: two quadratics ½ a (w − c)², one steep and one flat

STEEP, FLAT = (2.0, 0.0), (0.5, 1.0)  # (a, c)
LEAST = 0.05  # the sum of weights from which on gradient descent, as fast as that sum, is waited for


class Number(nn.Module):
    """One weight w, for every example."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return self.w.expand(len(x))


def parabola(w: Tensor, target: Tensor) -> Tensor:
    """½ a (w − c)² for targets (a, c)."""
    return (0.5 * target[:, 0] * (w - target[:, 1]).square()).mean()


def two_tasks() -> Task:
    part = torch.zeros(2, 1, 1, dtype=torch.float64), torch.tensor([[STEEP], [FLAT]], dtype=torch.float64)
    return Task(part, part)


# A start is the mean of the tasks' optima c, each weighted by:
WEIGHTS: dict[str, Callable[[float, float, int], float]] = {
    "joint": lambda a, lr, steps: a,
    "maml": lambda a, lr, steps: a * (1 - lr * a) ** (2 * steps),
    "fomaml": lambda a, lr, steps: a * (1 - lr * a) ** steps,
    "reptile": lambda a, lr, steps: 1 - (1 - lr * a) ** steps,
}


def start(name: str, lr: float, steps: int) -> float:
    """The closed form; NaN where the weights' sum is no longer positive, and gradient descent runs away."""
    weights = weights_of(name, lr, steps)
    found = sum(weight * c for weight, (_, c) in zip(weights, (STEEP, FLAT), strict=True))
    return found / sum(weights) if sum(weights) > 0 else math.nan


def weights_of(name: str, lr: float, steps: int) -> list[float]:
    return [WEIGHTS[name](a, lr, steps) for a, _ in (STEEP, FLAT)]


def method(name: str, lr: float, steps: int, net: nn.Module | None = None) -> MetaOptimizer:
    """The library's own method of that name."""
    net = net or Number()
    if name == "reptile":
        return mo.reptile(net, parabola, lr=lr, steps=steps, inner="sgd", batch_size=None, moments="reset")
    if name == "joint":
        return mo.compose(net, parabola, rule=mo.rules.SGD(lr), steps=0, name="joint")
    return (mo.maml if name == "maml" else mo.fomaml)(net, parabola, lr=lr, steps=steps)


def trained(name: str, lr: float, steps: int, outer: int = 400) -> float:
    """Where gradient descent of unit step on the meta-gradient ends."""
    module = mo.MetaModule(method(name, lr, steps), **PLAIN)
    optimizer, tasks = torch.optim.SGD(module.parameters(), lr=1.0), two_tasks()
    for _ in range(outer):
        optimizer.zero_grad()
        module.backward(tasks)
        optimizer.step()
    return module.phi().weights["w"].item()


def adapted_loss(w: float, lr: float, steps: int) -> float:
    """The mean loss of both tasks after their steps."""
    return float(np.mean([0.5 * a * ((1 - lr * a) ** steps * (w - c)) ** 2 for a, c in (STEEP, FLAT)]))


def starts() -> Figure:
    """The start against the inner step size, in closed form and trained; and the loss that is left after adaptation."""
    figure = sheet(9.5, 6.4)
    grid, some, rows = np.linspace(0.01, 0.95, 189), (0.1, 0.25, 0.4, 0.55, 0.7, 0.9), []
    for (left, right), steps in zip(figure.subplots(2, 2), (1, 3), strict=True):
        for name, colour in zip(WEIGHTS, ("0.4", BLUE, RED, GREEN), strict=True):
            closed = [start(name, lr, steps) for lr in grid]
            left.plot(grid, closed, color=colour, label=name)
            left_over = [max(adapted_loss(w, lr, steps), 1e-5) for w, lr in zip(closed, grid, strict=True)]
            right.semilogy(grid, left_over, color=colour)
            known = [lr for lr in (some if name != "joint" else some[:1]) if sum(weights_of(name, lr, steps)) > LEAST]
            known = [] if name == "reptile" and steps == 1 else known  # which is joint training
            ends = [trained(name, lr, steps) for lr in known]
            left.plot(known, ends, "o", color=colour, markersize=5)
            rows += [(name, str(steps), lr, start(name, lr, steps), w) for lr, w in zip(known, ends, strict=True)]
        left.set_ylim(0, 2.4 if steps == 1 else 1.6)
        left.set_ylabel(f"start, K = {steps}")
        right.set_ylabel(f"loss after K = {steps} steps")
        for axes in (left, right):
            axes.set_xlabel("inner step size α")
            axes.grid(alpha=0.3)
        left.legend(title="closed form; dots: trained", ncols=2, loc="upper left")
    heads = ("method", "K", "α", "closed form", "trained")
    table("the start of two quadratics, whose optima are 0 (steep) and 1 (flat)", heads, rows)
    CONSOLE.print(f"largest gap: {max(abs(row[3] - row[4]) for row in rows):.1e}")
    return figure


# What first order drops


def sinusoid_net() -> nn.Module:
    torch.manual_seed(0)
    return mo.nn.mlp((1, 40, 40, 1)).double()


def gradient_of(method: MetaOptimizer, phi: MetaParams, tasks: Task) -> Tensor:
    """The meta-gradient as one vector."""
    grad = mo.Engine(method, **PLAIN)(phi, tasks).grad
    return torch.cat([g.flatten() for g in grad.weights.values()])


def first_order() -> Figure:
    """How far the first-order meta-gradient is from the exact one, against α·K."""
    tasks = trees.map_tensors(Tensor.double, mo.tasks.sinusoid().sample("train", seed=1, start=0, count=25))
    net, sizes, rows = sinusoid_net(), np.logspace(-4, -1.25, 12), []
    learnt = mo.train(mo.maml(net, mo.losses.mse, lr=0.01), _doubles(), iterations=1000, tasks_per_step=25, validate_every=0,
                      progress=False, engine=PLAIN)  # fmt: skip
    figure = sheet(11, 4.4)
    gap, angle = figure.subplots(1, 2)
    for (where, phi), style in zip({"at random": learnt.method.phi, "trained": learnt.phi}.items(), ("--", "-"), strict=True):
        for steps, colour in ((1, BLUE), (5, RED)):
            seen = []
            for lr in sizes / steps:
                exact, first = (
                    gradient_of(build(net, mo.losses.mse, lr=float(lr), steps=steps), phi, tasks)
                    for build in (mo.maml, mo.fomaml)
                )
                seen.append(((first - exact).norm() / exact.norm(), torch.cosine_similarity(first, exact, dim=0)))
            distance, cosine = (np.array([x.item() for x in part]) for part in zip(*seen, strict=True))
            slope = np.polyfit(np.log(sizes[:5]), np.log(distance[:5]), 1)[0]
            gap.loglog(sizes, distance, style, color=colour, marker="o", markersize=4, label=f"K = {steps}, {where}")
            angle.semilogx(sizes, cosine, style, color=colour, marker="o", markersize=4)
            at = int(np.argmin(abs(np.log(sizes / 0.01))))
            rows.append((where, str(steps), slope, sizes[at], distance[at], cosine[at], cosine[-1]))
    gap.set_ylabel("relative distance from the exact meta-gradient")
    angle.set_ylabel("cosine with it")
    for axes in (gap, angle):
        axes.set_xlabel("α · K")
        axes.grid(alpha=0.3)
    gap.legend()
    heads = ("start", "K", "slope at small α·K", "α·K", "distance there", "cosine there", f"cosine at {sizes[-1]:.3g}")
    table("sinusoids, 25 tasks, mlp 1-40-40-1, float64", heads, rows)
    return figure


def _doubles() -> Any:
    """Sinusoids in double precision."""
    family = mo.tasks.sinusoid()

    class Doubles:
        splits = family.splits
        describe = staticmethod(family.describe)

        def sample(self, split: str, **where: int) -> Any:
            return trees.map_tensors(Tensor.double, family.sample(split, **where))

    return Doubles()


# Why α times K is what counts

LOST = 10.0  # a loss from which on a run is taken to diverge


def alpha_k() -> Figure:
    """The loss of one start after K steps of size α, against K and against α·K."""
    torch.manual_seed(0)
    family = mo.tasks.sinusoid()
    run = mo.train(mo.maml(mo.nn.mlp((1, 40, 40, 1)), mo.losses.mse, lr=0.01), family, iterations=3000, tasks_per_step=25,
                   validate_every=0, progress=False, engine=PLAIN)  # fmt: skip
    figure, rows, products = sheet(11, 4.4), [], (0.01, 0.02, 0.04, 0.08, 0.16)
    by_steps, by_product = figure.subplots(1, 2, sharey=True)
    for i, lr in enumerate((0.00125, 0.0025, 0.005, 0.01, 0.02)):
        learner: Any = run.method.learner
        other = replace(
            run, method=replace(run.method, learner=replace(learner, rule=mo.rules.SGD(lr), steps=round(0.16 / lr)))
        )
        steps = other.method.learner.steps
        losses = mo.evaluate(other, family, episodes=200, steps=steps, baselines=(), progress=False).rows[0].mean("loss")
        found: Any = mo.diagnose(other, family, episodes=2, closely=10, steps=steps)["curvature"].numbers
        k, colour = np.arange(steps + 1), (*COLOURS, "0.4")[i]
        for axes, x in ((by_steps, k), (by_product, lr * k)):
            axes.semilogy(x[1:], np.clip(losses[1:], None, LOST), color=colour, label=f"α = {lr:g}", linewidth=1.8)
        reached = [kept(losses[round(p / lr)]) if p >= lr * 0.999 else "–" for p in products]
        rows.append((lr, kept(losses[8]), *reached, found["product"]["mean"][0], max(found["product"]["mean"])))
    by_steps.set_xlabel("inner steps K")
    by_steps.set_ylabel("query loss after adaptation")
    by_product.set_xlabel("α · K")
    by_steps.set_xlim(0, 40)
    by_steps.legend()
    for axes in (by_steps, by_product):
        axes.grid(alpha=0.3)
    heads = ("α", "K = 8", *(f"α·K = {p:g}" for p in products), "α·λ at the start", "largest on the path")
    table("sinusoids: the loss from one start, 200 test episodes", heads, rows)
    return figure


def kept(loss: float) -> float | str:
    return loss if loss < LOST else "diverges"


# Bias and variance of every estimator

K, LR, PROX = 12, 0.1, 1.0
START = (0.2, 0.3)
SUPPORT = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64), (1.0, -1.0)
QUERY = torch.tensor([[1.5, -0.3], [-0.3, 0.8]], dtype=torch.float64), (0.5, -2.0)
WINDOWS = (12, 6, 4, 3, 2, 1)


class Vector(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.w = nn.Parameter(torch.tensor(START, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return self.w.expand(len(x), 2)


def bowl(w: Tensor, target: Tensor) -> Tensor:
    """½ (w − c)ᵀ A (w − c) for targets of the rows of A and then c: (B, 3, 2)."""
    gap = w - target[:, 2]
    return 0.5 * (gap[:, :, None] * target[:, :2] * gap[:, None, :]).sum((1, 2)).mean()


def toy() -> Task:
    """One task: its support is one quadratic in two weights, its query another."""
    x = torch.zeros(1, 1, dtype=torch.float64)
    return Task(*((x, torch.cat([a, torch.tensor([c], dtype=torch.float64)])[None]) for a, c in (SUPPORT, QUERY)))


class Seen(NamedTuple):
    """Of an estimate of a whole run: relative bias, its standard error, relative standard deviation, cosine of the mean."""

    bias: float
    error: float
    spread: float
    cosine: float


def judged(estimator: Estimator, target: Estimator, runs: int = 1) -> Seen:
    """An estimator against the exact gradient of what it estimates, over runs that differ in their random numbers."""
    net = Vector()

    def build(e: Estimator) -> mo.MetaOptimizer:
        return mo.compose(net, bowl, rule=mo.rules.SGD(LR), steps=K, prox=PROX, estimator=e)

    (exact,), found = gradients(build(target), 1), gradients(build(estimator), runs)
    mean, size = found.mean(0), exact.norm()
    spread = (found.var(0).sum().sqrt() / size).item() if runs > 1 else 0.0
    bias = ((mean - exact).norm() / size).item()
    return Seen(bias, spread / runs**0.5, spread, torch.cosine_similarity(mean, exact, dim=0).item())


def gradients(method: MetaOptimizer, runs: int) -> Tensor:
    """The mean of an estimate over the outer steps that a run takes, (runs, 2)."""
    estimator, learner, phi, task = method.estimator, method.learner, method.phi, toy()
    draw = torch.Generator().manual_seed(0)
    keys = torch.randint(2**31, (estimator.lasts(learner), runs), generator=draw)

    def one(carry: Any, key: Tensor, step: Tensor) -> Any:
        estimate = estimator(learner, phi, task, carry, Clock(step, key))
        return estimate.grad.weights["w"], estimate.carry

    carry = trees.map_tensors(lambda x: x.expand(runs, *x.shape).clone(), estimator.init(learner, phi, task, keys[0, 0]))
    total = torch.zeros(runs, 2, dtype=torch.float64)
    for i, now in enumerate(keys):
        found, carry = vmap(one, in_dims=(0, 0, None))(carry, now, torch.tensor(i))
        total += found / len(keys)
    return total


def estimators(runs: int = 4000) -> Figure:
    """Bias and standard deviation of every estimator on one problem whose exact gradient is known."""
    est, mean = mo.estimators, mo.estimators.Unroll(objective=mo.objectives.trajectory_mean)
    last = est.Unroll()
    fixed: dict[str, Estimator] = {
        "Unroll": last, "first order": est.Unroll(first_order=True), "Displacement": est.Displacement(),
        "Implicit, CG": est.Implicit(), "Implicit, Neumann": est.Implicit("neumann", iterations=20, scale=0.3),
    }  # fmt: skip
    rows = [(name, "last step", *judged(e, last)) for name, e in fixed.items()]
    sigma, figure = 0.01, sheet(11, 4.4)
    drawn: dict[str, tuple[Callable[[int], Estimator], int, str]] = {
        "Truncated": (est.Truncated, 1, "0.4"), "truncated_es": (lambda w: est.truncated_es(w, sigma), runs, RED),
        "pes": (lambda w: est.pes(w, sigma), runs, BLUE), "nres": (lambda w: est.nres(w, sigma), runs, GREEN),
    }  # fmt: skip
    bias, spread = figure.subplots(1, 2)
    for name, (make, count, colour) in drawn.items():
        seen = [judged(make(w), mean, count) for w in WINDOWS]
        rows += [(f"{name}, W = {w}", "mean of the run", *s) for w, s in zip(WINDOWS, seen, strict=True) if w in (12, 3, 1)]
        x = [K // w for w in WINDOWS]
        bias.errorbar(
            x, [s.bias for s in seen], [1.96 * s.error for s in seen], color=colour, marker="o", label=name, capsize=3
        )
        if count > 1:
            spread.plot(x, [s.spread for s in seen], color=colour, marker="o", label=name)
    spread.set_ylim(0)
    for axes, what in ((bias, "bias"), (spread, "standard deviation of one run")):
        axes.set_xlabel(f"windows in a run of {K} steps")
        axes.set_xticks([K // w for w in WINDOWS])
        axes.set_ylabel(f"{what} / |exact gradient|")
        axes.grid(alpha=0.3)
        axes.legend()
    heads = ("estimator", "objective", "relative bias", "± (standard error)", "relative deviation", "cosine")
    table(f"a quadratic task, K = {K} steps, σ = {sigma}, one pair; {runs} runs where there is noise", heads, rows)
    return figure


# Error against the number of training classes


def classes(counts: Sequence[int] = (6, 12, 25, 50, 100, 200, 400), iterations: int = 150, episodes: int = 300) -> Figure:
    """Test error of prototypical networks on letters of unseen scripts, against the number of letters in training."""
    family, rows = mo.tasks.glyphs(ways=5, shots=1, queries=5), []
    order = np.random.default_rng(0).permutation(family.members["train"])
    for count in counts:
        few = replace(family, members={**family.members, "train": order[:count]})
        torch.manual_seed(0)
        run = mo.train(mo.protonet(mo.nn.conv4(ways=5, filters=16), mo.losses.cross_entropy), few, iterations=iterations,
                       tasks_per_step=8, validate_every=0, progress=False, engine={**PLAIN, "batching": "loop"})  # fmt: skip
        score = mo.evaluate(run, few, episodes=episodes, baselines=(), progress=False)
        rows.append((str(count), 100 * (1 - score.mean), 100 * score.interval))
    x, error, half = (np.array([float(row[i]) for row in rows]) for i in range(3))
    slope, scale = power_law(x, error)
    figure = sheet(7, 4.4)
    axes = figure.subplots()
    axes.errorbar(x, error, half, fmt="o", color=BLUE, capsize=4, label=f"test error, {episodes} episodes")
    axes.loglog(x, scale * x**slope, color=RED, label=f"{scale:.0f} · n^({slope:.2f})")
    axes.set_xlabel("letters in training, n")
    axes.set_ylabel("test error, %")
    for axis, ticks in ((axes.xaxis, counts), (axes.yaxis, (20, 30, 40, 50))):
        axis.set_ticks(ticks, [f"{tick}" for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    table(f"protonet, conv4-16, 5-way 1-shot, {iterations} iterations of 8 tasks", ("letters", "test error, %", "±"), rows)
    CONSOLE.print(f"fit: error = {scale:.1f} · n^({slope:.3f}), R² of the logarithms {_explained(x, error):.3f}")
    return figure


def power_law(x: Any, y: Any) -> tuple[float, float]:
    """(exponent, factor) of y = factor · x^exponent, by least squares on the logarithms."""
    slope, offset = np.polyfit(np.log(x), np.log(y), 1)
    return float(slope), float(np.exp(offset))


def _explained(x: Any, y: Any) -> float:
    return float(np.corrcoef(np.log(x), np.log(y))[0, 1] ** 2)


COMMANDS: dict[str, Callable[[], Figure]] = {
    "starts": starts,
    "first-order": first_order,
    "alpha-k": alpha_k,
    "estimators": estimators,
    "classes": classes,
}

if __name__ == "__main__":
    main()
