"""How good the rules that come with the library are: against rules by hand whose step size is tuned for each family.

    METAOPTIM_DATA=DIR python benchmarks/shipped_rules.py [--families MNIST transformer] [--problems 10] [--seeds 3]

By the protocol of `metaoptim.lopt.evaluate`, on the families of meta-training and on the held-out ones. Baselines are tuned
once for a family, and then stand beside every rule, from the same starts and on the same minibatches, as does Adam at its
default step size. Writes a table, the curves as a PNG, and all numbers as JSON.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from shared import CONSOLE, RESULTS, doing, save, summary

from metaoptim import lopt, optim
from metaoptim.lopt.baselines import Baseline
from metaoptim.lopt.judgement import Judgement, Row
from metaoptim.rules import Adam

DEFAULT = "Adam, 0.001"


def judge(family: lopt.Problems, **options: Any) -> Judgement:
    """Every shipped rule and every baseline on one family, of which the first rule's judgement sweeps the step sizes."""
    first, *others = optim.available()
    swept = lopt.evaluate(optim.load(first), families=[family], progress=False, **options)
    rows, default = [replace(swept.learned[0], name=first)], Baseline(lambda lr, warmup: Adam(lr), 0.001, 0.001)
    options["step_sizes"] = 1
    for name in others:
        told = lopt.evaluate(optim.load(name), families=[family], baselines={DEFAULT: default}, progress=False, **options)
        rows.append(replace(told.learned[0], name=name))
    rows += [replace(row, edge=row.edge and row.name != DEFAULT) for row in told.rows[1:] + swept.rows[1:]]
    return Judgement(tuple(rows), first, swept.facts)


def main() -> None:
    """Judges family by family, prints, draws, and writes a record."""
    known = {family.name: family for family in lopt.training_families()} | lopt.held_out()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--families", nargs="+", choices=list(known), default=list(known), metavar="NAME")
    parser.add_argument("--problems", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--step-sizes", type=int, default=14)
    parser.add_argument("--out", type=Path, default=RESULTS / "shipped_rules.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    CONSOLE.print(summary())
    rows: list[Row] = []
    record: dict[str, Any] = {"benchmark": "shipped_rules", "families": {}}
    for name in options.families:
        doing(name)
        began = time.perf_counter()
        judged = judge(known[name], problems=options.problems, seeds=options.seeds, step_sizes=options.step_sizes)
        rows += [replace(row, family=name) for row in judged.rows]
        record["families"][name] = judged.json() | {"took": time.perf_counter() - began}
        save(options.out, record)
        CONSOLE.print(table(judged, name))
    Judgement(tuple(rows), rows[0].name, judged.facts).draw(options.out.with_suffix(".png"))
    CONSOLE.print(f"written: {options.out} and {options.out.with_suffix('.png')}")


def table(judged: Judgement, family: str) -> Table:
    """Final losses of each rule on a family, mean and median, and the mean loss of a run."""
    shown = Table(title=f"{family}: {len(judged.rows[0].losses)} runs of {judged.rows[0].losses.shape[1] - 1} steps")
    for heading in ("rule", "step size", "at the end: mean", "median", "mean loss of the run", "diverged"):
        shown.add_column(heading, justify="left" if heading == "rule" else "right")
    for row in judged.rows:
        warmup = f", warm-up {row.warmup}" if row.warmup else ""
        size = "" if row.lr != row.lr else f"{row.lr:.2g}{'*' if row.edge else ''}{warmup}"
        numbers = f"{row.final:.4f}", f"{row.finals.quantile(0.5).item():.4f}", f"{row.area:.4f}", f"{100 * row.diverged:.0f} %"
        shown.add_row(row.name, size, *numbers)
    return shown


if __name__ == "__main__":
    main()
