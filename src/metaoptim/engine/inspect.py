"""Looks at a model, a loss and a rule once, by the gradient of one task in plain autograd, for what would be wrong silently."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from metaoptim.core import trees
from metaoptim.core.callers import warn, where
from metaoptim.core.checks import check_update
from metaoptim.core.gradients import inspected
from metaoptim.core.types import Carry, MetaOptimizer, MetaParams, Params, Rule, State, Step, Task
from metaoptim.engine.executor import Executor
from metaoptim.estimators import Joint
from metaoptim.learners import Inner, Network, network_of
from metaoptim.nn import alone

LONG = 5  # inner steps beyond which the graph of a whole run could be too large


PARTS = ("support set", "query set")


def inspect(
    method: MetaOptimizer, phi: MetaParams, batch: Task, carry: Carry, memory: str = "auto", parts: tuple[str, str] = PARTS
) -> None:
    """Warns of losses that no weight influences, of parameters that are read beside φ and stay constant, and of outputs for
    more classes than there are.

    memory: the engine's setting; a run's whole graph is built only where the run is short and memory was not to be saved.
    parts: what the user calls the two parts of a task.

    Raises a ValueError for a rule whose updates don't fit the weights, for functions that can be differentiated once alone,
    where a meta-gradient differentiates twice, for a forward pass that writes into its weights or its data, and for a head that
    was guessed wrong.
    """
    sparing = "steps" in method.estimator.memories and (method.learner.steps > LONG or memory in ("steps", "mixed"))
    kept = "steps" if sparing else method.estimator.memories[0]
    one, carried = trees.map_tensors(torch.clone, trees.index((batch, carry), slice(1)))
    # What fails is told of where it is run.
    rule, state = None if isinstance(method.estimator, Joint) else getattr(method.learner, "rule", None), None
    with torch.random.fork_rng(devices=[]), suppress(Exception), torch.no_grad():
        state = method.learner.init(phi, trees.index(one.support, 0)) if rule is not None else None
    if rule is not None and isinstance(state, Inner):
        check_updates(rule, phi.rule, state.fast)
    with inspected() as found, untouched(phi, one, parts) as own, torch.random.fork_rng(devices=[]), suppress(Exception):
        Executor(method, "loop", kept, "eager")(own, one, carried, 0)
    network = network_of(method.learner)
    if getattr(method.learner, "pooled", None) is None:  # whose classes are those of all tasks
        _check_outputs(found.outputs, batch)
    if network and _guessed(network) and _sets_apart(method, network):
        _check_head(network, phi, one)
    loss = f"the loss `{getattr(network.loss, '__name__', type(network.loss).__name__)}`" if network else "the loss"
    if found.once:
        raise ValueError(
            "the model, the loss or the rule has a function marked @once_differentiable, which a meta-gradient would have to "
            "differentiate twice: write its backward in differentiable operations, or use a first-order method, such as fomaml."
        )
    if found.parameters:
        names = {id(p): n for n, p in network.net.named_parameters()} if network else {}
        name = next((f"`{n}` of the network" for i, n in names.items() if i in found.parameters), "parameters from elsewhere")
        warn(
            f"{loss} reads {name} itself, and not the weights that adapt: it stays constant, without a gradient. "
            "Compute penalties from the model's output, or let an update rule decay weights."
        )
    elif found.looked and not found.reached and method.estimator.claim in ("exact", "first_order", "truncated"):
        warn(f"no weight influences {loss}: its meta-gradient is zero.")


def check_updates(rule: Rule, psi: Params, weights: Params) -> None:
    """A ValueError where the first two updates of a rule fail, aren't for these weights, or write into what they are given."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            state = rule.init(psi, weights)
            for _ in range(2):  # in the first, what is written into zeros may leave them as they are
                state = _updated(rule, psi, state, weights)
        except KeyError as error:
            raise ValueError(
                f"the rule {type(rule).__name__} finds no {error} where it looks for it: what it knows by the names of other "
                "weights can't move these; start it on these, or let it know none by name."
            ) from error
        except (RuntimeError, IndexError, TypeError) as error:
            line = str(error).strip().partition("\n")[0].rstrip(".")
            raise ValueError(f"the rule {type(rule).__name__} fails in {where(error) or 'its update'}: {line}.") from error


def _updated(rule: Rule, psi: Params, state: State, weights: Params) -> State:
    """The state after a step, which is the first: a run may have no other."""
    like = next(iter(weights.values()))
    given = {"ψ": psi, "the gradients": weights, "the state": state, "the weights": weights}
    own: dict[str, Any] = trees.map_tensors(torch.clone, given)
    leaves = {part: trees.flatten(tree) for part, tree in own.items()}  # in a dictionary, a rule may put others in their place
    step = Step(torch.tensor(0, device=like.device), like.new_ones(()))
    found = rule.update(own["ψ"], own["the gradients"], own["the state"], own["the weights"], step)
    updates, after = check_update(rule, found, weights)
    if odd := next((n for n, w in weights.items() if updates[n].dtype != w.dtype), None):
        raise ValueError(
            f"`update` of the rule {type(rule).__name__} returns {updates[odd].dtype} for the weight `{odd}`, which is "
            f"{weights[odd].dtype}; compute in the weight's own type, or convert: u.to(weights[name].dtype)."
        )
    for part, tree in given.items():
        for x, y in zip(trees.flatten(tree), leaves[part], strict=True):
            if not torch.allclose(x, y, 0.0, 0.0, equal_nan=True):
                raise ValueError(
                    f"`update` of the rule {type(rule).__name__} writes into {part} that it is given, and a gradient through "
                    "the run needs what stood there: return new tensors, as in 0.9 * m in place of m.mul_(0.9)."
                )
    return after


def _check_outputs(outputs: int, batch: Task) -> None:
    """Warns of outputs that no target of a batch names."""
    pairs = [part for part in batch if isinstance(part, tuple | list) and len(part) == 2]
    targets = [y for _, y in pairs if isinstance(y, torch.Tensor) and y.ndim == 2 and not y.is_floating_point()]
    ways = 1 + max((int(y.max()) for y in targets), default=outputs)
    if outputs > ways:
        warn(
            f"the model chooses among {outputs} classes, and the targets of the first batch are below {ways}: the others are "
            f"never right; give its last layer {ways} outputs, unless later tasks have more classes."
        )


def _sets_apart(method: MetaOptimizer, network: Network) -> bool:
    """Whether the head starts anew, adapts or is learnt as no other weight does."""

    def roles(head: bool) -> set[tuple[bool, bool]]:
        names = [n for n in method.phi.weights if network.trainable(n) and network.in_head(n) == head]
        return {(method.learner.adapts(n), method.learns(n)) for n in names}

    return getattr(method.learner, "start", None) is not None or not roles(True) & roles(False)


def _guessed(network: Network) -> bool:
    """Whether the head is the last of several linear layers by definition, which need not be the last that is called."""
    chosen = network.head is not None or "head" in dict(network.net.named_children())
    return not chosen and sum(isinstance(m, nn.Linear) for m in network.net.modules()) > 1


def _last_called(network: Network, weights: Params, x: Any) -> str | None:
    """The linear layer that is called last on inputs; None where none is called."""
    found: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *call: found.append(name)

    with alone:  # while no thread has its layers exchanged
        hooks = [m.register_forward_hook(note(n)) for n, m in network.net.named_modules() if isinstance(m, nn.Linear)]
        try:
            network.output(weights, x, None)
        finally:
            for hook in hooks:
                hook.remove()
    return found[-1] if found else None


def _check_head(network: Network, phi: MetaParams, one: Task) -> None:
    """A ValueError where the layer that was taken for the head is not the last one that is called."""
    last = None
    with suppress(Exception), torch.no_grad(), untouched(phi, one) as own:  # what fails is told of where it is run
        last = _last_called(network, network.initial(own.weights), trees.index(one.query, 0)[0])
    if last not in (None, network.head_name):
        raise ValueError(
            f"`{network.head_name}` is the last linear layer that the network defines, and was taken for its head, but the "
            f"last one that it calls is `{last}`: name the head with head=, as in head={last!r}."
        )


@contextmanager
def untouched(phi: MetaParams, batch: Task | None = None, names: tuple[str, str] = PARTS) -> Iterator[MetaParams]:
    """A copy of φ; a ValueError afterwards if a forward pass has written into it, or into the batch."""
    own: MetaParams = trees.map_tensors(torch.clone, phi)
    parts = dict(zip(names, batch, strict=True)) if batch is not None else {}
    before = {part: trees.map_tensors(torch.clone, tree) for part, tree in parts.items()}
    yield own
    for part, tree in parts.items():
        for x, y in zip(trees.flatten(tree), trees.flatten(before[part]), strict=True):
            if not torch.allclose(x, y, 0.0, 0.0, equal_nan=True):
                raise ValueError(
                    f"a forward pass or the loss writes into the {part} that it is given, so that the next one sees other "
                    "data: compute with a changed copy instead, as in x = x + 1, or ReLU(inplace=False)."
                )
    for name, x in own.weights.items():
        if not torch.allclose(x, phi.weights[name], 0.0, 0.0, equal_nan=True):
            raise ValueError(
                f"a forward pass writes into the weight `{name}`, which is for the optimizer alone to change: compute with a "
                "changed copy of it instead."
            )
