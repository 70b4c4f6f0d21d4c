"""What `Run.adapt` returns: an ordinary module, which shares nothing with the run and needs nothing of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from metaoptim.core import trees
from metaoptim.core.types import Batch, Learner, MetaParams, Normalisation, Params, State
from metaoptim.learners import ClosedForm, Network
from metaoptim.nn import BatchNorm, store_statistics

_TORCHS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""torch's batch norm for inputs of so many axes."""


def adapted_module(
    learner: Learner, network: Network, phi: MetaParams, weights: Params, state: State, support: Batch
) -> nn.Module:
    """The network with adapted weights, in eval mode; for a closed form, a module around it.

    Batch norms that use stored statistics (policies inductive and frozen) are torch's own. Under "transductive" they use those
    of whatever batch comes, and what is stored is NaN, so that a module which would use it can't go wrong in silence.
    """
    module = copy.deepcopy(network.net)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
    if isinstance(learner, ClosedForm):
        if network.normalisation == "inductive":
            with quiet(module):
                store_statistics(module, support[0])
        policy: Normalisation = "transductive" if network.normalisation == "transductive" else "frozen"
        own = replace(learner, model=replace(network, net=module, normalisation=policy))
        return Fitted(own, phi.rule, state, support, network.normalisation).eval()
    return with_statistics(module, network.normalisation, support).eval()


def with_statistics(module: nn.Module, policy: Normalisation, support: Batch) -> nn.Module:
    """The module with batch norms that use the policy's statistics when it is called on its own."""
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
    if not norms:
        return module
    if policy == "transductive":
        for layer in norms:
            layer.stored = False
            layer.num_batches_tracked.zero_()
            for statistic in (layer.running_mean, layer.running_var):
                statistic.fill_(math.nan)
        return module
    axes: dict[nn.Module, int] = {}
    hooks = [m.register_forward_pre_hook(lambda layer, inputs: axes.update({layer: inputs[0].ndim})) for m in norms]
    with quiet(module), torch.no_grad():
        if policy == "inductive":
            store_statistics(module, support[0])
        else:
            for layer in norms:
                layer.stored = True
            module(support[0])
    for hook in hooks:
        hook.remove()
    return _replaced(module, axes)


def _replaced(module: nn.Module, axes: dict[nn.Module, int]) -> nn.Module:
    """The module with torch's batch norms in place of those that it has run."""
    for name, child in module._modules.items():
        if child is not None:
            setattr(module, name, _replaced(child, axes))
    kind = _TORCHS.get(axes.get(module, 0))
    if not isinstance(module, BatchNorm) or kind is None:
        return module
    layer: Any = kind(module.features, module.eps, affine=module.weight is not None)
    layer.weight, layer.bias = module.weight, module.bias
    layer.running_mean, layer.running_var = module.running_mean, module.running_var
    layer.num_batches_tracked = module.num_batches_tracked.fill_(1)
    found: nn.Module = layer.to(module.running_mean.device)
    return found


class Fitted(nn.Module):
    """A closed form fitted to a support set: inputs (B, …) -> its predictions."""

    policy: Tensor

    def __init__(self, learner: ClosedForm, rule: Params, state: State, support: Batch, policy: Normalisation) -> None:
        nn.Module.__init__(self)
        self.net = learner.model.net
        self._learner = learner
        self.register_buffer("policy", torch.tensor(get_args(Normalisation).index(policy)))  # part of a state dict
        register: Any = self.register_load_state_dict_pre_hook
        register(_same_policy)
        for name, x in {"rule": rule, "state": state, "support": support}.items():
            self.register_module(name, _Tensors(x))

    def forward(self, x: Tensor) -> Tensor:
        rule, state, support = (self.get_submodule(part)() for part in ("rule", "state", "support"))
        phi = MetaParams(dict(self.net.named_parameters()), rule)
        return self._learner.predict(self._learner.model, phi, state, support, x)


def _same_policy(module: Fitted, state: Any, prefix: str, data: Any, strict: bool, lacks: Any, extra: Any, errors: Any) -> None:
    saved, own = (int(x) for x in (state.get(f"{prefix}policy", module.policy), module.policy))
    if saved != own:
        policies = get_args(Normalisation)
        errors.append(f"it was fitted with normalisation={policies[saved]!r}, and this module with {policies[own]!r}.")


class _Tensors(nn.Module):
    """A tree of tensors, held as buffers."""

    def __init__(self, tree: Any) -> None:
        nn.Module.__init__(self)
        self._like = trees.map_tensors(lambda x: torch.empty(0), tree)
        for i, x in enumerate(trees.flatten(tree)):
            self.register_buffer(f"_{i}", x.detach().clone())

    def forward(self) -> Any:
        return trees.unflatten(list(self.buffers()), self._like)


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
