"""The state of a training run: one outer step, one validation, to a checkpoint and back."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.types import Carry, Estimate, Meta, MetaOptimizer, Outer
from metaoptim.engine import Choice, rest, rollout
from metaoptim.gradcheck import self_check
from metaoptim.runs.checkpoint import Checkpoint
from metaoptim.runs.run import Run, network_of, pack, part, quiet, unpack
from metaoptim.runs.store import RunDirectory
from metaoptim.tasks import TaskFamily
from metaoptim.training.module import MetaModule
from metaoptim.training.outer_step import factor

AT_ONCE = 50  # validation episodes sampled and adapted at a time


class TrainingError(RuntimeError):
    """Training can't go on; the message says where it stood and what to do."""


class Best(NamedTuple):
    """The best validation score so far."""

    metric: str
    score: float
    step: int


class Training:
    """φ, the outer optimizer and where the run stands; the only thing that `train` changes."""

    def __init__(
        self, meta: MetaOptimizer, tasks: TaskFamily, module: MetaModule, optimizer: torch.optim.Optimizer, outer: Outer,
        iterations: int, tasks_per_step: int, seed: int, clip: float | None, check: bool,
    ) -> None:  # fmt: skip
        self.meta, self.tasks, self.module, self.optimizer, self.outer = meta, tasks, module, optimizer, outer
        self.iterations, self.tasks_per_step, self.seed, self.clip = iterations, tasks_per_step, seed, clip
        self.check = check
        self.step = 0
        self.best: Best | None = None
        self.best_phi: tuple[Meta, Carry] | None = None

    def advance(self, directory: RunDirectory | None) -> dict[str, Any]:
        """One outer step; returns its record."""
        started = time.perf_counter()
        first = self.step * self.tasks_per_step
        phi = self.module.meta()
        batch = trees.to(self.tasks.sample("train", seed=self.seed, start=first, count=self.tasks_per_step), phi.device)
        if self.check and self.step == 0 and (fault := self_check(self.meta, phi, batch)):
            warnings.warn(f"{fault} Training goes on (check=False skips this).", stacklevel=3)
        with _seeded(self.seed, self.step):
            estimate = self.module.estimate(batch)
        size = self.check_finite(estimate, first, directory)
        self.optimizer.zero_grad()
        shrink = 1.0 if self.clip is None or size <= self.clip else self.clip / size
        self.module.accumulate(trees.map_tensors(lambda g: g * shrink, estimate.grad) if shrink < 1 else estimate.grad)
        rate = self.outer.lr * factor(self.outer.schedule, self.step / self.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        scalars = {n: x.item() for n, x in estimate.info.items() if n != "losses"}
        return {"step": self.step, "loss": estimate.loss.item(), **scalars, "grad_norm": size, "lr": rate,
                "seconds": time.perf_counter() - started}  # fmt: skip

    def check_finite(self, estimate: Estimate, first: int, directory: RunDirectory | None) -> float:
        """The norm of the meta-gradient; a TrainingError where it or a loss is not finite."""
        size = trees.norm({str(i): g for i, g in enumerate(trees.flatten(estimate.grad))}).item()
        bad = (~torch.isfinite(estimate.info["losses"])).nonzero().flatten().tolist()
        if not bad and math.isfinite(size):
            return size
        what = (
            f"the loss of task {bad[0]} (episode {first + bad[0]} of seed {self.seed}) is not finite"
            if bad
            else "the meta-gradient is not finite, though every loss is"
        )
        saved = directory.load() if directory is not None else None
        good = (
            f"the last good checkpoint is step {saved.step} in {directory.path}"
            if saved is not None and directory is not None
            else "no checkpoint was saved"
        )
        raise TrainingError(
            f"step {self.step + 1}: {what}; {good}. Lower the inner or the outer step size, or set clip, and train again."
        )

    def validate(self, episodes: int, steps: int | None) -> dict[str, float]:
        """Mean scores on split "val" after the last inner step."""
        steps = self.meta.learner.steps if steps is None else steps
        totals: dict[str, float] = {}
        phi, memory = self.module.meta(), rest(self.module.carry)
        network = network_of(self.meta)
        with _seeded(self.seed, self.step), quiet(*([network.net] if network else [])):
            for start in range(0, episodes, AT_ONCE):
                batch = self.tasks.sample("val", seed=self.seed, start=start, count=min(AT_ONCE, episodes - start))
                scores = rollout(self.meta, phi, trees.to(batch, phi.device), memory, steps, self.choice.tasks)
                for name, x in scores.items():
                    totals[name] = totals.get(name, 0.0) + x[:, -1].sum().item() / episodes
        return totals

    def improved(self, scores: Mapping[str, float]) -> bool:
        """Whether these are the best scores so far; remembers them if so."""
        metric = "accuracy" if "accuracy" in scores else "loss"
        better = math.isfinite(scores[metric]) and (
            self.best is None
            or (scores[metric] > self.best.score if metric == "accuracy" else scores[metric] < self.best.score)
        )
        if better:
            self.best = Best(metric, scores[metric], self.step)
            self.best_phi = (trees.map_tensors(Tensor.clone, self.module.meta()), self.module.carry)
        return better

    @property
    def choice(self) -> Choice:
        return self.module.engine.choice or Choice("loop")

    def checkpoint(self) -> Checkpoint:
        saved = self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        for i, entry in saved["state"].items():
            for name, value in entry.items():
                (tensors if isinstance(value, Tensor) else scalars)[f"outer/{i}/{name}"] = value
        state = {
            "seed": self.seed,
            "iterations": self.iterations,
            "tasks_per_step": self.tasks_per_step,
            "outer": self.outer._asdict(),
            "clip": self.clip,
            "scalars": scalars,
            "best": self.best._asdict() if self.best else None,
            "choice": self.choice._asdict(),
        }
        return Checkpoint(self.step, pack(self.module.meta(), self.module.carry) | tensors, state)

    def restore(self, directory: RunDirectory) -> None:
        """Goes back to the last checkpoint, or to the start where there is none yet."""
        checkpoint = directory.load()
        if checkpoint is None:
            directory.rewind(0)
            return
        state = checkpoint.state
        now = {"seed": self.seed, "tasks_per_step": self.tasks_per_step, "clip": self.clip,
               "outer": self.outer._asdict(), "iterations": self.iterations}  # fmt: skip
        for name, value in now.items():
            longer = name == "iterations" and self.outer.schedule == "constant" and self.iterations >= checkpoint.step
            if state[name] != value and not longer:
                raise ValueError(
                    f"the run in {directory.path} was trained with {name}={state[name]}, not {value}: resume with the "
                    "same value, or start a new run in another folder."
                )
        phi, carry = unpack(checkpoint, self.meta)
        with torch.no_grad():
            values = {f"weights.{n}": p for n, p in phi.weights.items()} | {f"rule.{n}": p for n, p in phi.rule.items()}
            for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers()):
                tensor.copy_(values[name])
        self.module.carry = carry
        saved = part(checkpoint.tensors, "outer") | part(state["scalars"], "outer")
        entries: dict[int, dict[str, Any]] = {}
        for key, value in saved.items():
            i, _, name = key.partition("/")
            entries.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({"state": entries, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.module.engine.restore(Choice(**state["choice"]))
        self.best = Best(**state["best"]) if state["best"] else None
        self.step = checkpoint.step
        directory.rewind(self.step)

    def run(self) -> Run:
        """The best φ of a run that has no directory."""
        phi, carry = self.best_phi or (self.module.meta(), self.module.carry)
        selection: Literal["best", "last"] = "best" if self.best else "last"
        return Run(
            self.meta,
            phi,
            rest(carry),
            self.best.step if self.best else self.step,
            selection,
            self.seed,
            self.choice.tasks,
        )


@contextmanager
def _seeded(seed: int, step: int) -> Iterator[None]:
    """torch's generator as a function of (seed, step), so that no generator's state need be saved; the caller's is kept."""
    with torch.random.fork_rng(devices=[]):
        # Hashed, because torch's CPU generator reads 32 bits of its seed alone.
        torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
        yield
