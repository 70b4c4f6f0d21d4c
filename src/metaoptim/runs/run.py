"""A meta-trained φ, with everything needed to adapt it, evaluate it and train it further."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaoptim.core import trees
from metaoptim.core.types import Batch, MetaOptimizer, MetaParams, Normalisation, Params, State
from metaoptim.engine import adapt
from metaoptim.learners import ClosedForm, Network, network_of
from metaoptim.nn import BatchNorm, store_statistics
from metaoptim.runs.checkpoint import BEST, Checkpoint
from metaoptim.runs.store import load_checkpoint


@dataclass(frozen=True)
class Run:
    """What `train` and `load` return.

    method holds the initial φ, phi is the current one; inherited is what a rule's state carries into a new task, by name; step
    counts outer steps; selection says how this φ was chosen ("best" on the validation split, or "last"); batching is how the
    engine mapped tasks; path is the run directory, if there is one.
    """

    method: MetaOptimizer
    phi: MetaParams = field(repr=False)
    inherited: Params = field(default_factory=dict, repr=False)
    step: int = 0
    selection: Literal["best", "last"] = "last"
    seed: int = 0
    batching: str = "loop"
    path: Path | None = None

    @property
    def network(self) -> Network:
        """The module that adapts, with its loss."""
        network = network_of(self.method.learner)
        if network is None:
            raise ValueError("this run's learner is not built on one module, so there is no module to return.")
        return network

    def adapt(self, support: Batch, steps: int | None = None) -> nn.Module:
        """A module adapted to a support set: an ordinary one, which shares nothing with the run.

        It is a copy of the network or, for a closed form, a module around such a copy that returns what the closed form
        predicts. Under the policy "inductive", its batch norms keep the support's statistics; under "transductive", they go
        on using those of whatever batch they are given.

        Args:
            support: inputs (S, …) and targets (S, …) of one task.
            steps: inner steps; as in training if not given.
        """
        count = self.method.learner.steps if steps is None else steps
        if count < 0:
            raise ValueError(f"steps={count}: the number of inner steps must not be negative.")
        sizes = {x.shape[:1] for x in trees.flatten(support)}
        if len(sizes) != 1 or sizes & {torch.Size([]), torch.Size([0])}:
            raise ValueError(
                "a support set is a pair of inputs (S, …) and targets (S, …) with the same S >= 1; found shapes "
                f"{' and '.join(str(tuple(x.shape)) for x in trees.flatten(support))}."
            )
        network = self.network
        here = trees.to(support, self.phi.device)
        with quiet(network.net):
            k, state = adapt(self.method, self.phi, here, self.inherited, count)
        module, learner = copy.deepcopy(network.net), self.method.learner
        weights = network.at(learner.weights(self.phi, state), k)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(weights[name])
        _keep_statistics(network, module, here)
        if isinstance(learner, ClosedForm):
            policy: Normalisation = "transductive" if network.normalisation == "transductive" else "frozen"
            own = replace(learner, model=replace(network, net=module, normalisation=policy))
            return Fitted(own, self.phi.rule, state, here)
        return module


class Fitted(nn.Module):
    """A closed form fitted to a support set: inputs (B, …) -> its predictions."""

    def __init__(self, learner: ClosedForm, rule: Params, state: State, support: Batch) -> None:
        nn.Module.__init__(self)
        self.net = learner.model.net
        self._learner = learner
        for name, x in {"rule": rule, "state": state, "support": support}.items():
            self.register_module(name, _Tensors(x))

    def forward(self, x: Tensor) -> Tensor:
        rule, state, support = (self.get_submodule(part)() for part in ("rule", "state", "support"))
        phi = MetaParams(dict(self.net.named_parameters()), rule)
        return self._learner.predict(self._learner.model, phi, state, support, x)


class _Tensors(nn.Module):
    """A tree of tensors, held as buffers."""

    def __init__(self, tree: Any) -> None:
        nn.Module.__init__(self)
        self._like = trees.map_tensors(lambda x: torch.empty(0), tree)
        for i, x in enumerate(trees.flatten(tree)):
            self.register_buffer(f"_{i}", x.detach().clone())

    def forward(self) -> Any:
        return trees.unflatten(list(self.buffers()), self._like)


def _keep_statistics(network: Network, module: nn.Module, support: Batch) -> None:
    """Makes an adapted module use the policy's statistics when it is called on its own."""
    if network.normalisation == "inductive":
        with quiet(module):
            store_statistics(module, support[0])
    if network.normalisation == "frozen":
        for layer in module.modules():
            if isinstance(layer, BatchNorm):
                layer.stored = True


@contextmanager
def quiet(*nets: nn.Module) -> Iterator[None]:
    """Inside, modules run without dropout, as after `eval()`; afterwards, each is in its former mode again."""
    modes = [(m, m.training) for net in nets for m in net.modules()]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def load(path: str | Path, method: MetaOptimizer, which: Literal["best", "last"] = "best") -> Run:
    """Loads a run: its φ, and the meta-optimizer that it was trained with, which the caller has rebuilt.

    Raises ValueError if the checkpoint does not fit that meta-optimizer.
    """
    if which not in ("best", "last"):
        raise ValueError(f"which={which!r} is unknown: choose best or last.")
    checkpoint = load_checkpoint(path, which)
    phi = unpack(checkpoint, method)
    inherited = trees.to(part(checkpoint.tensors, "inherited"), phi.device)
    best, batching = checkpoint.field("best"), checkpoint.field("choice")["batching"]
    selection: Literal["best", "last"] = "best" if which == "best" and best and best["step"] == checkpoint.step else "last"
    if which == "best" and best and selection == "last":
        warnings.warn(
            f"{Path(path) / BEST}, the best by validation (step {best['step']}), is lost: this is the last one, step "
            f"{checkpoint.step}",
            stacklevel=2,
        )
    return Run(method, phi, inherited, checkpoint.step, selection, checkpoint.field("seed"), batching, Path(path))


def pack(phi: MetaParams, inherited: Params) -> dict[str, Tensor]:
    """φ and what a new task inherits, as the tensors of a checkpoint."""
    return {
        f"{name}/{n}": p
        for name, tensors in (("weights", phi.weights), ("rule", phi.rule), ("inherited", inherited))
        for n, p in tensors.items()
    }


def part(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under a prefix, without it."""
    return {n.removeprefix(f"{prefix}/"): x for n, x in tensors.items() if n.startswith(f"{prefix}/")}


def unpack(checkpoint: Checkpoint, method: MetaOptimizer) -> MetaParams:
    """A checkpoint's φ, on the device of the meta-optimizer's own φ."""
    found = MetaParams(part(checkpoint.tensors, "weights"), part(checkpoint.tensors, "rule"))
    for what, saved, expected in zip(("weights", "rule"), found, method.phi, strict=True):
        saved_shapes = {n: tuple(p.shape) for n, p in saved.items()}
        shapes = {n: tuple(p.shape) for n, p in expected.items()}
        if saved_shapes != shapes:
            name = min(n for n in saved_shapes.keys() | shapes if saved_shapes.get(n) != shapes.get(n))
            raise ValueError(
                f"the checkpoint does not fit this meta-optimizer: {what} `{name}` is {saved_shapes.get(name, 'missing')} "
                f"in the checkpoint and {shapes.get(name, 'missing')} here; build the same model and algorithm."
            )
    ordered = MetaParams(*({n: saved[n] for n in own} for saved, own in zip(found, method.phi, strict=True)))
    return trees.to(ordered, method.phi.device)
