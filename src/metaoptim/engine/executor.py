"""One meta-gradient of a batch of tasks, computed in one way.

The gradient is taken inside the map, task by task: taken outside `vmap`, stock torch returns a wrong second-order
gradient, silently, for affine batch and layer norms (pytorch/functorch#534).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim.core import trees
from metaoptim.core.types import Carry, Estimate, Meta, MetaOptimizer, Params, Task, directly
from metaoptim.engine.graphs.graphs import Graphs, modules
from metaoptim.engine.graphs.parts import Bound, Parts
from metaoptim.engine.options import cut
from metaoptim.nn import blame


class Way:
    """`way(meta, batch, carry) -> Estimate` over T tasks, with the settings of `Engine`, none of them "auto".

    The batch is cut into pieces; each gives its tasks' losses and carries and the sum of their gradients; the sums are put
    together in the order of the tasks, whoever was done first.
    """

    def __init__(self, optimizer: MetaOptimizer, tasks: str, memory: str, runtime: str, precision: str = "full") -> None:
        estimator = optimizer.estimator
        if memory not in estimator.memories:
            raise ValueError(
                f"engine.memory = {memory!r} is not offered by {type(estimator).__name__}; choose one of auto, "
                f"{', '.join(estimator.memories)}."
            )
        self.optimizer, self.tasks, self.cut, self.half = optimizer, tasks, cut(tasks), precision == "bf16"
        self.graphs = Graphs(optimizer, compiled=runtime == "compile")
        self.whole = runtime != "eager" and memory == "graph"
        self.estimator = estimator.keeping(memory, directly if runtime == "eager" else Parts(self.graphs))
        self.ready: set[Any] = set()
        self.pool: ThreadPoolExecutor | None = None

    def __call__(self, meta: Meta, batch: Task, carry: Carry) -> Estimate:
        count = batch.query[0].shape[0]
        learnt, fixed = self.optimizer.split(meta)
        keys = torch.randint(2**31, (count,), device=batch.query[0].device)
        parts, cuts = (batch, carry, keys), self.cut.pieces(count)
        pieces = [(learnt, fixed, *(trees.index(parts, rows) if len(cuts) > 1 else parts)) for rows in cuts]
        found = self._side_by_side(pieces) if self.cut.workers > 1 else [self.piece(*piece) for piece in pieces]
        scale = 1.0 if self.optimizer.reduction == "sum" else 1.0 / count
        losses, after, info = found[0].loss, found[0].carry, found[0].info
        grad = reduce(trees.plus, (f.grad for f in found))
        if len(found) > 1:
            losses, after, info = trees.cat([(f.loss, f.carry, f.info) for f in found])
        return Estimate(
            losses.sum() * scale,
            trees.map_tensors(lambda g: g * scale, grad),
            after,
            {name: x.mean() for name, x in info.items()} | {"losses": losses},
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
                    f"engine.tasks = {self.tasks!r}: this learner draws from torch's generator, in an order that "
                    "would depend on which thread is faster; choose loop or vmap."
                )
            left = [i for i in range(len(pieces)) if i not in found]
            self.pool = self.pool or ThreadPoolExecutor(self.cut.workers)
            found |= zip(left, self.pool.map(lambda i: self.piece(*pieces[i]), left), strict=True)
            return [found[i] for i in range(len(pieces))]
        finally:
            torch.set_num_threads(threads)

    def rest(self) -> None:
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

    def _piece(self, learnt: Meta, fixed: Params, batch: Task, carry: Carry, keys: Tensor) -> Estimate:
        """Losses, carry and info stacked over the tasks of a piece; gradients summed."""
        with torch.autocast(batch.query[0].device.type, torch.bfloat16, enabled=self.half):
            if not self.cut.vmapped:
                alone = self._one(learnt, fixed, *trees.index((batch, carry, keys), 0))
                loss, after, info = trees.map_tensors(lambda x: x[None], (alone.loss, alone.carry, dict(alone.info)))
                return Estimate(loss, alone.grad, after, info)
            mapped = vmap(self._one, in_dims=(None, None, 0, 0, 0), randomness="different")
            stacked: Estimate = mapped(learnt, fixed, batch, carry, keys)
        return stacked._replace(grad=trees.map_tensors(lambda g: g.sum(0), stacked.grad))

    def _one(self, learnt: Meta, fixed: Params, task: Task, carry: Carry, key: Tensor) -> Estimate:
        return self.estimator(Bound(self.optimizer.learner, fixed, key), learnt, task, carry)


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
def explained(data: Any, owner: Any) -> Iterator[None]:
    """Turns what torch says of data that don't go through the owner's module or loss into one sentence about them."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        found = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}{_range(x)}" for x in trees.flatten(data))
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        layers = [layer for module in modules(owner) if (layer := blame(error, module))]
        who = layers[0] if layers else "the model or the loss"
        raise ValueError(
            f"{who} can't take these data ({reason}): found tensors {found}, in the order of support and query, "
            "inputs and targets; expected what the model reads and, for classes, targets below its outputs."
        ) from error


def _range(x: Tensor) -> str:
    return "" if x.is_floating_point() or x.is_complex() else f" from {x.min()} to {x.max()}"
