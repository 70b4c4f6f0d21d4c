"""Calls a module with other weights, and leaves it as it was: whatever its forward pass does, and whether or not it fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from metaoptim.core.callers import warn
from metaoptim.nn.layers import BATCH_NORMS

alone = RLock()  # one module may be called from several threads, and its weights are exchanged for the time of a call
_WRITTEN: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()  # buffers that a forward pass writes in place
_KNOWN: ContextVar[dict[int, list[tuple[dict[str, Any], str, str]]] | None] = ContextVar("_KNOWN", default=None)
_CONTAINERS = (dict, list, set)
_OWN = {"_parameters", "_buffers", "_modules"}
_TORCHS = frozenset(vars(nn.Module())) - _OWN


def called(net: nn.Module, weights: Mapping[str, Tensor], x: Any, without: str | None = None, tidy: bool = True) -> Any:
    """net(x) with these weights (names as of `named_parameters`); attributes and buffers that a forward pass sets are set back.

    torch's `functional_call` forgets the weights of a module that has two names.

    Args:
        without: a submodule that passes on what it is given.
        tidy: whether the module's own code may set attributes, which none of torch's layers does.
    """
    with alone:
        if tidy:
            with _tidied(net):
                return _called(net, weights, x, without)
        return _called(net, weights, x, without)


def _called(net: nn.Module, weights: Mapping[str, Tensor], x: Any, without: str | None) -> Any:
    changed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for own, leaf, name in _places(net):
            if name in weights:
                changed.append((own, leaf, own[leaf]))
                own[leaf] = weights[name]
        if without is not None:
            parent, _, leaf = without.rpartition(".")
            folder: dict[str, Any] = net.get_submodule(parent)._modules
            changed.append((folder, leaf, folder[leaf]))
            folder[leaf] = nn.Identity()
        return net(x)
    finally:
        for own, leaf, p in reversed(changed):
            own[leaf] = p


@contextmanager
def steady() -> Iterator[None]:
    """Inside, where the weights of a network are is looked up once: nobody gives it other layers meanwhile."""
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _places(net: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    """Where each weight is: the dictionary of its module, the key there, and its first name in the network."""
    known = _KNOWN.get()
    if known is not None and id(net) in known:
        return known[id(net)]
    names: dict[int, str] = {}
    found: list[tuple[dict[str, Any], str, str]] = []
    for prefix, module in net.named_modules():
        own: dict[str, Any] = module._parameters
        for leaf, p in own.items():
            if p is not None:
                found.append((own, leaf, names.setdefault(id(p), f"{prefix}.{leaf}" if prefix else leaf)))
    if known is not None:
        known[id(net)] = found
    return found


@contextmanager
def _tidied(net: nn.Module) -> Iterator[None]:
    """Sets everything back that a forward pass changes in a module: its attributes, lists and dicts among them, its buffers."""
    modules = list(net.modules())
    kept = [(module.__dict__, dict(module.__dict__)) for module in modules]
    inside = [(n, v, v.copy()) for _, own in kept for n, v in own.items() if type(v) in _CONTAINERS and n not in _TORCHS]
    written, copies = _WRITTEN.get(net), []
    for module in modules:
        if isinstance(module, BATCH_NORMS):
            module._buffers["num_batches_tracked"] = None  # no batch is counted
        for name, buffer in module._buffers.items():
            if buffer is not None and (written is None or name in written):
                module._buffers[name] = copy = buffer.clone()
                copies.append((name, copy, copy._version))
    buffers = [(module._buffers, module._buffers.copy()) for module in modules]
    try:
        yield
    finally:
        counted = [name for name, copy, version in copies if copy._version != version]
        if written is None:
            told = [n for own, before in kept for n, x in own.items() if isinstance(x, int | float) and before.get(n) != x]
            told += [n for n, own, before in inside if n not in _OWN and _moved(own, before)]
            told += [n for own, before in buffers for n, x in own.items() if x is not before.get(n)]
            _tell(net, counted + told)
        _WRITTEN[net] = frozenset(counted)  # what the first call has not written is not copied again
        for own, before in kept:
            own.clear()
            own.update(before)
        for _, container, before in inside:
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)


def _moved(container: Any, before: Any) -> bool:
    """Whether a list, dict or set has lost something, or has been given what is no tensor: those are results that are kept."""
    now, old = (list(x.values() if isinstance(x, dict) else x) for x in (container, before))
    return len(now) < len(old) or any(not isinstance(x, Tensor) and all(x is not y for y in old) for x in now)


def _tell(net: nn.Module, counted: list[str]) -> None:
    if counted:
        warn(
            f"{type(net).__name__} changes `{counted[0]}` while it runs, which is set back after each call, so that a gradient "
            "is a function of the weights alone: change it in your loop."
        )
