"""What losses problems come to when rules train them: whole runs, side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from metaoptim.core.callers import is_ours
from metaoptim.core.checks import many_at_once
from metaoptim.core.gradients import held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import MetaParams, Params, Rule, Task
from metaoptim.engine.bound import Bound
from metaoptim.engine.faults import explained
from metaoptim.lopt.learner import Optimizee
from metaoptim.lopt.mixture import Family

TOGETHER = 64  # runs side by side, above which nothing is saved


def curves(family: Family, rule: Rule, psi: Params, tasks: Task) -> tuple[Tensor, Tensor]:
    """Judged losses of whole runs of T problems after 0 … K steps, and where a run counts as diverged; each (T, K+1)."""
    learner, phi = Optimizee(family, rule), MetaParams({}, psi)

    def one(task: Task, key: Tensor) -> tuple[Tensor, Tensor]:
        own = Bound(learner, {}, key)
        found = [own.loss(phi, s, task.support, task.query, k) for k, s in inner_loop(own, phi, task.support, held)]
        return torch.stack([loss for loss, _ in found]), torch.stack([info["diverged"] for _, info in found])

    first = tasks.support["first"]
    with explained(tasks, learner), torch.no_grad():
        losses, diverged = vmap(one, randomness="different")(tasks, torch.arange(len(first), device=first.device))
    return losses, diverged


def final(losses: Tensor) -> Tensor:
    """The mean over the last tenth of a run's steps, (…, K+1) -> (…), for a single minibatch says little."""
    last = losses[..., -max(1, (losses.shape[-1] - 1) // 10) :]
    return last.mean(-1)


def final_losses(family: Family, rules: Sequence[Rule], psi: Params, tasks: Task) -> Tensor:
    """The final losses of T problems by each of R rules, (R, T): as of `curves` up to rounding, and sooner."""
    at_once = max(1, TOGETHER // len(tasks.support["first"]))
    groups = [rules[i : i + at_once] for i in range(0, len(rules), at_once)]
    return torch.cat([_of_group(family, group, psi, tasks) for group in groups])


def _of_group(family: Family, rules: Sequence[Rule], psi: Params, tasks: Task) -> Tensor:
    # Others' rules may go by their numbers in Python, where tensors would lead another way; some of ours can't be mapped over.
    if all(map(is_ours, rules)):
        with suppress(Exception):
            return _mapped(family, rules, psi, tasks)
    return torch.stack([final(curves(family, rule, psi, tasks)[0]) for rule in rules])


def _mapped(family: Family, rules: Sequence[Rule], psi: Params, tasks: Task) -> Tensor:
    """The rules as one, mapped over the numbers that they differ in."""
    columns: list[Tensor] = []
    device = tasks.support["first"].device
    merged(rules, lambda values: columns.append(torch.tensor(values, dtype=torch.float64, device=device)))

    def of_one(*numbers: Tensor) -> Tensor:
        rest: Iterator[Tensor] = iter(numbers)
        rule: Rule = merged(rules, lambda values: next(rest))
        return final(curves(family, rule, psi, tasks)[0])

    with many_at_once():
        found: Tensor = vmap(of_one, randomness="different")(*columns)
    return found


def merged(values: Sequence[Any], number: Callable[[Sequence[float]], Any]) -> Any:
    """One value in place of several that are built alike, with what `number` makes of numbers where these differ.

    Raises:
        TypeError: they differ in more than numbers.
    """
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise TypeError(f"{first!r} is of another type than the others.")
    if is_dataclass(first):
        one = copy.copy(first)
        for name in vars(first):
            object.__setattr__(one, name, merged([vars(value)[name] for value in values], number))
        return one
    if type(first) in (tuple, list):
        return type(first)(merged(parts, number) for parts in zip(*values, strict=True))
    if all(value is first or value == first for value in values):
        return first
    if isinstance(first, float):
        return number(values)
    raise TypeError(f"{first!r} differs from the others.")
