"""The state of a training run: one outer step, one validation, to a checkpoint and back."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.random import forked
from metaoptim.core.types import Carry, Estimate, MetaOptimizer, MetaParams, Params, Task
from metaoptim.engine import Choice, heritage, rollout
from metaoptim.gradcheck import in_the_data, in_the_rule, overshoot, self_check
from metaoptim.learners import network_of
from metaoptim.runs import identity
from metaoptim.runs.adapted import quiet
from metaoptim.runs.checkpoint import BEST, LAST, PREVIOUS, Checkpoint, newest
from metaoptim.runs.run import Run, pack, part, unpack
from metaoptim.runs.store import RunDirectory, finished
from metaoptim.tasks import TaskFamily
from metaoptim.training.module import MetaModule
from metaoptim.training.outer_step import OptimizerStep, OuterStep, grad_norm
from metaoptim.training.source import Episodes, Source

AT_ONCE = 50  # validation episodes sampled and adapted at a time


class TrainingError(RuntimeError):
    """Training can't go on; the message says where it stood and what to do."""


class Best(NamedTuple):
    """The best validation score so far."""

    metric: str
    score: float
    step: int


class Training:
    """φ, what takes the outer step, and where the run stands; the only thing that `train` changes."""

    def __init__(
        self, method: MetaOptimizer, source: Source, tasks: TaskFamily | None, module: MetaModule, outer_step: OuterStep,
        iterations: int, seed: int, protocol: Mapping[str, Any], check: bool,
    ) -> None:  # fmt: skip
        self.method, self.source, self.tasks, self.module, self.outer_step = method, source, tasks, module, outer_step
        self.iterations, self.seed, self.check = iterations, seed, check
        protocol = {"seed": seed, "iterations": iterations, **protocol, **identity.described(outer_step.facts)}
        self.identity = {"method": identity.of_method(method), "tasks": identity.of_tasks(tasks), "train": protocol}
        self.best: Best | None = None
        self.best_phi: tuple[MetaParams, Params] | None = None
        self.vain = 0  # validations in a row without a better score

    @property
    def step(self) -> int:
        """Outer steps that are done."""
        return self.module.outer_step

    def advance(self, directory: RunDirectory | None) -> dict[str, Any]:
        """One outer step; returns its record."""
        started, step = time.perf_counter(), self.step
        phi = self.module.phi()
        with _seeded(self.seed, step, self.device, "tasks"):
            batch = self.source(step, phi)
        for look in (self_check, overshoot) if self.check and step == 0 else ():
            if fault := look(self.method, phi, batch):
                warnings.warn(f"{fault} Training goes on (check=False skips this).", stacklevel=3)
        carry = self.module.carry
        with _seeded(self.seed, step, self.device):
            estimate = self.module.estimate(batch)
        size = self.check_finite(estimate, step, batch, directory)

        def again(phi: MetaParams) -> Estimate:
            with _seeded(self.seed, step, self.device):
                return self.module.engine(phi, batch, carry, step)

        self.module.assign(self.outer_step(phi, estimate, again))
        scalars = {n: x.item() for n, x in estimate.info.items() if n != "losses"}
        rate = {"lr": self.outer_step.rate} if isinstance(self.outer_step, OptimizerStep) else {}
        return {"step": self.step, "loss": estimate.loss.item(), **scalars, "grad_norm": size, **rate,
                "seconds": time.perf_counter() - started}  # fmt: skip

    def check_finite(self, estimate: Estimate, step: int, batch: Task, directory: RunDirectory | None) -> float:
        """The norm of the meta-gradient; a TrainingError where it or a loss is not finite."""
        size = grad_norm(estimate)
        bad = (~torch.isfinite(estimate.info["losses"])).nonzero().flatten().tolist()
        if not bad and math.isfinite(size):
            return size
        what, cause = "the meta-gradient is not finite, though every loss is", in_the_rule(self.method, self.module.phi())
        if bad:
            episode = self.source.first(step) + bad[0] if isinstance(self.source, Episodes) else None
            where = "" if episode is None else f" (episode {episode} of seed {self.seed})"
            what, cause = f"the loss of task {bad[0]}{where} is not finite", in_the_data(batch, bad[0])
        saved = directory.load() if directory is not None else None
        good = (
            f"the last good checkpoint is step {saved.step} in {directory.path}"
            if saved is not None and directory is not None
            else "no checkpoint was saved"
        )
        advice = cause or "lower the inner or the outer step size, or set clip, and train again"
        raise TrainingError(f"step {step + 1}: {what}; {good}; {advice}.")

    def validate(self, tasks: TaskFamily, episodes: int, steps: int | None) -> dict[str, float]:
        """Mean scores on split "val" after the last inner step."""
        steps = self.method.learner.steps if steps is None else steps
        totals: dict[str, float] = {}
        phi, inherited = self.module.phi(), self.inherited
        network = network_of(self.method.learner)
        with _seeded(self.seed, self.step, self.device), quiet(*([network.net] if network else [])):
            for start in range(0, episodes, AT_ONCE):
                batch = tasks.sample("val", seed=self.seed, start=start, count=min(AT_ONCE, episodes - start))
                scores = rollout(self.method, phi, trees.to(batch, phi.device), inherited, steps, self.choice.batching)
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
        self.vain = 0 if better else self.vain + 1
        if better:
            self.best = Best(metric, scores[metric], self.step)
            self.best_phi = (trees.map_tensors(Tensor.clone, self.module.phi()), self.inherited)
        return better

    def stale(self, patience: int | None) -> bool:
        """Whether so many validations in a row have been in vain (None: never)."""
        return patience is not None and self.vain >= patience

    @property
    def inherited(self) -> Params:
        """What a new task starts from."""
        return {} if self.module.carry is None else heritage(self.method, self.module.carry)

    @property
    def device(self) -> torch.device:
        """Where φ is."""
        return self.method.phi.device

    @property
    def choice(self) -> Choice:
        return self.module.engine.choice or Choice("loop")

    def checkpoint(self) -> Checkpoint:
        tensors = pack(self.module.phi(), self.inherited)
        tensors |= {f"carry/{n}": x for n, x in trees.named(() if self.module.carry is None else self.module.carry).items()}
        scalars: dict[str, Any] = {}
        for name, value in self.outer_step.state().items():
            (tensors if isinstance(value, Tensor) else scalars)[f"outer/{name}"] = value
        best = self.best._asdict() if self.best else None
        state = {"seed": self.seed, "identity": self.identity, "scalars": scalars, "best": best, "vain": self.vain}
        return Checkpoint(self.step, tensors, {**state, "choice": self.choice._asdict()})

    def done(self, path: Path) -> bool:
        """Whether the run in a folder has come to its end already; a ValueError where it is another run than this one."""
        checkpoint, _, _ = newest(path, (LAST, PREVIOUS, BEST))
        if checkpoint is None:
            return False
        saved, here = identity.saved_in(checkpoint.state, path), copy.deepcopy(self.identity)
        longer = self.outer_step.facts.get("schedule") == "constant" and self.iterations >= checkpoint.step
        if longer:  # what was done is the beginning of what is wanted
            here["train"]["iterations"] = saved["train"]["iterations"]
        advice = "resume it with the same, or start a new run in another folder"
        identity.refuse_others(path, saved, here, advice)
        self.vain = checkpoint.state["vain"]
        over = checkpoint.step >= self.iterations or self.stale(self.identity["train"]["early_stopping"])
        return over and finished(path)

    def restore(self, directory: RunDirectory) -> None:
        """Goes back to the last checkpoint, or to the start where there is none yet."""
        checkpoint = directory.load()
        if checkpoint is None:
            directory.rewind(0)
            return
        state = checkpoint.state
        phi = unpack(checkpoint, self.method)
        self.module.assign(phi)
        self.module.outer_step = checkpoint.step
        self.module.carry = self.carry(checkpoint, phi)
        self.outer_step.restore(part(checkpoint.tensors, "outer") | part(state["scalars"], "outer"))
        self.module.engine.restore(Choice(**state["choice"]))
        self.best, self.vain = Best(**state["best"]) if state["best"] else None, state["vain"]
        directory.rewind(self.step)

    def carry(self, checkpoint: Checkpoint, phi: MetaParams) -> Carry:
        """The estimator's carry, in the structure that it gives it."""
        saved = part(checkpoint.tensors, "carry")
        if not saved:
            return ()
        with _seeded(self.seed, self.step, self.device):
            like = self.module.engine.init(phi, self.source(self.step, phi))
        try:
            return trees.to(trees.filled(like, saved), phi.device)
        except ValueError as error:
            raise ValueError(f"the checkpoint does not fit this meta-optimizer: in what it carries, {error}.") from error

    def run(self) -> Run:
        """The best φ of a run that has no directory."""
        phi, inherited = self.best_phi or (self.module.phi(), self.inherited)
        selection: Literal["best", "last"] = "best" if self.best else "last"
        step = self.best.step if self.best else self.step
        known = {part: self.identity[part] for part in ("tasks", "train")}
        return Run(self.method, phi, inherited, step, selection, self.seed, self.choice.batching, trained=known)


@contextmanager
def _seeded(seed: int, step: int, device: torch.device, what: Literal["estimate", "tasks"] = "estimate") -> Iterator[None]:
    """torch's generator as a function of (seed, step), so that no generator's state need be saved; the caller's is kept."""
    # Hashed, because torch's CPU generator reads 32 bits of its seed alone.
    words = (seed, step) if what == "estimate" else (seed, step, 1)
    with forked(device, int(np.random.SeedSequence(words).generate_state(1)[0])):
        yield
