"""Seconds of one meta-step: a plain autograd loop, higher, TorchOpt, metaoptim and JAX, in the same rounds.

    python benchmarks/speed.py [--rounds 9] [--only sinusoid-1 …] [--settings loop/graph/eager …] [--jax PYTHON]

First every way's meta-gradient is compared with the loop's in float64; then all are timed once per round, in an order drawn
anew. A ratio is the loop's seconds ÷ the way's in the same round: medians and quartiles over the rounds are printed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from jax_peer import JaxPeer
from rich.table import Table
from rounds import Contender, measure, quartiles, ratios, timed
from shared import CACHES, CONSOLE, RESULTS, doing, matmul_rate, no_fallback, save, summary
from works import SPEED, Work

from metaoptim.core.types import Params
from metaoptim.engine import Engine

BATCHES = 4  # batches that the rounds take in turn
TOLERANCE = 1e-3  # of the relative error of a float32 meta-gradient


def main() -> None:
    """Measures, prints, and writes a record."""
    options = _arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    record: dict[str, Any] = {"benchmark": "speed", "rounds": options.rounds, "complete": False, "works": {}}
    CONSOLE.print(summary())
    try:
        with tempfile.TemporaryDirectory(prefix="metaoptim-bench-") as fresh:
            os.environ |= dict.fromkeys(CACHES, str(options.cache or fresh))
            for work in SPEED:
                if not options.only or work.name in options.only:
                    record["works"][work.name] = compare(work, options)
        record["complete"] = True
    except KeyboardInterrupt:
        CONSOLE.print("stopped; what is complete is kept")
    save(options.json, record)
    CONSOLE.print(f"written: {options.json}")


def compare(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """One work: a table on the screen, and its record."""
    CONSOLE.print(f"\n[bold]{work.name}[/]: {work.about}")
    closers: list[JaxPeer] = []
    try:
        contenders = prepare(work, options, closers)
        a, b, operations = matmul_rate()
        matmul = Contender("matrix product", timed(lambda _: a @ b))
        measure([*contenders, *([matmul] if work.flops() else [])], options.rounds, BATCHES, work.name)
    finally:
        for child in closers:
            child.close()
    rate = operations / matmul.median if work.flops() else None
    CONSOLE.print(table(work, contenders, rate))
    base = contenders[0]
    return {
        "about": work.about,
        "matmul_gflops": rate and rate / 1e9,
        "gflop": (flops := work.flops()) and flops / 1e9,
        "ways": {c.name: _record(base, c) for c in contenders},
    }


def prepare(work: Work, options: argparse.Namespace, closers: list[JaxPeer]) -> list[Contender]:
    """Every way that can be had, with its first call made and its meta-gradient compared; the loop comes first."""
    weights, batches = work.weights(), [work.batch(i) for i in range(BATCHES)]
    _, truth = peers.loop(work)(work.weights(torch.float64), work.batch(0, torch.float64))
    ways: list[tuple[str, peers.Way, Engine | None]] = [
        ("loop", peers.loop(work), None),
        ("loop, functional_call", peers.loop(work, module=True), None),
    ]
    for name, package, build in (("higher", "higher", peers.with_higher), ("TorchOpt", "torchopt", peers.with_torchopt)):
        why = peers.missing(package) or (
            "it has no first-order option" if package == "torchopt" and work.algorithm != "maml" else ""
        )
        if why:
            CONSOLE.print(f"  {name} is left out: {why}")
        else:
            ways.append((name, build(work), None))
    for setting in options.settings or work.settings:
        try:
            ways.append((f"metaoptim {setting}", *peers.ours(work, setting, horizon=options.horizon)))
        except ValueError as error:
            CONSOLE.print(f"  metaoptim {setting} is left out: {error}")
    contenders = []
    for name, way, engine in ways:
        if name != "loop" and not _wanted(name, options):
            continue
        one = Contender(name, timed(partial(_call, way, weights, batches)))
        doing(name)
        try:
            with no_fallback():
                start = time.perf_counter()
                _, grad = way(weights, batches[0])
                one.first = time.perf_counter() - start
        except (RuntimeError, ValueError, UserWarning) as error:
            CONSOLE.print(f"  {name} is left out: {str(error).splitlines()[0]}")
            continue
        one.error = distance(grad, truth)
        if engine is not None:
            one.note, one.rest = _chosen(engine), peers.rest(engine)
            engine.release()
        contenders.append(one)
    return contenders + _jax(work, options, truth, closers)


def _wanted(name: str, options: argparse.Namespace) -> bool:
    return not options.ways or any(part in name for part in options.ways)


def _call(way: peers.Way, weights: Params, batches: list[Any], index: int) -> object:
    return way(weights, batches[index])


def _jax(work: Work, options: argparse.Namespace, truth: Params, closers: list[JaxPeer]) -> list[Contender]:
    """JAX's contenders: its tasks mapped by vmap and, where that makes grouped convolutions, one after the other too."""
    if not options.jax.exists():
        CONSOLE.print(f"  JAX is left out: there is no {options.jax}")
        return []
    found = []
    for how in ("vmap", "map") if work.model == "conv4" else ("vmap",):
        name = f"JAX jit, {how}"
        if not _wanted(name, options):
            continue
        doing(name)
        try:
            child = JaxPeer(options.jax, work, how, BATCHES, torch.get_num_threads())
            closers.append(child)
            one = Contender(name, child.time, first=child.time(1, 0))
            one.error = distance(child.grad(0)[1], truth)
            one.note = f"JAX {child.versions['jax']}, optax {child.versions['optax']}"
            found.append(one)
        except (RuntimeError, OSError) as error:
            CONSOLE.print(f"  {name} is left out: {error}")
    return found


def distance(grad: Params, truth: Params) -> float:
    """‖g − g*‖ ÷ ‖g*‖ over all weights together, in float64."""
    gap = sum((grad[n].double() - g.double()).square().sum() for n, g in truth.items())
    return float((gap / sum(g.double().square().sum() for g in truth.values())) ** 0.5)


def _chosen(engine: Engine) -> str:
    words = [getattr(engine.choice, name, "") for name in peers.SETTINGS]
    return "/".join(word for word in words if word)


def table(work: Work, contenders: list[Contender], rate: float | None) -> Table:
    """A row per way."""
    found = Table(title=f"{work.name}: one meta-step")
    for heading in ("way", "ms", "× loop", "quartiles", "first call, s", "gradient error"):
        found.add_column(heading, justify="left" if heading == "way" else "right")
    if rate:
        found.add_column(f"of {rate / 1e9:.0f} GFLOP/s", justify="right")
    for one in contenders:
        low, middle, high = quartiles(ratios(contenders[0], one))
        name = f"{one.name} ({one.note})" if one.note and one.note not in one.name else one.name
        wrong = "" if one.error < TOLERANCE else " (differs!)"
        cells = [name, f"{1e3 * one.median:.2f}", f"{middle:.2f}", f"{low:.2f} – {high:.2f}", f"{one.first:.2f}"]
        cells.append(f"{one.error:.0e}{wrong}")
        if rate and (flops := work.flops()):
            cells.append(f"{100 * flops / one.median / rate:.0f} %")
        found.add_row(*cells)
    return found


def _record(base: Contender, one: Contender) -> dict[str, Any]:
    low, middle, high = quartiles(ratios(base, one))
    return {
        "ms": 1e3 * one.median, "times_loop": middle, "quartiles": [low, high], "first_call_s": one.first,
        "gradient_error": one.error, "note": one.note, "calls": one.calls, "seconds": one.seconds,
    }  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=[w.name for w in SPEED], help="works; all where not given")
    parser.add_argument("--ways", nargs="+", help="parts of the names of the ways to measure beside the loop")
    parser.add_argument("--settings", nargs="+", help="of our engine, as batching/memory/runtime, default, or auto")
    parser.add_argument("--horizon", type=int, default=100_000, help="outer steps to come, as `auto` is told")
    parser.add_argument("--threads", type=int, help="intra-op threads; torch's own number where not given")
    parser.add_argument("--jax", type=Path, default=Path(".venv-jax/bin/python"), help="a Python with jax and optax")
    parser.add_argument("--cache", type=Path, help="folder for plans and compiled graphs; a fresh one where not given")
    parser.add_argument("--json", type=Path, default=RESULTS / "speed.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
