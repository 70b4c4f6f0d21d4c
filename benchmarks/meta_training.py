"""Inner steps a second, of 16 problems side by side, when a learned rule is meta-trained by evolution strategies.

    python benchmarks/meta_training.py [--rules small_fc celo2 lstm] [--ways "vmap trace"] [--rounds 7] [--threads 1]

A problem is a perceptron 64 → 32 → 10 on 8×8 digits, 64 of them in a minibatch; an outer step takes 10 inner steps of 8
antithetic pairs, and judges each of them. A way is batching and runtime of the engine; "workers:2:4" are two threads with
four pairs each. The plain loop, and the training steps alone of one problem, are timed in the same rounds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rounds import Contender, measure, quartiles, timed
from shared import CONSOLE, RESULTS, doing, no_fallback, save, summary
from torch.nn import functional as F

from metaoptim import lopt
from metaoptim.core.types import Rule
from metaoptim.engine import Engine
from metaoptim.estimators import nres
from metaoptim.learners import placed
from metaoptim.lopt.data import load

RULES: dict[str, Rule] = {"small_fc": lopt.SmallFC(), "celo2": lopt.Celo2(), "lstm": lopt.LSTM()}
WAYS = ("loop eager", "vmap eager", "vmap trace", "vmap compile", "workers:2:4 compile")
PAIRS, WINDOW = 8, 10


def meta_step(rule: Rule, way: str, device: str) -> Contender:
    """An outer step's estimate."""
    problems = lopt.mlp(load("digits", 8), steps=100)
    method = placed(lopt.learned_optimizer(rule, problems, nres(WINDOW, 0.01)), device)
    batch = lopt.Streams(problems, 0, PAIRS, WINDOW, (100, 100))(0, method.phi)
    batching, runtime = way.split()
    engine = Engine(method, batching, "graph", runtime)
    carry = engine.init(method.phi, batch)
    with no_fallback():
        engine(method.phi, batch, carry, 0)
    return Contender(way, timed(lambda i: engine(method.phi, batch, carry, 0)), rest=engine.release)


def by_hand(device: str) -> Contender:
    """The same number of steps of one such network by torch's Adam, nothing judged."""
    data = load("digits", 8)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    x, y = data.x[:64].to(device), data.y[:64].to(device)

    def run(i: int) -> None:
        for _ in range(WINDOW):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return Contender("torch, one problem", timed(run))


def main() -> None:
    """Measures, prints, and writes a record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rules", nargs="+", default=["small_fc"], choices=list(RULES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="inside of operators")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=RESULTS / "meta_training.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    CONSOLE.print(summary())
    settings = {"rounds": options.rounds, "threads": options.threads, "device": options.device}
    record: dict[str, Any] = {"benchmark": "meta_training", **settings, "rules": {}}
    for name in options.rules:
        contenders = [by_hand(options.device)]
        for way in options.ways:
            doing(f"{name}, {way}")
            contenders.append(meta_step(RULES[name], way, options.device))
        measure(contenders, options.rounds, 1, name)
        shown = Table(title=f"inner steps a second of {2 * PAIRS} problems, {name}")
        for heading in ("way", "steps/s", "quartiles"):
            shown.add_column(heading, justify="left" if heading == "way" else "right")
        for one in contenders:
            low, middle, high = quartiles([WINDOW / s for s in one.seconds.values()])
            shown.add_row(one.name, f"{middle:.0f}", f"{low:.0f} – {high:.0f}")
        record["rules"][name] = {one.name: one.seconds for one in contenders}
        CONSOLE.print(shown)
    save(options.json, record)
    CONSOLE.print(f"written: {options.json}")


if __name__ == "__main__":
    main()
