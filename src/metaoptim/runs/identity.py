"""What a run is, in words that are the same in every process: its method, its tasks and how it was trained.

Nested dictionaries of JSON's types, kept in every checkpoint: so that what differs between two runs can be named.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metaoptim.core.callers import warn
from metaoptim.core.types import MetaOptimizer
from metaoptim.learners import network_of
from metaoptim.tasks import TaskFamily
from metaoptim.tasks.base import LOCATION

FEW = 8  # numbers of a tensor that are written out

MISSING = "missing"


def of_method(method: MetaOptimizer) -> dict[str, Any]:
    """Algorithm, learner (network, loss, rule, steps, …), estimator and the other choices of a meta-optimizer.

    Not the outer optimizer that it asks for: which one was used is a fact of the training.
    """
    learner = described(method.learner)
    learner = learner if isinstance(learner, dict) else {"kind": learner}
    masks = {"adapts": _chosen(method, method.learner.adapts), "learns": _chosen(method, method.learns)}
    parts = {part: described(getattr(method, part)) for part in ("estimator", "reduction")}
    return {"algorithm": method.name, "learner": learner | {"adapts": masks["adapts"]}, "learns": masks["learns"], **parts}


def _chosen(method: MetaOptimizer, mask: Callable[[str], bool]) -> str | list[str]:
    names = [n for n in method.phi.weights if mask(n)]
    return names if len(names) < len(method.phi.weights) else "all"


def of_tasks(tasks: TaskFamily | None) -> dict[str, Any]:
    """What a family says of the tasks that it trains on; {} where a source of one's own gives them."""
    if tasks is None:
        return {}
    known: dict[str, Any] = described(tasks.describe("train" if "train" in tasks.splits else tasks.splits[0]))
    return known


def described(x: Any) -> Any:
    """Anything in JSON's types. Functions have their names, modules their layers, dataclasses their fields."""
    if x is None or isinstance(x, bool | int | str):
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else str(x)
    if isinstance(x, Tensor):
        return _tensor(x)
    if isinstance(x, nn.Module):
        return {name or "itself": f"{type(m).__name__}({_options(m)})" for name, m in x.named_modules()}
    if isinstance(x, Mapping):
        return {str(k): described(v) for k, v in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_asdict"):
        return described(x._asdict())
    if isinstance(x, list | tuple):
        return [described(v) for v in x]
    if isinstance(x, set | frozenset):
        return sorted(map(str, x))
    if is_dataclass(x) and not isinstance(x, type):
        known = {f.name: getattr(x, f.name) for f in fields(x) if f.init}
        absent = {f.name for f in fields(x) if f.metadata.get("later") and known.get(f.name) is None}  # when runs were saved
        return {"kind": type(x).__name__} | {n: described(value) for n, value in known.items() if n not in absent}
    if isinstance(x, partial):
        return {"kind": x.func.__name__} | described(x.keywords) | {str(i): described(v) for i, v in enumerate(x.args)}
    if isinstance(x, np.generic):
        return described(x.item())
    if isinstance(x, MethodType) and is_dataclass(x.__self__):
        return described(x.__self__) | {"method": x.__name__}
    if callable(x) and hasattr(x, "__name__"):
        return x.__name__
    return {"kind": type(x).__name__} | {
        k: described(v) for k, v in getattr(x, "__dict__", {}).items() if isinstance(v, _PLAIN)
    }


def _options(module: nn.Module) -> str:
    """What a module says of itself; for torch's losses, which say nothing, their options.

    Attributes of other modules are left out, for people anneal them while they train: see `attributes`.
    """
    if type(module).__module__ != nn.modules.loss.__name__:
        return module.extra_repr()
    own = {n: v for n, v in vars(module).items() if n not in _TORCHS and isinstance(v, _NUMBERS)}
    return ", ".join(f"{n}={v!r}" for n, v in sorted(own.items()))


def attributes(method: MetaOptimizer) -> dict[str, Any]:
    """Numbers, texts and flags that the user's own modules have as attributes, and their loss as those, or as variables.

    By path, as in {"net.body.temperature": 1.0}. Layers of torch and of this library say themselves what they are.
    """
    network = network_of(method.learner) or getattr(method.learner, "network", None)
    found: dict[str, Any] = {}
    for root, part in {"net": network.net, "loss": network.loss}.items() if network else ():
        if isinstance(part, nn.Module):
            for name, module in part.named_modules(prefix=root):
                found |= {f"{name}.{n}": v for n, v in _attributes(module).items()}
        elif isinstance(part, FunctionType):
            with suppress(ValueError):  # a variable that is not yet bound
                read = inspect.getclosurevars(part)
                found |= {f"{root}.{n}": v for n, v in {**read.globals, **read.nonlocals}.items()}
    return {name: described(v) for name, v in found.items() if v is None or isinstance(v, (*_NUMBERS, np.generic))}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Those of its classes, as far as they are the user's own, and of itself; {} for a layer that is not."""
    own = [kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] not in ("torch", "metaoptim", "builtins")]
    if type(module) not in own:
        return {}
    of_classes = {n: v for kind in reversed(own) for n, v in vars(kind).items() if not n.startswith("__")}
    return of_classes | {n: v for n, v in vars(module).items() if n not in _TORCHS}


def warn_of_attributes(path: object, recorded: Mapping[str, Any], method: MetaOptimizer) -> None:
    """One warning where attributes differ from those that the run in `path` began with.

    recorded: {"start": …, "since": …}: those at its start, and those that had been changed, as annealing does, when it was
    saved; either is as it should be.
    """
    here, start = attributes(method), recorded.get("start", {})
    now = start | recorded.get("since", {})
    common = [n for n in here if n in start and here[n] != now[n]]
    found = [*differences({n: start[n] for n in common}, {n: here[n] for n in common})]
    if found:
        told = "; ".join(f"{name} was {there} and is {value} here" for name, there, value in found)
        advice = "Set them as they were if φ counts on that."
        warn(f"the run in {path} began with other attributes: {told}. {advice}")


_TORCHS = frozenset(vars(nn.Module()))

_NUMBERS = (bool, int, float, str)
_PLAIN = (*_NUMBERS, Tensor)


def _tensor(x: Tensor) -> Any:
    if x.numel() <= FEW:
        return described(x.tolist())
    digest = hashlib.sha256(x.detach().reshape(-1).contiguous().view(torch.uint8).numpy(force=True).tobytes()).hexdigest()
    return f"{x.dtype} {tuple(x.shape)}, sha256 {digest[:12]}"


def differences(saved: Any, here: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Each field in which two descriptions differ, and both of its values: ("learner.rule.lr", "0.4", "0.1")."""
    both = isinstance(saved, Mapping) and isinstance(here, Mapping)
    if both and saved.get("kind") == here.get("kind"):
        for key in _order(saved, here):
            yield from differences(saved.get(key, MISSING), here.get(key, MISSING), f"{path}.{key}".lstrip("."))
    elif saved != here:
        yield path, _short({k: saved[k] for k in _order(saved, here) if k in saved} if both else saved), _short(here)


def _order(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The fields of both, as they are ordered here: a checkpoint's are sorted. Where data lie is none: they may be moved."""
    return [key for key in {**here, **saved} if key != LOCATION]


def _short(x: Any) -> str:
    """A value in a sentence."""
    if isinstance(x, Mapping):
        inside = ", ".join(f"{k}={_short(v)}" for k, v in x.items() if k != "kind" and not isinstance(v, Mapping | list))
        return f"{x.get('kind', '')}({inside})" if len(inside) <= 80 else str(x.get("kind", "another"))
    text = str(x)
    return text if len(text) <= 80 else f"{text[:79]}…"


def saved_in(state: Mapping[str, Any], path: object) -> Any:
    """What the run of a checkpoint with this state is; a ValueError where an early version did not record it."""
    if "identity" not in state:
        raise ValueError(f"the run in {path} was saved by a version that did not record what a run is; train it again.")
    saved = state["identity"]
    return saved | {"method": {part: told for part, told in saved["method"].items() if part != "outer"}}  # as of early versions


def refuse_others(path: object, saved: Any, here: Any, advice: str, of_steps: str | None = None) -> None:
    """Raises a ValueError that names the first field in which a run differs from what is asked for.

    of_steps: another advice where that are inner steps.
    """
    for field, there, now in differences(saved, here):
        told = of_steps if of_steps and field.rpartition(".")[2] == "steps" else advice
        raise ValueError(
            f"the run in {path} differs from what is asked for: {field} is {there} in the run and {now} here; {told}."
        )
