"""Has a traced graph call torch's operators by the functions of Python's interface, which get there in half the time.

An operator that is named with its overload reads its arguments by a schema; `torch.mul` has code of its own for that. Small
operators take a microsecond or two, of which this is one.
"""

from __future__ import annotations

import torch
from torch import fx

_aten = torch.ops.aten
_METHODS = {_aten.view.default: "view", _aten.expand.default: "expand"}
_FUNCTIONS = {  # those that take the same arguments in the same order
    "add", "sub", "rsub", "mul", "div", "neg", "exp", "log", "sqrt", "rsqrt", "pow", "tanh", "sigmoid", "relu", "clamp",
    "where", "lerp", "mm", "bmm", "mean", "sum", "amax", "gather", "scatter_add", "cat", "stack", "permute", "transpose",
    "unsqueeze", "squeeze", "unbind", "bitwise_and", "bitwise_xor",
}  # fmt: skip


def direct(module: fx.GraphModule) -> None:
    """The same operators, called directly."""
    for node in module.graph.nodes:
        if node.target in _METHODS:
            node.op, node.target = "call_method", _METHODS[node.target]
        elif isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
            name = node.target._schema.name.partition("::")[2]
            node.target = getattr(torch, name) if name in _FUNCTIONS else node.target
    module.recompile()
