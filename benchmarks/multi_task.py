"""Does meta-learning share more between tasks than joint training does?

One body with a head per task, with and without a cure for conflicts, beside MAML, ANIL and Reptile: as many gradients of tasks'
losses for each, and the same new tasks, with 1 and 5 shots.

    python benchmarks/multi_task.py [--only omniglot-1 …] [--share 0.01] [--out comparisons/multi-task]

Runs `metaoptim compare` for each part, which resumes what was interrupted; docs/multi-task.md says what comes of it.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from typing import Any

from shared import CONSOLE, summary

METHODS = ("multi-task", "multi-task-upgrad", "multi-task-pcgrad", "multi-task-mgda", "maml", "anil", "reptile")
GRADIENTS = {"omniglot": 16_000, "fertility": 200_000}  # of tasks' losses, in each training
EPISODES = {"omniglot": 300, "fertility": 600}
BASELINES = {"omniglot": ["prototypes"], "fertility": ["untrained"]}  # judging a row with steps costs as much as a method
PARTS = tuple(f"{family}-{shots}" for family in GRADIENTS for shots in (1, 5))


def main() -> None:
    """Compares what was asked for, one part after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--share", type=float, default=1.0, help="of the gradients; a small one tries it out")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", default="comparisons/multi-task")
    options = parser.parse_args()
    for part in options.only:
        words = command(part, options.share, options.seeds, options.out)
        CONSOLE.print(f"metaoptim {shlex.join(words)}")
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "metaoptim", *words], check=True)
        CONSOLE.print(f"{part}: {time.perf_counter() - began:.0f} s on {summary()}")


def command(part: str, share: float, seeds: str, out: str) -> list[str]:
    """The words after `metaoptim` that compare the methods on one family with so many shots."""
    family, _, shots = part.partition("-")
    amount = max(1, round(share * GRADIENTS[family]))
    baselines = "[" + ", ".join(f'"{name}"' for name in BASELINES[family]) + "]"
    settings: dict[str, Any] = {"tasks.shots": shots, "evaluate.episodes": EPISODES[family], "evaluate.baselines": baselines}
    settings |= {} if family == "fertility" else {"train.validate_every": 0}  # to validate images takes as long as to train
    return [
        "compare",
        *(f"{family}-{name}" for name in METHODS),
        *("--budget", "gradients", "--amount", str(amount), "--seeds", seeds, "--out", f"{out}/{part}"),
        *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
    ]


if __name__ == "__main__":
    main()
