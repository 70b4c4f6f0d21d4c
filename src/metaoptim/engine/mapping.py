"""One meta-gradient of a batch of tasks.

The gradient is taken inside the map, task by task: taken outside `vmap`, stock torch returns a wrong second-order
gradient, silently, for affine batch and layer norms (pytorch/functorch#534).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim import trees
from metaoptim.engine.choose import Choice, choose, key
from metaoptim.types import Batch, Carry, Estimate, GradOp, Info, Learner, Meta, MetaOptimizer, Params, State, Task

One = Callable[[Meta, Params, Task, Carry], Estimate]


@dataclass(frozen=True)
class _Bound:
    """A learner that sees the weights which are not learnt beside those that are, so that no gradient is taken of them."""

    learner: Learner
    fixed: Params

    @property
    def steps(self) -> int:
        return self.learner.steps

    def _all(self, meta: Meta) -> Meta:
        return Meta(self.fixed | meta.weights, meta.rule)

    def adapts(self, name: str) -> bool:
        return self.learner.adapts(name)

    def init(self, meta: Meta, support: Batch, memory: State = ()) -> State:
        return self.learner.init(self._all(meta), support, memory)

    def step(self, meta: Meta, state: State, support: Batch, k: int, grad: GradOp) -> State:
        return self.learner.step(self._all(meta), state, support, k, grad)

    def loss(self, meta: Meta, state: State, batch: Batch, k: int) -> tuple[Tensor, Info]:
        return self.learner.loss(self._all(meta), state, batch, k)

    def weights(self, meta: Meta, state: State) -> Params:
        return self.learner.weights(self._all(meta), state)

    def memory(self, state: State) -> State:
        return self.learner.memory(state)


class Engine:
    """Computes meta-gradients: `engine(meta, batch, carry) -> Estimate` over T tasks.

    The loss and the gradient are put together as the meta-optimizer asks (mean or sum, always in the order of the
    tasks); the carry keeps its leading axis T; `info["losses"]` holds the T single losses, other entries are means.

    Args:
        optimizer: whose estimator and learner run.
        tasks: "loop", "vmap", "vmap:C" (C tasks at a time), or "auto": the faster of loop and vmap on the first batch.
        memory: "auto" or "graph": the whole unrolled graph is kept.
        runtime: "auto" or "eager".
    """

    def __init__(self, optimizer: MetaOptimizer, tasks: str = "auto", memory: str = "auto", runtime: str = "auto") -> None:
        for name, value, allowed in (("memory", memory, ("auto", "graph")), ("runtime", runtime, ("auto", "eager"))):
            if value not in allowed:
                raise ValueError(f"engine.{name} = {value!r} is not offered; choose one of {', '.join(allowed)}.")
        if tasks not in ("auto", "loop", "vmap") and not chunk_size(tasks):
            raise ValueError(f"engine.tasks = {tasks!r} is not offered; choose auto, loop, vmap, or vmap:C with C >= 1.")
        self.optimizer, self.tasks = optimizer, tasks
        self.choice: Choice | None = None if tasks == "auto" else Choice(tasks, {})

    def init(self, meta: Meta, count: int) -> Carry:
        """The carry of `count` task slots before the first outer step."""
        return trees.stack([self.optimizer.estimator.init(self.optimizer.learner, meta)] * count)

    def __call__(self, meta: Meta, batch: Task, carry: Carry = ()) -> Estimate:
        count = check_tasks(batch)
        slots = {x.shape[0] for x in trees.flatten(carry)}
        if slots - {count}:
            raise ValueError(
                f"the batch has {count} tasks and this algorithm carries its state for {slots.pop()} task slots; keep the "
                'number of tasks per step, or choose moments="reset".'
            )
        learnt, fixed = self.optimizer.split(meta)
        with explained(batch):
            if self.choice is None:
                with torch.random.fork_rng(devices=[]):  # dropout must draw the same, measured or read from the cache
                    self.choice = choose(
                        key(self.optimizer, meta, batch),
                        {how: partial(self._map, how, learnt, fixed, batch, carry) for how in ("loop", "vmap")},
                        time.perf_counter,
                    )
            total = self._map(self.choice.tasks, learnt, fixed, batch, carry)
        scale = 1.0 if self.optimizer.reduction == "sum" else 1.0 / count
        return Estimate(
            total.loss.sum() * scale,
            trees.map_tensors(lambda g: g * scale, total.grad),
            total.carry,
            {n: x.mean() for n, x in total.info.items()} | {"losses": total.loss},
        )

    def one(self, learnt: Meta, fixed: Params, task: Task, carry: Carry) -> Estimate:
        """The estimate of one task."""
        learner: Learner = _Bound(self.optimizer.learner, fixed) if fixed else self.optimizer.learner
        return self.optimizer.estimator(learner, learnt, task, carry)

    def _map(self, how: str, learnt: Meta, fixed: Params, batch: Task, carry: Carry) -> Estimate:
        """Losses and info stacked over T, gradients summed, carry stacked."""
        if how == "loop":
            return self._loop(learnt, fixed, batch, carry)
        mapped = vmap(self.one, in_dims=(None, None, 0, 0), randomness="different", chunk_size=chunk_size(how))
        stacked: Estimate = mapped(learnt, fixed, batch, carry)
        return stacked._replace(grad=trees.map_tensors(lambda g: g.sum(0), stacked.grad))

    def _loop(self, learnt: Meta, fixed: Params, batch: Task, carry: Carry) -> Estimate:
        grad: list[Tensor] = []
        parts: list[Any] = []
        for t in range(check_tasks(batch)):
            estimate = self.one(learnt, fixed, trees.index(batch, t), trees.index(carry, t))
            leaves = trees.flatten(estimate.grad)
            grad = [a + b for a, b in zip(grad, leaves, strict=True)] if grad else leaves
            parts.append((estimate.loss, estimate.carry, dict(estimate.info)))
        loss, after, info = trees.stack(parts)
        return Estimate(loss, trees.unflatten(grad, learnt), after, info)

    def restore(self, choice: Choice) -> None:
        """Takes over the choice of an earlier process, so that a resumed run computes the same floats."""
        if self.tasks == "auto":
            self.choice = choice


def check_tasks(batch: Task) -> int:
    """T of a batch of tasks; a ValueError where its parts disagree."""
    sizes = {
        f"{part}.{name}": x.shape[:2]
        for part, pair in zip(Task._fields, batch, strict=True)
        for name, x in zip("xy", pair, strict=True)
    }
    counts = {len(s) and s[0] for s in sizes.values()}
    pairs_agree = all(sizes[f"{p}.x"][:2] == sizes[f"{p}.y"][:2] for p in Task._fields)
    if len(counts) != 1 or any(len(s) < 2 or 0 in s for s in sizes.values()) or not pairs_agree:
        found = ", ".join(f"{n} {tuple(s)}…" for n, s in sizes.items())
        raise ValueError(
            "a batch of tasks needs support x (T, S, …) and y (T, S, …) and query x (T, Q, …) and y (T, Q, …) with the "
            f"same T >= 1, S >= 1 and Q >= 1; found leading axes {found}."
        )
    return int(counts.pop())


@contextmanager
def explained(data: Any) -> Iterator[None]:
    """Turns what torch says of data that don't go through the model or the loss into one sentence about them."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        found = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}{_range(x)}" for x in trees.flatten(data))
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"the model or the loss can't take these data ({reason}): found tensors {found}, in the order of support and "
            "query, inputs and targets; expected what the model reads and, for classes, targets below its outputs."
        ) from error


def _range(x: Tensor) -> str:
    return "" if x.is_floating_point() or x.is_complex() else f" from {x.min()} to {x.max()}"


def chunk_size(how: str) -> int | None:
    """C of "vmap:C", None for anything else."""
    head, _, size = how.partition(":")
    return int(size) if head == "vmap" and size.isdecimal() and int(size) > 0 else None
