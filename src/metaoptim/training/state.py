"""The state of a training run: one outer step, one validation, to a checkpoint and back."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.callers import warn
from metaoptim.core.random import forked
from metaoptim.core.types import Carry, Estimate, MetaOptimizer, MetaParams, Params, Task
from metaoptim.engine import Choice, heritage, rollout
from metaoptim.gradcheck import in_the_data, in_the_rule, overshoot, self_check
from metaoptim.learners import network_of
from metaoptim.runs import code, identity
from metaoptim.runs.adapted import quiet
from metaoptim.runs.checkpoint import BEST, LAST, PREVIOUS, Checkpoint, newest
from metaoptim.runs.run import Best, Run, pack, part, unpack
from metaoptim.runs.store import WARNINGS, RunDirectory, told_state
from metaoptim.tasks import TaskFamily
from metaoptim.training.callbacks import AT_ONCE
from metaoptim.training.module import MetaModule
from metaoptim.training.outer_step import OptimizerStep, OuterStep, grad_norm
from metaoptim.training.source import Episodes, Source

CURE = "Lower the inner or the outer step size, or set clip, and train again."


class TrainingError(RuntimeError):
    """Training can't go on; the message says where it stood and what to do."""


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
        self.start = identity.attributes(method)  # which may be annealed from now on
        self.code = code.digests(method)
        self.axes: tuple[int, ...] = ()
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
        if self.check and step == 0:
            self.look(phi, batch, directory)
        carry = self.module.carry
        with _seeded(self.seed, step, self.device):
            estimate = self.module.estimate(batch)
        self.axes = tuple(x.ndim - 1 for x in trees.flatten(batch[0]))
        size = grad_norm(estimate)
        if wrong := self.fault(estimate, size, batch, step):
            self.module.carry, self.module.outer_step = carry, step  # φ has not moved yet
            raise TrainingError(f"step {step + 1}: {wrong[0]}; {self.keep(directory)}. {wrong[1]}")

        def again(phi: MetaParams) -> Estimate:
            with _seeded(self.seed, step, self.device):
                return self.module.engine(phi, batch, carry, step)

        self.module.assign(self.outer_step(phi, estimate, again))
        if odd := [n for n, p in self.module.named_parameters() if not torch.isfinite(p).all()]:
            raise TrainingError(f"step {step + 1}: it made `{odd[0]}` not finite; {_kept(directory)}. {CURE}")
        scalars = {n: x.item() for n, x in estimate.info.items() if n != "losses"}
        rate = {"lr": self.outer_step.rate} if isinstance(self.outer_step, OptimizerStep) else {}
        return {"step": self.step, "loss": estimate.loss.item(), **scalars, "grad_norm": size, **rate,
                "seconds": time.perf_counter() - started}  # fmt: skip

    def look(self, phi: MetaParams, batch: Task, directory: RunDirectory | None) -> None:
        """Warns of what is wrong in the first step though nothing fails; the run keeps these warnings."""
        whole = not hasattr(self.source, "window")  # else a batch is a stretch of runs
        found = (self_check(self.method, phi, batch, whole=whole), overshoot(self.method, phi, batch))
        faults = [fault for fault in found if fault]
        for fault in faults:
            warn(f"{fault} Training goes on (check=False skips this).")
        if directory is not None and faults:
            directory.write(WARNINGS, "".join(f"{fault}\n" for fault in faults))

    def fault(self, estimate: Estimate, size: float, batch: Task, step: int) -> tuple[str, str] | None:
        """What is not finite in an estimate, whose gradient has that norm, and what to do about it."""
        bad = (~torch.isfinite(estimate.info["losses"])).nonzero().flatten().tolist()
        if not bad and math.isfinite(size):
            return None
        first = self.source.first(step) if isinstance(self.source, Episodes) else None

        def called(task: int) -> str:
            return f"task {task}" + ("" if first is None else f" (episode {first + task} of seed {self.seed})")

        if odd := in_the_data(batch):
            return f"the data of {called(odd[0])} hold {odd[1]}", "Mend the data, and train again."
        if bad:
            return f"the loss of {called(bad[0])} is not finite", CURE
        cause = in_the_rule(self.method, self.module.phi())
        return "the meta-gradient is not finite, though every loss is", f"The cause: {cause}." if cause else CURE

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
        better = math.isfinite(scores[metric]) and (self.best is None or self.best.beaten(scores[metric]))
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
        # Without what was measured, so that the same run is the same bytes.
        choice = {name: value for name, value in self.choice._asdict().items() if name != "seconds"}
        state = {"seed": self.seed, "identity": self.identity, "scalars": scalars, "best": best, "vain": self.vain}
        since = {n: x for n, x in identity.attributes(self.method).items() if self.start.get(n, x) != x}
        state |= {"attributes": {"start": self.start, "since": since}, "code": self.code, "axes": self.axes}
        return Checkpoint(self.step, tensors, {**state, "choice": choice})

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
        recorded = checkpoint.state.get("attributes", {})
        identity.warn_of_attributes(path, recorded, self.method)
        code.warn_of_code(path, checkpoint.state.get("code", {}), self.method)
        self.start, self.axes = recorded.get("start", self.start), tuple(checkpoint.state.get("axes", ()))
        self.vain = checkpoint.field("vain")
        over = checkpoint.step >= self.iterations or self.stale(self.identity["train"]["early_stopping"])
        return over and told_state(path).get("status") == "finished"

    def restore(self, directory: RunDirectory) -> None:
        """Goes back to the last checkpoint, or to the start where there is none yet."""
        checkpoint = directory.load()
        if checkpoint is None:
            directory.rewind(0)
            return
        phi = unpack(checkpoint, self.method)
        self.module.assign(phi)
        self.module.outer_step = checkpoint.step
        self.module.carry = self.carry(checkpoint, phi)
        self.outer_step.restore(part(checkpoint.tensors, "outer") | part(checkpoint.field("scalars"), "outer"))
        self.module.engine.restore(Choice(**checkpoint.field("choice")))
        best = checkpoint.field("best")
        self.best, self.vain = Best(**best) if best else None, checkpoint.field("vain")
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
        batching, axes = self.choice.batching, self.axes
        return Run(self.method, phi, inherited, step, selection, self.seed, batching, trained=known, axes=axes, best=self.best)


def _kept(directory: RunDirectory | None) -> str:
    if directory is None or directory.step == 0:
        return "no checkpoint was saved"
    return f"the last good checkpoint is step {directory.step} in {directory.path}"


@contextmanager
def _seeded(seed: int, step: int, device: torch.device, what: Literal["estimate", "tasks"] = "estimate") -> Iterator[None]:
    """torch's generator as a function of (seed, step), so that no generator's state need be saved; the caller's is kept."""
    # Hashed, because torch's CPU generator reads 32 bits of its seed alone.
    words = (seed, step) if what == "estimate" else (seed, step, 1)
    with forked(device, int(np.random.SeedSequence(words).generate_state(1)[0])):
        yield
