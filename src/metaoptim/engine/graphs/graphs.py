"""Runs functions of tensors as graphs that were traced once, or by those graphs compiled.

A graph belongs to the shapes, strides, types and devices of its inputs, to their structure, and to what decides a module's
own branches (training or not): anything else is traced anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from metaoptim.engine.graphs.buffers import Kind, Scratch, recycle
from metaoptim.engine.graphs.trace import bare, draws, trace

Function = Callable[..., tuple[Sequence[Tensor], Any]]


class _Graph(NamedTuple):
    """What runs, on tensors and memory of these kinds; what it returns beside tensors; whether it draws random numbers."""

    run: Callable[..., Any]
    kinds: Sequence[Kind]
    beside: Any
    draws: bool


class Graphs:
    """Pure functions of tensors, run as graphs; random numbers are drawn anew in every run.

    Args:
        owner: whose modules' modes (`training`) belong to a graph.
        compiled: whether graphs go through Inductor.
    """

    def __init__(self, owner: Any, compiled: bool = False) -> None:
        self.compiled = compiled
        self.modules = [m for net in modules(owner) for m in net.modules()]
        self.graphs: dict[Any, _Graph] = {}
        self.scratch = Scratch()

    def __call__(self, name: Hashable, function: Function, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """function(*inputs): tensors, and whatever it returned beside them. name: equal for equal functions."""
        key = self.key(name, inputs)
        if key not in self.graphs:
            self.graphs[key] = self._build(function, inputs)
        graph = self.graphs[key]
        with self.scratch.lent(graph.kinds) as pieces:
            with torch.inference_mode():
                outputs = graph.run(*inputs, *pieces)
            return [x.clone() for x in outputs], graph.beside  # ordinary tensors again, in memory of their own

    def key(self, name: Hashable, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Equal where the same graph runs."""
        shapes = tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
        return name, shapes, tuple(m.training for m in self.modules)

    @property
    def draws(self) -> bool:
        """Whether a graph draws random numbers by torch's generator."""
        return any(graph.draws for graph in self.graphs.values())

    def _build(self, function: Function, inputs: Sequence[Tensor]) -> _Graph:
        flat = _Flat(function)
        self.scratch.give_back()  # tracing runs the graph once, in memory of its own
        with torch.no_grad():
            module = trace(flat, inputs)
        found = any(draws(node) for node in module.graph.nodes)
        kinds = [] if self.compiled else recycle(module)
        bare(module)
        return _Graph(_compile(module, inputs) if self.compiled else module.forward, kinds, flat.beside, found)


class _Flat:
    """A function for tracing, which knows nothing but tensors."""

    def __init__(self, function: Function) -> None:
        self.function, self.beside = function, None

    def __call__(self, *args: Any) -> list[Tensor]:
        outputs, self.beside = self.function(*args)
        return list(outputs)


def _compile(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The graph through Inductor, whose results stay on disk between processes; the graph itself where that can't be had."""
    # Called from C++ its kernels don't hold Python's lock, for which several threads would wait.
    run = torch.compile(module, fullgraph=True, dynamic=False, options={"fallback_random": True, "cpp_wrapper": True})
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the compiler are not about the user's work
            run(*inputs)
    except Exception as error:  # whatever a compiler can say
        said = str(error).partition("Set TORCH")[0]  # what follows is for torch's developers
        reason = " ".join(said.split()).partition(". ")[0][:200]
        warnings.warn(f'runtime="compile" is not to be had here ({reason}); the traced graph runs instead.', stacklevel=2)
        return module.forward
    return run


def modules(owner: Any) -> Iterator[nn.Module]:
    """The modules among the fields of a dataclass, at any depth."""
    if isinstance(owner, nn.Module):
        yield owner
    elif is_dataclass(owner) and not isinstance(owner, type):
        for field in fields(owner):
            yield from modules(getattr(owner, field.name))
    elif isinstance(owner, partial):
        yield from modules(owner.func)
