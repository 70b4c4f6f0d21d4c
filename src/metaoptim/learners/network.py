"""A module with a loss, as a function of its weights; it knows its head, and the features that the head reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from metaoptim.core import gradients, losses, trees
from metaoptim.core.brief import brief
from metaoptim.core.checks import check_called
from metaoptim.core.types import Batch, Info, Learner, MetaOptimizer, MetaParams, Normalisation, Params
from metaoptim.nn import alone, called, needs_written_out, refuse, statistics, written_out
from metaoptim.nn.layers import named

CHOOSE = 'let it be the layer that runs last: call that one `head`, or choose it by head="NAME", where the method takes one'


def nothing(name: str) -> bool:
    """The mask that holds no weight."""
    return False


@dataclass(frozen=True)
class Network:
    """A module with a loss, as a function of its weights.

    Args:
        net: the module.
        loss: loss(output, target) -> scalar mean.
        normalisation: whose statistics a batch is normalised by: its own ("transductive"), those of the support set that is
            passed along ("inductive"), or the stored ones ("frozen").
        head: the submodule that reads the features; by default the one called `head`, else the last linear layer.
        per_step: names of weights that have a version for each of the states s_0 … s_K: these have a leading axis K+1,
            which is indexed by k (beyond K: the last one). Antoniou 2019, section 4.
        versions: K+1, where some weights are per step.
    """

    net: nn.Module
    loss: Callable[[Any, Any], Tensor]
    normalisation: Normalisation = "transductive"
    head: str | None = None
    per_step: Callable[[str], bool] = nothing
    versions: int = 1
    learnt: frozenset[str] = field(init=False, repr=False)  # a set's order differs in every process
    unusual: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        net: Any = self.net  # by somebody whose type checker is off
        if not isinstance(net, nn.Module):
            raise ValueError(f"net={brief(net)}: it must be a torch.nn.Module{', not its class' * isinstance(net, type)}.")
        if not callable(self.loss) or isinstance(self.loss, type):
            kind = "an instance, not a class" if isinstance(self.loss, type) else "such as mo.losses.cross_entropy"
            raise ValueError(f"loss={brief(self.loss)}: it must be a function of (output, target), {kind}.")
        # Read once: what is frozen in the module later, or set free, is another meta-optimizer's affair.
        learnt = frozenset(n for n, p in self.net.named_parameters() if p.requires_grad)
        object.__setattr__(self, "learnt", learnt)
        check_called("the loss", self.loss, "output", "target")
        if self.normalisation not in get_args(Normalisation):
            raise ValueError(
                f"normalisation {self.normalisation!r} is unknown: choose among {', '.join(get_args(Normalisation))}."
            )
        if self.head is not None and self.head not in dict(self.net.named_modules()):
            known = ", ".join(n for n, _ in self.net.named_children()) or "none"
            raise ValueError(f"the network has no submodule `{self.head}` for its head; its own are: {known}.")
        refuse(self.net, self.normalisation)
        object.__setattr__(self, "unusual", needs_written_out(self.net))

    def weights(self) -> Params:
        """The module's weights as they are now, detached copies."""
        own = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        return {n: torch.stack([p] * self.versions) if self.per_step(n) else p for n, p in own.items()}

    def trainable(self, name: str) -> bool:
        """Whether the module's own parameter of that name asked for a gradient."""
        return name in self.learnt

    def in_head(self, name: str) -> bool:
        """Whether the weight of that name belongs to the head."""
        return name.startswith(f"{self.head_name}.")

    @property
    def head_name(self) -> str:
        """The head's name."""
        if self.head is not None:
            return self.head
        linear = [n for n, m in self.net.named_modules() if isinstance(m, nn.Linear) and n]
        if "head" in dict(self.net.named_children()):
            return "head"
        if not linear:
            last = [named(n, m) for n, m in self.net.named_modules() if n and list(m.parameters(recurse=False))]
            found = f" (its last one with weights is {last[-1]})" if last else ""
            raise ValueError(
                f"this network has no submodule `head` and no linear layer to take for its head{found}; choose one by "
                'head="NAME", or leave out what needs it (baselines, closed forms).'
            )
        return str(linear[-1])

    @property
    def head_layer(self) -> nn.Module:
        """The head itself."""
        with alone:  # while no thread has its layers exchanged
            return self.net.get_submodule(self.head_name)

    @property
    def head_told(self) -> str:
        """The head as sentences name it."""
        return f"the head, {named(self.head_name, self.head_layer)},"

    @property
    def outputs(self) -> int:
        """How many outputs the head has: as many as its last linear layer."""
        return self._linear()[-1].out_features

    @property
    def width(self) -> int:
        """How many features the head reads: as many as its first linear layer takes."""
        return self._linear()[0].in_features

    def _linear(self) -> list[nn.Linear]:
        """The linear layers in the head."""
        with alone:
            found = [layer for layer in self.head_layer.modules() if isinstance(layer, nn.Linear)]
        if not found:
            raise ValueError(
                f"{self.head_told} has no linear layer, so how many features it reads and outputs it gives isn't known: choose "
                'one that has by head="NAME", or end the network in a linear layer.'
            )
        return found

    def at(self, weights: Params, k: Tensor) -> Params:
        """The weights of the module itself after k steps."""
        if not any(map(self.per_step, weights)):
            return weights
        row = k.clamp(max=self.versions - 1).reshape(1)
        return {n: p.index_select(0, row).squeeze(0) if self.per_step(n) else p for n, p in weights.items()}

    def initial(self, weights: Params) -> Params:
        """The weights of the module itself before the first step."""
        return {n: p[0] if self.per_step(n) else p for n, p in weights.items()}

    def __call__(self, weights: Params, batch: Batch, support: Batch | None, k: Tensor) -> tuple[Tensor, Info]:
        """The mean loss on a batch (x, y) after k steps, and its accuracy where targets are classes.

        support: the set whose statistics count under "inductive"; None while that set itself is fitted, with no report.
        """
        x, y = pair(batch)
        output = self.output(self.at(weights, k), x, support)
        return (self.mean_loss(output, y), {}) if support is None else self.judge(output, y)

    def output(self, weights: Params, x: Any, support: Batch | None) -> Any:
        """What the module makes of inputs."""
        return self._run(weights, x, support)

    def features(self, weights: Params, x: Tensor, support: Batch | None) -> Tensor:
        """What the head reads (B, D) of inputs (B, …); a ValueError where the head is not the network's last layer."""
        try:
            found = self._run(weights, x, support, without=self.head_name)
        except (AttributeError, RuntimeError) as error:
            self._run(weights, x, support)  # which fails too, and is told, unless it is the head that is wrong
            raise ValueError(
                f"{self.head_told} can't be left out of the network, whose other layers need what it gives: {CHOOSE}."
            ) from error
        features, layer = one_tensor(found, f"without {self.head_told} the network"), self.head_layer
        if isinstance(layer, nn.Linear) and features.shape[-1] != layer.in_features:
            raise ValueError(
                f"{self.head_told} reads {layer.in_features} features, and without it the network gives {features.shape[-1]}: "
                f"{CHOOSE}."
            )
        return features

    def judge(self, output: Any, y: Any) -> tuple[Tensor, Info]:
        """The mean loss of an output, and its accuracy where targets are classes."""
        loss = self.mean_loss(output, y)
        if isinstance(output, Tensor) and isinstance(y, Tensor) and (axis := self._classes(output, y)):
            gradients.shown(output, axis)
            return loss, {"accuracy": (output.argmax(axis) == y).to(output.dtype).mean()}
        return loss, {}

    def mean_loss(self, output: Any, y: Any) -> Tensor:
        """The mean loss of an output; a ValueError for a loss that returns something else."""
        try:
            with written_out(not _is_ours(self.loss)):
                loss = self.loss(output, y)
        except (AttributeError, TypeError) as error:
            if isinstance(output, Tensor) and isinstance(y, Tensor):
                raise
            kinds = f"{type(output).__name__} and {type(y).__name__}"
            raise ValueError(
                f"the loss can't take what the model returned and the targets ({kinds}: {error}); give a loss that picks what "
                "it needs, such as lambda output, target: loss(output[0], target)."
            ) from error
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__} {loss!r}"
            raise ValueError(f"the loss returned {found}; it must return a scalar tensor, the mean over examples.")
        return loss

    def _classes(self, output: Tensor, y: Tensor) -> int | None:
        """The axis of classes: torch's losses want (B, N, …) for targets (B, …), and ours (…, N); None for other targets."""
        if y.is_floating_point() or y.is_complex() or output.ndim != y.ndim + 1:
            return None
        fitting = [axis for axis in (1, output.ndim - 1) if (*output.shape[:axis], *output.shape[axis + 1 :]) == y.shape]
        if not fitting or output.ndim < 2:
            return None
        return fitting[-1] if _is_ours(self.loss) else fitting[0]

    def _run(self, weights: Params, x: Any, support: Batch | None, without: str | None = None) -> Any:
        given = support[0] if support is not None and self.normalisation == "inductive" else None
        rows = None if given is None else trees.flatten(given)[0].shape[0]
        with statistics(frozen=self.normalisation == "frozen", rows=rows), written_out(self.unusual):
            if given is None:
                return called(self.net, weights, x, without, tidy=self.unusual)
            both = trees.cat([given, x])
            return trees.index(called(self.net, weights, both, without, tidy=self.unusual), slice(rows, None))


Pooled = Callable[[Any, MetaParams, Batch], tuple[Tensor, Info]]
"""(model, usually a `Network`, φ, examples of many tasks) -> mean loss, and what to report beside it."""


def one_tensor(found: Any, who: str) -> Tensor:
    """What is read as features (B, D); a ValueError for a tuple or a dictionary."""
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{who} returns a {type(found).__name__}, and features are one tensor (B, D): let it return one, or take a method "
            "that reads no features, such as maml."
        )
    return found


def _is_ours(loss: Any) -> bool:
    return getattr(loss, "__module__", None) == losses.__name__


def pair(batch: Batch) -> tuple[Any, Any]:
    """(x, y); a ValueError for a batch of another kind."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        found = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list | dict) else "")
        raise ValueError(
            f"a network reads batches (x, y), of which x may be a tree of tensors; found {found}: give (x, y). For "
            "other batches build GradientLearner on a function of your own, of (weights, batch, support, k)."
        )
    return batch[0], batch[1]


def network_of(learner: Learner) -> Network | None:
    """The network that a learner is built on; None where it is not built on one."""
    model = getattr(learner, "model", None)
    return model if isinstance(model, Network) else None


def placed(method: MetaOptimizer, device: str | torch.device | None) -> MetaOptimizer:
    """The meta-optimizer on a device, with copies of what is elsewhere; None: where it is. A ValueError for no device here."""
    if device is None:
        return method
    where = device_called(device)
    network, learner = network_of(method.learner), method.learner
    if network is not None and any(x.device != where for x in (*network.net.parameters(), *network.net.buffers())):
        loss = copy.deepcopy(network.loss).to(where) if isinstance(network.loss, nn.Module) else network.loss
        learner = with_network(learner, replace(network, net=copy.deepcopy(network.net).to(where), loss=loss))
    elif method.phi.device == where:
        return method
    return replace(method, learner=learner, phi=trees.to(method.phi, where))


def device_called(name: str | torch.device) -> torch.device:
    """The device of a name; a ValueError where there is none here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"device={str(name)!r} can't be used here ({reason}): give one that torch has, such as cpu."
        ) from error


def with_network(learner: Learner, network: Network) -> Learner:
    """The same learner on another network, and its start too, if that reads features."""
    other: Any = learner
    start: Any = getattr(other, "start", None)
    own = {"start": replace(start, network=network)} if isinstance(getattr(start, "network", None), Network) else {}
    changed: Learner = replace(other, model=network, **own)
    return changed


def modules(owner: Any) -> Iterator[nn.Module]:
    """The modules in the fields of a dataclass, at any depth."""
    if isinstance(owner, nn.Module):
        yield owner
    elif is_dataclass(owner) and not isinstance(owner, type):
        for field in fields(owner):
            yield from modules(getattr(owner, field.name))
    elif isinstance(owner, partial):
        yield from modules(owner.func)
