"""Runs a function of tensors: by calling it, by a graph that was traced once, or by that graph compiled.

A graph belongs to the shapes, strides, types and devices of its inputs, to their structure, and to what decides a module's
own branches (training or not): anything else is traced anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim import trees
from metaoptim.engine.graph import draws, trace

Function = Callable[..., Any]


class Traced:
    """The same function of nested tensors, run as a graph.

    Args:
        function: a pure function of tensors in nested tuples and dicts, to the same; its random numbers are drawn anew.
        owner: whose modules' modes (`training`) belong to the graph.
        compiled: whether the graph goes through Inductor.
        share: whether what is computed twice may be kept instead.
    """

    def __init__(self, function: Function, owner: Any, compiled: bool = False, share: bool = True) -> None:
        self.function, self.compiled, self.share = function, compiled, share
        self.modules = [m for net in modules(owner) for m in net.modules()]
        self.graphs: dict[Any, tuple[Callable[..., Any], Any, bool]] = {}

    def __call__(self, *args: Any) -> Any:
        inputs: list[Tensor] = []
        run, after, _ = self._graph(trees.take(args, inputs), inputs)
        with torch.inference_mode():
            outputs = run(*inputs)
        return trees.put(after, iter([x.clone() for x in outputs]))  # ordinary tensors again

    def draws(self, *args: Any) -> bool:
        """Whether the graph for these arguments draws random numbers."""
        inputs: list[Tensor] = []
        return self._graph(trees.take(args, inputs), inputs)[2]

    def _graph(self, structure: Any, inputs: list[Tensor]) -> tuple[Callable[..., Any], Any, bool]:
        key = (
            structure,
            tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs),
            tuple(m.training for m in self.modules),
        )
        if key not in self.graphs:
            self.graphs[key] = self._build(inputs, structure)
        return self.graphs[key]

    def _build(self, inputs: list[Tensor], structure: Any) -> tuple[Callable[..., Any], Any, bool]:
        after: Any = None

        def flat(*inputs: Tensor) -> list[Tensor]:
            nonlocal after
            outputs: list[Tensor] = []
            after = trees.take(self.function(*trees.put(structure, iter(inputs))), outputs)
            return outputs

        with torch.no_grad():
            module = trace(flat, inputs, self.share)
        run = _compile(module, inputs) if self.compiled else module.forward
        return run, after, any(draws(node) for node in module.graph.nodes)


def _compile(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """The graph through Inductor, whose results stay on disk between processes; the graph itself where that can't be had."""
    run = torch.compile(module, fullgraph=True, dynamic=False, options={"fallback_random": True})
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the compiler are not about the user's work
            run(*inputs)
    except Exception as error:  # whatever a compiler can say
        reason = " ".join(str(error).split()).partition(". ")[0][:200]
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
