"""Peak memory and time of one meta-step against the number of inner steps, each measured in a process of its own.

    python benchmarks/memory.py [--steps 1 5 20 50 200] [--rounds 3] [--figure docs/images/memory.png]

The work has mini-ImageNet's size: one 5-way 5-shot task with 75 queries, 84×84 colour images, conv4 of 32 filters, max-pool.
Memory is the peak of the resident set over one meta-step, less what was resident before it, with imports, data and model there.
Time is that of a second meta-step in the same process. Ways take turns; medians over the rounds are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import peers
import torch
from rich.table import Table
from shared import CONSOLE, RESULTS, doing, save, summary
from works import mini_imagenet

from metaoptim.engine.autotune import peak

WAYS = ("loop", "higher", "graph", "steps", "mixed")
SETTINGS = {memory: f"loop/{memory}/trace" for memory in ("graph", "steps", "mixed")}
TOLERANCE = 0.01  # of the sum of |∇θ|, in float32, after many steps


class Seen(NamedTuple):
    """One process: bytes at the peak above idle, seconds of the second meta-step, the sum of |∇θ|."""

    peak: int
    seconds: float
    checksum: float


def main() -> None:
    """Measures in child processes, prints, writes a record and, where asked to, draws."""
    options = _arguments()
    if options.child:
        way, steps = options.child
        CONSOLE.file.write(json.dumps(child(way, int(steps), options.threads)) + "\n")
        return
    CONSOLE.print(summary())
    seen: dict[str, dict[int, list[Seen]]] = {way: {} for way in options.ways}
    skipped: dict[str, dict[int, str]] = {way: {} for way in options.ways}
    complete = False
    try:
        for steps in options.steps:
            for _ in range(options.rounds):
                for way in options.ways:
                    if steps not in skipped[way]:
                        _one(way, steps, options, seen[way], skipped[way])
        complete = True
    except KeyboardInterrupt:
        CONSOLE.print("stopped; what has been measured is kept")
    CONSOLE.print(table(options.steps, seen, skipped))
    _claims(seen)
    rows = {way: {steps: [s._asdict() for s in found] for steps, found in by.items()} for way, by in seen.items()}
    save(options.json, {"benchmark": "memory", "complete": complete, "ways": rows, "skipped": skipped})
    CONSOLE.print(f"written: {options.json}")
    if options.figure:
        draw(seen, options.figure)
        CONSOLE.print(f"drawn: {options.figure}")


def child(way: str, steps: int, threads: int | None) -> dict[str, float]:
    """In a process of its own: two meta-steps, the first for the memory and the second for the time."""
    if threads:
        torch.set_num_threads(threads)
    work = mini_imagenet(steps)
    build = {"loop": peers.loop, "higher": peers.with_higher}.get(way)
    step = build(work) if build else peers.ours(work, SETTINGS.get(way, way))[0]
    weights, batch = work.weights(), work.batch()
    torch.mm(torch.rand(256, 256), torch.rand(256, 256))  # the threads and the library's own buffers belong to the idle process
    (_, grad), used = peak.of(lambda: step(weights, batch), batch.query[0].device)
    if used is None:
        raise SystemExit("this system does not tell the peak of memory (Linux does, in /proc)")
    checksum = sum(g.abs().sum().item() for g in grad.values())
    start = time.perf_counter()
    step(weights, batch)
    return Seen(used, time.perf_counter() - start, checksum)._asdict()


def _one(way: str, steps: int, options: argparse.Namespace, seen: dict[int, list[Seen]], skipped: dict[int, str]) -> None:
    """Starts one child, or notes why not."""
    expected = extrapolated(seen, steps)
    package = way if way == "higher" else ""
    if package and (why := peers.missing(package)):
        skipped[steps] = why
    elif expected > options.limit * 1e9:
        skipped[steps] = f"about {expected / 1e9:.0f} GB expected, more than --limit"
    if steps not in skipped:
        doing(f"{way}, {steps} steps")
        command = [sys.executable, __file__, "--child", way, str(steps)]
        command += ["--threads", str(options.threads)] if options.threads else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
        except subprocess.TimeoutExpired:
            skipped[steps] = f"took more than {options.timeout:.0f} s"
        else:
            if done.returncode == 0:
                found = Seen(**json.loads(done.stdout.splitlines()[-1]))
                seen.setdefault(steps, []).append(found)
                CONSOLE.print(f"  {way}, {steps} steps: {found.peak / 1e9:.2f} GB, {found.seconds:.2f} s")
                return
            said = done.stderr.strip().splitlines()
            skipped[steps] = "out of memory" if done.returncode == -9 else (said[-1] if said else f"exit {done.returncode}")
    CONSOLE.print(f"  {way}, {steps} steps: left out ({skipped[steps]})")


def extrapolated(seen: Mapping[int, list[Seen]], steps: int) -> float:
    """Bytes that are to be expected, on the line through the two largest numbers of steps seen; 0 where nothing is known."""
    known = sorted((k, _memory(found)) for k, found in seen.items() if k < steps)
    if len(known) < 2:
        return 0.0
    (a, low), (b, high) = known[-2:]
    return high + (high - low) / (b - a) * (steps - b)


def _memory(found: list[Seen]) -> float:
    return statistics.median(s.peak for s in found)


def _seconds(found: list[Seen]) -> float:
    return statistics.median(s.seconds for s in found)


def table(steps: list[int], seen: Mapping[str, Mapping[int, list[Seen]]], skipped: Mapping[str, Mapping[int, str]]) -> Table:
    """A row per way, a column per number of steps: GB and seconds."""
    found = Table(title="one meta-step: peak GB above the idle process · seconds", caption="–: left out, for the reason above")
    found.add_column("way \\ inner steps")
    for k in steps:
        found.add_column(str(k), justify="right")
    for way, by in seen.items():
        cells = [f"{_memory(by[k]) / 1e9:.2f} · {_seconds(by[k]):.2f}" if by.get(k) else "–" for k in steps]
        found.add_row(way, *cells)
    return found


def _claims(seen: Mapping[str, Mapping[int, list[Seen]]]) -> None:
    """How flat the memory is, and what that costs in time, where both were measured; and who computed something else."""
    loop = seen.get("loop", {})
    for way, by in seen.items():
        for k, found in by.items():
            if loop.get(k) and abs(found[0].checksum / loop[k][0].checksum - 1) > TOLERANCE:
                CONSOLE.print(f"{way}, {k} steps: the sum of |∇θ| is not the loop's ({found[0]}, {loop[k][0]})")
    for way in ("steps", "mixed"):
        mine = seen.get(way, {})
        if all(mine.get(k) and loop.get(k) for k in (1, 50)):
            flat, share = _memory(mine[50]) / _memory(mine[1]), _memory(loop[50]) / _memory(mine[50])
            times = statistics.median(m.seconds / b.seconds for m, b in zip(mine[50], loop[50], strict=False))
            CONSOLE.print(
                f"{way} at 50 steps: {flat:.2f} × its memory at 1 step, 1/{share:.1f} of the loop's, in {times:.2f} × its time"
            )


def draw(seen: Mapping[str, Mapping[int, list[Seen]]], path: Path) -> None:
    """Memory against steps, and time beside it, as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    colours = dict(zip(WAYS, ("#777777", "#e69f00", "#0072b2", "#009e73", "#cc79a7"), strict=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for way, by in seen.items():
        steps = sorted(k for k, found in by.items() if found)
        if not steps:
            continue
        about = {"loop": "plain autograd loop", "higher": "higher"}.get(way, f"metaoptim, {way}")
        style = {"marker": "o", "color": colours.get(way), "label": about}
        left.plot(steps, [_memory(by[k]) / 1e9 for k in steps], **style)
        right.plot(steps, [_seconds(by[k]) for k in steps], **style)
    ticks = sorted({k for by in seen.values() for k in by})
    for axes, what in ((left, "peak memory above the idle process, GB"), (right, "seconds per meta-step")):
        axes.set(xscale="log", xlabel="inner steps", ylabel=what)
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    right.set_yscale("log")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 20, 50, 200])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help=f"{', '.join(WAYS)}, or batching/memory/runtime")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="intra-op threads; torch's own number where not given")
    parser.add_argument("--limit", type=float, default=16.0, help="GB above which a measurement is left out")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one process")
    parser.add_argument("--figure", type=Path, help="a PNG to draw")
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "STEPS"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
