"""φ as an ordinary `nn.Module`, for loops that people already have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from metaoptim.core import trees
from metaoptim.core.checks import check_method
from metaoptim.core.types import Carry, Estimate, MetaOptimizer, MetaParams, Params, Task
from metaoptim.engine import SETTINGS, Engine, look_at
from metaoptim.learners import modules, network_of


class MetaModule(nn.Module):
    """φ as parameters: `weights.NAME` (learnt weights; those that are not learnt are buffers) and `rule.NAME`.

    `backward(batch)` adds the meta-gradient to `.grad`, as `loss.backward()` does; any optimizer then takes the step.
    `Run(method, module.phi())` adapts and evaluates the φ that it has learnt. An estimator that goes through a long run window
    by window (`Truncated`, `pes`, …) wants the same batch in `method.estimator.lasts(method.learner)` calls after one another.

    Args:
        method: what an algorithm's builder returned.
        batching, memory, runtime, precision, budget, horizon, wait, choice: the engine's settings (see `Engine`). Unless asked,
            operators run one by one ("eager"), nothing is timed, and the first gradient comes at once.
    """

    def __init__(
        self,
        method: MetaOptimizer,
        batching: str = "auto",
        memory: str = "auto",
        runtime: str = "eager",
        precision: str = "full",
        budget: float | None = None,
        horizon: int | None = None,
        wait: int = 0,
        choice: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_method(method, "MetaModule")
        self.method = method
        self.engine = Engine(method, batching, memory, runtime, precision, budget, horizon, wait, choice)
        self.carry: Carry | None = None
        self.outer_step = 0
        self._loaded: dict[str, Tensor] = {}  # a carry whose structure is known once there are tasks
        network = network_of(method.learner)
        self.weights, self.rule = _Weights(network.net if network else nn.Module()), nn.Module()
        for name, value in method.phi.weights.items():
            _place(self.weights, name, value, learnt=method.learns(name))
        for name, value in method.phi.rule.items():
            _place(self.rule, name, value, learnt=True)

    def phi(self) -> MetaParams:
        """φ now. It shares memory with the parameters, so that the next step of an optimizer changes it: clone what is to stay
        as it is, as in {n: p.clone() for n, p in module.phi().weights.items()}, or `copy.deepcopy(module.phi())`.
        """
        return MetaParams(*({n: x.detach() for n, x in _own(part).items()} for part in (self.weights, self.rule)))

    def estimate(self, batch: Task) -> Estimate:
        """The meta-gradient of a batch of T tasks, with nothing changed but the estimator's carry and the count of steps."""
        refuse_list(batch)
        if not self.engine.inspected:
            look_at(self.method, batch)
        phi = self.phi()
        if self._loaded:
            self.carry, self._loaded = trees.filled(self.engine.init(phi, batch), self._loaded), {}
        estimate = self.engine(phi, batch, self.carry, self.outer_step)
        self.carry = estimate.carry
        self.outer_step += 1
        return estimate

    def accumulate(self, grad: MetaParams) -> None:
        """Adds a meta-gradient to `.grad`, except where `requires_grad` is off."""
        for module, part in ((self.weights, grad.weights), (self.rule, grad.rule)):
            for name, g in part.items():
                if (parameter := module.get_parameter(name)).requires_grad:
                    add_grad(parameter, g)

    def assign(self, phi: MetaParams) -> None:
        """Makes φ what is given."""
        with torch.no_grad():
            for module, part in ((self.weights, phi.weights), (self.rule, phi.rule)):
                own = _own(module)
                for name, value in part.items():
                    own[name].copy_(value)

    def train(self, mode: bool = True) -> MetaModule:
        """Training mode, or not, for the network too, such as for its dropout."""
        nn.Module.train(self, mode)
        for net in modules(self.method):
            net.train(mode)
        return self

    def _apply(self, fn: Any, *args: Any) -> Any:
        for part in (part for net in modules(self.method) for part in net.modules()):
            for name, buffer in part._buffers.items():  # the network's, which are read where the weights are
                part._buffers[name] = None if buffer is None else fn(buffer)
        apply: Any = nn.Module._apply
        return apply(self, fn, *args)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        destination[f"{prefix}outer_step"] = torch.tensor(self.outer_step, device=self.phi().device)
        carry = self._loaded if self.carry is None else trees.named(self.carry)
        destination.update({f"{prefix}carry.{name}": x for name, x in carry.items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.outer_step = int(state_dict.pop(f"{prefix}outer_step", 0))
        names = [name for name in state_dict if name.startswith(f"{prefix}carry.")]
        device = self.phi().device
        self._loaded = {n.removeprefix(f"{prefix}carry."): state_dict.pop(n).detach().clone().to(device) for n in names}
        self.carry = None
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """A ValueError: what would be called is a network, and this is what it is made of."""
        raise ValueError(
            "a MetaModule holds φ and is no network to be called: module.backward(batch of tasks) takes the meta-gradient, and "
            "mo.Run(module.method, module.phi()).adapt(support) returns an adapted network."
        )

    def backward(self, batch: Task) -> Tensor:
        """Adds the meta-gradient of a batch of T tasks to `.grad`; returns the outer loss, a scalar."""
        estimate = self.estimate(batch)
        self.accumulate(estimate.grad)
        return estimate.loss


def check_engine(engine: Any) -> None:
    """Raises a ValueError for what is no table of the engine's settings."""
    if engine is not None and not isinstance(engine, Mapping):
        raise ValueError(
            f"engine={engine!r}: it must be settings by name, such as {{'runtime': 'eager'}}, of {', '.join(SETTINGS)}."
        )
    if unknown := [name for name in engine or {} if name not in SETTINGS]:
        raise ValueError(f"engine has no setting {unknown[0]!r}; choose among {', '.join(SETTINGS)}.")


def refuse_list(batch: Any) -> None:
    """Raises a ValueError for tasks one by one, in place of a batch of them."""
    if isinstance(batch, list | tuple) and batch and all(isinstance(part, Task) for part in batch):
        raise ValueError(
            f"a batch of tasks is one Task, whose tensors have a leading axis T; found {len(batch)} tasks in a "
            f"{type(batch).__name__}: stack their tensors, as the collation of a torch DataLoader does."
        )


def add_grad(parameter: Tensor, grad: Tensor) -> None:
    """What `backward` does at a leaf."""
    parameter.grad = grad.clone() if parameter.grad is None else parameter.grad + grad


def _place(root: nn.Module, name: str, value: Tensor, learnt: bool) -> None:
    *folders, leaf = name.split(".")
    for folder in folders:
        if folder not in root._modules:
            root.add_module(folder, nn.Module())
        root = root.get_submodule(folder)
    if learnt:
        root.register_parameter(leaf, nn.Parameter(value.detach().clone()))
    else:
        root.register_buffer(leaf, value.detach().clone())


def _own(root: nn.Module) -> Params:
    """Learnt weights, and those that are not learnt."""
    return dict(root.named_parameters()) | dict(root.named_buffers())


class _Weights(nn.Module):
    """θ; its state dict is one of the network: with the buffers and with the second names of what is shared."""

    def __init__(self, net: nn.Module) -> None:
        nn.Module.__init__(self)
        self._net = (net,)  # which is no part of this module

    def _others(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Second names of weights, with the first ones; the network's buffers."""
        first: dict[int, str] = {}
        weights = self._net[0].named_parameters(remove_duplicate=False)
        names = {name: first.setdefault(id(p), name) for name, p in weights}
        state = self._net[0].state_dict(keep_vars=True)
        buffers = {n: x for n, x in state.items() if isinstance(x, Tensor) and n not in names}
        return {n: known for n, known in names.items() if n != known}, buffers

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found, prefix = nn.Module.state_dict(self, *args, **kwargs), kwargs.get("prefix", "")
        second, buffers = self._others()
        found.update({prefix + name: found[prefix + known] for name, known in second.items() if prefix + known in found})
        found.update({prefix + name: x if kwargs.get("keep_vars") else x.detach() for name, x in buffers.items()})
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        second, buffers = self._others()
        for name in second:
            state_dict.pop(prefix + name, None)
        with torch.no_grad():
            for name, x in buffers.items():
                if (saved := state_dict.pop(prefix + name, None)) is not None:
                    x.copy_(saved)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
