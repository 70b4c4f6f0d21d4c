"""JAX beside torch: a long-lived process in an environment of its own, which runs when it is asked to."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from works import Work

from metaoptim.core.types import Params

CHILD = Path(__file__).with_name("jax_child.py")


class JaxPeer:
    """One work in JAX; `threads` are the processor cores that it may use."""

    def __init__(self, python: Path, work: Work, how: Literal["vmap", "map"], batches: int, threads: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="metaoptim-jax-")
        inputs = Path(self.folder.name, "inputs.npz")
        np.savez(inputs, **_inputs(work, how, batches))
        command = [str(python), str(CHILD), str(inputs)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self.said = Path(self.folder.name, "stderr.txt")
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
            )
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, sorted(os.sched_getaffinity(0))[:threads])
        self.versions: dict[str, str] = json.loads(self._answer())

    def time(self, calls: int, index: int) -> float:
        """Seconds of so many calls."""
        return float(self._ask(f"time {calls} {index}"))

    def grad(self, index: int) -> tuple[Tensor, Params]:
        """Loss and ∇θ of a batch."""
        path = Path(self.folder.name, "grad.npz")
        self._ask(f"grad {index} {path}")
        saved = np.load(path)
        grad = {n.removeprefix("w/"): torch.from_numpy(saved[n]) for n in saved.files if n.startswith("w/")}
        return torch.from_numpy(saved["loss"]), grad

    def close(self) -> None:
        """Ends the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self.folder.cleanup()

    def _ask(self, line: str) -> str:
        if self.process.stdin is not None and self.process.poll() is None:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        answer = self.process.stdout.readline().strip() if self.process.stdout else ""
        if not answer:
            said = self.said.read_text().strip().splitlines()
            raise RuntimeError(f"JAX's process ended: {said[-1] if said else 'it said nothing'}")
        return answer


def _inputs(work: Work, how: str, batches: int) -> dict[str, Any]:
    """θ, the batches and the work, as arrays; images with their channels last, as JAX's own examples have them."""
    facts = {
        "model": work.model, "algorithm": work.algorithm, "steps": work.steps, "lr": work.lr, "batches": batches, "map": how,
    }  # fmt: skip
    arrays: dict[str, Any] = {f"w/{n}": w.numpy() for n, w in work.weights().items()}
    for i in range(batches):
        for part, x in enumerate(y for pair in work.batch(i) for y in pair):
            arrays[f"batch{i}/{part}"] = x.movedim(2, -1).numpy() if work.classes and x.ndim > 2 else x.numpy()
    return arrays | {"work": np.array(json.dumps(facts))}
