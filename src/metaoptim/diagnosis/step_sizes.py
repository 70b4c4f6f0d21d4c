"""The step sizes that a rule has learnt, by layer: those that ψ calls `lr.WEIGHT` or `LAYER.lr`, in a chain too.

Threshold: a layer is flagged for a single negative step size, which climbs the support loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from metaoptim.core.types import Params
from metaoptim.diagnosis.subject import Numbers, Subject
from metaoptim.rules import Chain


def measure(subject: Subject) -> Numbers:
    """Mean, range and share of negative ones for every layer."""
    rule = getattr(subject.learner, "rule", None)
    now, first = (by_layer(rule, phi.rule) for phi in (subject.run.phi, subject.run.method.phi))
    if not now:
        raise ValueError("the update rule has no step sizes among what is learnt (ψ named lr.WEIGHT or LAYER.lr).")
    layers = []
    for layer, values in now.items():
        sizes = sorted(values)
        layers.append(
            {
                "layer": layer,
                "count": len(sizes),
                "mean": sum(sizes) / len(sizes),
                "least": sizes[0],
                "most": sizes[-1],
                "negative": sum(size < 0 for size in sizes) / len(sizes),
                "mean_at_start": sum(first[layer]) / len(first[layer]),
            }
        )
    return {"layers": layers}


def by_layer(rule: Any, psi: Params) -> dict[str, list[float]]:
    """Every learnt step size, by the module whose weights it moves."""
    found: dict[str, list[float]] = {}
    for name, x in _own(rule, psi):
        if (layer := _layer(name)) is not None:
            found.setdefault(layer, []).extend(x.detach().flatten().tolist())
    return found


def _layer(name: str) -> str | None:
    """The layer whose step sizes ψ has under a name; None for what is none."""
    if name.startswith("lr."):
        weight = name.removeprefix("lr.")
        return weight.rpartition(".")[0] or weight
    return name.removesuffix(".lr") if name.endswith(".lr") else "all" if name == "lr" else None


def _own(rule: Any, psi: Params) -> Iterator[tuple[str, Tensor]]:
    """ψ by the names that each rule of a chain gives it."""
    if not isinstance(rule, Chain):
        yield from psi.items()
        return
    for i, part in enumerate(rule.rules):
        prefix = f"{i}."
        yield from _own(part, {n.removeprefix(prefix): x for n, x in psi.items() if n.startswith(prefix)})


def read(numbers: Numbers) -> str:
    """The sentence that follows."""
    layers = numbers["layers"]
    if flagged := [layer for layer in layers if layer["negative"] > 0]:
        worst = max(flagged, key=lambda layer: layer["negative"])
        return (
            f"{len(flagged)} of {len(layers)} layers have negative step sizes, `{worst['layer']}` most of them "
            f"({100 * worst['negative']:.1f} %): their weights climb the support loss."
        )
    layers = sorted(layers, key=lambda layer: layer["mean"])
    small, large = layers[0], layers[-1]
    means = f"from {small['mean']:.3g} (`{small['layer']}`) to {large['mean']:.3g} (`{large['layer']}`)"
    return f"No step size is negative; the means of the layers go {means}."
