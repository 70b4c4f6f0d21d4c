"""A meta-trained φ, with all that is needed to adapt it, judge it and go on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaoptim.core import trees
from metaoptim.engine import adapt, rest
from metaoptim.learners import GradientLearner, Network
from metaoptim.runs.checkpoint import Checkpoint
from metaoptim.runs.store import load_checkpoint
from metaoptim.nn import BatchNorm, store_statistics
from metaoptim.core.types import Batch, Carry, Meta, MetaOptimizer


@dataclass(frozen=True)
class Run:
    """What `train` and `load` return.

    optimizer holds φ at the start, meta is φ now; memory is what the rule carries into a new task; step counts outer
    steps; selection says how this φ was chosen ("best" by the validation split, or "last"); tasks is the engine's
    mapping; path is the run directory, where there is one.
    """

    optimizer: MetaOptimizer
    meta: Meta
    memory: Carry = ()
    step: int = 0
    selection: Literal["best", "last"] = "last"
    seed: int = 0
    tasks: str = "loop"
    path: Path | None = None

    @property
    def network(self) -> Network:
        """The module that adapts, with its loss."""
        network = network_of(self.optimizer)
        if network is None:
            raise ValueError("this run's learner is not built on one module, so there is no module to return.")
        return network

    def adapt(self, support: Batch, steps: int | None = None) -> nn.Module:
        """A copy of the network, adapted to a support set: an ordinary module, which shares nothing with the run.

        Under the policy "inductive" its batch norms keep the support's statistics; under "transductive" they go on using
        those of whatever batch they are given.

        Args:
            support: inputs (S, …) and targets (S, …) of one task.
            steps: inner steps; as in training where not given.
        """
        x, y = support
        count = self.optimizer.learner.steps if steps is None else steps
        if count < 0:
            raise ValueError(f"steps={count}: the number of inner steps must not be negative.")
        if x.ndim == 0 or y.ndim == 0 or x.shape[0] != y.shape[0] or x.shape[0] == 0:
            raise ValueError(
                f"a support set is a pair of inputs (S, …) and targets (S, …) with the same S >= 1; found shapes "
                f"{tuple(x.shape)} and {tuple(y.shape)}."
            )
        network = self.network
        here = trees.to((x, y), self.meta.device)
        with quiet(network.net):
            weights = adapt(self.optimizer, self.meta, here, self.memory, count)
        module = copy.deepcopy(network.net)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(weights[name])
        if network.normalisation == "inductive":
            with quiet(module):
                store_statistics(module, here[0])
        if network.normalisation == "frozen":
            for layer in module.modules():
                if isinstance(layer, BatchNorm):
                    layer.stored = True
        return module


def network_of(optimizer: MetaOptimizer) -> Network | None:
    """The module that a meta-optimizer adapts, with its loss; None where it is not built on one."""
    learner = optimizer.learner
    if isinstance(learner, GradientLearner) and isinstance(learner.objective, Network):
        return learner.objective
    return None


@contextmanager
def quiet(*nets: nn.Module) -> Iterator[None]:
    """Modules without dropout, as in `eval()`, and as they were afterwards."""
    modes = [(m, m.training) for net in nets for m in net.modules()]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def load(path: str | Path, optimizer: MetaOptimizer, which: Literal["best", "last"] = "best") -> Run:
    """A run's φ around the meta-optimizer that it was trained with, built again by the caller.

    Raises ValueError where the checkpoint does not fit that meta-optimizer.
    """
    checkpoint = load_checkpoint(path, which)
    meta, carry = unpack(checkpoint, optimizer)
    state = checkpoint.state
    selection: Literal["best", "last"] = "best" if which == "best" and state.get("best") else "last"
    return Run(optimizer, meta, rest(carry), checkpoint.step, selection, state["seed"], state["choice"]["tasks"], Path(path))


def pack(meta: Meta, carry: Carry) -> dict[str, Tensor]:
    """φ and the carry as the tensors of a checkpoint."""
    return (
        {f"weights/{n}": p for n, p in meta.weights.items()}
        | {f"rule/{n}": p for n, p in meta.rule.items()}
        | {f"carry/{n}": p for n, p in trees.named(carry).items()}
    )


def part(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under a prefix, without it."""
    return {n.removeprefix(f"{prefix}/"): x for n, x in tensors.items() if n.startswith(f"{prefix}/")}


def unpack(checkpoint: Checkpoint, optimizer: MetaOptimizer) -> tuple[Meta, Carry]:
    """φ and the carry of a checkpoint, on the device of the meta-optimizer's own φ."""
    found = Meta(part(checkpoint.tensors, "weights"), part(checkpoint.tensors, "rule"))
    for what, saved, expected in zip(("weights", "rule"), found, optimizer.meta, strict=True):
        saved_shapes = {n: tuple(p.shape) for n, p in saved.items()}
        shapes = {n: tuple(p.shape) for n, p in expected.items()}
        if saved_shapes != shapes:
            name = min(n for n in saved_shapes.keys() | shapes if saved_shapes.get(n) != shapes.get(n))
            raise ValueError(
                f"the checkpoint does not fit this meta-optimizer: {what} `{name}` is {saved_shapes.get(name, 'missing')} "
                f"in the checkpoint and {shapes.get(name, 'missing')} here; build the same model and algorithm."
            )
    carry = trees.unnamed(part(checkpoint.tensors, "carry"))
    return trees.to((found, carry), optimizer.meta.device)
