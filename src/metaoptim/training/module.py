"""φ as an ordinary `nn.Module`, for loops that people already have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metaoptim.core.types import Carry, Estimate, MetaOptimizer, MetaParams, Params, Task
from metaoptim.engine import Engine


class MetaModule(nn.Module):
    """φ as parameters: `weights.NAME` (learnt weights; those that are not learnt are buffers) and `rule.NAME`.

    `backward(batch)` adds the meta-gradient to `.grad`, as `loss.backward()` does; any optimizer then takes the step.
    `Run(method, module.phi())` adapts and evaluates the φ that it has learnt. An estimator that goes through a long run window
    by window (`Truncated`, `pes`, …) wants the same batch in `method.estimator.lasts(method.learner)` calls after one another.

    Args:
        method: what an algorithm's builder returned.
        batching, memory, runtime, precision, budget, horizon: the engine's settings (see `Engine`). Unless asked, operators run
            one by one ("eager"): a graph would not see what the loop around it changes, such as a temperature.
    """

    def __init__(
        self,
        method: MetaOptimizer,
        batching: str = "auto",
        memory: str = "graph",
        runtime: str = "eager",
        precision: str = "full",
        budget: float | None = None,
        horizon: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.method = method
        self.engine = Engine(method, batching, memory, runtime, precision, budget, horizon)
        self.carry: Carry | None = None
        self.outer_step = 0
        self.weights, self.rule = nn.Module(), nn.Module()
        for name, value in method.phi.weights.items():
            _place(self.weights, name, value, learnt=method.learns(name))
        for name, value in method.phi.rule.items():
            _place(self.rule, name, value, learnt=True)

    def phi(self) -> MetaParams:
        """φ now, sharing memory with the parameters."""
        return MetaParams(_read(self.weights), _read(self.rule))

    def estimate(self, batch: Task) -> Estimate:
        """The meta-gradient of a batch of T tasks, with nothing changed but the estimator's carry and the count of steps."""
        estimate = self.engine(self.phi(), batch, self.carry, self.outer_step)
        self.carry = estimate.carry
        self.outer_step += 1
        return estimate

    def accumulate(self, grad: MetaParams) -> None:
        """Adds a meta-gradient to `.grad`."""
        for module, part in ((self.weights, grad.weights), (self.rule, grad.rule)):
            for name, g in part.items():
                add_grad(module.get_parameter(name), g)

    def assign(self, phi: MetaParams) -> None:
        """Makes φ what is given."""
        with torch.no_grad():
            for module, part in ((self.weights, phi.weights), (self.rule, phi.rule)):
                own = dict(module.named_parameters()) | dict(module.named_buffers())
                for name, value in part.items():
                    own[name].copy_(value)

    def backward(self, batch: Task) -> Tensor:
        """Adds the meta-gradient of a batch of T tasks to `.grad`; returns the outer loss, a scalar."""
        estimate = self.estimate(batch)
        self.accumulate(estimate.grad)
        return estimate.loss


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


def _read(root: nn.Module) -> Params:
    return {n: p.detach() for n, p in (*root.named_parameters(), *root.named_buffers())}
