"""Are features reused, or learnt anew in every task? Linear CKA between what each layer makes of the query before and after
adaptation.

    CKA(X, Y) = ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖)            of centred features (n, D), Frobenius norms

Kornblith et al. 2019, https://arxiv.org/abs/1905.00414, section 3; asked of MAML by Raghu et al. 2020,
https://arxiv.org/abs/1909.09157. With few examples n and many features it is high for any two sets; the same with the rows of
one shuffled says how high. Threshold: features are reused from 0.9 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim.core import trees
from metaoptim.core.types import Params, Task
from metaoptim.diagnosis.subject import Numbers, Subject
from metaoptim.learners import Network

REUSED = 0.9


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two sets of features (n, …) of the same n examples; NaN where one of them is constant."""
    a, b = (_gram(z) for z in (x, y))
    return float((a * b).sum() / (a.norm() * b.norm()))


def _gram(z: Tensor) -> Tensor:
    """Centred inner products (n, n), which know all that CKA needs, and are small where D is large."""
    z = z.flatten(1).double()
    z = z - z.mean(0)
    return z @ z.mT


def measure(subject: Subject) -> Numbers:
    """The mean CKA of every layer over episodes, and the same with the rows of one side shuffled."""
    if not subject.adapts or not subject.learner.steps:
        raise ValueError("no inner step moves a weight, so that features are the same before and after.")
    network, phi = subject.run.network, subject.run.phi
    found: dict[str, list[tuple[float, float]]] = {}
    for task in subject.episodes():
        before, after = (
            outputs(network, network.at(subject.learner.weights(phi, state), k), task)
            for k, state in (subject.start(task), subject.end(task))
        )
        for name in before:
            other = torch.randperm(len(after[name]), device=after[name].device)
            found.setdefault(name, []).append((cka(before[name], after[name]), cka(before[name], after[name][other])))
    if not found:
        raise ValueError("no layer with weights of its own returns a row of features for every example of the query.")
    means = {name: torch.tensor(pairs, dtype=torch.float64).nanmean(0).tolist() for name, pairs in found.items()}
    names, head = list(means), _head(network)
    first = next((i for i, name in enumerate(names) if f"{name}.".startswith(f"{head}.")), len(names) - 1)
    return {
        "episodes": subject.closely,
        "examples": len(trees.flatten(subject.batch.query)[0][0]),
        "layers": [
            {"layer": name, "cka": means[name][0], "by_chance": means[name][1], "head": i >= first}
            for i, name in enumerate(names)
        ],
    }


def outputs(network: Network, weights: Params, task: Task) -> dict[str, Tensor]:
    """What each layer with weights of its own makes of the query's inputs: (Q, …), in the order of the calls."""
    inputs, found = task.query[0], dict[str, Tensor]()
    rows = len(trees.flatten(inputs)[0])
    both = rows + len(trees.flatten(task.support)[0])  # under the policy inductive, the support's rows come first

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for x in trees.flatten(output):
                if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and len(x) in (rows, both):
                    found[name] = x[-rows:].detach()
                    return

        return hook

    own = {name: m for name, m in network.net.named_modules() if list(m.parameters(recurse=False))}
    hooks = [module.register_forward_hook(keep(name)) for name, module in own.items()]
    try:
        network.output(weights, inputs, task.support)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _head(network: Network) -> str | None:
    with suppress(ValueError):  # for a network that has none
        return network.head_name
    return None


def read(numbers: Numbers) -> str:
    """The sentence that follows."""
    known = [layer for layer in numbers["layers"] if math.isfinite(layer["cka"])]  # constant features have none
    body, heads = ([layer for layer in known if layer["head"] == head] for head in (False, True))
    head = f"; the head's outputs keep {min(layer['cka'] for layer in heads):.2f}" if heads else ""
    if not body:
        return f"There are no features ahead of the head{head}."
    worst = min(body, key=lambda layer: layer["cka"])
    lowest = f"`{worst['layer']}` keeps the least, a CKA of {worst['cka']:.2f}"
    if worst["cka"] >= REUSED and worst["by_chance"] >= REUSED:
        few = f"shuffled rows have {worst['by_chance']:.2f}"
        return f"{numbers['examples']} examples can't tell whether features are reused: {lowest}, and {few}{head}."
    does = "Features are reused" if worst["cka"] >= REUSED else "Features change with the task"
    return f"{does}: ahead of the head {lowest}{head}."
