"""How good is `auto`? On many works, its choice against the best of all fixed settings, timed in the same rounds.

    python benchmarks/sweep.py [--rounds 9] [--only 0 3 …] [--limit 120] [--json FILE] [--resume]

Fixed settings are every mapping of tasks × memory × runtime. Compiling takes long, so it is tried only where the traced graph
of the same mapping and memory is within twice the fastest. `auto` starts from an empty cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peers
import torch
from rich.table import Table
from rounds import Contender, measure, quartiles, ratios, timed
from shared import CACHES, CONSOLE, RESULTS, doing, no_fallback, save, summary
from works import SWEEP, Work

from metaoptim.core.types import Params, Task

GOOD = 1.15  # auto's seconds ÷ those of the best fixed setting
PROMISING = 2.0  # a traced setting within this factor of the fastest is compiled too
HOPELESS = 4.0  # a setting this many times slower than the fastest, in its second call, is not timed in rounds


class TooLong(Exception):
    """A setting did not get through its first calls in time."""


def main() -> None:
    """Sweeps, with the record written after every work."""
    options = _arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    record: dict[str, Any] = {"benchmark": "sweep", "rounds": options.rounds, "works": {}}
    if options.resume and options.json.exists():
        record["works"] = json.loads(options.json.read_text())["works"]
    CONSOLE.print(summary())
    try:
        for number, work in enumerate(SWEEP):
            if work.name not in record["works"] and (options.only is None or number in options.only):
                CONSOLE.print(f"\n[bold]{number}: {work.name}[/]")
                record["works"][work.name] = compare(work, options)
                save(options.json, record)
    except KeyboardInterrupt:
        CONSOLE.print("stopped; --resume goes on after the last complete work")
    CONSOLE.print(table(record["works"]))
    within = sum(row["ratio"] <= GOOD for row in record["works"].values())
    CONSOLE.print(
        f"auto is within {100 * (GOOD - 1):.0f} % of the best fixed setting on {within} of {len(record['works'])} works"
    )


def compare(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """One work: all settings and `auto`, in rounds."""
    with tempfile.TemporaryDirectory(prefix="metaoptim-sweep-") as fresh:
        os.environ |= dict.fromkeys(CACHES, fresh)
        found, refused = prepare(work, options)
        start = time.perf_counter()
        step, engine = peers.ours(work, horizon=options.horizon)
        weights, batch = work.weights(), work.batch()
        step(weights, batch)
        first = time.perf_counter() - start
        auto = Contender("auto", _repeated(step, weights, batch), peers.rest(engine), first)
        measure([*found, auto], options.rounds, 1, work.name)
    torch.compiler.reset()
    best = min(found, key=lambda one: one.median)
    low, ratio, high = quartiles([1 / r for r in ratios(best, auto)])
    chosen = "/".join(engine.choice[:3]) if engine.choice else ""
    CONSOLE.print(
        f"  best {best.name} {1e3 * best.median:.2f} ms; auto took {chosen}, {ratio:.2f} × as long ({low:.2f} – {high:.2f}), "
        f"after {auto.first:.1f} s of measuring"
    )
    return {
        "best": best.name, "best_ms": 1e3 * best.median, "auto": chosen, "auto_ms": 1e3 * auto.median, "ratio": ratio,
        "quartiles": [low, high], "auto_first_s": auto.first, "horizon": options.horizon, "refused": refused,
        "ms": {one.name: 1e3 * one.median for one in found}, "first_s": {one.name: one.first for one in found},
    }  # fmt: skip


def prepare(work: Work, options: argparse.Namespace) -> tuple[list[Contender], dict[str, str]]:
    """The settings worth timing, warm; and why others are not."""
    found: dict[str, Contender] = {}
    warm: dict[str, float] = {}
    refused: dict[str, str] = {}
    weights, batch = work.weights(), work.batch()
    for setting in settings(work, options.runtimes):
        tasks, memory, runtime = setting.split("/")
        traced = warm.get(f"{tasks}/{memory}/trace")
        if runtime == "compile" and traced is not None and traced > PROMISING * min(warm.values()):
            refused[setting] = "its traced graph is not among the fast ones"
            continue
        doing(setting)
        try:
            with _within(options.limit), no_fallback():
                step, engine = peers.ours(work, setting)
                start = time.perf_counter()
                step(weights, batch)
                middle = time.perf_counter()
                step(weights, batch)
                warm[setting] = time.perf_counter() - middle
        except (RuntimeError, ValueError, UserWarning, TooLong, MemoryError) as error:
            refused[setting] = (str(error).splitlines() or [type(error).__name__])[0]
            CONSOLE.print(f"  {setting} is left out: {refused[setting]}")
            continue
        found[setting] = Contender(setting, _repeated(step, weights, batch), peers.rest(engine), middle - start)
        engine.release()
    fastest = min(warm.values(), default=math.inf)
    kept = [one for setting, one in found.items() if warm[setting] <= HOPELESS * fastest]
    CONSOLE.print(f"  {len(found)} settings run; {len(kept)} of them are timed in rounds")
    return kept, refused


def _repeated(step: peers.Way, weights: Params, batch: Task) -> Callable[[int, int], float]:
    return timed(lambda _: step(weights, batch))


def settings(work: Work, runtimes: list[str]) -> Iterator[str]:
    """Every mapping × memory × runtime: all tasks at once, one by one, a quarter at a time, two threads of both kinds."""
    chunk, half = max(2, work.tasks // 4), max(2, work.tasks // 2)
    for runtime in runtimes:
        for tasks in ("loop", "vmap", f"vmap:{chunk}", "workers:2", f"workers:2:{half}"):
            if runtime != "eager" or not tasks.startswith("workers"):
                for memory in work.optimizer().estimator.memories:
                    yield f"{tasks}/{memory}/{runtime}"


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises TooLong inside once the time is up."""

    def ring(number: int, frame: Any) -> None:
        raise TooLong(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(works: dict[str, dict[str, Any]]) -> Table:
    """A row per work."""
    found = Table(title="auto against the best fixed setting")
    for heading in ("work", "best fixed", "ms", "auto chose", "ms", "auto ÷ best", "measuring, s"):
        found.add_column(heading, justify="left" if heading in ("work", "best fixed", "auto chose") else "right")
    for name, row in works.items():
        ratio = f"{row['ratio']:.2f}" + ("" if row["ratio"] <= GOOD else " !")
        cells = [name, row["best"], f"{row['best_ms']:.2f}", row["auto"], f"{row['auto_ms']:.2f}", ratio]
        found.add_row(*cells, f"{row['auto_first_s']:.1f}")
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", type=int, nargs="+", help=f"numbers of works, 0 to {len(SWEEP) - 1}")
    parser.add_argument("--runtimes", nargs="+", default=["eager", "trace", "compile"])
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a setting's first two calls")
    parser.add_argument("--horizon", type=int, default=100_000, help="outer steps to come, as `auto` is told")
    parser.add_argument("--threads", type=int, help="intra-op threads; torch's own number where not given")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file holds")
    parser.add_argument("--json", type=Path, default=RESULTS / "sweep.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
