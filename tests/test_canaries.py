"""One test for each private or unstable name of torch that the package relies on: where one fails, torch has changed it."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import metaoptim

SOURCE = Path(metaoptim.__file__).parent
ALLOWED = ("engine/graphs/", "nn/", "training/module.py", "runs/adapted.py")
"""engine/graphs has what is torch's alone; the others read the dictionaries of an nn.Module, and `torch._weight_norm`."""
MODULES = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_version"}
aten = torch.ops.aten


def traced(function: Any, *inputs: Tensor, **how: Any) -> fx.GraphModule:
    return make_fx(function, **how)(*inputs)


def names(graph: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def test_make_fx_traces_by_shapes_with_tensors_that_are_no_inputs() -> None:
    held = torch.ones(2)
    graph = traced(lambda x: x + held, torch.ones(2), tracing_mode="fake", _allow_non_fake_inputs=True)
    assert graph(torch.ones(2)).tolist() == [2, 2]


def test_make_fx_takes_decompositions_that_may_decline() -> None:
    table = {aten.mul.Tensor: lambda x, y: NotImplemented if x.ndim == 2 else x + y}
    assert names(traced(lambda x: x * x, torch.ones(3), decomposition_table=table)) == [aten.add.Tensor]
    assert names(traced(lambda x: x * x, torch.ones(3, 1), decomposition_table=table)) == [aten.mul.Tensor]


def test_make_fx_records_values() -> None:
    graph = traced(lambda x: x + 1, torch.ones(2), tracing_mode="fake")
    assert all(node.meta["val"].shape == (2,) for node in graph.graph.nodes if node.op == "call_function")


def test_operators_tell_what_they_write_and_alias() -> None:
    assert isinstance(aten.add.Tensor, torch._ops.OpOverload)
    assert aten.add_.Tensor._schema.is_mutable and not aten.add.Tensor._schema.is_mutable
    assert aten.view.default._schema.returns[0].alias_info and not aten.add.Tensor._schema.returns[0].alias_info
    assert any(x.is_out for x in aten.add.out._schema.arguments)


def test_operators_tell_that_they_draw() -> None:
    assert torch.Tag.nondeterministic_seeded in aten.rand_like.default.tags
    assert torch.Tag.nondeterministic_seeded not in aten.add.Tensor.tags


@pytest.mark.parametrize(
    "name", ["_unsafe_view", "_to_copy", "_efficientzerotensor", "_new_zeros_with_same_feature_meta", "lift_fresh",
             "lift_fresh_copy", "alias", "convolution", "convolution_backward"]
)  # fmt: skip
def test_aten_has_the_operator(name: str) -> None:
    assert isinstance(getattr(aten, name).default, torch._ops.OpOverload)


def test_aten_has_the_variants_that_write_into_a_buffer() -> None:
    for op in (aten.threshold_backward.grad_input, aten.pow.Tensor_Scalar_out, aten.where.self_out, aten.clamp_min.out,
               aten.max_pool2d_with_indices_backward.grad_input, aten.bmm.out, aten.gather.out):  # fmt: skip
        assert isinstance(op, torch._ops.OpOverload)


def test_inductor_has_the_options() -> None:
    from torch._inductor import config

    assert hasattr(config, "fallback_random") and hasattr(config, "cpp_wrapper")
    assert {"gm", "example_inputs", "options"} <= inspect.signature(torch._inductor.compile).parameters.keys()


def test_tensors_count_what_is_written_into_them() -> None:
    x = torch.ones(2)
    before = x._version
    x.add_(1)
    assert x._version == before + 1


def test_modules_keep_their_parts_in_dictionaries_that_forward_reads() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    other = torch.zeros(2, 2)
    net[0]._parameters["weight"] = other
    net._modules["1"] = nn.Identity()
    assert net[0].weight is other and net(torch.ones(1, 2)).tolist() == [net[0].bias.tolist()]
    assert {"running_mean", "running_var", "num_batches_tracked"} <= nn.BatchNorm1d(2)._buffers.keys()
    assert not net._forward_hooks and not net._forward_pre_hooks


def test_modes_see_the_functions_that_are_written_out() -> None:
    seen = []

    class Sees(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    x = torch.ones(1, 2)
    with Sees():
        layer(x)
        F.mse_loss(x, x)
        F.one_hot(torch.zeros(1, dtype=torch.long), 2)
        nn.BatchNorm1d(2).eval()(x)
    assert {torch._weight_norm, F.mse_loss, F.one_hot, F.batch_norm} <= set(seen)


def test_private_names_stand_in_few_places() -> None:
    found = []
    for file in SOURCE.rglob("*.py"):
        where = file.relative_to(SOURCE).as_posix()
        if where.startswith(ALLOWED):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            path = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            private = path.startswith("torch.") and any(part.startswith("_") and part[1:2] != "_" for part in path.split("."))
            imported = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch") and (
                "_" in [part[0] for part in (node.module or "").split(".")] or any(a.name.startswith("_") for a in node.names)
            )  # fmt: skip
            if private or imported or (isinstance(node, ast.Attribute) and node.attr in MODULES):
                found.append(f"{where}: {path or ast.unparse(node)}")
    assert not found
