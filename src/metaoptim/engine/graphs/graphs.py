"""Runs functions of tensors as graphs that are traced once, and compiled if so asked.

A graph is specific to the shapes, strides, dtypes and devices of its inputs, to their structure, and to the state of the code
that was traced (see `guards`). Anything else is traced afresh.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from metaoptim.core.callers import warn
from metaoptim.engine.graphs.bindings import direct
from metaoptim.engine.graphs.buffers import Kind, Scratch, recycle
from metaoptim.engine.graphs.guards import Guards, Unsteady
from metaoptim.engine.graphs.nodes import Node, called, inside, nodes_of
from metaoptim.engine.graphs.trace import bare, draws, silenced, trace

Function = Callable[..., tuple[Sequence[Tensor], Any]]
_CONTRACT = "enable_floating_point_contract_flag"  # as for gcc's -ffp-contract, "off" unless told otherwise


class _Graph(NamedTuple):
    """What runs, on tensors and scratch memory of these kinds; what it returns besides tensors; whether it draws at random."""

    run: Callable[..., Any]
    kinds: Sequence[Kind]
    beside: Any
    draws: bool


class Graphs:
    """Runs pure functions of tensors as graphs; random numbers are drawn afresh in every run.

    Args:
        guards: tell the states of the code apart that the functions run; none: it never changes.
        compiled: whether Inductor compiles the graphs.
        as_made: whether tensors are returned as Inductor made them, in its memory and its order of axes, and not copied; then
            it may also round a product and the sum that it is a part of once, and not each.
    """

    def __init__(self, guards: Guards | None = None, compiled: bool = False, as_made: bool = False) -> None:
        self.compiled, self.as_made = compiled, as_made
        self.guards, self.state = guards, 0
        self.graphs: dict[Any, _Graph] = {}
        self.nodes: dict[Any, tuple[Node | None, Any]] = {}
        self.scratch = Scratch()

    def __call__(self, name: Hashable, function: Function, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """function(*inputs): its tensors, and whatever else it returned. name: equal for equal functions."""
        if inside():
            return self._inside(name, function, inputs)
        key = self.key(name, inputs)
        graph = self.graphs.get(key) or self._kept(name, function, inputs)
        if self.as_made:
            with torch.no_grad():
                return list(graph.run(*inputs)), graph.beside
        with self.scratch.lent(graph.kinds) as pieces:
            with torch.no_grad() if self.compiled else torch.inference_mode():
                outputs = graph.run(*inputs, *pieces)
            # Ordinary tensors again, not inference tensors; in their own memory, because the next graph writes into the pieces;
            # and in one layout, because they may come back as inputs, and a graph is specific to strides.
            return [x.clone(memory_format=torch.contiguous_format) for x in outputs], graph.beside

    def look(self) -> None:
        """Sees what state the code is in; raises Unsteady where no graph can be kept for it."""
        if self.guards is not None:
            self.state = self.guards.state()

    def key(self, name: Hashable, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Equal keys mean the same graph."""
        shapes = tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
        device = inputs[0].device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return name, shapes, self.state, torch.get_default_dtype(), half

    @property
    def draws(self) -> bool:
        """Whether any graph draws from torch's generator."""
        return any(graph.draws for graph in self.graphs.values())

    def _kept(self, name: Hashable, function: Function, inputs: Sequence[Tensor]) -> _Graph:
        """A new graph; made again where the code has changed what it reads, as by what it makes when it is first called."""
        changed = ""
        for _ in range(2):
            module, beside = self._traced(function, inputs)
            changed = "" if self.guards is None else self.guards.changed(self.state)
            if not changed:
                graph = self.graphs[self.key(name, inputs)] = self._built(module, beside, inputs)
                return graph
            self.nodes.clear()  # which would not change it
            self.look()
        raise Unsteady(f"{changed} changes while it runs, and a graph would not change it")

    def _traced(self, function: Function, inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, Any]:
        flat = _Flat(function)
        self.scratch.give_back()  # tracing tries the graph once, in its own memory; idle pieces would add to that peak
        with torch.no_grad(), _nothing_drawn():
            return trace(flat, inputs), flat.beside

    def _built(self, module: fx.GraphModule, beside: Any, inputs: Sequence[Tensor]) -> _Graph:
        found = any(draws(node) for node in module.graph.nodes)
        nodes = nodes_of(module)
        compiled = self.compiled and not nodes  # else its nodes are
        kinds = [] if compiled else recycle(module)  # Inductor plans its buffers itself
        if not compiled:
            self._ready(nodes)
            called(module)
            direct(module)
        bare(module)
        run = _compile(module, inputs, contract=self.as_made) if compiled else module.forward
        return _Graph(run, kinds, beside, found)

    def _inside(self, name: Hashable, function: Function, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """In the trace of another graph: a node of it; or the function's own operators, where they can't be one."""
        inputs = [x.contiguous() for x in inputs]  # so that the first step can be the same node as the others
        key = self.key(name, inputs)
        if key not in self.nodes:
            flat = _Flat(function)
            try:
                self.nodes[key] = Node(flat, inputs, self.compiled), flat.beside
            except Exception:  # torch can raise anything; an error of the function itself is raised once more below
                self.nodes[key] = None, None
        node, beside = self.nodes[key]
        if node is None:
            tensors, beside = function(*inputs)
            return list(tensors), beside
        return node(inputs), beside

    def _ready(self, nodes: Sequence[Node]) -> None:
        """Compiles nodes, or has them call operators directly and use scratch memory."""
        for node in nodes:
            if node.ready:
                continue
            if self.compiled:
                node.run = _compile(node.module, node.inputs)
            else:
                kinds = recycle(node.module, results=False)
                direct(node.module)
                node.run = partial(self._lending, node.module.forward, kinds)
            bare(node.module)
            node.inputs.clear()
            node.ready = True

    def _lending(self, run: Callable[..., Any], kinds: Sequence[Kind], *inputs: Tensor) -> Any:
        with self.scratch.lent(kinds) as pieces:
            return run(*inputs, *pieces)


class _Flat:
    """A function in the form that tracing needs: it returns tensors alone, and keeps the rest in `beside`."""

    def __init__(self, function: Function) -> None:
        self.function, self.beside = function, None

    def __call__(self, *args: Any) -> list[Tensor]:
        outputs, self.beside = self.function(*args)
        return list(outputs)


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Unsteady where Python's or NumPy's generator is used inside: a graph would keep the first numbers for good."""
    before = _generators()
    yield
    for name, state in _generators().items():
        if before.get(name, state) != state:
            raise Unsteady(f"the model, the loss or the rule draws numbers from {name}, which a graph can't do again")


def _generators() -> dict[str, Any]:
    """The states of the generators that Python code shares."""
    found: dict[str, Any] = {"`random`": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        _, keys, *rest = numpy.random.get_state()
        found["`numpy.random`"] = (keys.tobytes(), *rest)
    return found


def _compile(module: fx.GraphModule, inputs: Sequence[Tensor], contract: bool = False) -> Callable[..., Any]:
    """The graph compiled by Inductor, which caches its results on disk; the traced graph itself where compiling fails."""
    # Called from Python, Inductor's kernels for processors hold the GIL while they compute, and threads take turns.
    # `cpp_wrapper` releases it; with it, kernels of accelerators can't be tuned (torch 2.11, Triton 3.6).
    options: dict[str, Any] = {"fallback_random": True, "cpp_wrapper": all(x.is_cpu for x in inputs)}
    if contract and isinstance(getattr(torch._inductor.config.cpp, _CONTRACT, None), str):
        options[f"cpp.{_CONTRACT}"] = "fast"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings(), silenced("torch._inductor.ir"):
            warnings.simplefilter("ignore")  # the compiler's warnings are not about the user's code
            # Without `torch.compile` around it, whose own guards take longer than a small graph: `Graphs.key` is the guard.
            # Shapes have an environment, though none varies: without one, Inductor looks for no graph in its cache.
            with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))):
                run: Callable[..., Any] = torch._inductor.compile(module, list(inputs), options=options)
            run(*inputs)
    except Exception as error:  # a compiler can raise anything
        said = str(error).partition("Set TORCH")[0]  # the rest is meant for torch's developers
        reason = " ".join(said.split()).partition(". ")[0][:200]
        warn(f"compiling is not to be had here ({reason}); the traced graph runs instead.")
        return module.forward
    return run
