"""What the groups of an optimizer say to its rule, or to the one rule of a chain that is meant: step size, weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from metaoptim.core.checks import check_numbers
from metaoptim.core.types import Rule
from metaoptim.rules import Chain


def parts(rule: Any) -> list[Any]:
    """The rules of a chain, and of chains in it; any other rule by itself."""
    return [part for one in rule.rules for part in parts(one)] if isinstance(rule, Chain) else [rule]


def values(rule: Any) -> list[Any]:
    """The arguments of a rule."""
    return [getattr(rule, f.name) for f in fields(rule)] if is_dataclass(rule) else []


def family(rule: Any) -> list[Any]:
    """A rule, and all those in its arguments."""
    given = [x for value in values(rule) for x in (value if isinstance(value, tuple | list) else [value])]
    return [rule, *(part for x in given if hasattr(x, "init") and hasattr(x, "update") for part in family(x))]


def kind(rule: Rule) -> str:
    """A rule without its numbers, by which a state is known."""
    own, *inside = [type(part).__name__ for part in family(rule)]
    return f"{own}({', '.join(inside)})" if inside else own


def separable(rule: Rule) -> bool:
    """Whether each weight moves by itself."""
    return bool(getattr(rule, "separable", False))


def own_lr(rule: Rule) -> float:
    """The step size of a rule, or of the one in a chain that has one other than 1; 1 where there is none, or are several."""
    sizes = _step_sizes(rule)
    return sizes[0] if len(sizes) == 1 else 1.0


def _step_sizes(rule: Rule) -> list[float]:
    return [lr for part in parts(rule) if (lr := float(getattr(part, "lr", 1.0))) != 1.0]


def own_decay(rule: Rule) -> float | None:
    """The weight decay of a rule, or of the one in a chain that has it; None where there is none, or are several."""
    decays = _decays(rule)
    return decays[0] if len(decays) == 1 else None


def _decays(rule: Rule) -> list[float]:
    return [float(getattr(part, "decay", 0.0)) for part in parts(rule) if getattr(part, "decays_weights", False)]


def with_decay(rule: Any, decay: float) -> Rule:
    """The rule with another weight decay."""
    if isinstance(rule, Chain):
        return Chain(tuple(with_decay(one, decay) for one in rule.rules))
    changed: Rule = replace(rule, decay=decay) if getattr(rule, "decays_weights", False) else rule
    return changed


def check_added(rule: Rule, group: dict[str, Any], begun: bool) -> None:
    """Whether a rule can do what a new group says; begun: whether it has made a step."""
    lr, decay = group["lr"], group.get("weight_decay")
    check_numbers(0, lr=lr, weight_decay=decay)
    for i, param in enumerate(group["params"]):
        if not param.is_floating_point():
            raise ValueError(f"Parameter {i} of the group is {param.dtype}: rules move weights that are real numbers.")
    if begun and not separable(rule):
        raise ValueError(
            f"A group was added after the first step: {rule} reads all weights together, which must be the same in each step; "
            "give all parameters before."
        )
    if lr != own_lr(rule) and len(_step_sizes(rule)) > 1:
        raise ValueError(f"lr={lr}: several rules of {rule} have a step size; give it to the one that you mean.")
    if decay is not None and len(_decays(rule)) > 1:
        raise ValueError(f"weight_decay={decay}: several rules of {rule} decay weights; give `decay` to the one that you mean.")
    if decay and not _decays(rule):
        raise ValueError(f"weight_decay={decay}: {rule} decays no weights; leave it out.")


def check_together(rule: Rule, groups: Sequence[dict[str, Any]]) -> None:
    """Whether a rule can do what all groups say, which schedulers change."""
    if any(hasattr(part, "read_out") for part in parts(rule)) and any(group["lr"] != own_lr(rule) for group in groups):
        own = "build the rule with the lr that it is to have" if _step_sizes(rule) else "it has no step size, so leave lr out"
        raise ValueError(f"{rule} averages weights, which scaled updates would break: {own}, and take no scheduler.")
    if not separable(rule) and len({group.get("weight_decay") or 0.0 for group in groups}) > 1:
        raise ValueError(f"Groups differ in weight_decay: {rule} reads all weights together, which must have the same.")
