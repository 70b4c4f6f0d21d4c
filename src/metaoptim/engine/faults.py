"""Says in a sentence what is at fault where a model, a loss or a rule breaks down in torch, and which setting works."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim.core import trees
from metaoptim.core.types import MetaOptimizer, Task
from metaoptim.estimators import EvolutionStrategy, unguarded
from metaoptim.learners import modules, network_of
from metaoptim.nn import blame

_VALUE = re.compile(r"value out of a tracing tensor|data.dependent|_local_scalar_dense|\.item\(\) on a Tensor|data_ptr", re.I)
_FORWARD = re.compile(r"ZeroTensors are immutable|forward AD|forward-mode AD|implement the jvp")
_TWICE = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented|(once_differentiable)")
_INTO = re.compile(
    r"mutating a non-functional|mutate a captured Tensor|inplace arithmetic|match the broadcast shape|updated in place"
)
_CHANGED = re.compile(r"modified by an inplace operation")
_WHOLE = re.compile(r"not implemented for '(?:Long|Int|Short|Byte|Bool)'")
_MAP = re.compile(r"vmap|batching rule|BatchedTensor", re.I)
_CHECKPOINT = re.compile(r"computes values again in the backward pass")
_DATA = re.compile(
    r"shape|size|dimension|scalar type|dtype|out of (?:range|bounds)|index|device|channels|multipl|broadcast|Expected|target",
    re.I,
)
_FLOATS = re.compile(r"dtype|scalar type|Input type|desired output type")
_TYPES = {torch.float64: "double", torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16"}
_CALL = re.compile(r"forward\(\) .*(?:argument|keyword)|must be Tensor, not (?:tuple|list|dict)")

_LOOP = ', or batching="loop" with runtime="eager" (in training: engine={"batching": "loop", "runtime": "eager"})'
_NO_STRATEGY = (
    ', or, in place of evolution strategies, which map the runs of a pair, estimator="truncated" with engine={"batching": '
    '"loop", "runtime": "eager"}'
)

_SENTENCES: tuple[tuple[re.Pattern[str], Callable[[str, re.Match[str], str], str]], ...] = (
    (_CHECKPOINT, lambda who, found, way: found.string),
    (_VALUE, lambda who, found, way: (
        f"{who} branches on a value (an `if` on a tensor, int(), .item()), which neither vmap nor a graph can hold: use "
        f"torch.where there, or index by a tensor with an axis, as in x[i[None]][0]{way}"
    )),
    (_FORWARD, lambda who, found, way: (
        f'{who} uses a function that has no forward mode in torch, which memory="mixed" needs: use memory="steps", with the '
        "same numbers"
    )),
    (_TWICE, lambda who, found, way: (
        f"{who} uses `{found[1] or found[2]}`, which torch can't differentiate twice, as a gradient through inner steps must: "
        "use another function there, or a first-order method, such as fomaml"
    )),
    (_INTO, lambda who, found, way: (
        f"{who} writes into a tensor in place ({found[0]}), such as a buffer that it counts in, which neither vmap nor a graph "
        f"can do: leave that to your loop (mo.nn.convert makes batch norms that count nothing){way}"
    )),
    (_CHANGED, lambda who, found, way: (
        f"{who} writes in place into a tensor that a gradient needs as it was: compute with new tensors, as in x = 0.9 * x, or "
        "ReLU(inplace=False)"
    )),
    (_WHOLE, lambda who, found, way: (
        f"{who} was given whole numbers where torch takes floats ({_line(found.string)}): give inputs as x.float(), and a loss "
        "that takes (output, target), in this order"
    )),
    (_MAP, lambda who, found, way: (
        f"{who} does what vmap can't map ({_line(found.string)}): use other operations there{way}"
    )),
)  # fmt: skip


@contextmanager
def explained(data: Any, owner: Any) -> Iterator[None]:
    """Turns what torch says about a shape, an operator or a class number inside a model into one sentence, as a ValueError.

    data: a task, or data by the names that the user knows them by.
    owner: has the modules in its fields, among which the layer is looked for.
    """
    try:
        yield
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        told = isinstance(error, torch.OutOfMemoryError) or (isinstance(error, ValueError) and not _is_torchs(error))
        if told or (isinstance(error, TypeError) and not _CALL.search(str(error))):
            raise
        raise ValueError(f"{sentence(error, owner, data)}.") from error


def sentence(error: Exception, owner: Any, data: Any = (), taken_over: bool = False) -> str:
    """What is at fault, without a full stop; and which setting works, unless that has taken over."""
    text = str(error).strip()
    if isinstance(error, ValueError) and not _is_torchs(error):  # a sentence of ours, or of the user's own
        return text.rstrip(".")
    layers = [layer for module in modules(owner) if (layer := _blamed(error, module, owner))]
    rule = _rule_of(error)
    who = layers[0] if layers else rule or "the model, the loss or the rule"
    for sign, told in _SENTENCES:
        if found := sign.search(text):
            return told(who, found, "" if taken_over else _way(owner))
    if isinstance(error, TypeError):
        return (
            f"the model is called with the inputs of a batch as one argument, but {_line(text)}; wrap it in one that takes them"
        )
    tensors = trees.flatten(data)
    if rule or not tensors or not (_DATA.search(text) or _FLOATS.search(text)):
        return f"{who} failed: {_line(text)}"
    shapes = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}{_range(x)}" for x in tensors)
    who = layers[0] if layers else "the model or the loss"
    axes = ", with axes (T, S, …)" if isinstance(data, Task) else ""
    order = " and ".join(data) if isinstance(data, dict) else f"support and query, inputs and targets{axes}"
    return (
        f"{who} can't take these data ({_line(text)}): found tensors {shapes}, in the order of {order}; "
        f"{_expected(text, tensors, owner)}"
    )


def _way(owner: Any) -> str:
    """The settings that need neither vmap nor a graph, where the owner is run by an engine."""
    if not isinstance(owner, MetaOptimizer):
        return ""
    return _NO_STRATEGY if isinstance(unguarded(owner.estimator), EvolutionStrategy) else _LOOP


def _blamed(error: Exception, module: nn.Module, owner: Any) -> str | None:
    """The layer that an error came from; a module that is the loss is called so."""
    name = blame(error, module)
    network = network_of(getattr(owner, "learner", owner))
    return name.replace("the module itself", "the loss") if name and network and module is network.loss else name


def _rule_of(error: Exception) -> str | None:
    """The update rule that an error came through, in words; of a chain the one at fault."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_argcount]
    owners = [frame.f_locals.get(frame.f_code.co_varnames[0]) for frame in frames]
    rules = [x for x in owners if all(hasattr(x, name) for name in ("start", "init", "update"))]
    return f"the rule {type(rules[-1]).__name__}" if rules else None


def _is_torchs(error: Exception) -> bool:
    """Whether torch itself raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("torch.")


def _expected(text: str, tensors: list[Tensor], owner: Any) -> str:
    """What to give, as far as what torch says tells it."""
    if re.search(r"target dtype|expected scalar type Long|int64 for index", text):
        return "expected class numbers as targets: y.long()"
    if "desired output type" in text:
        return "expected floats as targets: y.float()"
    if _FLOATS.search(text):
        if re.search(r"\b(long|int)\b", text, re.I):
            return "expected floats as inputs: x.float()"
        weights = [p.dtype for module in modules(owner) for p in module.parameters()]
        data = [x.dtype for x in tensors]
        here, there = (next((_TYPES[kind] for kind in kinds if kind in _TYPES), "float") for kinds in (weights, data))
        return f"expected data and weights of one type: .{here}() of the data, or net.{there}()"
    if re.search(r"out of (?:range|bounds)|\bindex\b|target", text, re.I):
        return "expected what the model reads and, for classes, targets below its outputs, by a loss of (output, target)"
    return "expected what the model reads and the loss takes"


def _line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip(".")


def _range(x: Tensor) -> str:
    numbers = not (x.is_floating_point() or x.is_complex()) and x.numel() > 0
    return f" from {x.min()} to {x.max()}" if numbers else ""
