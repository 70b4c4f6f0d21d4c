"""What arguments must be. Each check says nothing, or raises a ValueError of one sentence: what was found, what was expected.

An argument that is None was not given, and passes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.brief import brief, shapes
from metaoptim.core.types import MetaOptimizer, Params, Rule, State

LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
MOST = 2**63 - 1  # what a tensor of integers holds
INNER_STEP = 1e-4  # seconds: next to no inner step is as quick
PATIENCE = 3600.0  # seconds
_MANY: ContextVar[bool] = ContextVar("many", default=False)


@contextmanager
def many_at_once() -> Iterator[None]:
    """Inside, tensors pass for numbers: under `vmap`, each stands for several, which were checked one by one."""
    before = _MANY.set(True)
    try:
        yield
    finally:
        _MANY.reset(before)


def check_method(method: Any, taker: str) -> None:
    """A meta-optimizer, and not the network that it is made of."""
    if not isinstance(method, MetaOptimizer):
        raise ValueError(f"{taker} takes a meta-optimizer, such as mo.maml(net, loss); found {type(method).__name__}.")


def check_step(rule: Rule) -> None:
    """A rule that moves weights, as far as it says."""
    if takes_step(rule) is False:
        raise ValueError(
            f"{brief(rule)} takes no step: what it gives would be added to the weights, which climbs the loss; chain it with a "
            "rule that does, as in mo.rules.chain(mo.rules.Clip(norm=1.0), mo.rules.SGD(0.1)), or a list in a recipe."
        )


def check_update(rule: Rule, found: Any, weights: Params) -> tuple[Params, State]:
    """What a rule's `update` returned: an update of its own shape for every weight, and a state."""
    who = f"`update` of the rule {type(rule).__name__}"
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], dict):
        raise ValueError(f"{who} returned {type(found).__name__}; it must return (updates by name, state).")
    for name, w in weights.items():
        shape = getattr(found[0].get(name), "shape", None)
        if shape != w.shape:
            other = brief(found[0][name]) if name in found[0] else "no update"
            told = other if shape is None else f"an update of shape {tuple(shape)}"
            raise ValueError(
                f"{who} returns {told} for the weight `{name}` of shape {tuple(w.shape)}; it must return one of the same "
                "shape for every weight, zeros where one is to stay."
            )
    if odd := [n for n in found[0] if n not in weights]:
        like = f" (one is {min(weights)!r})" if weights else ""
        raise ValueError(f"{who} returns an update for {odd[0]!r}, which is no weight that it was given{like}; leave it out.")
    return found


def check_state(rule: Rule, before: State, after: State, where: str = "the state") -> State:
    """The state that a rule's `update` returned, in the order of the one that it was given, whose form it must have."""
    if isinstance(before, Mapping) and isinstance(after, Mapping) and before.keys() == after.keys():
        return {n: check_state(rule, x, after[n], f"{where}[{n!r}]") for n, x in before.items()}
    if isinstance(before, tuple | list) and isinstance(after, tuple | list) and len(before) == len(after):
        parts = [check_state(rule, x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(before, after, strict=True))]
        return type(before)(*parts) if hasattr(before, "_fields") else type(before)(parts)
    if isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape:
        return after
    raise ValueError(
        f"`update` of the rule {type(rule).__name__} returns {_short(after)} for {where}, where it was given {_short(before)}: "
        "a state has the same names and shapes in all steps, those of `init`."
    )


def _short(state: State) -> str:
    told = shapes(state)
    return told if len(told) <= 60 else f"a {type(state).__name__} of {len(state)}"


def check_carried(state: State) -> State:
    """What an estimator carries from outer step to outer step: made of tensors alone."""
    odd: list[Any] = [x for x in trees.flatten(state) if not isinstance(x, Tensor)]
    if odd:
        raise ValueError(
            f"the rule's state has {brief(odd[0])} ({type(odd[0]).__name__}) in it, and tensors alone are carried from one "
            "outer step to the next: keep it as one, such as torch.tensor(0), or as a field of the rule if it never changes."
        )
    return state


def takes_step(rule: Rule) -> bool | None:
    """Whether a rule turns gradients into steps down the loss; None for one that doesn't say."""
    found: bool | None = getattr(rule, "takes_step", None)
    return found


def check_counts(least: int = 1, **counts: Any) -> None:
    """Whole numbers, such as iterations or steps."""
    for name, value in counts.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (whole and least <= int(value) <= MOST):
            raise ValueError(f"{name}={value!r}: it must be a whole number, at least {least}{_and_at_most(value, MOST)}.")


def check_numbers(least: float = -LARGEST, **values: Any) -> None:
    """Numbers that float32 can hold."""
    for name, value in values.items():
        if not _passes(value) and not (_is_number(value) and least <= value <= LARGEST):
            bound = "" if least == -LARGEST else f" and at least {least:g}"
            raise ValueError(
                f"{name}={value!r}: it must be a {_number(value)} that is finite{bound}{_and_at_most(value, LARGEST)}."
            )


def check_positive(**values: Any) -> None:
    """Numbers above 0 that float32 can hold, such as step sizes."""
    for name, value in values.items():
        if not _passes(value) and not (_is_number(value) and SMALLEST <= value <= LARGEST):
            raise ValueError(f"{name}={value!r}: it must be a positive {_number(value)} that float32 can hold.")


def check_fractions(**values: Any) -> None:
    """Numbers from 0 to below 1, such as the decay of a mean."""
    for name, value in values.items():
        if not _passes(value) and not (_is_number(value) and 0 <= value < 1):
            raise ValueError(f"{name}={value!r}: it must be a {_number(value)} from 0 to below 1.")


def check_flags(**flags: Any) -> None:
    """True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: it must be True or False.")


def check_by_name(**functions: Any) -> None:
    """Functions of a weight's name."""
    for name, function in functions.items():
        if function is not None and (not callable(function) or isinstance(function, type)):
            raise ValueError(
                f"{name}={function!r}: it must be a function of a weight's name, such as mo.optim.Named('*embed*', '*bias')."
            )


def check_choice(choices: Sequence[str], **words: Any) -> None:
    """One of a few words."""
    for name, word in words.items():
        if word is not None and word not in choices:
            fault = "is unknown" if isinstance(word, str) else "is no text"
            raise ValueError(f"{name}={word!r} {fault}: choose {', '.join(choices[:-1])} or {choices[-1]}.")


def check_called(name: str, function: Any, *given: str, advice: str = "") -> None:
    """What can be called with these arguments, as far as it tells which it takes."""
    try:
        signature(function).bind(*given)
    except TypeError as error:
        raise ValueError(f"{name} is called with ({', '.join(given)}): {error}{advice}.") from error
    except ValueError:  # it does not tell
        return


def check_memory(size: int, what: str) -> None:
    """Whether that many bytes fit into this machine's memory at all; what: the subject of the sentence."""
    total = memory()
    if total is not None and size > total:
        raise ValueError(
            f"{what} would take {size / 2**30:,.1f} GiB or more, and this machine has {total / 2**30:,.1f} GiB of memory; "
            "ask for fewer."
        )


def check_time(inner_steps: int, what: str) -> None:
    """Whether that many inner steps, one after the other, end within hours; what: the subject of the sentence."""
    seconds = inner_steps * INNER_STEP
    if seconds > PATIENCE:
        raise ValueError(
            f"{what} would go through {inner_steps:,} inner steps one after the other, which takes {seconds / 3600:,.1f} hours "
            "even for the smallest network; ask for fewer."
        )


def memory() -> int | None:
    """The bytes of memory that this machine has; None where the system doesn't report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _passes(value: Any) -> bool:
    """Whether nothing is asked of a number."""
    return value is None or (_MANY.get() and isinstance(value, Tensor))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return "Python number (value.item() gives it)" if isinstance(value, torch.Tensor) else "number"


def _and_at_most(value: Any, most: float) -> str:
    """The upper bound, where that is what was crossed."""
    return f", and at most {most:.3g}" if _is_number(value) and value > most else ""
