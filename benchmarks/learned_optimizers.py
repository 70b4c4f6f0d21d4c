"""Seconds of one step of a learned rule as an optimizer, beside those of torch's optimizers, in the same rounds.

    python benchmarks/learned_optimizers.py [--nets mlp conv] [--rules celo2 "celo2 base"] [--compile] [--rounds 7]

On one thread of a processor, or on an accelerator with `--device cuda`.
The floor of a rule is what its products alone would take at the rate of a large matrix product on this machine: those of its
perceptron for each weight, and those of Newton–Schulz's iteration. A ratio is a way's seconds ÷ the floor's, which is measured
in the same round. "Naive" is the rule's own `update`, tensor by tensor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rounds import Contender, measure, quartiles, timed
from shared import CONSOLE, RESULTS, doing, no_fallback, save, summary
from torch import Tensor, nn
from torch.nn import functional as F

from metaoptim.core.types import Params, Rule, Step
from metaoptim.lopt import LSTM, Celo2, SmallFC
from metaoptim.optim import Named, from_rule

SIDE = 1024  # of the matrices whose product gives the rate
BATCH = 64
RULES: dict[str, Rule] = {
    "celo2": Celo2(), "celo2 base": Celo2(orthogonal=False, by_adam=Named()), "small_fc": SmallFC(), "lstm": LSTM(),
}  # fmt: skip


def net(name: str, device: str) -> tuple[nn.Module, Tensor]:
    """A network of about a million weights, and a batch for it."""
    torch.manual_seed(0)
    if name == "mlp":
        sizes = (784, 800, 400, 100, 10)
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1]).to(device), torch.randn(BATCH, 784).to(device)
    sizes = (3, 64, 128, 256, 256)
    blocks = [m for a, b in pairwise(sizes) for m in (nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(1024, 10)).to(device), torch.randn(BATCH, 3, 32, 32).to(device)


def backward(model: nn.Module, x: Tensor) -> None:
    """Forward and backward, whose gradients stay for the optimizers."""
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(BATCH, device=x.device) % 10).backward()


def products(rule: Rule, model: nn.Module) -> int:
    """Multiplications with addition of one step that matrix products can do, as far as they are the rule's own."""
    found = 0
    for p in model.parameters():
        if isinstance(rule, Celo2):
            if p.ndim < 2 and rule.by_adam is None:
                continue
            found += p.numel() * (30 * 8 + 8 * 8 + 8)
            if rule.orthogonal and p.ndim > 1:
                small, large = sorted(p.shape[:2])
                found += 5 * (p[0, 0].numel() * (2 * small**2 * large + small**3))
        else:
            found += p.numel() * (39 * 4 + 4 * 4 + 4 * 2 if isinstance(rule, SmallFC) else 4 * 20 * (2 + 3 * 20) + 20)
    return found


def naive(rule: Any, psi: Params, model: nn.Module) -> Callable[[], None]:
    """The rule's `update`, tensor by tensor."""
    weights = dict(model.named_parameters())
    states = {n: rule.init(psi, {n: p.detach()}) for n, p in weights.items()}
    first = next(iter(weights.values()))
    step = Step(torch.tensor(5, device=first.device), first.new_zeros(()))

    @torch.no_grad()
    def call() -> None:
        for n, p in weights.items():
            updates, states[n] = rule.update(psi, {n: p.grad}, states[n], {n: p}, step)
            p.add_(updates[n])

    return call


def prepare(name: str, kinds: list[str], compiled: bool, device: str) -> list[Contender]:
    """The matrix product first, then every way, each on weights of its own."""
    matrix = torch.randn(SIDE, SIDE, device=device)
    ways: dict[str, Callable[[], object]] = {"product": lambda: matrix @ matrix}

    def own() -> nn.Module:
        model, x = net(name, device)
        backward(model, x)
        return model

    model, x = net(name, device)
    ways["forward and backward"] = lambda: backward(model, x)
    ways["torch Adam, foreach"] = torch.optim.Adam(own().parameters(), foreach=True).step
    ways["torch Adam, fused"] = torch.optim.Adam(own().parameters(), fused=True).step
    if name == "mlp":
        ways["torch Muon, of matrices"] = torch.optim.Muon([p for p in own().parameters() if p.ndim == 2]).step
    for kind in kinds:
        opt = from_rule(RULES[kind])(own().named_parameters())
        ways[f"{kind}"] = opt.step
        ways[f"{kind}, naive"] = naive(opt.rule, opt.psi, own())
        if compiled:
            ways[f"{kind}, compiled"] = from_rule(RULES[kind])(own().named_parameters(), compile=True).step
    contenders = []
    for way, call in ways.items():
        doing(way)
        with no_fallback():
            call()
            call()
        contenders.append(Contender(way, timed(lambda i, call=call: call())))
    return contenders


def floor_of(way: str, product: float, model: nn.Module) -> float:
    """Seconds of a rule's products at the rate of the matrix product; NaN for what is no rule."""
    rule = RULES.get(way.partition(",")[0])
    return products(rule, model) * product / SIDE**3 if rule else float("nan")


def table(name: str, contenders: list[Contender]) -> tuple[Table, dict[str, Any]]:
    """A row per way."""
    model, _ = net(name, "meta")
    product = contenders[0]
    found = Table(title=f"one step of {name}, {sum(p.numel() for p in model.parameters()):,} weights")
    record = {}
    for heading in ("way", "ms", "floor, ms", "× floor", "quartiles"):
        found.add_column(heading, justify="left" if heading == "way" else "right")
    for one in contenders[1:]:
        each = [s / floor_of(one.name, product.seconds[i], model) for i, s in one.seconds.items() if i in product.seconds]
        low, middle, high = quartiles(each)
        cells = [f"{1e3 * floor_of(one.name, product.median, model):.1f}", f"{middle:.1f}", f"{low:.1f} – {high:.1f}"]
        found.add_row(one.name, f"{1e3 * one.median:.1f}", *(cells if middle == middle else ["", "", ""]))
        record[one.name] = {"ms": 1e3 * one.median, "times_floor": each, "seconds": one.seconds}
    return found, record


def main() -> None:
    """Measures, prints, and writes a record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nets", nargs="+", default=["mlp", "conv"], choices=["mlp", "conv"])
    parser.add_argument("--rules", nargs="+", default=["celo2", "celo2 base"], choices=list(RULES))
    parser.add_argument("--compile", action="store_true", help="compiled steps too; compiling takes a minute or more each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=RESULTS / "learned_optimizers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    CONSOLE.print(summary())
    record: dict[str, Any] = {"benchmark": "learned_optimizers", "rounds": options.rounds, "device": options.device, "nets": {}}
    for name in options.nets:
        contenders = prepare(name, options.rules, options.compile, options.device)
        measure(contenders, options.rounds, 1, name)
        shown, record["nets"][name] = table(name, contenders)
        CONSOLE.print(shown)
    save(options.json, record)
    CONSOLE.print(f"written: {options.json}")


if __name__ == "__main__":
    main()
