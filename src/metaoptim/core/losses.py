"""Losses as `loss(output, target) -> scalar`, always a MEAN over the examples.

Published step sizes may belong to another scale: the code of the MAML paper divides the summed cross-entropy by the shots
and not by N·S, so its inner step size 0.4 on 5-way Omniglot is 0.4 · 5 = 2.0 on a mean.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from metaoptim.core.gradients import by_autograd

Loss = Callable[[Tensor, Tensor], Tensor]

FEW = 16  # classes


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats. Shapes: output (…, N) logits, target (…) class numbers 0 … N−1."""
    _check_output("cross_entropy", output)
    if target.is_floating_point():
        raise ValueError(
            f"cross_entropy: the targets are {target.dtype}; they must be class numbers, such as int64 (of a table: "
            "kind='classification'; for regression: mse)."
        )
    if by_autograd() and output.ndim == 2:
        return F.cross_entropy(output, target)
    # Over few classes torch's kernel for the last axis takes three times as long as that for the first; over many it is faster.
    axis = 0 if output.shape[-1] < FEW else -1
    return -F.log_softmax(output.movedim(-1, axis), axis).gather(axis, target.unsqueeze(axis)).mean()


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements. Shapes: output and target alike."""
    _check_output("mse", output)
    # Written out: a shape that broadcasts would be a silent error, and forward mode through F.mse_loss may raise.
    if output.shape != target.shape:
        raise ValueError(
            f"mse: the model returned shape {tuple(output.shape)} for targets of shape {tuple(target.shape)}; "
            "they must be equal: reshape the targets or the model's last layer."
        )
    return (output - target).square().mean()


def _check_output(loss: str, output: object) -> None:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{loss}: the model returned {type(output).__name__}; it must return one tensor, or the loss pick it, as in "
            f"lambda output, target: {loss}(output[0], target)."
        )


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse}
