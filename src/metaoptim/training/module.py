"""φ as an ordinary `nn.Module`, for loops that people already have."""

from __future__ import annotations

from torch import Tensor, nn

from metaoptim.core.types import Carry, Estimate, Meta, MetaOptimizer, Params, Task
from metaoptim.engine import Engine, check_tasks


class MetaModule(nn.Module):
    """φ as parameters: `weights.NAME` (learnt weights; those that are not learnt are buffers) and `rule.NAME`.

    `backward(batch)` adds the meta-gradient to `.grad`, as `loss.backward()` does; any optimizer then takes the step.

    Args:
        meta: what an algorithm's builder returned.
        tasks, memory, runtime, precision, budget, horizon: the engine's settings (see `Engine`). Unless asked, operators run
            one by one ("eager"): a graph would not see what the loop around it changes, such as a temperature.
    """

    def __init__(
        self,
        meta: MetaOptimizer,
        tasks: str = "auto",
        memory: str = "graph",
        runtime: str = "eager",
        precision: str = "full",
        budget: float | None = None,
        horizon: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.optimizer = meta
        self.engine = Engine(meta, tasks, memory, runtime, precision, budget, horizon)
        self.carry: Carry | None = None
        self.weights, self.rule = nn.Module(), nn.Module()
        for name, value in meta.meta.weights.items():
            _place(self.weights, name, value, learnt=meta.learns(name))
        for name, value in meta.meta.rule.items():
            _place(self.rule, name, value, learnt=True)

    def meta(self) -> Meta:
        """φ now, sharing memory with the parameters."""
        return Meta(_read(self.weights), _read(self.rule))

    def estimate(self, batch: Task) -> Estimate:
        """The meta-gradient of a batch of T tasks, with nothing changed but the estimator's carry."""
        meta, count = self.meta(), check_tasks(batch)
        if self.carry is None:
            self.carry = self.engine.init(meta, count)
        estimate = self.engine(meta, batch, self.carry)
        self.carry = estimate.carry
        return estimate

    def accumulate(self, grad: Meta) -> None:
        """Adds a meta-gradient to `.grad`."""
        for module, part in ((self.weights, grad.weights), (self.rule, grad.rule)):
            for name, g in part.items():
                add_grad(module.get_parameter(name), g)

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
