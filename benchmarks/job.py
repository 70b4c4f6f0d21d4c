"""The whole job: seconds until a recipe reaches its accuracy, with the loop engine and with `auto`.

    METAOPTIM_DATA=DIR python benchmarks/job.py [--target 0.95] [--out runs/benchmarks/job] [--resume]

Each job is `metaoptim train omniglot-maml` in a process of its own, imports, data, measuring and compiling included, until a
validation on 200 episodes reaches the target. The jobs take turns of a minute each, and whoever waits is paused, so that a
machine's moods hit both alike; each has its own clock. Ctrl-C saves them, and --resume goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import CACHES, CONSOLE, RESULTS, save, summary

ENGINES = {
    "loop": ("engine.batching=loop", "engine.memory=graph", "engine.runtime=eager"),
    "auto": ("engine.batching=auto", "engine.memory=auto", "engine.runtime=auto"),
}
START = "import sys; from metaoptim.cli.main import main; sys.exit(main())"
GLANCE = 0.1  # seconds between two looks at what a job has logged
GRACE = 120.0  # seconds for a job to save itself


@dataclass
class Job:
    """A training that can be paused; `seconds` counts only while it may run."""

    name: str
    folder: Path
    target: float
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    @property
    def reached(self) -> bool:
        return bool(self.history) and self.history[-1]["accuracy"] >= self.target

    def start(self, options: argparse.Namespace, resume: bool) -> None:
        """Starts the process; it waits at once for its turn."""
        sets = [*ENGINES[self.name], f"train.validate_every={options.every}", f"train.validate_episodes={options.episodes}"]
        sets += [f"train.checkpoint_every={options.every}", *options.set]
        words = ["train", options.recipe, "--out", str(self.folder), *(word for s in sets for word in ("--set", s))]
        words += ["--resume"] if resume and (self.folder / "recipe.toml").exists() else []
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.folder.with_suffix(".log").open("ab") as log:
            command = [sys.executable, "-c", START, *words]
            own = dict.fromkeys(CACHES, str(self.folder.with_suffix(".cache").resolve()))  # each pays for its own
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=os.environ | own)
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        """To the process and those that it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def turn(self, length: float) -> None:
        """Runs for so many seconds, or until the target is reached or the process ends."""
        if self.process is None:
            return
        start, before = time.perf_counter(), self.seconds
        self.signal(signal.SIGCONT)
        try:
            while self.seconds - before < length and not self.reached and self.process.poll() is None:
                time.sleep(GLANCE)
                self.seconds = before + time.perf_counter() - start
                self.look()
        finally:
            self.signal(signal.SIGSTOP)
        if self.process.poll() is not None:
            self.look()

    def look(self) -> None:
        """Reads validations that were logged since the last look."""
        known = self.history[-1]["step"] if self.history else 0
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            if '"val_accuracy"' in line and line.endswith("}") and (found := json.loads(line))["step"] > known:
                self.history.append({"step": found["step"], "accuracy": found["val_accuracy"], "seconds": self.seconds})
                CONSOLE.print(f"  {self.name}: step {found['step']}, {found['val_accuracy']:.4f} after {self.seconds:.1f} s")

    def stop(self) -> None:
        """Lets the process save itself and end."""
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGINT)
            self.signal(signal.SIGCONT)
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
                self.process.wait()


def main() -> None:
    """Lets the jobs take turns until each has reached the target."""
    options = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no paused process is left behind
    record = options.out / "job.json"
    jobs = [Job(name, options.out / name, options.target) for name in options.engines]
    if options.resume and record.exists():
        saved = json.loads(record.read_text())["jobs"]
        for job in jobs:
            job.seconds, job.history = saved[job.name]["seconds"], saved[job.name]["history"]
    CONSOLE.print(summary())
    try:
        for job in jobs:
            if not job.reached:
                job.start(options, options.resume)
        while waiting := [job for job in jobs if not job.reached and job.process and job.process.poll() is None]:
            for job in waiting:
                job.turn(options.turn)
                save(record, _record(jobs, options))
    except KeyboardInterrupt:
        CONSOLE.print("stopped; --resume goes on")
    finally:
        for job in jobs:
            job.stop()
        save(record, _record(jobs, options))
    for job in jobs:
        last = job.history[-1] if job.history else {"step": 0, "accuracy": float("nan")}
        outcome = "reached" if job.reached else "has NOT reached"
        CONSOLE.print(
            f"{job.name} {outcome} {100 * options.target:.0f} %: {job.seconds:.0f} s, {last['step']} steps, validation "
            f"{100 * last['accuracy']:.2f} % (log: {job.folder.with_suffix('.log')})"
        )
    if len(jobs) > 1 and all(job.reached for job in jobs):
        CONSOLE.print(f"{jobs[-1].name} is {jobs[0].seconds / jobs[-1].seconds:.2f} × as fast as {jobs[0].name}")
    CONSOLE.print(f"written: {record}")


def _record(jobs: list[Job], options: argparse.Namespace) -> dict[str, Any]:
    found = {
        j.name: {"seconds": j.seconds, "reached": j.reached, "settings": ENGINES[j.name], "history": j.history} for j in jobs
    }
    asked = {"recipe": options.recipe, "target": options.target, "episodes": options.episodes, "set": options.set}
    return {"benchmark": "job", **asked, "jobs": found}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipe", default="omniglot-maml")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--target", type=float, default=0.95, help="validation accuracy to reach, a fraction")
    parser.add_argument("--every", type=int, default=100, help="outer steps between validations")
    parser.add_argument("--episodes", type=int, default=200, help="validation episodes")
    parser.add_argument("--turn", type=float, default=60.0, help="seconds that a job runs before the other one does")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="further options of the recipe")
    parser.add_argument("--out", type=Path, default=RESULTS / "job")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
