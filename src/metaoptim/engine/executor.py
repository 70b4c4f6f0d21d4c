"""One meta-gradient of a batch of tasks, computed in one way.

The gradient is taken inside the map, task by task: taken outside `vmap`, stock torch returns a wrong second-order
gradient, silently, for affine batch and layer norms (pytorch/functorch#534).
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim.core import trees
from metaoptim.core.gradients import autograd
from metaoptim.core.types import Carry, Clock, Estimate, MetaOptimizer, MetaParams, Params, Task, directly
from metaoptim.engine.bound import Bound
from metaoptim.engine.graphs.graphs import Graphs
from metaoptim.engine.graphs.guards import Guards
from metaoptim.engine.graphs.parts import Parts
from metaoptim.engine.options import cut
from metaoptim.engine.reducer import Reducer
from metaoptim.nn import steady


class Executor:
    """`executor(phi, batch, carry, outer_step) -> Estimate` over T tasks, with the settings of `Engine`, none of them "auto".

    The batch is cut into pieces; each gives its tasks' losses and carries and the sum of their gradients (or each of them,
    where they are weighed); these are put together in the order of the tasks, whoever was done first.
    """

    def __init__(self, method: MetaOptimizer, batching: str, memory: str, runtime: str, precision: str = "full") -> None:
        estimator = method.estimator
        if memory not in estimator.memories:
            raise ValueError(
                f"engine.memory = {memory!r} is not offered by {type(estimator).__name__}; choose one of auto, "
                f"{', '.join(estimator.memories)}."
            )
        self.method, self.batching, self.cut, self.half = method, batching, cut(batching), precision == "bf16"
        guards = Guards({"the learner": method.learner, "the estimator": method.estimator}) if runtime != "eager" else None
        self.graphs = Graphs(guards, compiled=runtime == "compile")
        self.reducer = Reducer(method)
        self.by_autograd = runtime == "eager" and not self.cut.vmapped
        self.whole = runtime != "eager" and memory == "graph"
        self.estimator = estimator.keeping(memory, directly if runtime == "eager" else Parts(self.graphs))
        self.ready: set[Any] = set()
        self.pool: ThreadPoolExecutor | None = None

    def __call__(self, phi: MetaParams, batch: Task, carry: Carry, outer_step: int) -> Estimate:
        self.graphs.look()
        count, device = count_tasks(batch), trees.device(batch)
        learnt, fixed = self.method.split(phi)
        parts, cuts = (batch, carry, drawn := keys(count, device)), self.cut.pieces(count)
        step = torch.tensor(outer_step, device=device)
        pieces = [(learnt, fixed, step, *(trees.index(parts, rows) if len(cuts) > 1 else parts)) for rows in cuts]
        added: Any = None
        each: list[MetaParams] = []
        others: list[tuple[Tensor, Carry, Any]] = []
        with steady():
            for found in self._side_by_side(pieces) if self.cut.workers > 1 else (self.piece(*piece) for piece in pieces):
                kept: Any = found.grad  # as `Reducer.of_piece` gives it
                added = kept.added if added is None else trees.plus(added, kept.added)
                each.append(kept.each)
                others.append((found.loss, found.carry, found.info))
        losses, after, info = trees.cat(others) if len(others) > 1 else others[0]
        grad, told = self.reducer.one(added, each, count, drawn)
        scale = 1.0 if self.method.reduction == "sum" else 1.0 / count
        return Estimate(
            losses.sum() * scale, grad, after, {name: x.mean() for name, x in info.items()} | told | {"losses": losses}
        )

    def _side_by_side(self, pieces: list[tuple[Any, ...]]) -> list[Estimate]:
        """The pieces by several threads, each without threads of its own inside torch's operators."""
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // self.cut.workers))  # first: compiled code keeps the number it was built with
        try:
            found: dict[int, Estimate] = {}
            for i, piece in enumerate(pieces):
                if (key := self.graphs.key((), trees.flatten(piece))) not in self.ready:
                    found[i] = self.piece(*piece)  # what is new is traced before threads want it
                    self.ready.add(key)
            if self.graphs.draws:
                raise ValueError(
                    f"engine.batching = {self.batching!r}: this learner draws from torch's generator, in an order that "
                    "would depend on which thread is faster; choose loop or vmap."
                )
            left = [i for i in range(len(pieces)) if i not in found]
            self.pool = self.pool or ThreadPoolExecutor(self.cut.workers)
            found |= zip(left, self.pool.map(lambda i: self.piece(*pieces[i]), left), strict=True)
            return [found[i] for i in range(len(pieces))]
        finally:
            torch.set_num_threads(threads)

    def release(self) -> None:
        """Until it is called again, gives back memory and ends threads: while those live, OpenMP's cost more everywhere."""
        self.graphs.scratch.give_back()
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None

    def piece(self, *args: Any) -> Estimate:
        """`_piece`, as one graph where the graph of a whole run is kept."""
        if not self.whole:
            return self._piece(*args)
        inputs: list[Tensor] = []
        structure = trees.take(args, inputs)

        def flat(*inputs: Tensor) -> tuple[list[Tensor], Any]:
            outputs: list[Tensor] = []
            after = trees.take(self._piece(*trees.put(structure, iter(inputs))), outputs)
            return outputs, after

        outputs, after = self.graphs(structure, flat, inputs)
        return cast(Estimate, trees.put(after, iter(outputs)))

    def _piece(
        self, learnt: MetaParams, fixed: Params, outer_step: Tensor, batch: Task, carry: Carry, keys: Tensor
    ) -> Estimate:
        """Losses, carry and info stacked over the tasks of a piece; of gradients, what the reducer keeps."""
        with self.precision(batch), autograd(self.by_autograd):
            if not self.cut.vmapped:
                alone = self._one(learnt, fixed, outer_step, *trees.index((batch, carry, keys), 0))
                loss, after, info = trees.map_tensors(lambda x: x[None], (alone.loss, alone.carry, alone.info))
                return Estimate(loss, cast(Any, self.reducer.of_piece(alone.grad, stacked=False)), after, info)
            mapped = vmap(self._one, in_dims=(None, None, None, 0, 0, 0), randomness="different")
            stacked: Estimate = mapped(learnt, fixed, outer_step, batch, carry, keys)
        return stacked._replace(grad=cast(Any, self.reducer.of_piece(stacked.grad, stacked=True)))

    def precision(self, batch: Task) -> AbstractContextManager[Any]:
        """The autocast that was asked for; a surrounding one stays in force where none was."""
        return torch.autocast(trees.device(batch).type, torch.bfloat16) if self.half else nullcontext()

    def _one(self, learnt: MetaParams, fixed: Params, outer_step: Tensor, task: Task, carry: Carry, key: Tensor) -> Estimate:
        bound = Bound(self.method.learner, fixed, key)
        found = self.estimator(bound, learnt, task, carry, Clock(outer_step, key))
        return found._replace(info=dict(found.info))


def keys(count: int, device: torch.device) -> Tensor:
    """A key for the noise of each task (T,): drawn by torch's generator, the same numbers on every device."""
    source = torch.default_generator
    return torch.randint(2**31, (count,), generator=source, device=source.device).to(device)


def starts(method: MetaOptimizer, phi: MetaParams, batch: Task) -> Carry:
    """The carry of T task slots before the first outer step; torch's generator is left as it is."""
    learnt, fixed = method.split(phi)

    def start(t: int) -> Carry:
        return method.estimator.init(Bound(method.learner, fixed, drawn[t]), learnt, trees.index(batch, t), drawn[t])

    with torch.random.fork_rng(devices=[]):
        drawn = keys(count_tasks(batch), trees.device(batch))
        first = start(0)
        return trees.stack([first, *map(start, range(1, len(drawn)))]) if trees.flatten(first) else first


def count_tasks(batch: Task) -> int:
    """T."""
    return int(trees.flatten(batch)[0].shape[0])


def tasks_of(batch: Any) -> Task:
    """A batch of tasks from what a user gave: a Task, or a plain pair of support and query."""
    parts = batch if isinstance(batch, tuple | list) and len(batch) == 2 else ()
    if isinstance(batch, Task) or (parts and all(isinstance(part, tuple | list | dict) for part in parts)):
        odd = [x for x in trees.flatten(tuple(parts)) if not isinstance(x, Tensor)]
        if not odd:
            return batch if isinstance(batch, Task) else Task(*parts)
        found = f"{type(odd[0]).__name__} among its tensors"
    else:
        found = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
    raise ValueError(
        "a batch of tasks is Task(support=(x, y), query=(x, y)), or ((x, y), (x, y)), with tensors (T, S, …) and (T, Q, …); "
        f"found {found}."
    )


def check_tasks(batch: Task) -> int:
    """T of a batch of tasks; a ValueError where its parts disagree."""
    axes = [{tuple(x.shape[:2]) for x in trees.flatten(part)} for part in batch]
    counts = {a[0] for part in axes for a in part if a}
    if len(counts) != 1 or not all(len(part) == 1 and all(len(a) == 2 and 0 not in a for a in part) for part in axes):
        named = {f"{part}.{_name(path)}": x for part, own in batch._asdict().items() for path, x in trees.named(own).items()}
        told = ", ".join(f"{name} {tuple(x.shape[:2])}…" for name, x in named.items()) or "no tensor"
        raise ValueError(
            "a batch of tasks needs a support with tensors (T, S, …) and a query with tensors (T, Q, …), such as inputs x and "
            f"targets y, with the same T >= 1, S >= 1 and Q >= 1; found leading axes {told}."
        )
    return counts.pop()


def _name(path: str) -> str:
    """A tensor of a batch in a sentence: x and y of a pair; else its keys."""
    steps = json.loads(path)
    return "xy"[steps[0]] if len(steps) == 1 and steps[0] in (0, 1) else ".".join(map(str, steps)) or "tensor"
