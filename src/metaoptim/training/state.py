"""The state of a training run: one outer step, one validation, to a checkpoint and back."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.types import Carry, Estimate, MetaOptimizer, MetaParams, Params, Task
from metaoptim.engine import Choice, heritage, rollout
from metaoptim.gradcheck import self_check
from metaoptim.learners import network_of
from metaoptim.runs.checkpoint import Checkpoint
from metaoptim.runs.run import Run, pack, part, quiet, unpack
from metaoptim.runs.store import RunDirectory
from metaoptim.tasks import TaskFamily
from metaoptim.training.module import MetaModule
from metaoptim.training.outer_step import OptimizerStep, OuterStep, grad_norm
from metaoptim.training.source import Episodes, Source

AT_ONCE = 50  # validation episodes sampled and adapted at a time
CURE = "Lower the inner or the outer step size, or set clip, and train again."


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
        iterations: int, seed: int, facts: Mapping[str, Any], check: bool,
    ) -> None:  # fmt: skip
        self.method, self.source, self.tasks, self.module, self.outer_step = method, source, tasks, module, outer_step
        self.iterations, self.seed, self.check = iterations, seed, check
        self.facts = {"seed": seed, "iterations": iterations, **facts, **outer_step.facts}
        self.best: Best | None = None
        self.best_phi: tuple[MetaParams, Params] | None = None

    @property
    def step(self) -> int:
        """Outer steps that are done."""
        return self.module.outer_step

    def advance(self, directory: RunDirectory | None) -> dict[str, Any]:
        """One outer step; returns its record."""
        started, step = time.perf_counter(), self.step
        phi = self.module.phi()
        with _seeded(self.seed, step, "tasks"):
            batch = self.source(step, phi)
        if self.check and step == 0 and (fault := self_check(self.method, phi, batch)):
            warnings.warn(f"{fault} Training goes on (check=False skips this).", stacklevel=3)
        carry = self.module.carry
        with _seeded(self.seed, step):
            estimate = self.module.estimate(batch)
        size = grad_norm(estimate)
        if wrong := self.fault(estimate, size, batch, step):
            self.module.carry, self.module.outer_step = carry, step  # φ has not moved yet
            raise TrainingError(f"step {step + 1}: {wrong[0]}; {self.keep(directory)}. {wrong[1]}")

        def again(phi: MetaParams) -> Estimate:
            with _seeded(self.seed, step):
                return self.module.engine(phi, batch, carry, step)

        self.module.assign(self.outer_step(phi, estimate, again))
        if odd := [n for n, p in self.module.named_parameters() if not torch.isfinite(p).all()]:
            raise TrainingError(f"step {step + 1}: it made `{odd[0]}` not finite; {_kept(directory)}. {CURE}")
        scalars = {n: x.item() for n, x in estimate.info.items() if n != "losses"}
        rate = {"lr": self.outer_step.rate} if isinstance(self.outer_step, OptimizerStep) else {}
        return {"step": self.step, "loss": estimate.loss.item(), **scalars, "grad_norm": size, **rate,
                "seconds": time.perf_counter() - started}  # fmt: skip

    def fault(self, estimate: Estimate, size: float, batch: Task, step: int) -> tuple[str, str] | None:
        """What is not finite in an estimate, whose gradient has that norm, and what to do about it."""
        bad = (~torch.isfinite(estimate.info["losses"])).nonzero().flatten().tolist()
        if not bad and math.isfinite(size):
            return None
        first = self.source.first(step) if isinstance(self.source, Episodes) else None

        def called(task: int) -> str:
            return f"task {task}" + ("" if first is None else f" (episode {first + task} of seed {self.seed})")

        if odd := odd_data(batch):
            return f"the data of {called(odd[0])} hold NaN or infinity, in {odd[1]}", "Mend the data, and train again."
        if not bad:
            return "the meta-gradient is not finite, though every loss is", CURE
        return f"the loss of {called(bad[0])} is not finite", CURE

    def keep(self, directory: RunDirectory | None) -> str:
        """Saves the state that a failed step began with; where the last good φ is, in words."""
        if directory is not None and directory.step < self.step:
            with suppress(OSError):  # such as a full disk; what was saved before is there
                directory.save(self.checkpoint())
        return _kept(directory)

    def validate(self, tasks: TaskFamily, episodes: int, steps: int | None) -> dict[str, float]:
        """Mean scores on split "val" after the last inner step."""
        steps = self.method.learner.steps if steps is None else steps
        totals: dict[str, float] = {}
        phi, inherited = self.module.phi(), self.inherited
        network = network_of(self.method.learner)
        with _seeded(self.seed, self.step), quiet(*([network.net] if network else [])):
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
        if better:
            self.best = Best(metric, scores[metric], self.step)
            self.best_phi = (trees.map_tensors(Tensor.clone, self.module.phi()), self.inherited)
        return better

    @property
    def inherited(self) -> Params:
        """What a new task starts from."""
        return {} if self.module.carry is None else heritage(self.method, self.module.carry)

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
        choice = {
            name: value for name, value in self.choice._asdict().items() if name != "seconds"
        }  # the same run, the same bytes
        return Checkpoint(self.step, tensors, {**self.facts, "scalars": scalars, "best": best, "choice": choice})

    def restore(self, directory: RunDirectory) -> None:
        """Goes back to the last checkpoint, or to the start where there is none yet."""
        checkpoint = directory.load()
        if checkpoint is None:
            directory.rewind(0)
            return
        state = checkpoint.state
        for name, value in self.facts.items():
            outer = state.get("outer", {})
            longer = name == "iterations" and outer.get("schedule") == "constant" and self.iterations >= checkpoint.step
            if name != "method" and state.get(name) != value and not longer:
                raise ValueError(
                    f"the run in {directory.path} was trained with {name}={state.get(name)}, not {value}: resume with the "
                    "same value, or start a new run in another folder."
                )
        phi = unpack(checkpoint, self.method)
        if state.get("method") != self.facts["method"]:
            raise ValueError(
                f"the run in {directory.path} was trained with another method: its network, rule, steps or estimator differ; "
                "resume with the same one, or start a new run in another folder."
            )
        self.module.assign(phi)
        self.module.outer_step = checkpoint.step
        self.module.carry = self.carry(checkpoint, phi)
        self.outer_step.restore(part(checkpoint.tensors, "outer") | part(checkpoint.field("scalars"), "outer"))
        self.module.engine.restore(Choice(**checkpoint.field("choice")))
        best = checkpoint.field("best")
        self.best = Best(**best) if best else None
        directory.rewind(self.step)

    def carry(self, checkpoint: Checkpoint, phi: MetaParams) -> Carry:
        """The estimator's carry, in the structure that it gives it."""
        saved = part(checkpoint.tensors, "carry")
        if not saved:
            return ()
        with _seeded(self.seed, self.step):
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
        return Run(self.method, phi, inherited, step, selection, self.seed, self.choice.batching)


def _kept(directory: RunDirectory | None) -> str:
    if directory is None or directory.step == 0:
        return "no checkpoint was saved"
    return f"the last good checkpoint is step {directory.step} in {directory.path}"


def odd_data(batch: Task) -> tuple[int, str] | None:
    """The first task with data that are not finite, and the tensor that they are in; None where there is none."""
    found = []
    for where, tree in zip(Task._fields, batch, strict=True):
        for path, x in trees.named(tree).items():
            tasks = (~torch.isfinite(x)).reshape(len(x), -1).any(1).nonzero()
            found += [(int(t), f"{where} {'xy'[int(path[1])] if path in ('[0]', '[1]') else path}") for t in tasks[:1]]
    return min(found, key=lambda place: place[0], default=None)


@contextmanager
def _seeded(seed: int, step: int, what: Literal["estimate", "tasks"] = "estimate") -> Iterator[None]:
    """torch's generator as a function of (seed, step), so that no generator's state need be saved; the caller's is kept."""
    with torch.random.fork_rng(devices=[]):
        # Hashed, because torch's CPU generator reads 32 bits of its seed alone.
        words = (seed, step) if what == "estimate" else (seed, step, 1)
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
        yield
