"""A meta-trained φ, with everything needed to adapt it, evaluate it and train it further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metaoptim.core import trees
from metaoptim.core.callers import warn
from metaoptim.core.checks import check_counts, check_method
from metaoptim.core.finite import odd_place
from metaoptim.core.types import Batch, MetaOptimizer, MetaParams, Params, Task
from metaoptim.engine import adapt
from metaoptim.learners import Network, network_of
from metaoptim.runs import code, identity
from metaoptim.runs.adapted import adapted_module, quiet
from metaoptim.runs.checkpoint import BEST, START, Checkpoint, newest
from metaoptim.runs.store import load_checkpoint, told_state


class Best(NamedTuple):
    """The best validation of a run: the metric ("accuracy", of which more is better, or "loss"), its score, the outer step."""

    metric: str
    score: float
    step: int

    def beaten(self, score: float) -> bool:
        """Whether another score is better."""
        return score > self.score if self.metric == "accuracy" else score < self.score


@dataclass(frozen=True)
class Run:
    """What `train` and `load` return.

    method holds the initial φ, phi is the current one; inherited is what a rule's state carries into a new task, by name; step
    counts outer steps; selection says how this φ was chosen ("best" on the validation split, or "last"); batching is how the
    engine mapped tasks; path is the run directory, if there is one; trained is what is known of the tasks and of the training,
    in words ({}: nothing); axes counts those of each tensor of a support set in training (none: not known); best is the best
    validation so far (None: nothing was validated).
    """

    method: MetaOptimizer
    phi: MetaParams = field(repr=False)
    inherited: Params = field(default_factory=dict, repr=False)
    step: int = 0
    selection: Literal["best", "last"] = "last"
    seed: int = 0
    batching: str = "loop"
    path: Path | None = None
    trained: Mapping[str, Any] = field(default_factory=dict, repr=False)
    axes: tuple[int, ...] = field(default=(), repr=False)
    best: Best | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        count = sum(p.numel() for part in self.phi for p in part.values())
        where = f", path={str(self.path)!r}" if self.path else ""
        return f"Run({self.method.name}, step={self.step}, {self.selection}, seed={self.seed}, {count:,} numbers in φ{where})"

    @property
    def identity(self) -> dict[str, Any]:
        """What this run is: its method, tasks and training, as far as they are known."""
        return {"method": identity.of_method(self.method), **self.trained}

    @property
    def network(self) -> Network:
        """The module that adapts, with its loss."""
        network = network_of(self.method.learner)
        if network is None:
            raise ValueError("this run's learner is not built on one module, so there is no module to return.")
        return network

    def adapt(self, support: Batch, steps: int | None = None) -> nn.Module:
        """A module adapted to a support set: an ordinary one in eval mode, which shares nothing with the run.

        It is a copy of the network or, for a closed form, a module around such a copy that returns what the closed form
        predicts. Under the policies "inductive" and "frozen", its batch norms are torch's own, with the support's or the
        stored statistics; under "transductive", they go on using those of whatever batch they are given.

        Args:
            support: inputs (S, …) and targets (S, …) of one task.
            steps: inner steps; as in training if not given.

        Raises:
            ValueError: a support set of another kind, or one that holds NaN or infinity, so that what adapts is not finite.
        """
        if isinstance(steps, Tensor):
            raise ValueError("adapt takes one pair, as in run.adapt((x, y)); found a tensor in the place of steps.")
        check_counts(0, steps=steps)
        count = self.method.learner.steps if steps is None else steps
        if isinstance(support, Tensor | dict):
            raise ValueError(f"a support set is a pair of tensors; found a {type(support).__name__}: give (x, y).")
        if isinstance(support, Task) or not all(isinstance(x, Tensor) for x in trees.flatten(support)):
            found = "a Task, whose support set is enough" if isinstance(support, Task) else "other things than tensors"
            raise ValueError(f"a support set is a pair of tensors, inputs (S, …) and targets (S, …); found {found}.")
        sizes = {x.shape[:1] for x in trees.flatten(support)}
        if len(sizes) != 1 or sizes & {torch.Size([]), torch.Size([0])}:
            raise ValueError(
                "a support set is a pair of inputs (S, …) and targets (S, …) with the same S >= 1; found shapes "
                f"{' and '.join(str(tuple(x.shape)) for x in trees.flatten(support))}."
            )
        if self.axes and [x.ndim - 1 for x in trees.flatten(support)] == list(self.axes):
            raise ValueError(
                "a support set is that of one task, inputs (S, …) and targets (S, …); found an axis more than in training, in "
                f"shapes {' and '.join(str(tuple(x.shape)) for x in trees.flatten(support))}: take one task, as in x[0], y[0]."
            )
        network = self.network
        here = trees.to(support, self.phi.device)
        with quiet(network.net):
            k, state = adapt(self.method, self.phi, here, self.inherited, count)
        learner = self.method.learner
        weights = network.at(learner.weights(self.phi, state), k)
        if (odd := odd_place(here)) and not all(x.isfinite().all() for x in trees.flatten((weights, state))):
            raise ValueError(f"the support set holds {odd}, and what was adapted to it is not finite: mend the data.")
        return adapted_module(learner, network, self.phi, weights, state, here)


def load(path: str | Path, method: MetaOptimizer | None = None, which: Literal["best", "last"] = "best") -> Run:
    """Loads a run: its φ, and the meta-optimizer that it was trained with, which the caller has rebuilt.

    `Run.method.phi` is the φ that training began with. Raises ValueError, which names the difference, if it was trained with
    another meta-optimizer; warns where plain attributes of the network's modules, such as a temperature, were others.
    """
    if which not in ("best", "last"):
        raise ValueError(f"which={which!r} is unknown: choose best or last.")
    if method is None:
        raise ValueError(
            f"load({str(path)!r}) needs the meta-optimizer that the run was trained with, built anew, as its second argument: "
            "such as mo.maml(net, loss), or mo.lopt.learned_optimizer(rule, problems, estimator)."
        )
    check_method(method, "load")
    checkpoint = load_checkpoint(path, which)
    run = loaded(path, method, checkpoint, which)
    identity.warn_of_attributes(path, checkpoint.state.get("attributes", {}), method)
    code.warn_of_code(path, checkpoint.state.get("code", {}), method)
    return run


def warn_unless_finished(run: Run, iterations: int) -> None:
    """Warns of a run whose training has not come to its end, which is so many steps."""
    if run.path is not None and told_state(run.path).get("status", "finished") != "finished":
        warn(f"{run.path} has not come to its end: what is judged is step {run.step} of {iterations}; train --resume goes on.")


def loaded(path: str | Path, method: MetaOptimizer, checkpoint: Checkpoint, which: Literal["best", "last"]) -> Run:
    """The run of a checkpoint that was read in its folder."""
    saved = identity.saved_in(checkpoint.state, path)
    advice = "build the same model and algorithm"
    judged = f"{advice}; after how many steps it is judged is told to evaluate, as in --set evaluate.steps=…"
    identity.refuse_others(path, saved["method"], identity.of_method(method), advice, of_steps=judged)
    phi = unpack(checkpoint, method)
    inherited = trees.to(part(checkpoint.tensors, "inherited"), phi.device)
    best, batching = checkpoint.field("best"), checkpoint.field("choice")["batching"]
    selection: Literal["best", "last"] = "best" if which == "best" and best and best["step"] == checkpoint.step else "last"
    if which == "best" and best and selection == "last":
        warn(
            f"{Path(path) / BEST}, the best by validation (step {best['step']}), is lost: this is the last one, step "
            f"{checkpoint.step}"
        )
    known = {part: saved[part] for part in ("tasks", "train")}
    axes = tuple(checkpoint.state.get("axes", ()))
    method = _begun(Path(path), method)
    seed = checkpoint.field("seed")
    found = Best(**best) if best else None
    return Run(method, phi, inherited, checkpoint.step, selection, seed, batching, Path(path), known, axes, found)


def _begun(path: Path, method: MetaOptimizer) -> MetaOptimizer:
    """The meta-optimizer with the φ that the run began with, where it has kept that."""
    start, _, damaged = newest(path, (START,))
    if damaged:
        warn(f"{path / START} is cut or altered: φ before training is taken from the method given")
    return method if start is None else replace(method, phi=unpack(start, method))


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
