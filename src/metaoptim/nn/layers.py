"""Names the layer at fault in a sentence: one that no inner loop can handle correctly, or one whose forward pass failed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

_CONVERT = "call metaoptim.nn.convert(module), which swaps such layers for ours and keeps the weights"
_FROZEN = ', or use the stored statistics by normalisation="frozen" (in a recipe, that is a key of [algorithm])'
_BATCHS = ', or use those by normalisation="transductive" (in a recipe, that is a key of [algorithm])'
_EMBEDDING = {
    "max_norm": "by which a forward pass changes the weights that it is given",
    "sparse": "and sparse gradients have no second derivative",
    "scale_grad_by_freq": "so its gradient is not the derivative of the loss",
}


def refuse(module: nn.Module, policy: str, choice: bool = True) -> None:
    """Raises a ValueError that names the first layer that an inner loop can't handle correctly, and the fix.

    choice: whether another policy could be chosen.
    """
    for name, layer in module.named_modules():
        fault = _fault(layer, policy, choice)
        if fault:
            raise ValueError(f"{named(name, layer)} {fault}.")


def _fault(layer: nn.Module, policy: str, choice: bool) -> str:
    """What is wrong with a layer, and what to do about it; empty if nothing is."""
    if any(is_lazy(p) for p in layer.parameters(recurse=False)):
        return "has no weights before it has seen data; call the module once on an example"
    if isinstance(layer, BATCH_NORMS) and layer.track_running_stats and policy == "frozen":
        return ""  # stored statistics are what that policy means
    if isinstance(layer, (*BATCH_NORMS, *_INSTANCE_NORMS)) and layer.track_running_stats:
        convert = _CONVERT + _FROZEN * choice
        fix = convert if isinstance(layer, BATCH_NORMS) else "build it with track_running_stats=False"
        return f"keeps running statistics, which an inner loop would mix across tasks and no transform can update; {fix}"
    if isinstance(layer, BATCH_NORMS) and policy != "transductive":
        return f"knows only its batch's statistics, which the policy `{policy}` forbids; {_CONVERT}{_BATCHS}"
    for option in ("max_norm", "sparse", "scale_grad_by_freq"):
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and getattr(layer, option):
            return f"has {option}={getattr(layer, option)!r}, {_EMBEDDING[option]}; build it without {option}"
    spectral = type(layer).__name__ == "_SpectralNorm" or any(
        isinstance(h, SpectralNorm) for h in layer._forward_pre_hooks.values()
    )
    if spectral and layer.training:
        return "becomes another function whenever it runs in training mode, by a step of power iteration; call its eval()"
    if isinstance(layer, torch.jit.ScriptModule):
        return "is scripted, and takes its weights from nowhere else; use the module that it was made from"
    if isinstance(getattr(layer, "_orig_mod", None), nn.Module):
        return "is compiled, which torch can't differentiate twice; use its `_orig_mod`, which the engine can compile"
    return ""


def held(module: nn.Module) -> dict[str, Tensor]:
    """Masks, by name, of weights that torch keeps constant whatever the loss says: the padding rows of embeddings."""
    masks = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            mask = torch.zeros_like(layer.weight, dtype=torch.bool)
            mask[layer.padding_idx] = True
            masks[f"{name}.weight".lstrip(".")] = mask
    return masks


def blame(error: BaseException, module: nn.Module) -> str | None:
    """The layer, by name and type, whose forward pass raised an error; None for any other error."""
    names = {id(layer): name for name, layer in reversed(list(module.named_modules()))}
    found, frames = None, error.__traceback__
    while frames is not None:
        code, local = frames.tb_frame.f_code, frames.tb_frame.f_locals
        owner = local.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = named(names[id(owner)], owner)
        frames = frames.tb_next
    return found


def named(name: str, layer: nn.Module) -> str:
    """A layer as a sentence names it: its dotted name and its type."""
    kind = type(layer).__name__
    return f"layer `{name}` ({kind})" if name else f"the module itself ({kind})"
